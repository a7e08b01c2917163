"""Tables and pictures of all runs below a folder: `python -m experiments.sweep DIR`, for one sweep or several."""

import evolvenet  # isort: skip  # noqa: F401  (before torchvision, which it patches)

import argparse
from pathlib import Path

from experiments.training.sweep import tabulate


def main() -> None:
    """Write `sweep.md`, `sweep.png` and `front.png` into the folder, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m experiments.sweep", description=__doc__)
    parser.add_argument("folder", type=Path, help="of a sweep, or of several: all runs below it are taken")
    print(tabulate(parser.parse_args().folder))


if __name__ == "__main__":
    main()

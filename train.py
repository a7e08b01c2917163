"""Train one experiment: `python train.py`, `python train.py experiment=mnist_resnet data.root=DIR evolve=none`."""

import evolvenet  # isort: skip  # noqa: F401  (first: it patches PyPI's torchvision, which Lightning imports)

import sys
from pathlib import Path
from typing import Any

import hydra
import lightning
import torch
from omegaconf import DictConfig

from experiments.training.jobs import plain_words, unknown_name
from experiments.training.run import run_config


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(config: DictConfig) -> Any:
    """Set threads and seed, then build and run what the configuration names; returns what a sweeper optimizes."""
    if config.threads:
        torch.set_num_threads(config.threads)
    lightning.seed_everything(config.seed, verbose=False)
    return run_config(config)


if __name__ == "__main__":
    sys.argv = plain_words(sys.argv)
    if (problem := unknown_name(sys.argv[1:], Path(__file__).parent / "conf")) is not None:
        sys.exit(f"error: {problem}")
    main()

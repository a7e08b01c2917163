"""Draw all figures into `docs/figures`: `python -m experiments.figures`."""

from __future__ import annotations

from experiments.figures import peers, pipeline, spectra, two_starts
from experiments.figures.style import save

FIGURES = {"two-starts": two_starts.draw, "event": pipeline.draw, "spectra": spectra.draw, "peers": peers.draw}

if __name__ == "__main__":
    for name, draw in FIGURES.items():
        print(*save(name, draw), sep="\n")

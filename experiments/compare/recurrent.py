"""Layers of an LSTM that keep units of their own, beside the same units in all: `python -m experiments.compare.recurrent`.

Three layers in one `torch.nn.LSTM` are trained on sequences made here and cut once. Both kinds of cut are the package's own:
without parts a graph ties the layers, as it did before it had them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

import evolvenet
from evolvenet.graph.serialization import from_state_dict, to_state_dict
from experiments.compare.copies import copied
from experiments.pages import cell, commit, machine_line, markdown, write_whole

STEPS, CHANNELS, HIDDEN, TRAINING = 32, 4, 64, 1500
CUTS = (30, 50, 70)
"""Percent of the parameters that go."""
INPUTS = 512
"""Sequences without targets that a cut is fitted on."""


class Filter(nn.Module):
    """Three layers, and a dense layer on every step."""

    def __init__(self) -> None:
        super().__init__()
        self.steps, self.last = nn.LSTM(CHANNELS, HIDDEN, 3, batch_first=True), nn.Linear(HIDDEN, 3)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, steps, channels]` → `[batch, steps, 3]`."""
        return self.last(self.steps(x)[0])


def sequences(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random numbers, and of each step a product of two delayed channels, a slow mean, and a largest number so far."""
    x = torch.randn(count, STEPS, CHANNELS, generator=generator)
    product = functional.pad(x[:, :-3, 0] * x[:, 2:-1, 1], (3, 0))
    mean = torch.zeros(count, STEPS)
    for step in range(1, STEPS):
        mean[:, step] = 0.8 * mean[:, step - 1] + x[:, step, 2] * x[:, step, 3].sign()
    return x, torch.stack([product, mean, x[:, :, 3].cummax(1).values], 2)


def trained(seed: int) -> Filter:
    """A network after `TRAINING` steps of AdamW on fresh sequences."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Filter()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=TRAINING)
    for _ in range(TRAINING):
        x, y = sequences(64, generator)
        optimizer.zero_grad()
        functional.mse_loss(model(x), y).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def without_parts(graph: evolvenet.WidthGraph) -> evolvenet.WidthGraph:
    """The graph in which unit i of one layer is unit i of all."""
    data = to_state_dict(graph)
    for axes in data["layouts"].values():
        for _, segments in axes:
            segments[:] = [segment[:3] for segment in segments]
    return from_state_dict(data)


def explained(model: nn.Module) -> float:
    """Share of the targets' variance that a network explains on sequences that nothing else has seen."""
    x, y = sequences(2048, torch.Generator().manual_seed(1000))
    with torch.no_grad():
        return 1 - float(functional.mse_loss(model(x), y) / y.var())


def measured(seed: int) -> dict[str, list[float]]:
    """{row: the uncut network's score, then that after each cut}."""
    model = trained(seed)
    x = sequences(INPUTS, torch.Generator().manual_seed(2000 + seed))[0]
    graph = evolvenet.trace(model, x[:2])
    found: dict[str, list[float]] = {}
    for units, own in (("the same units in all layers", without_parts(graph)), ("units of each layer", graph)):
        for fit, batches in (("no data", None), ("fitted", x.split(64))):
            scores = [explained(model)]
            for percent in CUTS:
                cut = copied(model)
                sizes = {"steps": _size(graph, percent)}
                evolvenet.prune(cut, own, sizes, batches)
                scores.append(explained(cut))
            found[f"{units}, {fit}"] = scores
    return found


def _size(graph: evolvenet.WidthGraph, percent: int) -> int:
    """The largest size that leaves at most the share of the parameters."""
    most = (1 - percent / 100) * graph.parameters
    return max(size for size in range(1, HIDDEN + 1) if graph.proposed_parameters({"steps": size}) <= most)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m experiments.compare.recurrent", description=__doc__)
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--page", type=Path, default=Path(__file__).with_suffix(".md"), help="page to write")
    options = parser.parse_args(arguments)
    runs = [measured(seed) for seed in options.seeds]
    lines = [
        "# Units of each recurrent layer",
        "",
        f"Written by `python -m experiments.compare.recurrent` {machine_line()} at git {commit()}.",
        "",
        f"Three layers of {HIDDEN} in one `torch.nn.LSTM`, trained for {TRAINING} steps on sequences made here, cut once "
        f"to a share of their parameters: from the weights alone, or chosen and fitted on {INPUTS} sequences without "
        "targets. Share of the targets' variance that is explained, %, on 2,048 sequences that nothing else has seen; seeds "
        f"{', '.join(map(str, options.seeds))}, mean ± standard deviation.",
        "",
        *markdown(
            ["", "uncut", *(f"−{percent} %" for percent in CUTS)],
            [[row, *(cell([run[row][k] for run in runs]) for k in range(len(CUTS) + 1))] for row in runs[0]],
        ),
    ]
    write_whole(options.page, "\n".join(lines) + "\n")
    print("\n".join(lines[-5:]))


if __name__ == "__main__":
    main()

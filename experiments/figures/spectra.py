"""Spectra of a network before and after a cut: a dense network on scikit-learn's digits, `python -m experiments.figures.spectra`.

The network is trained, its spectra are taken from 512 images, `allocate` and `prune` cut it to a tenth of its parameters, and the
spectra are taken again. `spectra.json` beside this file holds what the figure needs.
"""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import evolvenet

# isort: split
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn

from experiments.figures.style import Palette, plain
from experiments.pages import commit, machine_line

DATA = Path(__file__).with_suffix(".json")
TEST = 360


def compute(epochs: int = 30) -> dict[str, Any]:
    """Train, measure, cut, measure again."""
    torch.manual_seed(0)
    pixels, targets = load_digits(return_X_y=True)
    images, labels = torch.as_tensor(pixels, dtype=torch.float32) / 16, torch.as_tensor(targets)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(epochs):
        for batch in torch.randperm(len(images) - TEST).split(64):
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    batches = list(images[:512].split(128))
    graph = evolvenet.trace(model, images[:1])
    before = _state(model, graph, batches, images, labels)
    sizes = evolvenet.allocate(model, graph, parameters=graph.parameters // 10, batches=batches)
    graph = evolvenet.prune(model, graph, sizes, batches=batches)
    return {"before": before, "after": _state(model, graph, batches, images, labels)}


def _state(
    model: nn.Module, graph: evolvenet.WidthGraph, batches: list[Tensor], images: Tensor, labels: Tensor
) -> dict[str, Any]:
    with torch.no_grad():
        right = (model(images[-TEST:]).argmax(1) == labels[-TEST:]).float().mean()
    found = evolvenet.spectra(model, graph, batches)
    return {
        "parameters": graph.parameters,
        "test_acc": round(float(right), 4),
        "spectra": {name: [float(f"{value:.3g}") for value in values.tolist()] for name, values in found.items()},
    }


def draw(palette: Palette) -> Figure:
    """Energy of each direction, before and after, of both hidden widths."""
    data = json.loads(DATA.read_text("utf-8"))
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for panel, name in zip(figure.subplots(1, 2, sharey=True), data["before"]["spectra"], strict=True):
        plain(panel, palette)
        for when, colour in (("before", palette.first), ("after", palette.second)):
            state = data[when]
            energy = [value**2 for value in state["spectra"][name]]
            panel.plot(range(1, len(energy) + 1), energy, color=colour, lw=2.2)
            panel.annotate(
                f"{when}: {len(energy)} units",
                (len(energy) * (0.5 if when == "before" else 0.9), energy[len(energy) // 2 if when == "before" else -3]),
                (6, 8), textcoords="offset points", color=colour,
            )  # fmt: skip
        panel.set_yscale("log")
        panel.set_ylim(1e-8, 1)
        panel.set_xlabel("direction")
        panel.set_title(f"width {name!r}", fontsize=11)
    before, after = data["before"], data["after"]
    figure.axes[0].set_ylabel("share of the energy")
    figure.suptitle(
        f"{before['parameters']:,} parameters, {before['test_acc']:.1%} right  →  {after['parameters']:,}, "
        f"{after['test_acc']:.1%} right, nothing trained since".replace("%", " %"),
        color=palette.text, fontsize=11,
    )  # fmt: skip
    return figure


if __name__ == "__main__":
    about = {"command": "python -m experiments.figures.spectra", "commit": commit(), "date": date.today().isoformat()}
    DATA.write_text(
        json.dumps({**about, "machine": machine_line(), **compute()}, separators=(",", ":")) + "\n", "utf-8"
    )

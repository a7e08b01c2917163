"""A dense network that grows while it trains, by us and by gromo: `python -m experiments.compare.schedule --data DIR`.

Every run has the same epochs, batches and learning rates, and its hidden layers get the same number of units at the same steps;
only how new units start differs, and whether the optimizer's state survives. Measured: test accuracy of MNIST, once at the end
of each run, mean ± standard deviation of a sample over the seeds.
"""

from __future__ import annotations

import evolvenet  # isort: skip  # before torchvision, which it patches

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import nn
from torch.nn import functional
from torch.optim import AdamW

from experiments.compare.gromo import Pairs, gromo_of, gromo_widen, installed, version
from experiments.compare.growth import BATCH, Images
from experiments.data.images import MnistData, Split
from experiments.pages import add_data, add_seeds, cell, machine_line, markdown, span, write_whole

CALIBRATION = 8, 512
"""Number of batches, and of training images in each, for the methods with data."""

METHODS = "orthogonal", "paired", "gradmax", "tiny"
"""Our methods in the table."""

Change = Callable[[nn.Module, AdamW, Pairs, int], tuple[nn.Module, AdamW]]
"""(network, optimizer, calibration batches, seed) → both after one growth."""


@dataclass(frozen=True)
class Schedule:
    """What all runs have in common.

    Args:
        start: units of each of the two hidden layers.
        added: to each at a growth.
        growths: one at the end of each of the first epochs.
        epochs: of the whole run.
        rate: of AdamW at the beginning; it falls linearly to zero.
    """

    start: int = 8
    added: int = 8
    growths: int = 4
    epochs: int = 10
    rate: float = 4e-3

    @property
    def end(self) -> int:
        """Units of each hidden layer after the last growth."""
        return self.start + self.growths * self.added

    def dense(self, hidden: int) -> nn.Sequential:
        """784-hidden-hidden-10, fresh weights from torch's global random state."""
        layers = nn.Linear(784, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 10)
        return nn.Sequential(nn.Flatten(), *layers)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        title: in the table.
        change: one growth, None for a network that never grows.
        whole: whether it begins with the final widths.
    """

    title: str
    change: Change | None
    whole: bool = False


@dataclass(frozen=True)
class Outcome:
    """One run: test accuracy 0 … 1, parameters at the end, seconds of all its growths."""

    accuracy: float
    parameters: int
    seconds: float


def ours(method: str, added: int, fresh: bool = False, update: bool = False) -> Change:
    """Growth by EvolveNet, with the optimizer's state carried, or with a fresh optimizer as gromo needs it."""

    def change(model: nn.Module, optimizer: AdamW, pairs: Pairs, seed: int) -> tuple[nn.Module, AdamW]:
        graph, needs_loss = evolvenet.trace(model, pairs[0][0][:2]), update or method in ("gradmax", "tiny")
        evolvenet.grow(
            model,
            graph,
            {name: size + added for name, size in graph.sizes.items()},
            method=method,
            optimizers=optimizer,
            generator=torch.Generator().manual_seed(seed),
            batches=pairs if needs_loss else None,
            loss=functional.cross_entropy if needs_loss else None,
            update=update,
        )
        return model, fresh_optimizer(model, optimizer) if fresh else optimizer

    return change


def fresh_optimizer(model: nn.Module, optimizer: AdamW) -> AdamW:
    """AdamW without state, at the same learning rate."""
    return AdamW(model.parameters(), lr=optimizer.param_groups[0]["lr"])


def gromo(added: int) -> Change:
    """Growth by gromo's TINY; its layers are new parameters, so AdamW starts without state."""

    def change(model: nn.Module, optimizer: AdamW, pairs: Pairs, seed: int) -> tuple[nn.Module, AdamW]:
        grown = model if hasattr(model, "set_growing_layers") else gromo_of(model, pairs[0][0])
        grown = gromo_widen(grown, pairs, added)
        return grown, fresh_optimizer(grown, optimizer)

    return change


def rows(schedule: Schedule) -> list[Row]:
    """The lines of the table; gromo's only where it is installed."""
    found = [
        Row("never grown", None),
        Row("final widths from the start", None, whole=True),
        *(Row(f"EvolveNet, {method}", ours(method, schedule.added)) for method in METHODS),
        Row("EvolveNet, paired, fresh AdamW", ours("paired", schedule.added, fresh=True)),
        Row("EvolveNet, paired, update", ours("paired", schedule.added, update=True)),
        Row("EvolveNet, tiny, update", ours("tiny", schedule.added, update=True)),
        Row("EvolveNet, tiny, update, fresh AdamW", ours("tiny", schedule.added, fresh=True, update=True)),
    ]
    return [*found, Row("gromo's TINY", gromo(schedule.added))] if installed() else found


def train_row(row: Row, schedule: Schedule, data: Images, test: Pairs, seed: int) -> Outcome:
    """One run from fresh weights to its test accuracy."""
    torch.manual_seed(seed)
    model: nn.Module = schedule.dense(schedule.end if row.whole else schedule.start)
    optimizer, seconds = AdamW(model.parameters(), lr=schedule.rate), 0.0
    epoch = len(data.labels) // BATCH
    for step, (images, labels) in enumerate(data.batches(seed, schedule.epochs * epoch, BATCH)):
        if row.change and step % epoch == 0 and 0 < step // epoch <= schedule.growths:
            began = time.perf_counter()
            pairs = data.batches(1000 * seed + step, *CALIBRATION)
            model, optimizer = row.change(model, optimizer, pairs, seed + step)
            seconds += time.perf_counter() - began
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate * (1 - step / (schedule.epochs * epoch))
        optimizer.zero_grad()
        functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    with torch.no_grad():
        right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in test)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Outcome(right / sum(len(labels) for _, labels in test), parameters, seconds)


def table(found: Mapping[str, Sequence[Outcome]]) -> list[str]:
    """Markdown, one line a row: mean ± standard deviation over the seeds."""
    rows = []
    for title, outcomes in found.items():
        accuracies = [outcome.accuracy for outcome in outcomes]
        sizes = span([f"{size:,}" for size in sorted(outcome.parameters for outcome in outcomes)])
        each = " ".join(f"{100 * accuracy:.2f}" for accuracy in accuracies)
        took = median(outcome.seconds for outcome in outcomes)
        rows.append([title, sizes, cell(accuracies), each, f"{took:.1f}" if took else ""])
    return markdown(
        ["dense network", "parameters", "test accuracy, %", "of each seed", "growths, s"], rows, text=(0, 3)
    )


ABOUT = """\
Written by `python -m experiments.compare.schedule --seeds {seeds}` {machine}; gromo {gromo}.

784-{start}-{start}-10 with ReLU on MNIST without augmentation, {epochs} epochs, batches of {batch}, AdamW whose rate falls from
{rate:g} to zero. After each of the first {growths} epochs both hidden layers get {added} units more, {end} in the end. The test
split is looked at once, after the last epoch; mean ± standard deviation (of a sample) over n = {seeds} seeds. gromo's layers are
new parameters, so its AdamW starts without state after each growth; it may add fewer units than the schedule has."""


def page(found: Mapping[str, Sequence[Outcome]], schedule: Schedule, seeds: int) -> str:
    """The whole page."""
    values = {name: getattr(schedule, name) for name in ("start", "added", "growths", "epochs", "rate", "end")}
    about = ABOUT.format(seeds=seeds, machine=machine_line(), gromo=version(), batch=BATCH, **values)
    return "\n".join(["# Growing while training: a dense network", "", about, "", *table(found)]) + "\n"


def batches(split: Split, like: Images) -> Pairs:
    """Another split's images, normalised like the training images, in batches of 1,000."""
    return list(zip(like.normal(split.images).split(1000), split.labels.split(1000), strict=True))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all and write the page."""
    parser = argparse.ArgumentParser(prog="python -m experiments.compare.schedule", description=__doc__)
    add_data(parser)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"), help="page to write")
    add_seeds(parser, default=5)
    options = parser.parse_args(arguments)
    schedule = Schedule()
    train, test = MnistData(root=options.data).read()
    data = Images(train, lambda images: images)
    held, found = batches(test, data), {}
    for row in rows(schedule):
        found[row.title] = [train_row(row, schedule, data, held, seed) for seed in range(options.seeds)]
        print(table(found)[-1], flush=True)
    write_whole(options.out, page(found, schedule, options.seeds))
    print(f"page: {options.out}")


if __name__ == "__main__":
    main()

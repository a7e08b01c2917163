"""How new units start, compared: `python -m experiments.compare.growth --data DIR --out FILE.md`, or `make compare`.

A network is trained, widened once by each method from there, and trained on, on the same batches. On a dense network
gromo's TINY is compared too; gromo has no layers for the ResNet with BatchNorm.
"""

from __future__ import annotations

import evolvenet  # isort: skip  # before torchvision, which it patches

import argparse
import copy
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import AdamW

from evolvenet.growth.initializers import METHODS
from experiments.compare.gromo import Pairs, gromo_tiny, installed, version
from experiments.data.images import MnistData, Split
from experiments.models.resnet import ResNet
from experiments.pages import add_data, add_seeds, commit, machine_line, markdown, write_whole

BATCH = 128
LATER = (100, 1000)
"""Steps after the growth at which the loss is measured again."""

MEASURED = 10_000
"""Training images on which the loss is measured."""


@dataclass(frozen=True)
class Subject:
    """A network and how it is trained and widened.

    Args:
        name: in the table.
        about: what it is, in words.
        build: a fresh network, its weights from torch's global random state.
        calibration: number of batches, and of training images in each, for the methods with data.
        prepare: images `[N, 1, 28, 28]` → the network's input.
        rate: of AdamW.
        grown: new size of a width of that many units.
    """

    name: str
    about: str
    build: Callable[[], nn.Module]
    calibration: tuple[int, int]
    prepare: Callable[[Tensor], Tensor] = lambda images: images
    rate: float = 2e-3
    grown: Callable[[int], int] = lambda size: 2 * size


SUBJECTS = (
    Subject(
        "dense",
        "784-8-8-10 with ReLU, both hidden widths doubled: as many new units as TINY can find for 10 outputs",
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 10)),
        calibration=(64, 512),
    ),
    Subject(
        "ResNet",
        "`experiments.models.resnet.ResNet` with BatchNorm and ReLU, widths 4 and 8, one block each, hidden 16, on images "
        "averaged to 14 × 14, every width doubled",
        lambda: ResNet(1, widths=(4, 8), blocks=(1, 1), strides=(1, 2), stem_stride=2, hidden=16),
        calibration=(8, 256),
        prepare=lambda images: functional.avg_pool2d(images, 2),
    ),
)


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Args:
        title: in the table.
        method: name of the method, None for the control.
        data: whether it is given the calibration batches.
        keeps: whether it keeps the function, so that the loss right after equals the loss right before.
        fresh: whether AdamW starts without state, as it must for gromo, whose parameters are new.
        update: whether the weights around the new units move too.
    """

    title: str
    method: str | None
    data: bool = False
    keeps: bool = True
    fresh: bool = False
    update: bool = False


GROMO = "gromo"
ROWS = (
    Row("no growth", None),
    Row("no growth, fresh AdamW", None, fresh=True),
    Row("orthogonal", "orthogonal"),
    Row("orthogonal, with data", "orthogonal", data=True),
    Row("paired", "paired"),
    Row("gradmax", "gradmax", data=True),
    Row("tiny", "tiny", data=True),
    Row("random (changes the function)", "random", keeps=False),
    Row("paired, update (changes the function)", "paired", data=True, keeps=False, update=True),
    Row("tiny, update (changes the function)", "tiny", data=True, keeps=False, update=True),
    Row("tiny, update, fresh AdamW (changes the function)", "tiny", data=True, keeps=False, update=True, fresh=True),
    Row("gromo's TINY (changes the function)", GROMO, data=True, keeps=False, fresh=True),
)
assert {row.method for row in ROWS} == {None, GROMO, *METHODS}


@dataclass(frozen=True)
class Outcome:
    """The result of one method on one network.

    Args:
        losses: right before the growth, right after it, and after each of `LATER` steps.
        seconds: duration of the growth.
        parameters: after the growth.
    """

    losses: tuple[float, ...]
    seconds: float
    parameters: int


class Images:
    """MNIST's training images in memory, and batches drawn from them."""

    def __init__(self, train: Split, prepare: Callable[[Tensor], Tensor]) -> None:
        pixels = prepare(train.images.float() / 255)
        self.prepare, self.mean, self.deviation = prepare, pixels.mean(), pixels.std()
        self.images, self.labels = self.normal(train.images), train.labels

    def normal(self, images: Tensor) -> Tensor:
        """Images uint8 `[N, 1, 28, 28]` → the network's input, normalised with the mean and deviation of the training images."""
        return (self.prepare(images.float() / 255) - self.mean) / self.deviation

    def batches(self, seed: int, count: int, size: int) -> Pairs:
        """`count` batches of (images, labels), epoch after epoch without repetition; the same ones for the same seed."""
        generator, total = torch.Generator().manual_seed(seed), len(self.labels)
        passes = -(-count * size // total)
        order = torch.cat([torch.randperm(total, generator=generator) for _ in range(passes)])
        return [(self.images[part], self.labels[part]) for part in order[: count * size].split(size)]

    def loss(self, model: nn.Module) -> float:
        """Mean cross-entropy on the first training images, in eval mode."""
        flags = model.training
        model.eval()
        with torch.no_grad():
            parts = zip(self.images[:MEASURED].split(1000), self.labels[:MEASURED].split(1000), strict=True)
            losses = [functional.cross_entropy(model(x), y, reduction="sum") for x, y in parts]
        model.train(flags)
        return float(torch.stack(losses).sum()) / min(MEASURED, len(self.labels))


def train(model: nn.Module, optimizer: AdamW, pairs: Pairs) -> None:
    """One step on each batch."""
    model.train()
    for images, labels in pairs:
        optimizer.zero_grad()
        functional.cross_entropy(model(images), labels).backward()
        optimizer.step()


@dataclass(frozen=True)
class Trained:
    """A network before its growth.

    Args:
        model: the network.
        state: of its optimizer.
        graph: its widths.
        seed: of the network, the batches and the new units.
    """

    model: nn.Module
    state: Mapping[str, Any]
    graph: evolvenet.WidthGraph
    seed: int

    @classmethod
    def of(cls, subject: Subject, data: Images, seed: int, epochs: float) -> Trained:
        """Train a fresh network."""
        torch.manual_seed(seed)
        model = subject.build()
        optimizer = AdamW(model.parameters(), lr=subject.rate)
        train(model, optimizer, data.batches(seed, round(epochs * len(data.labels)) // BATCH, BATCH))
        return cls(model, optimizer.state_dict(), evolvenet.trace(model, data.images[:2]), seed)


def grow_and_train(subject: Subject, row: Row, start: Trained, data: Images) -> Outcome:
    """Widen a copy of the trained network by one method and train on."""
    seed, model = start.seed, copy.deepcopy(start.model)
    torch.manual_seed(seed)
    optimizer = AdamW(model.parameters(), lr=subject.rate)
    if not row.fresh:
        optimizer.load_state_dict(copy.deepcopy(dict(start.state)))
    pairs = data.batches(1000 + seed, *subject.calibration)
    losses, began = [data.loss(model)], time.perf_counter()
    if row.method == GROMO:
        model = gromo_tiny(model, pairs)
        optimizer = AdamW(model.parameters(), lr=subject.rate)
    elif row.method is not None:
        evolvenet.grow(
            model,
            start.graph,
            {name: subject.grown(size) for name, size in start.graph.sizes.items()},
            method=row.method,
            optimizers=optimizer,
            generator=torch.Generator().manual_seed(seed),
            batches=pairs if row.data else None,
            loss=functional.cross_entropy if row.data else None,
            update=row.update,
        )
    seconds = time.perf_counter() - began
    losses.append(data.loss(model))
    following, done = data.batches(2000 + seed, LATER[-1], BATCH), 0
    for steps in LATER:
        train(model, optimizer, following[done:steps])
        losses.append(data.loss(model))
        done = steps
    return Outcome(tuple(losses), seconds, sum(parameter.numel() for parameter in model.parameters()))


def run(
    subject: Subject, data: Images, seeds: int, epochs: float, rows: Sequence[Row] = ROWS
) -> dict[str, list[Outcome]]:
    """Results of some methods on networks of one kind: {row's title: an outcome for each seed}; the first is the control."""
    rows = [row for row in rows if row.method != GROMO or (installed() and subject.name == "dense")]
    found: dict[str, list[Outcome]] = {row.title: [] for row in rows}
    for seed in range(seeds):
        start = Trained.of(subject, data, seed, epochs)
        for row in rows:
            found[row.title].append(grow_and_train(subject, row, start, data))
    return found


def table(found: Mapping[str, Sequence[Outcome]]) -> list[str]:
    """Markdown, one line a method: mean ± standard deviation over the seeds."""
    heads = ["right before", "right after", *(f"{steps:,} steps later" for steps in LATER)]
    heads.append(f"{LATER[-1]:,} steps later − no growth")
    control = [outcome.losses[-1] for outcome in found[ROWS[0].title]]
    rows = []
    for title, outcomes in found.items():
        columns = list(zip(*(outcome.losses for outcome in outcomes), strict=True))
        apart = [outcome.losses[-1] - loss for outcome, loss in zip(outcomes, control, strict=True)]
        cells = [f"{fmean(column):.4f} ± {stdev(column):.4f}" for column in columns]
        cells.append(f"{fmean(apart):+.4f} ± {stdev(apart):.4f}")
        seconds = "" if "no growth" in title else f"{median(outcome.seconds for outcome in outcomes):.2f}"
        rows.append([title, *cells, f"{outcomes[0].parameters:,}", seconds])
    return markdown(["new units", *heads, "parameters", "growth, s"], rows)


def kept(found: Mapping[str, Sequence[Outcome]]) -> str:
    """Whether the loss right after is that right before, in a sentence."""
    keeping = [outcome for row in ROWS if row.keeps for outcome in found.get(row.title, ())]
    apart = max(abs(outcome.losses[1] / outcome.losses[0] - 1) for outcome in keeping)
    return (
        f"Right after equals right before, for every method that keeps the function: "
        f"{'yes' if apart < 1e-5 else '**no**'}, largest relative difference {apart:.0e} in float32."
    )


ABOUT = """\
Written by `python -m experiments.compare.growth{options}` {machine}, package at {commit}.

Mean cross-entropy on the first {measured:,} training images of MNIST in eval mode, mean ± standard deviation (of a sample)
over n = {seeds} networks, each trained for {epochs:g} epoch(s) with AdamW, batches of {batch}, constant learning rate, then
widened once by each method and trained on with the same batches, learning rate and carried optimizer state.

- **with data**, gradmax, tiny, gromo: they use batches of training images, the same ones for all. Without data, orthogonal
  new units of a layer whose rows already span everything are random.
- **no growth**: the control, trained on; also with fresh optimizer state, as gromo's layers have new parameters.
- **− no growth**: the difference from the control of the same network; negative is better.
- **update**: `grow(…, update=True)`, the weights around the new units move along TINY's least-squares step, with a line search.
- **gromo's TINY**: gromo {gromo}, `GrowingMLP` with the same weights, layer by layer `compute_optimal_updates` and a line search
  of its scaling factor on those batches. It also updates the old weights, so it does not keep the function, and AdamW
  starts without state.
- **growth, s**: seconds for the growth, gromo's with its statistics and line search; median."""


def write(path: Path, results: Mapping[Subject, Mapping[str, Sequence[Outcome]]], options: argparse.Namespace) -> None:
    """The page with all tables."""
    page = ABOUT.format(
        options=f" --seeds {options.seeds} --epochs {options.epochs:g}{_chosen(options)}",
        machine=machine_line(),
        commit=commit(),
        measured=MEASURED,
        seeds=options.seeds,
        epochs=options.epochs,
        batch=BATCH,
        gromo=version(),
    )
    lines = ["# Growing: how new units start", "", page]
    for subject, found in results.items():
        batches, images = subject.calibration
        about = f"{subject.about}; learning rate {subject.rate:g}; with data: {batches} batches of {images} images."
        lines += ["", f"## {subject.name}", "", about, ""]
        lines += [*table(found), "", kept(found)]
    write_whole(path, "\n".join(lines) + "\n")


def _chosen(options: argparse.Namespace) -> str:
    """The options that choose networks and rows, as they were given."""
    given = (("subjects", options.subjects), ("rows", options.rows))
    return "".join(f" --{name} {shlex.join(each)}" for name, each in given if each)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all and write the page."""
    parser = argparse.ArgumentParser(prog="python -m experiments.compare.growth", description=__doc__)
    add_data(parser)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"), help="page to write")
    add_seeds(parser, default=5)
    parser.add_argument("--epochs", type=float, default=1.0, help="training before the growth")
    names, titles = [subject.name for subject in SUBJECTS], [row.title for row in ROWS]
    parser.add_argument("--subjects", nargs="+", choices=names, help="networks; all by default")
    parser.add_argument("--rows", nargs="+", choices=titles[1:], help="rows beside the control; all by default")
    options = parser.parse_args(arguments)
    rows = [row for row in ROWS if row.title in (titles[0], *(options.rows or titles))]
    split, results = MnistData(root=options.data).read()[0], {}
    for subject in (each for each in SUBJECTS if each.name in (options.subjects or names)):
        results[subject] = run(subject, Images(split, subject.prepare), options.seeds, options.epochs, rows)
        print("\n".join([subject.name, *table(results[subject]), kept(results[subject])]), flush=True)
    write(options.out, results, options)
    print(f"page: {options.out}")


if __name__ == "__main__":
    main()

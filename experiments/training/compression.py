"""A trained network beside its factorized and its 8-bit versions: accuracy, sizes, measured time."""

from __future__ import annotations

import copy
import importlib
import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from statistics import fmean, median
from typing import Any, TypeVar

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR

import evolvenet
from evolvenet.errors import MissingPackageError
from evolvenet.lowrank.latency import Run, fastest
from evolvenet.measurement.cost import macs, parameters
from experiments.data.images import ImageData
from experiments.pages import cell, markdown
from experiments.training.classifier import Cycles

log = logging.getLogger(__name__)

BATCHES = (1, 64)
"""Images in the batches that are timed."""

Key = TypeVar("Key")

REPEATS = 5
"""Rounds of timings of all networks in turns, each of which takes the least of several."""

INT8 = {"int8": "Int8WeightOnlyConfig", "int8 dynamic": "Int8DynamicActivationInt8WeightConfig"}
"""{weights alone, or activations too: torchao's configuration}. Dense layers alone: torchao has no int8 convolutions for CPUs."""


@dataclass(frozen=True)
class Scheme:
    """One way to factorize.

    Args:
        ranks: see `evolvenet.factorize`.
        kinds: see `evolvenet.factorize`.
        like: name of another scheme; the network may have as many parameters as with that one, which chooses the ranks.
        data: whether the factors are fitted to outputs.
    """

    ranks: Any = None
    kinds: Any = "auto"
    like: str | None = None
    data: bool = True


@dataclass(frozen=True)
class Row:
    """One network.

    Args:
        network: the original, or the scheme by which it was factorized.
        state: "" right after that, "+ epoch" an epoch later, or then quantized: see `INT8`.
        accuracy: on the test split, 0 … 1.
        classes: accuracy on the images of each class.
        parameters: number of them.
        macs: multiply-accumulates for one image.
        kilobytes: of its state dict in a file.
        latency: {images in the batch: time of a forward pass relative to the original's, on one thread}.
    """

    network: str
    state: str
    accuracy: float
    classes: Sequence[float]
    parameters: int
    macs: int
    kilobytes: float
    latency: Mapping[int, float]


class Compression:
    """Factorizes copies of a trained network, trains each for an epoch, and quantizes these.

    The original trains for the epoch too: what that alone gains is no merit of the factors.

    Args:
        schemes: {name: scheme}.
        learning_rate: highest one of the epoch, in AdamW; it warms up and falls as a cosine.
        batches: of the training data, by which the factors are fitted and latency is measured.
        epochs: after the factorization.
        most_steps: of each epoch, for trial runs.
    """

    def __init__(
        self,
        schemes: Mapping[str, Scheme],
        learning_rate: float = 1e-3,
        batches: int = 8,
        epochs: int = 1,
        most_steps: int | None = None,
    ) -> None:
        self.schemes, self.learning_rate, self.batches = schemes, learning_rate, batches
        self.epochs, self.most_steps = epochs, most_steps

    def __call__(self, model: nn.Module, data: ImageData) -> dict[str, Any]:
        """The rows of the table, and what `factorize` reported of each scheme; the model is left as it was.

        Args:
            model: trained.
            data: of the run.
        """
        whole = copy.deepcopy(model).cpu().eval()
        images = [batch for batch, _ in islice(data.train_dataloader(), self.batches)]
        networks, reports = {"original": whole}, dict[str, list[str]]()
        for name, scheme in self.schemes.items():
            networks[name] = copy.deepcopy(whole)
            limit = None if scheme.like is None else parameters(networks[scheme.like])
            fitted = images if scheme.data else None
            report = evolvenet.factorize(networks[name], scheme.ranks, scheme.kinds, fitted, parameters=limit)
            log.info("%s\n%s", name, report)
            reports[name] = str(report).splitlines()
        every: dict[tuple[str, str], nn.Module] = {}
        for name, network in networks.items():
            every[name, ""] = network
            every[name, "+ epoch"] = trained = self._trained(network, data)
            every |= {(name, words): quantized(trained, config) for words, config in INT8.items()}
        first = next(iter(every))
        times = {size: timed(every, images[0][:size]) for size in BATCHES}
        rows = []
        for (name, state), network in every.items():
            accuracy, classes = tested(network, data)
            latency = {size: found[name, state] / found[first] for size, found in times.items()}
            counts = parameters(networks[name]), macs(networks[name], images[0][:1])
            rows.append(asdict(Row(name, state, accuracy, classes, *counts, kilobytes(network), latency)))
        return {"rows": rows, "reports": reports, "milliseconds": {size: 1e3 * t[first] for size, t in times.items()}}

    def _trained(self, model: nn.Module, data: ImageData) -> nn.Module:
        """A copy of a network, trained on."""
        made = copy.deepcopy(model).train()
        loader = data.train_dataloader()
        optimizer = torch.optim.AdamW(made.parameters(), self.learning_rate)
        steps = min(len(loader), self.most_steps or len(loader))
        schedule = LambdaLR(optimizer, Cycles(self.epochs * steps, (1,), 0.05))
        for epoch in range(self.epochs):
            loader.set_epoch(1000 + epoch)  # no order or augmentation that the network has seen
            for images, labels in islice(loader, steps):
                functional.cross_entropy(made(images), labels).backward()
                nn.utils.clip_grad_norm_(made.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
        return made.eval()


def quantized(model: nn.Module, config: str) -> nn.Module:
    """A copy of a network with its dense layers in int8.

    Args:
        model: in float32.
        config: name of a configuration in `torchao.quantization`.

    Raises:
        MissingPackageError: if torchao is not installed.
    """
    logging.getLogger("torchao").setLevel(logging.ERROR)  # it reports kernels for other machines
    try:
        torchao = importlib.import_module("torchao.quantization")
    except ImportError as error:
        raise MissingPackageError("8 bits need torchao. In a clone: pip install '.[experiments]'") from error
    made = copy.deepcopy(model)
    torchao.quantize_(made, getattr(torchao, config)())
    return made


@torch.no_grad()
def tested(model: nn.Module, data: ImageData) -> tuple[float, list[float]]:
    """The accuracy on the test split, and on the images of each of its classes."""
    pairs = [(model(images).argmax(1), labels) for images, labels in data.test_dataloader()]
    answers, labels = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    right = (answers == labels).double()
    each = [float(right[labels == label].mean()) for label in labels.unique()]
    return float(right.mean()), each


@torch.no_grad()
def timed(networks: Mapping[Key, nn.Module], images: Tensor) -> dict[Key, float]:
    """Seconds of a forward pass of each network, the least of many, in turns, on one thread."""
    runs = [Run(network, images, partial(network, images)) for network in networks.values()]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rounds = [fastest(runs) for _ in range(REPEATS)]
    finally:
        torch.set_num_threads(threads)
    return dict(zip(networks, map(min, zip(*rounds, strict=True)), strict=True))


def kilobytes(model: nn.Module) -> float:
    """Size of the state dict as a file."""
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.tell() / 1000


def compression_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The rows as a table for the terminal."""
    table = Table(title="Compressed", title_justify="left")
    for place, head in enumerate(_heads()):
        table.add_column(head, justify="left" if place < 2 else "right")
    for row in rows:
        table.add_row(*_cells([row]), end_section=row["state"] == [*INT8][-1])
    return table


def compression_lines(results: Sequence[Mapping[str, Any]], names: Sequence[str] = ()) -> list[str]:
    """The rows as Markdown, over several runs mean ± standard deviation (times: median), and a table of the classes.

    Args:
        results: of `Compression`, one for each run, of the same schemes.
        names: of the classes; numbers by default.
    """
    groups = [list(each) for each in zip(*(result["rows"] for result in results), strict=True)]
    classes = [
        [*_cells(rows)[:2], *(cell(list(values)) for values in zip(*(row["classes"] for row in rows), strict=True))]
        for rows in groups
        if rows[0]["state"] not in INT8
    ]
    heads = names or [f"class {number}" for number in range(len(classes[0]) - 2)]
    return [
        *markdown(_heads(), [_cells(rows) for rows in groups], text=(0, 1)),
        "",
        *markdown(["network", "state", *heads], classes, text=(0, 1)),
    ]


def _heads() -> list[str]:
    return ["network", "state", "test %", "params", "MACs", "kB", *(f"time, {size}" for size in BATCHES)]


def _cells(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The cells of one network in several runs."""
    latency = [{int(size): ratio for size, ratio in row["latency"].items()} for row in rows]
    return [
        rows[0]["network"],
        rows[0]["state"],
        cell([row["accuracy"] for row in rows]),
        f"{fmean(row['parameters'] for row in rows):,.0f}",
        f"{fmean(row['macs'] for row in rows) / 1e6:.2f} M",
        f"{fmean(row['kilobytes'] for row in rows):,.0f}",
        *(f"{median(each[size] for each in latency):.2f}" for size in BATCHES),
    ]

"""How widths are chosen and fitted: `python -m experiments.compare.allocation --data DIR`, or `make compare-allocation`.

Trained networks of `experiments.compare.networks` are cut to some numbers of parameters, one shot, from 1,024 training images.
Ways to choose the sizes and ways to fit the consumers are compared on training images that no cut has seen. The test split is
looked at once, with `--test`. Each result is one small JSON file, so a run can be stopped and resumed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import evolvenet
from evolvenet.pruning.allocation import Allocation
from evolvenet.pruning.fitted_prune import plan_fitted_prune
from evolvenet.pruning.reconstruction_batch import ONE_SHOT_LIMITS
from evolvenet.surgery.resize_model import install
from experiments.compare import peers
from experiments.compare.copies import copied
from experiments.compare.networks import CALIBRATION, TaskData, tasks, uncut
from experiments.compare.records import Record, is_current, read
from experiments.pages import add_data, cell, commit, machine_line, markdown, state, write_whole

RATIOS = (50, 70, 90, 95)
VALIDATION = 5000
"""Training images after those that a cut is fitted on."""


@dataclass(frozen=True)
class Network:
    """A trained network, and what its cuts are chosen and fitted on.

    Args:
        data: of the task.
        seed: of the network.
        model: uncut.
    """

    data: TaskData
    seed: int
    model: nn.Module

    @cached_property
    def graph(self) -> evolvenet.WidthGraph:
        """Its widths."""
        return evolvenet.trace(self.model, self.data.example)

    @cached_property
    def _order(self) -> Tensor:
        return torch.randperm(len(self.data.train.labels), generator=torch.Generator().manual_seed(self.seed))

    @cached_property
    def images(self) -> list[Tensor]:
        """For the cuts."""
        return self.data.calibration(self.seed)

    @cached_property
    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """The same with their labels."""
        labels = self.data.train.labels[self._order[:CALIBRATION]].split(256)
        return list(zip(self.images, labels, strict=True))

    @cached_property
    def validation(self) -> TaskData:
        """The same task with training images that are in no cut in the place of the test split."""
        chosen = self._order[CALIBRATION : CALIBRATION + VALIDATION]
        images = self.data.task.normalise(self.data.train.images[chosen])
        return replace(self.data, test=(images, self.data.train.labels[chosen]))

    def allocation(self, loss: str) -> tuple[Allocation, float]:
        """Sizes by trials with a loss, and the seconds of one core that these took."""
        start = time.process_time()
        if loss == "task":
            found = evolvenet.allocate(
                self.model, self.graph, self.graph.parameters, self.pairs, loss=functional.cross_entropy
            )
        else:
            found = evolvenet.allocate(self.model, self.graph, self.graph.parameters, self.images, loss=loss)  # type: ignore[arg-type]
        return found, time.process_time() - start


Sizes = Callable[[int], peers.Sizes]
"""A number of parameters → sizes with at most so many."""


@dataclass(frozen=True)
class Method:
    """A way to cut.

    Args:
        title: for the page.
        loss: of the trials that the sizes are by; None for equal widths.
        rounds: of the fits of outputs that a rectifier takes.
        joint: rounds of `allocate`.
    """

    title: str
    loss: str | None
    rounds: int = ONE_SHOT_LIMITS.rounds
    joint: int = 0


METHODS = {
    "equal": Method("equal widths", None),
    "equal0": Method("equal widths, fitted without rounds", None, 0),
    "outputs": Method('`loss="outputs"`', "outputs"),
    "outputs0": Method('`loss="outputs"`, fitted without rounds', "outputs", 0),
    "kl": Method('`loss="kl"`', "kl"),
    "joint": Method('`loss="outputs", rounds=2`', "outputs", joint=2),
    "task": Method("`loss=cross_entropy`, with labels", "task"),
}


def run(data: TaskData, seed: int, options: argparse.Namespace) -> Iterator[Record]:
    """Yield each missing result of one network as soon as it is saved."""
    folder = options.cache / data.task.name / f"seed{seed}"
    model, trained = uncut(data, seed, folder)
    network, found = Network(data, seed, model), dict[str, tuple[Sizes, float]]()
    for name in options.methods:
        method = METHODS[name]
        for ratio in options.ratios:
            path = folder / f"allocation-{ratio}-{name}.json"
            made_of = {"weights": trained["weights"], "state": options.state, "commit": options.commit}
            if is_current(path, made_of, keep_old=options.keep_old, after="test" if options.test else None):
                continue
            by = f"{method.loss or 'equal'} {method.joint}"
            found[by] = found.get(by) or _sizes(network, method)
            start = time.process_time()
            sizes = found[by][0](round((1 - ratio / 100) * network.graph.parameters))
            seconds = found[by][1] or time.process_time() - start
            record = {"method": name, "ratio": ratio, "seconds": round(seconds, 1), **made_of}
            record |= measured(network, sizes, method.rounds, options.test)
            write_whole(path, json.dumps(record, indent=1))
            yield record


def _sizes(network: Network, method: Method) -> tuple[Sizes, float]:
    """The sizes, and the seconds of one core that the trials for all numbers of parameters took."""
    if method.loss is None:
        return partial(peers.equal_sizes, network.graph), 0.0
    if method.joint:
        allocate = partial(
            evolvenet.allocate, network.model, network.graph, batches=network.images, rounds=method.joint
        )
        return lambda parameters: dict(allocate(parameters)), 0.0
    found, seconds = network.allocation(method.loss)
    return lambda parameters: dict(found.at(parameters)), seconds


def measured(network: Network, sizes: peers.Sizes, rounds: int, test: bool) -> dict[str, Any]:
    """Cut a copy of the network, and measure its accuracies."""
    model = copied(network.model)
    start = time.process_time()
    limits = replace(ONE_SHOT_LIMITS, rounds=rounds)
    surgery = plan_fitted_prune(model, network.graph, sizes, network.images, limits)
    install(model, surgery)
    found: dict[str, Any] = {"prune_seconds": round(time.process_time() - start, 1)}
    found |= {"parameters": surgery.graph.parameters, "sizes": dict(surgery.graph.sizes)}
    found["validation"] = network.validation.accuracy(model)
    return {**found, "test": network.data.accuracy(model)} if test else found


ABOUT = """\
# How widths are chosen and fitted

Written by `make compare-allocation` (`python -m experiments.compare.allocation`) {machine}.

Accuracy in %, mean ± standard deviation (of a sample) over n trained networks, one shot from 1,024 training images without
labels (with them where it says so). Columns: share of the parameters removed. **Validation**: 5,000 other training images, on
which settings are chosen. **Test**: the test split.
"""


FOUND = """\
## What was found

- **Rounds of the fit** by what a ReLU passes on (`evolvenet.pruning.rectified`) gain at equal widths on every network above, and
  little where the widths are chosen; three of them are the default for cuts after training since.
- **The loss of the trials** is the outputs' error by default: it asks for neither logits nor labels, and the others gained
  nothing beyond chance on validation in trials on one network.
- **Losses of single cuts** do not add up in deep cuts. `allocate(…, rounds=2)` measures joint ones; it takes several times as
  long, and is off by default.
- Tried on one network and left out, as validation did not gain: units chosen by the exact decrease of the error of what their
  consumers put out, in the place of pivoted Cholesky; four times as many rows for each fit.
- What the tables lack (divergence, labels, `rounds=2`, other ratios) was tried on prototypes, whose results were not kept.
"""


def page(options: argparse.Namespace) -> str:
    """The results of all networks that are there."""
    lines = [ABOUT.format(machine=machine_line())]
    for name in tasks():
        networks, results = read(options.cache / name, METHODS, lambda record: (record["method"], record["ratio"]))
        ratios = sorted({ratio for _, ratio in results})
        if not results:
            continue
        seeds = sorted({seed for each in results.values() for seed in each})
        uncut_test = cell([networks[seed]["accuracy"] for seed in seeds])
        lines += [
            f"## {name}",
            "",
            f"n = {len(seeds)}, seeds {', '.join(map(str, seeds))}; uncut on the test split {uncut_test}.",
            "",
        ]
        for split in ("validation", "test"):
            if not any(split in record for each in results.values() for record in each.values()):
                continue
            rows = []
            for method, about in METHODS.items():
                of_ratios = [results.get((method, ratio), {}).values() for ratio in ratios]
                if any(of_ratios):
                    cells = [cell([record[split] for record in each if split in record]) for each in of_ratios]
                    rows.append([about.title, *cells])
            lines += [*markdown([split, *(f"{ratio} %" for ratio in ratios)], rows), ""]
        commits = sorted({record["commit"] for each in results.values() for record in each.values()})
        lines += [*_seconds(results), f"Results of the commits {', '.join(commits)}.", ""]
    return "\n".join([*lines, FOUND])


def _seconds(results: dict[tuple[str, int], dict[int, Record]]) -> list[str]:
    """What the trials cost."""
    found: dict[str, list[float]] = {}
    for (method, _), each in results.items():
        if METHODS[method].loss is not None:
            found.setdefault(method, []).extend(record["seconds"] for record in each.values())
    parts = [f"{METHODS[name].title} {min(each):.1f} … {max(each):.1f}" for name, each in found.items() if each]
    return [f"Seconds of one core for `allocate`: {'; '.join(parts)}.", ""] if parts else []


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing and write the page."""
    parser = argparse.ArgumentParser(prog="python -m experiments.compare.allocation", description=__doc__)
    add_data(parser)
    parser.add_argument("--only", nargs="+", choices=tuple(tasks()), help="data sets (default: mnist cifar10)")
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2), help="of the networks")
    parser.add_argument("--ratios", nargs="+", type=int, default=RATIOS, help="percent of the parameters removed")
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=tuple(METHODS))
    parser.add_argument("--test", action="store_true", help="look at the test split, too")
    parser.add_argument("--keep-old", action="store_true", help="keep results of an older state of the package")
    parser.add_argument("--cache", type=Path, default=Path("outputs/compare"), help="folder of the JSON files")
    parser.add_argument("--table", type=Path, default=Path(__file__).with_suffix(".md"), help="page to write")
    options = parser.parse_args(arguments)
    # Once, at the start: the sources may change during the run, which uses the modules loaded then.
    options.state, options.commit = state(), commit()
    for name in options.only or [name for name, task in tasks().items() if task.default]:
        data = TaskData.open(tasks()[name], options.data)
        for seed in options.seeds:
            for record in run(data, seed, options):
                shown = {key: record[key] for key in ("method", "ratio", "parameters", "validation")}
                print(name, seed, shown, flush=True)
    write_whole(options.table, page(options))
    print(f"page: {options.table}")


if __name__ == "__main__":
    main()

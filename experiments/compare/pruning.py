"""Pruning against peers, one shot and after an epoch: `python -m experiments.compare.pruning --data DIR`, or `make compare`.

Each result is one small JSON file, so a run can be stopped and resumed, and several can run at once on different seeds or
data sets. The table `experiments/compare/pruning.md` is written from those files.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import evolvenet
from experiments.compare import peers
from experiments.compare.copies import copied
from experiments.compare.networks import TaskData, reestimate, tasks, uncut
from experiments.compare.records import is_current
from experiments.compare.table import write_table
from experiments.pages import add_data, state, write_whole

RATIOS = (30, 50, 70, 90)
EQUAL, OWN = "equal", "own"
RATE_AFTER, WARM_AFTER = 1e-3, 0.05


@dataclass(frozen=True)
class Case:
    """One cut to be made.

    Args:
        data: the task with its data.
        seed: of the network.
        model: a copy of the uncut network, changed in place by the cut.
        graph: its widths.
        target: number of parameters after the cut.
        sizes: to which every method cuts; None for each method's own allocation.
    """

    data: TaskData
    seed: int
    model: nn.Module
    graph: evolvenet.WidthGraph
    target: int
    sizes: peers.Sizes | None


@dataclass(frozen=True)
class Method:
    """A way to cut: `cut` changes the case's model in place and returns its new graph; skipped if `needs` is not installed."""

    cut: Callable[[Case], evolvenet.WidthGraph]
    ours: bool = False
    needs: str = "torch"


def torch_pruning(kind: str) -> Callable[[Case], evolvenet.WidthGraph]:
    """Units chosen by one of Torch-Pruning's importance measures."""

    def cut(case: Case) -> evolvenet.WidthGraph:
        example = case.data.example
        if case.sizes is None:
            kept = peers.torch_pruning_global(case.model, case.graph, example, kind, case.target)
        else:
            scores = peers.torch_pruning_scores(case.model, case.graph, example, kind)
            kept = peers.best(case.graph, scores, case.sizes)
        return evolvenet.resize(case.model, case.graph, kept)

    return cut


def at_random(case: Case) -> evolvenet.WidthGraph:
    """Units chosen by random scores."""
    scores = peers.random_scores(case.graph, case.seed)
    if case.sizes is None:
        kept = peers.best_of_all(case.graph, scores, case.target)
    else:
        kept = peers.best(case.graph, scores, case.sizes)
    return evolvenet.resize(case.model, case.graph, kept)


def projection_of_2021(case: Case) -> evolvenet.WidthGraph:
    """The first units stay, and the consumers are projected as in SVD-evolutive-CNN (2021)."""
    sizes = case.sizes or peers.projection_sizes(case.model, case.graph, case.target)
    kept = peers.project_consumers(case.model, case.graph, sizes)
    return evolvenet.resize(case.model, case.graph, kept)


def ours_by_weights(case: Case) -> evolvenet.WidthGraph:
    """EvolveNet's pruning without data."""
    return evolvenet.prune(case.model, case.graph, case.sizes or allocated(case))


def ours(case: Case) -> evolvenet.WidthGraph:
    """EvolveNet's pruning with 1,024 unlabelled training images."""
    batches = case.data.calibration(case.seed)
    sizes = case.sizes or allocated(case, batches=batches)
    return evolvenet.prune(case.model, case.graph, sizes, batches=batches)


def allocated(case: Case, **measured: Any) -> peers.Sizes:
    """EvolveNet's own sizes for the case's parameter count."""
    return dict(evolvenet.allocate(case.model, case.graph, parameters=case.target, **measured))


METHODS = {
    "l2": Method(torch_pruning("l2"), needs="torch_pruning"),
    "bn": Method(torch_pruning("bn"), needs="torch_pruning"),
    "random": Method(at_random),
    "projection": Method(projection_of_2021),
    "weights": Method(ours_by_weights, ours=True),
    "ours": Method(ours, ours=True),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing and write the table."""
    options = _options(arguments)
    # Once, at the start: the sources may change during the run, which uses the modules loaded then.
    options.state = state()
    for name in options.only or [name for name, task in tasks().items() if task.default]:
        task = tasks()[name]
        data = TaskData.open(task, options.data)
        for seed in options.seeds if options.seeds is not None else task.seeds:
            for record in run(data, seed, options):
                print(_line(name, seed, record), flush=True)
    write_table(options.table, options.cache, options.state)
    print(f"table: {options.table}")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m experiments.compare.pruning", description=__doc__)
    add_data(parser)
    parser.add_argument("--only", nargs="+", choices=tuple(tasks()), help="data sets (default: mnist cifar10)")
    parser.add_argument("--seeds", nargs="+", type=int, help="of the networks (default: each data set's own)")
    parser.add_argument("--ratios", nargs="+", type=int, default=RATIOS, help="percent of the parameters removed")
    parser.add_argument("--allocations", nargs="+", choices=(EQUAL, OWN), default=(EQUAL, OWN))
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=tuple(METHODS))
    parser.add_argument("--one-shot", action="store_true", help="leave out the epoch after the cut")
    parser.add_argument("--keep-old", action="store_true", help="keep results of an older state of the package")
    parser.add_argument("--cache", type=Path, default=Path("outputs/compare"), help="folder of the JSON files")
    parser.add_argument("--table", type=Path, default=Path(__file__).with_suffix(".md"), help="page to write")
    return parser.parse_args(arguments)


def run(data: TaskData, seed: int, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield each missing result of one trained network as soon as it is saved."""
    folder = options.cache / data.task.name / f"seed{seed}"
    model, trained = uncut(data, seed, folder)
    graph = evolvenet.trace(model, data.example)
    for allocation in options.allocations:
        for ratio in options.ratios:
            target = round((1 - ratio / 100) * graph.parameters)
            sizes = peers.equal_sizes(graph, target) if allocation == EQUAL else None
            for name in options.methods:
                method, path = METHODS[name], folder / f"{allocation}-{ratio}-{name}.json"
                made_of = {"weights": trained["weights"], "state": options.state if method.ours else None}
                if importlib.util.find_spec(method.needs) is None or is_current(
                    path, made_of, keep_old=options.keep_old, after=None if options.one_shot else "after_epoch"
                ):
                    continue
                case = Case(data, seed, copied(model), graph, target, sizes)
                found = {"allocation": allocation, "ratio": ratio, "method": name, **made_of}
                found |= measured(case, method, not options.one_shot)
                write_whole(path, json.dumps(found, indent=1))
                yield found


def measured(case: Case, method: Method, epoch: bool) -> dict[str, Any]:
    """Cut, and measure: as it is, with BatchNorm re-estimated, and after an epoch of training."""
    torch.manual_seed(case.seed)
    graph = method.cut(case)
    found: dict[str, Any] = {"parameters": graph.parameters, "sizes": graph.sizes}
    found["as_cut"] = case.data.accuracy(case.model)
    again = copied(case.model)
    reestimate(again, case.data.calibration(case.seed))
    found["reestimated"] = case.data.accuracy(again)
    if epoch:
        found["seconds"] = round(case.data.fit(case.model, case.seed + 100, 1, RATE_AFTER, WARM_AFTER), 1)
        found["after_epoch"] = case.data.accuracy(case.model)
    return found


def _line(task: str, seed: int, record: dict[str, Any]) -> str:
    after = f"{record['after_epoch']:.2%} in {record['seconds']} s" if "after_epoch" in record else "not run"
    return (
        f"{task} seed {seed} {record['allocation']} {record['ratio']} % {record['method']}: {record['parameters']:,} "
        f"parameters, as cut {record['as_cut']:.2%}, BN re-estimated {record['reestimated']:.2%}, after an epoch {after}"
    )


if __name__ == "__main__":
    main()

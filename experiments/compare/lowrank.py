"""Widths, ranks, and both, beside peers: `python -m experiments.compare.lowrank --data DIR`, or `make compare-lowrank`.

Each result is one small JSON file, so a run can be stopped and resumed, and several can run at once on different seeds or
networks. The page `experiments/compare/lowrank.md` is written from those files. Goals about training under a budget are filled
from the file `in_training.json` in the cache: {"widths": [accuracy of each seed], "both": [the same with ranks]}.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import evolvenet
from evolvenet.measurement.cost import macs, parameters, seconds
from experiments.compare.copies import copied
from experiments.compare.lowrank_methods import LATENCY, METHODS, TIMED, Case, Method
from experiments.compare.lowrank_networks import tasks
from experiments.compare.lowrank_table import write_page
from experiments.compare.networks import TaskData, uncut
from experiments.compare.pruning import RATE_AFTER, WARM_AFTER
from experiments.compare.records import is_current
from experiments.pages import add_data, commit, state, write_whole

LEVELS = (*(f"parameters-{percent}" for percent in (30, 50, 70, 90)), "macs-50", "macs-70", "macs-90", "latency-30")
"""What is limited, and how many percent of it are removed."""

BATCHES = (1, TIMED)
"""Images in the batches that are timed."""

ROUNDS, SPAN = (5, 60), 1.0
"""Least and most rounds of timings, and seconds after which no further round begins once there were the least."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing and write the page."""
    options = _options(arguments)
    # Once, at the start: the sources may change during the run, which uses the modules loaded then.
    options.made_of = {"state": state(), "commit": commit()}
    torch.set_num_threads(1)  # latencies are those of one thread
    for name in options.only or [name for name, task in tasks().items() if task.default or name.startswith("mnist_")]:
        data = TaskData.open(tasks()[name], options.data)
        for seed in options.seeds if options.seeds is not None else data.task.seeds:
            for record in run(data, seed, options):
                print(_line(name, seed, record), flush=True)
                write_page(options.page, options.cache)
    write_page(options.page, options.cache)
    print(f"page: {options.page}")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m experiments.compare.lowrank", description=__doc__)
    add_data(parser)
    parser.add_argument("--only", nargs="+", choices=tuple(tasks()), help="networks (default: all but digits)")
    parser.add_argument("--seeds", nargs="+", type=int, help="of the networks (default: 0 1 2)")
    parser.add_argument("--levels", nargs="+", choices=LEVELS, default=LEVELS, help="what is limited, percent removed")
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=tuple(METHODS))
    parser.add_argument("--one-shot", action="store_true", help="leave out the epoch afterwards")
    parser.add_argument("--keep-old", action="store_true", help="keep results of an older state of the package")
    parser.add_argument("--cache", type=Path, default=Path("outputs/compare_lowrank"), help="folder of the JSON files")
    parser.add_argument("--page", type=Path, default=Path(__file__).with_suffix(".md"), help="page to write")
    return parser.parse_args(arguments)


def run(data: TaskData, seed: int, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield each missing result of one trained network as soon as it is saved."""
    folder = options.cache / data.task.name / f"seed{seed}"
    model, trained = uncut(data, seed, folder)
    answers: Tensor | None = None
    for level in options.levels:
        cost, percent = level.split("-")
        for name in options.methods:
            method, path = METHODS[name], folder / f"{level}-{name}.json"
            made_of = {"weights": trained["weights"], **(options.made_of if method.ours else {})}
            if not _applies(method, cost, model) or is_current(
                path, made_of, keep_old=options.keep_old, after=None if options.one_shot else "after_epoch"
            ):
                continue
            answers = outputs(model, data) if answers is None else answers
            found = {"level": level, "method": name, **made_of, "removed": int(percent) / 100}
            found |= result(data, seed, method, model, answers, cost, int(percent) / 100, not options.one_shot)
            write_whole(path, json.dumps(found, indent=1))
            yield found


def _applies(method: Method, cost: str, model: nn.Module) -> bool:
    """Whether a method can limit a cost, differs from the others for this network, and has the library that it needs."""
    kernels = any(isinstance(layer, nn.Conv2d) and layer.stride != layer.kernel_size for layer in model.modules())
    return (
        cost in method.costs and (kernels or not method.kernels) and importlib.util.find_spec(method.needs) is not None
    )


def result(
    data: TaskData, seed: int, method: Method, whole: nn.Module, answers: Tensor, cost: str, removed: float, epoch: bool
) -> dict[str, Any]:
    """One network made smaller and measured; or why the method cannot make it so small.

    Args:
        data: the task with its data.
        seed: of the network.
        method: how it becomes smaller.
        whole: the uncut network.
        answers: its outputs for the test images.
        cost: what is limited.
        removed: share of the uncut network's cost.
        epoch: whether the result is trained for an epoch and measured again.
    """
    torch.manual_seed(seed)
    case = Case(data, seed, copied(whole), cost, 0)
    before = latency([whole], case.example)[0] if cost == LATENCY else case.cost_of(whole)
    left = (1 - removed) * before
    case = Case(data, seed, case.model, cost, left if cost == LATENCY else round(left))
    begin = time.perf_counter()
    try:
        report = method.run(case)
    except evolvenet.EvolveNetError as error:
        return {"refused": str(error)}
    found: dict[str, Any] = {"seconds_to_cut": round(time.perf_counter() - begin, 1), "report": report}
    found |= measured(case.model, whole, data, answers)
    if epoch:
        seconds_of_epoch = data.fit(case.model, seed + 100, 1, RATE_AFTER, WARM_AFTER)
        found |= {"seconds_of_epoch": round(seconds_of_epoch, 1), "after_epoch": data.accuracy(case.model)}
    return found


def measured(model: nn.Module, whole: nn.Module, data: TaskData, answers: Tensor) -> dict[str, Any]:
    """Output error and accuracy on the test images, and what the model costs as a share of the uncut network's cost."""
    mine = outputs(model, data)
    found: dict[str, Any] = {
        "error": output_error(mine, answers),
        "accuracy": float(mine.argmax(1).eq(data.test[1]).double().mean()),
        "parameters": parameters(model) / parameters(whole),
        "macs": macs(model, data.example) / macs(whole, data.example),
    }
    for batch in BATCHES:
        before, after = latency([whole, model], data.test[0][:batch])
        found |= {f"latency_{batch}": after / before, f"milliseconds_{batch}": 1000 * after}
    return found


def outputs(model: nn.Module, data: TaskData) -> Tensor:
    """What a model puts out for the test images, in eval mode."""
    with torch.no_grad():
        return torch.cat([model.eval()(images) for images in data.test[0].split(100)])


def output_error(found: Tensor, expected: Tensor) -> float:
    """Σ‖y' − y‖² / Σ‖y − mean‖².

    >>> output_error(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [3.0]]))
    0.5
    """
    spread = expected - expected.mean(0)
    return float((found - expected).double().square().sum() / spread.double().square().sum())


def latency(models: Sequence[nn.Module], images: Tensor) -> list[float]:
    """Least seconds that each model takes for a batch; timed in turns, since other load on the machine changes.

    The first round warms up and does not count.
    """
    times: list[list[float]] = [[] for _ in models]
    begin = time.perf_counter()
    with torch.inference_mode():
        for number in range(ROUNDS[1] + 1):
            if number > ROUNDS[0] and time.perf_counter() - begin > SPAN:
                break
            for model, found in zip(models, times, strict=True):
                found.append(seconds(lambda model=model: model(images)))
    return [min(found[1:]) for found in times]


def _line(task: str, seed: int, record: dict[str, Any]) -> str:
    head = f"{task} seed {seed} {record['level']} {record['method']}: "
    if "refused" in record:
        return head + record["refused"]
    after = f", after an epoch {record['after_epoch']:.2%}" if "after_epoch" in record else ""
    return head + (
        f"error {record['error']:.2e}, accuracy {record['accuracy']:.2%}{after}, parameters {record['parameters']:.1%}, "
        f"MACs {record['macs']:.1%}, latency {record['latency_1']:.2f} / {record['latency_64']:.2f}, "
        f"{record['seconds_to_cut']} s"
    )


if __name__ == "__main__":
    main()

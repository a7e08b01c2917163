"""Networks that packages ship, made smaller: `python -m experiments.compare.shipped --data DIR`, or `make compare-shipped`.

Each result is one small JSON file, so a run can be stopped and resumed. The page `experiments/compare/shipped.md` is written from
those files.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import evolvenet
from evolvenet.pruning.allocation import Allocation
from experiments.compare.copies import copied
from experiments.compare.language_peers import equal_shares, parameters, torch_pruning_scores
from experiments.compare.networks import NORMS, reestimate
from experiments.compare.peers import best
from experiments.compare.shipped_molecules import chgnet, rxnfp
from experiments.compare.shipped_networks import (
    Subject,
    digit_recognizer,
    face_network,
    pesto,
    resemblyzer,
    silero_vad,
    torchcrepe,
    torchfcpe,
)
from experiments.compare.shipped_table import write_page
from experiments.pages import add_data, commit, state, write_whole

SUBJECTS: dict[str, Callable[[Path], Subject]] = {
    "digit-recognizer-py": digit_recognizer,
    "torchcrepe (tiny)": torchcrepe,
    "pesto-pitch": pesto,
    "silero-vad": silero_vad,
    "facenet-pytorch RNet": face_network("RNet", 24, 4096, 2000, 64),
    "facenet-pytorch ONet": face_network("ONet", 48, 1536, 400, 32),
    "resemblyzer": resemblyzer,
    "rxnfp": rxnfp,
    "torchfcpe": torchfcpe,
    "chgnet": chgnet,
}

LEVELS = (30, 50, 70)
"""Percent of the parameters that are removed."""

POLISH = {"steps": 200, "rate": 1e-2}
"""Arguments of `evolvenet.polish`, where a network has no other ones. Cuts that nothing was fitted to always take this rate."""


@dataclass(frozen=True, eq=False)
class Case:
    """A network to be cut.

    Args:
        subject: it and its task.
        model: a copy of it, changed in place.
        graph: its widths.
        sizes: a number of parameters → sizes of our allocation.
        target: number of parameters after the cut.
    """

    subject: Subject
    model: nn.Module
    graph: evolvenet.WidthGraph
    sizes: Callable[[int], Mapping[str, int]]
    target: int


def widths(case: Case) -> str:
    """`evolvenet.allocate` and `evolvenet.prune`."""
    chosen = case.sizes(case.target)
    evolvenet.prune(case.model, case.graph, chosen, batches=case.subject.calibration[:-1])
    return str(dict(chosen))


def both(case: Case) -> str:
    """`evolvenet.compress`."""
    known = case.subject.calibration[:-1]
    return str(evolvenet.compress(case.model, example(case.subject), known, parameters=case.target))


def torch_pruning(case: Case) -> str:
    """Units by magnitude."""
    shares = equal_shares(case.graph, case.target)
    evolvenet.resize(case.model, case.graph, best(case.graph, torch_pruning_scores(case.model, case.graph), shares))
    return str(shares)


METHODS: dict[str, Callable[[Case], str]] = {"widths": widths, "tp": torch_pruning, "both": both}
"""Each cuts the case's network, and returns a report."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing and write the page."""
    parser = argparse.ArgumentParser(prog="python -m experiments.compare.shipped", description=__doc__)
    add_data(parser)
    parser.add_argument("--only", nargs="+", choices=tuple(SUBJECTS), default=tuple(SUBJECTS), help="networks")
    parser.add_argument("--levels", nargs="+", type=int, default=LEVELS, help="percent removed")
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=tuple(METHODS))
    parser.add_argument(
        "--samples", type=int, help="inputs that an allocation's trials run on (default: each network's own)"
    )
    parser.add_argument(
        "--unpolished", nargs="+", choices=tuple(METHODS), default=(), help="methods to leave after the cut"
    )
    parser.add_argument("--keep-old", action="store_true", help="keep results of an older state of the package")
    parser.add_argument("--cache", type=Path, default=Path("outputs/compare_shipped"), help="folder of the JSON files")
    parser.add_argument("--page", type=Path, default=Path(__file__).with_suffix(".md"), help="page to write")
    options = parser.parse_args(arguments)
    options.made_of = {"state": state(), "commit": commit()}
    for name in options.only:
        for record in run(name, options):
            print(_line(record), flush=True)
            write_page(options.page, options.cache, tuple(SUBJECTS))
    write_page(options.page, options.cache, tuple(SUBJECTS))
    print(f"page: {options.page}")


def run(name: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield each missing result of one network as soon as it is saved; a network that cannot be run is one such result."""
    folder = options.cache / name
    keys = [(kind, level) for kind in options.methods for level in options.levels]
    missing = [(kind, level) for kind, level in keys if not _is_current(folder / f"{level}-{kind}.json", options)]
    if not missing:
        return
    try:
        known, cut = opened(name, options.data, options.samples)
    except Exception as error:  # noqa: BLE001  whatever a stranger's package raises ends no other row
        yield _saved(folder / "failed.json", {"name": name, "failed": _named(error), **options.made_of})
        return
    for kind, level in missing:
        found = {**known, **options.made_of, "method": kind, "level": level}
        try:
            found |= cut(kind, level, kind not in options.unpolished)
        except Exception as error:  # noqa: BLE001  as above
            found |= {"failed": _named(error)}
        yield _saved(folder / f"{level}-{kind}.json", found)


Cut = Callable[[str, int, bool], dict[str, Any]]
"""(method, percent, whether to polish) → what was measured of a copy that was made smaller."""


def opened(name: str, data: Path, samples: int | None) -> tuple[dict[str, Any], Cut]:
    """A network: what is known of it, and a function that makes a copy smaller and measures it."""
    torch.manual_seed(0)
    subject = SUBJECTS[name](data)
    samples = samples or subject.trials
    begin = time.process_time()
    graph = evolvenet.trace(subject.model, example(subject))
    known = {
        "name": name,
        "task": subject.task,
        "version": importlib.metadata.version(name.split()[0]),
        "parameters": graph.parameters,
        "coverage": graph.coverage,
        "samples": samples,
        "tried": _tried(subject.calibration[0], samples),
        "inputs": sum(_count(batch) for batch in subject.calibration),
        "settings": {**POLISH, **subject.polish},
        "trace": round(time.process_time() - begin, 1),
        "uncut": scores(subject, subject.model),
        "second": None if subject.second is None else subject.second[0],
    }

    @cache
    def allocation() -> Allocation:
        target = round(0.9 * graph.parameters)
        return evolvenet.allocate(subject.model, graph, target, subject.calibration[:-1], samples=samples)

    def cut(kind: str, level: int, polish: bool) -> dict[str, Any]:
        target = round((1 - level / 100) * graph.parameters)
        case = Case(subject, copied(subject.model), graph, lambda most: allocation().at(most), target)
        return measured(case, kind, polish)

    return known, cut


def measured(case: Case, kind: str, polish: bool) -> dict[str, Any]:
    """Cut a network and polish it, and measure after each; seconds are those of processor time."""
    torch.manual_seed(0)
    subject, model, begin = case.subject, case.model, time.process_time()
    found = {"report": METHODS[kind](case), "seconds": round(time.process_time() - begin, 1)}
    found |= {"left": parameters(model) / case.graph.parameters, "cut": scores(subject, model.eval())}
    if kind == "tp" and any(isinstance(module, NORMS) for module in model.modules()):
        reestimate(model, subject.calibration)
        found["reestimated"] = scores(subject, model)
    if not polish:
        return found
    begin = time.process_time()
    settings = {**POLISH, **subject.polish}
    if kind == "tp":
        # What is far from the function takes large steps; small ones would stop on the way.
        settings["rate"] = POLISH["rate"]
    done = evolvenet.polish(model, subject.model, subject.calibration, **settings)
    found |= {"seconds_to_polish": round(time.process_time() - begin, 1), "polish": vars(done)}
    return {**found, "polished": scores(subject, model)}


def scores(subject: Subject, model: nn.Module) -> list[float]:
    """A network's score, and its second one if there is one."""
    return [subject.score(model), *([] if subject.second is None else [subject.second[1](model)])]


def _count(batch: Any) -> int:
    return len(next(iter(batch.values())) if isinstance(batch, dict) else batch)


def _tried(batch: Any, samples: int) -> int:
    """Inputs in the trials: a batch without tensors cannot be cut, and counts as one of the samples."""
    if isinstance(batch, dict) and not any(isinstance(value, Tensor) for value in batch.values()):
        return samples * _count(batch)
    return samples


def example(subject: Subject) -> Any:
    """Two inputs, for the trace."""
    first = subject.calibration[0]
    return {key: value[:2] for key, value in first.items()} if isinstance(first, dict) else first[:2]


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:400]


def _saved(path: Path, found: dict[str, Any]) -> dict[str, Any]:
    write_whole(path, json.dumps(found, indent=1))
    return found


def _is_current(path: Path, options: argparse.Namespace) -> bool:
    if not path.exists():
        return False
    found = json.loads(path.read_text(encoding="utf-8"))
    whole = "polished" in found or "failed" in found or found["method"] in options.unpolished
    return whole and (options.keep_old or found["state"] == options.made_of["state"])


def _line(found: Mapping[str, Any]) -> str:
    head = f"{found['name']} " + (f"−{found['level']} % {found['method']}: " if "level" in found else "")
    if "failed" in found:
        return head + found["failed"]
    stages = ", ".join(
        f"{stage} {found[stage][0]:.2%}" for stage in ("cut", "reestimated", "polished") if stage in found
    )
    line = (
        head + f"{stages} of {found['uncut'][0]:.2%}, {found['left']:.1%} of {found['parameters']:,} parameters, "
        f"{found['seconds']} s"
    )
    if "polish" not in found:
        return line
    polish = found["polish"]
    return line + (
        f" and {found['seconds_to_polish']} s; output error {polish['before']:.3g} → {polish['after']:.3g} at {polish['rate']:g}"
    )


if __name__ == "__main__":
    main()

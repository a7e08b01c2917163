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
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

import evolvenet
from evolvenet.pruning.allocation import Allocation
from experiments.compare.copies import copied
from experiments.compare.language_peers import equal_shares, parameters, torch_pruning_scores
from experiments.compare.peers import best
from experiments.compare.shipped_networks import SUBJECTS, Subject
from experiments.pages import add_data, commit, machine_line, markdown, state, write_whole

LEVELS = (30, 50, 70)
"""Percent of the parameters that are removed."""

GOAL = (50, 0.98)
"""Percent removed, and the share of the score that is to be kept."""

SAMPLES = 96
"""Inputs on which the trials of an allocation run."""

Made = tuple[nn.Module, str]
Sizes = Callable[[int], Mapping[str, int]]
Method = Callable[[Subject, nn.Module, evolvenet.WidthGraph, Sizes, int], Made]
"""(subject, copy of its network, the graph, sizes for a number of parameters, that number) → what is left, a report."""

EXPLANATION = """Networks as the packages ship them, with their weights. Columns: share of the parameters that is removed.
Figures: the score right after, nothing trained, as a share of the uncut network's, %. What the score is, and on what, stands with
each; where it says "made here", "uncut network" or "photographs", there are no labelled data with the package: it is no
measure of the task on real data. **Ours** measures on a few hundred inputs without labels. **Torch-Pruning**: units by
`GroupMagnitudeImportance(p=2)`, computed by its formula on the graph's widths, one share of all widths; BatchNorm is not
re-estimated."""


def widths(
    subject: Subject,
    model: nn.Module,
    graph: evolvenet.WidthGraph,
    sizes: Callable[[int], Mapping[str, int]],
    target: int,
) -> Made:
    """`evolvenet.allocate` and `evolvenet.prune`."""
    chosen = sizes(target)
    evolvenet.prune(model, graph, chosen, batches=subject.calibration)
    return model, str(dict(chosen))


def both(
    subject: Subject,
    model: nn.Module,
    graph: evolvenet.WidthGraph,
    sizes: Callable[[int], Mapping[str, int]],
    target: int,
) -> Made:
    """`evolvenet.compress`."""
    return model, str(evolvenet.compress(model, example(subject), subject.calibration, parameters=target))


def torch_pruning(
    subject: Subject,
    model: nn.Module,
    graph: evolvenet.WidthGraph,
    sizes: Callable[[int], Mapping[str, int]],
    target: int,
) -> Made:
    """Units by magnitude."""
    shares = equal_shares(graph, target)
    evolvenet.resize(model, graph, best(graph, torch_pruning_scores(model, graph), shares))
    return model, str(shares)


METHODS: dict[str, tuple[str, Method]] = {
    "widths": ("**ours, widths**", widths),
    "tp": ("Torch-Pruning's magnitude", torch_pruning),
    "both": ("**ours, widths and ranks (`compress`)**", both),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing and write the page."""
    parser = argparse.ArgumentParser(prog="python -m experiments.compare.shipped", description=__doc__)
    add_data(parser)
    parser.add_argument("--only", nargs="+", choices=tuple(SUBJECTS), default=tuple(SUBJECTS), help="networks")
    parser.add_argument("--levels", nargs="+", type=int, default=LEVELS, help="percent removed")
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=tuple(METHODS))
    parser.add_argument("--samples", type=int, default=SAMPLES, help="inputs that an allocation's trials run on")
    parser.add_argument("--keep-old", action="store_true", help="keep results of an older state of the package")
    parser.add_argument("--cache", type=Path, default=Path("outputs/compare_shipped"), help="folder of the JSON files")
    parser.add_argument("--page", type=Path, default=Path(__file__).with_suffix(".md"), help="page to write")
    options = parser.parse_args(arguments)
    options.made_of = {"state": state(), "commit": commit()}
    for name in options.only:
        for record in run(name, options):
            print(_line(record), flush=True)
            write_page(options.page, options.cache)
    write_page(options.page, options.cache)
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
            found |= cut(kind, level)
        except Exception as error:  # noqa: BLE001  as above
            found |= {"failed": _named(error)}
        yield _saved(folder / f"{level}-{kind}.json", found)


def opened(name: str, data: Path, samples: int) -> tuple[dict[str, Any], Callable[[str, int], dict[str, Any]]]:
    """A network: what is known of it, and a function that makes a copy smaller (method, percent) and measures it."""
    torch.manual_seed(0)
    subject = SUBJECTS[name](data)
    begin = time.perf_counter()
    graph = evolvenet.trace(subject.model, example(subject))
    known = {
        "name": name,
        "task": subject.task,
        "version": importlib.metadata.version(name.split()[0]),
        "parameters": graph.parameters,
        "coverage": graph.coverage,
        "samples": samples,
        "trace": round(time.perf_counter() - begin, 1),
        "uncut": subject.score(subject.model),
    }

    @cache
    def allocation() -> Allocation:
        target = round(0.9 * graph.parameters)
        return evolvenet.allocate(subject.model, graph, target, subject.calibration, samples=samples)

    def cut(kind: str, level: int) -> dict[str, Any]:
        torch.manual_seed(0)
        target, begin = round((1 - level / 100) * graph.parameters), time.perf_counter()
        model, report = METHODS[kind][1](
            subject, copied(subject.model), graph, lambda most: allocation().at(most), target
        )
        seconds = round(time.perf_counter() - begin, 1)
        left = parameters(model) / graph.parameters
        return {"seconds": seconds, "report": report, "left": left, "score": subject.score(model.eval())}

    return known, cut


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
    return options.keep_old or found["method"] == "tp" or found["state"] == options.made_of["state"]


def _line(found: Mapping[str, Any]) -> str:
    head = f"{found['name']} " + (f"−{found['level']} % {found['method']}: " if "level" in found else "")
    if "failed" in found:
        return head + found["failed"]
    return head + (
        f"score {found['score']:.2%} of {found['uncut']:.2%}, {found['left']:.1%} of {found['parameters']:,} parameters, "
        f"{found['seconds']} s"
    )


def write_page(path: Path, cache: Path) -> None:
    """Write the page from the results.

    Args:
        path: of the page.
        cache: folder of the results, `network/…json`.
    """
    found = {name: _results(cache / name) for name in SUBJECTS if (cache / name).is_dir()}
    records = [record for each in found.values() for record in each]
    commits = ", ".join(sorted({record["commit"] for record in records}))
    lines = [
        "# Shipped networks made smaller",
        "",
        f"Written by `make compare-shipped` (`python -m experiments.compare.shipped`) {machine_line()}; page at git {commit()}, "
        f"results at {commits}.",
        "",
        EXPLANATION,
        "",
        *_goals(found),
        "",
    ]
    for name, results in found.items():
        lines += _network(name, results)
    write_whole(path, "\n".join(lines).rstrip() + "\n")


def _results(folder: Path) -> list[dict[str, Any]]:
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    whole = [record for record in records if "level" in record]
    return whole or records


def _kept(results: Sequence[Mapping[str, Any]], kind: str, level: int) -> float | None:
    for record in results:
        if record.get("method") == kind and record.get("level") == level and "score" in record:
            return record["score"] / record["uncut"]
    return None


def _goals(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    level, least = GOAL
    rows = []
    for name, results in found.items():
        widths, tp, both = (_kept(results, kind, level) for kind in METHODS)
        ours = [each for each in (widths, both) if each is not None]
        if ours:
            other = "" if tp is None else f"{100 * tp:.1f}"
            rows.append([name, f"{100 * max(ours):.1f}", other, "met" if max(ours) >= least else "**missed**"])
        else:
            rows.append([name, "–", "", "**not run**"])
    return markdown(
        [f"−{level} %, % of the score kept", "ours, the better one", "Torch-Pruning", f"goal {least:.0%}"], rows, (0, 3)
    )


def _network(name: str, results: Sequence[Mapping[str, Any]]) -> list[str]:
    one = results[0]
    few = sorted({record["samples"] for record in results if record.get("samples", SAMPLES) != SAMPLES})
    trials = f", trials on {few[0]} inputs alone" if few else ""
    if "level" not in one:
        return [f"## {name}", "", f"Not run: {one['failed']}", ""]
    lines = [
        f"## {name} {one['version']}: {100 * one['uncut']:.2f} % uncut",
        "",
        f"{one['task']}. {one['parameters']:,} parameters, coverage {one['coverage']:.1%}, traced in {one['trace']} s{trials}.",
        "",
    ]
    levels = sorted({record["level"] for record in results})
    rows = [[label, *(_cell(results, kind, level) for level in levels)] for kind, (label, _) in METHODS.items()]
    return [*lines, *markdown(["", *(f"−{level} %" for level in levels)], [row for row in rows if any(row[1:])]), ""]


def _cell(results: Sequence[Mapping[str, Any]], kind: str, level: int) -> str:
    kept = _kept(results, kind, level)
    if kept is not None:
        return f"{100 * kept:.1f}"
    failed = any(record.get("method") == kind and record.get("level") == level for record in results)
    return "–" if failed else ""


if __name__ == "__main__":
    main()

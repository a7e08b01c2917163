"""The table `experiments/coverage/coverage.md`, written from the results of `experiments.coverage.run`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from statistics import fmean, median

from experiments.coverage.cells import RUNS, Record, equal, figures_of, passed, short, trouble
from experiments.coverage.family_table import family_lines
from experiments.pages import machine_line, markdown, write_whole

OURS, PEER = "evolvenet", "torch-pruning"
CHECKED = ("pruned", "grown", "permuted")
Records = Mapping[tuple[str, str], Record]
"""(model, part) → what its process has written."""


EXPLANATION = """Each model has random weights and runs in a process of its own. Figures come from that run only.

- **widths**: how many can be resized, of how many found. **coverage**: share of the parameters that falls to resizable
  widths; an entry that lies in several widths (hidden units and a stream) is divided equally between them.
- **frozen, and why**: widths, their share of the parameters, reason; the weightiest first. The model's outputs and inputs
  (colours, vocabulary) are left out: they are given.
- **pruned**: every resizable width to 70 % of its units at once, by weights alone; then a forward pass in eval mode, one in
  train mode and a backward pass of two samples. Share of the parameters that is left.
- **grown**: 25 % more units, and 0, 1 or 2 besides, in every width at once, and the same removed again; the output's larger
  relative difference in float64 (float32, marked, above 100 million parameters or where the model's own code computes in
  float32), equal up to 1e-9 (1e-4). Widths whose units are mixed with each other (a layer norm over them) cannot grow without
  changing the function: they are left out, and counted.
- **permuted**: the units of every width in another order at once; the same comparison.
- **seconds**: of processor time for tracing and proving all widths, in one thread.
- **Torch-Pruning**: the same 30 % everywhere without hints, the last layer kept; then the same three passes. A cross is what
  it or the model raised.
- Models of transformers return one output alone; segmenters have their auxiliary head, which train mode runs.
"""


def write_table(
    path: Path, names: Sequence[str], records: Records, limits: Mapping[str, float], memory: float, state: str
) -> None:
    """Write the whole file.

    Args:
        path: of the file.
        names: every model, "library/name", in order.
        records: what was found.
        limits: seconds that a model had, by part.
        memory: gigabytes of address space that a model had.
        state: fingerprint of the package as it is now.
    """
    old = [name for name, part in records if part == OURS and records[name, part]["state"] != state]
    lines = [
        "# Which models can be traced, pruned and grown",
        "",
        f"Written by `make coverage` {machine_line()}, with the package in state {state} (`experiments.coverage.run.state()`). "
        f"Limits: {limits[OURS]:.0f} s a model, {limits[PEER]:.0f} s for Torch-Pruning, {memory:.0f} GB of address space.",
        "",
    ]
    if old:
        lines += [f"{len(old)} of the models were run with an older state of EvolveNet than the present one.", ""]
    lines += [EXPLANATION, *_totals(names, records), ""]
    families = {name.partition("/")[2]: found for (name, part), found in records.items() if part == OURS}
    lines += ["## Families of the transformers library", "", *family_lines(families), ""]
    for library, group in groupby(names, key=lambda name: name.partition("/")[0]):
        lines += [f"## {library}", "", *_library(list(group), records), ""]
    write_whole(path, "\n".join(lines).rstrip() + "\n")


def _totals(names: Sequence[str], records: Records) -> list[str]:
    head = [
        "",
        "models",
        "run",
        "traced",
        *CHECKED,
        "coverage: mean",
        "least",
        "seconds: median",
        "most",
        "Torch-Pruning",
    ]
    groups = groupby(names, key=lambda name: name.partition("/")[0])
    rows = [_total(library, list(group), records) for library, group in groups]
    return markdown(head, [*rows, _total("all", names, records)], text=(0, 8))


def _total(label: str, names: Sequence[str], records: Records) -> list[str]:
    ours = [records[name, OURS] for name in names if (name, OURS) in records]
    peers = [records[name, PEER] for name in names if (name, PEER) in records]
    traced = [record for record in ours if figures_of(record, "trace").get("ok")]
    coverage = {record["name"].partition("/")[2]: record["stages"]["trace"]["coverage"] for record in traced}
    seconds = {record["name"].partition("/")[2]: record["stages"]["trace"]["trace_seconds"] for record in traced}
    slowest = max(seconds, key=lambda name: seconds[name], default=None)
    least = min(coverage, key=lambda name: coverage[name], default=None)
    return [
        label,
        str(len(names)),
        str(len(ours)),
        str(len(traced)),
        str(sum(passed(figures_of(record, "prune")) for record in ours)),
        str(sum(bool(figures_of(record, "grow").get("equal")) for record in ours)),
        str(sum(bool(figures_of(record, "permute").get("equal")) for record in ours)),
        f"{fmean(coverage.values()):.1%}" if coverage else "",
        f"{coverage[least]:.1%} ({least})" if least else "",
        f"{median(seconds.values()):.1f}" if traced else "",
        f"{seconds[slowest]:.1f} ({slowest})" if slowest else "",
        f"{sum(passed(figures_of(record, 'cut')) for record in peers)} of {len(peers)}",
    ]


def _library(names: Sequence[str], records: Records) -> list[str]:
    head = ["model", "parameters", "seconds", "widths", "coverage", "frozen, and why", *CHECKED, "Torch-Pruning"]
    rows = []
    for name in names:
        record = records.get((name, OURS))
        peer = records.get((name, PEER))
        rows.append([name.partition("/")[2], *(_ours(record) if record else ["not run", *[""] * 7]), _peer(peer)])
    return markdown(head, rows, text=(0, 5, 6, 7, 8, 9))


def _ours(record: Record) -> list[str]:
    parameters = figures_of(record, "model").get("parameters")
    if parameters is None:
        return [f"could not be built: {short(record['stopped'] or 'no message')}", *[""] * 7]
    trace, coarse = figures_of(record, "trace"), ""
    cells = [f"{parameters:,}"]
    if not trace.get("ok"):
        return [*cells, trouble(record, "trace"), *[""] * 6]
    if figures_of(record, "permute").get("computes_in") == "float32":
        coarse = " (float32)"
    cells += [
        f"{trace['trace_seconds']:.1f}",
        f"{trace['resizable']} of {trace['widths']}",
        f"{trace['coverage']:.1%}",
        _frozen(trace["frozen"], parameters),
        _runs(record, "prune", parameters),
    ]
    for stage in ("grow", "permute"):
        figures = figures_of(record, stage)
        cells.append(equal(figures) + coarse if figures.get("ok") else trouble(record, stage))
    return cells


def _runs(record: Record, stage: str, parameters: int) -> str:
    figures = figures_of(record, stage)
    if not figures.get("ok"):
        return trouble(record, stage)
    if passed(figures):
        return f"yes, {figures['parameters'] / parameters:.0%} left"
    wrong = next(run for run in RUNS if figures[run] != "yes")
    return f"✗ {wrong}: {short(figures[wrong])}"


def _frozen(rows: Sequence[tuple[str, int, int]], parameters: int) -> str:
    cells = [f"{count} ({size / parameters:.1%}): {short(reason)}" for reason, count, size in rows[:2]]
    if len(rows) > 2:
        cells.append(f"{sum(count for _, count, _ in rows[2:])} for other reasons")
    return "; ".join(cells)


def _peer(record: Record | None) -> str:
    if record is None:
        return ""
    figures = figures_of(record, "cut")
    return "yes" if passed(figures) else _runs(record, "cut", 1)

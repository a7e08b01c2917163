"""The page `experiments/compare/time_to_accuracy.md`, written from the results of `experiments.compare.time_to_accuracy`."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from experiments.pages import cell, commit, machine_line, markdown, write_whole

GOAL = 10
"""Times fewer steps after a cut than from scratch, within a point."""
WIDTHS = {"own": "widths by `allocate`", "equal": "equal widths"}
STARTS = {"cut": "cut, then trained on", "polished": "cut, polished, then trained on", "scratch": "from scratch"}

EXPLANATION = """\
A trained network is cut to a part of its parameters by `evolvenet.prune` with unlabelled training samples (1,024 images, 256
sequences) and trained on, at once or after `evolvenet.polish` on the same samples, which needs no labels; or the same widths are
trained from new weights. (Widths of GPT-2 are chosen, and it is polished, by the divergence of what is predicted.) **How long
until it is within so many points of the uncut network?** All are trained with the
optimizer, the batches and the augmentation of the uncut network, in one cycle of the learning rate, and all with cycles of
several lengths, the short ones first, until one gets there; the two shortest with two largest learning rates each, the longer
ones with that which was better in the second. **Steps** are the fewest of all those cycles; where a cycle gets there before its
end, up to there.

- The accuracy is watched ten times in a cycle, on the even half of the test images (of GPT-2: next characters of validation
  text), which no network was trained on; it chooses between the rates, and training ends where the least margin is reached.
  **Judged**: on the other half (test text), at that moment, minus the uncut network's there, in points.
- **CPU seconds**: processor time of the training steps; watching is not counted. **With the cut**: plus tracing, `allocate`,
  `prune` and `polish`. Of a machine that other processes shared, so take ratios, not seconds.
- **–**: not reached in any cycle, the longest of which is named. All starts need the widths, and the cut needs the trained
  network: its training is not counted, that is what one has.
"""


def write_page(path: Path, cache: Path) -> None:
    """Write the whole page.

    Args:
        path: of the file.
        cache: folder of the results, `task/seedN/…json`.
    """
    lines = ["# From a trained network: time to accuracy", ""]
    lines += [
        f"Written by `python -m experiments.compare.time_to_accuracy` {machine_line()}, page at git {commit()}.",
        "",
    ]
    lines += [EXPLANATION]
    for task in sorted(each for each in cache.glob("*") if each.is_dir()):
        groups: dict[tuple[int, str], dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
        for file in sorted(task.glob("seed*/*-*-*.json")):
            found = json.loads(file.read_text(encoding="utf-8"))
            groups[found["kept"], found["widths"]][found["start"]].append(found)
        for (kept, widths), starts in sorted(groups.items()):
            lines += [*_section(task.name, kept, widths, starts), ""]
    write_whole(path, "\n".join(lines).rstrip() + "\n")


def _section(task: str, kept: int, widths: str, starts: dict[str, list[dict[str, Any]]]) -> list[str]:
    one = next(iter(starts.values()))
    first, sizes = one[0], sorted({each["parameters"] for each in one})
    uncut = cell([each["uncut"]["watched"] for each in one])
    cost = {name: fmean(each["seconds"][name] for each in one) for name in first["seconds"]}
    commits = ", ".join(sorted({each["commit"] for runs in starts.values() for each in runs}))
    head = f"## {task}, {kept} % of the parameters, {WIDTHS[widths]}"
    about = (
        f"{first['uncut_parameters']:,} → {' … '.join(f'{size:,}' for size in sizes)} parameters; uncut {uncut} % (watched); "
        f"seeds {', '.join(str(each['seed']) for each in one)}; {first['threads']} thread(s), at git {commits}. "
        f"CPU seconds of the cut: {', '.join(f'{name} {each:.1f}' for name, each in cost.items())}."
    )
    margins = sorted(
        {float(m) for runs in starts.values() for run in runs for c in run["climbs"] for m in c["crossed"]}
    )
    rows = [_row(start, starts, margin) for margin in margins for start in STARTS if start in starts]
    titles = ["within", "start", "steps of each seed", "CPU s", "with the cut", "that is, in steps", "judged, points"]
    lines = [head, "", about, ""]
    if rows:
        lines += [*markdown(titles, rows, text=(0, 1, 2)), ""]
        verdicts = _verdicts(starts, margins)
        lines += [*verdicts, ""] if verdicts else []
    return [*lines, *_cycles(starts)]


def _cycles(starts: dict[str, list[dict[str, Any]]]) -> list[str]:
    """What every cycle gave."""
    rows = [
        [STARTS[start], str(run["seed"]), f"{climb['steps']:,}", f"{climb['rate']:g}", *_best(climb)]
        for start in STARTS
        for run in starts.get(start, [])
        for climb in sorted(run["climbs"], key=lambda climb: (climb["steps"], climb["rate"]))
    ]
    return markdown(["every cycle", "seed", "steps", "rate", "watched at step 0, %", "best, %", "at step"], rows)


def _best(climb: dict[str, Any]) -> list[str]:
    step, accuracy = max(climb["curve"], key=lambda each: each[1])
    return [f"{100 * climb['curve'][0][1]:.2f}", f"{100 * accuracy:.2f}", f"{step:,}"]


def _row(start: str, starts: dict[str, list[dict[str, Any]]], margin: float) -> list[str]:
    runs = starts[start]
    best = [(run, first_crossing(run, margin)) for run in runs]
    reached = [(run, each) for run, each in best if each is not None]
    longest = max(climb["steps"] for run in runs for climb in run["climbs"])
    steps = " ".join("–" if each is None else f"{each['step']:,}" for _, each in best)
    title = [f"{margin:g} point{'s' if margin != 1 else ''}", STARTS[start], steps]
    if len(reached) < len(best):
        title[-1] += f" (longest cycle {longest:,})"
    if not reached:
        return [*title, "", "", "", ""]
    cuts = [sum(run["seconds"].values()) if start != "scratch" else 0.0 for run, _ in reached]
    whole = [each["seconds"] + cut for (_, each), cut in zip(reached, cuts, strict=True)]
    each_step = seconds_a_step([run for found in starts.values() for run in found])
    equal = [total / each_step for total in whole]
    judged = [100 * (each["judged"] - run["uncut"]["judged"]) for run, each in reached]
    figures = [f"{fmean(each['seconds'] for _, each in reached):.1f}", f"{fmean(whole):.1f}", f"{fmean(equal):,.0f}"]
    return [*title, *figures, f"{fmean(judged):+.2f}"]


def first_crossing(run: dict[str, Any], margin: float) -> dict[str, Any] | None:
    """The crossing of a margin with the fewest steps, of all cycles of a run; None if none got there."""
    found = [climb["crossed"][f"{margin:g}"] for climb in run["climbs"] if f"{margin:g}" in climb["crossed"]]
    return min(found, key=lambda each: each["step"]) if found else None


def seconds_a_step(runs: Sequence[dict[str, Any]]) -> float:
    """Processor time of a training step of the small network, mean over all cycles that had any; infinite if none had.

    From all starts: one that is near enough at once has no steps of its own.
    """
    known = [climb["seconds_a_step"] for run in runs for climb in run["climbs"] if climb["seconds_a_step"]]
    return fmean(known) if known else math.inf


def _verdicts(starts: dict[str, list[dict[str, Any]]], margins: Sequence[float]) -> list[str]:
    """Steps from scratch over steps after the cut, by margin."""
    lines = []
    for start, margin in product(
        (start for start in ("cut", "polished") if {start, "scratch"} <= set(starts)), margins
    ):
        cut, scratch = ([first_crossing(run, margin) for run in starts[each]] for each in (start, "scratch"))
        if any(each is None for each in cut):
            continue
        after, before = (sum(each["step"] for each in both if each) for both in (cut, scratch))
        lacking = any(each is None for each in scratch)
        ratio = "0 steps against " + f"{before:,}" if not after else f"{before / after:.1f} times fewer steps"
        ratio = "from scratch it is not reached in these cycles" if lacking else ratio
        met = lacking or before >= GOAL * after
        lines.append(
            f"- {STARTS[start]}, within {margin:g}: {ratio}"
            + (f" (goal {GOAL}): {'met' if met else '**missed**'}" if margin == 1 else "")
            + _with_polish(starts[start], after, 0 if lacking else before)
        )
    return lines


def _with_polish(runs: Sequence[dict[str, Any]], after: int, before: int) -> str:
    """The same if the steps of the polish, which see no label, count as steps of training."""
    polish = sum(run.get("polish_steps", 0) for run in runs)
    if not polish:
        return ""
    ratio = f", {before / (after + polish):.1f} times fewer" if before else ""
    return f"; with the {polish:,} steps of the polish, which see no label, {after + polish:,} steps{ratio}"

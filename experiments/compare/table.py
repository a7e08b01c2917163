"""The table `experiments/compare/pruning.md`, written from the results of `experiments.compare.pruning`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

from experiments.compare.records import Record, read
from experiments.pages import cell, commit, machine_line, markdown, write_whole

Cell = tuple[str, int, str]
"""Allocation, percent of the parameters removed, method."""

ALLOCATIONS = {"equal": "Equal widths for all methods", "own": "Each method's own allocation"}

ONE_SHOT = {
    ("l2", "as_cut"): "Torch-Pruning L2",
    ("l2", "reestimated"): "Torch-Pruning L2 + BatchNorm re-estimated",
    ("bn", "as_cut"): "Torch-Pruning BN-scale",
    ("bn", "reestimated"): "Torch-Pruning BN-scale + BatchNorm re-estimated",
    ("random", "reestimated"): "random + BatchNorm re-estimated",
    ("projection", "reestimated"): "projection of 2021 + BatchNorm re-estimated",
    ("weights", "as_cut"): "ours, weights only",
    ("ours", "as_cut"): "**ours**",
}
"""(method, which accuracy) → what the row is called."""

AFTER = {
    "l2": "Torch-Pruning L2",
    "bn": "Torch-Pruning BN-scale",
    "random": "random",
    "projection": "projection of 2021",
    "weights": "ours, weights only",
    "ours": "**ours**",
}

OURS = ("weights", "ours")

GOALS = {
    ("mnist", "equal"): {30: 0.992, 50: 0.991, 70: 0.989, 90: 0.97},
    ("mnist", "own"): {30: 0.993, 50: 0.992, 70: 0.99, 90: 0.986},
}
"""The accuracy right after the cut at which our goal is met."""

HALF = ("cifar10",)
"""Data sets on which the goal is to lose less than half of what the best peer loses."""

EXPLANATION = """Accuracy on the test split, %, mean ± standard deviation (of a sample) over n trained networks. Columns: share of
the parameters removed.

- **one shot**: right after the cut, nothing trained since. **After an epoch**: one epoch over all training images after the
  cut (AdamW at 1e-3, 5 % warm-up, cosine to 0; the same order of images, augmentation and schedule for all methods; in
  bfloat16). Training re-estimates BatchNorm's statistics in any case, so each method is trained once.
- **Torch-Pruning** 1.6.1, L2: `GroupMagnitudeImportance(p=2)`; BN-scale: `BNScaleImportance`, which leaves units without a
  BatchNorm alone; at equal widths those go by L2. Own allocation: `global_pruning=True`, its ratio such that the parameter
  count fits. The units are its choice, the cut is done by `evolvenet.resize`; the result is the same as that of its own cut
  (`tests/experiments/compare_torch_pruning.py`).
- **BatchNorm re-estimated**: mean over 4 batches of 256 training images, the same 1,024 images that ours measures on.
- **random**: own allocation: the least of one random number a unit, over the whole network.
- **projection of 2021**: that of SVD-evolutive-CNN (Dejaegher 2021). The first units stay, and the consumers' removed columns
  times U21·U11ᵀ of the producers' SVD are added to the kept ones (`experiments.compare.peers.project_consumers`); own
  allocation: as many units as directions hold the same share of each width's energy.
- **ours**: `evolvenet.prune` with 1,024 unlabelled training images, **weights only** without; own allocation:
  `evolvenet.allocate`.
"""


def write_table(path: Path, cache: Path, state: str) -> None:
    """Write the whole file.

    Args:
        path: of the file.
        cache: folder of the results, `task/seedN/…json`.
        state: fingerprint of the package as it is now.
    """
    lines = [
        "# Pruning compared with peers",
        "",
        f"Written by `make compare` (`python -m experiments.compare.pruning`) {machine_line()}, git {commit()}, package in "
        f"state {state} (`experiments.coverage.run.state()`).",
        "",
        EXPLANATION,
    ]
    for folder in sorted(cache.glob("*"), key=lambda found: (found.name != "mnist", found.name)):
        lines += _task(folder, state)
    write_whole(path, "\n".join(lines).rstrip() + "\n")


def _cell(record: Record) -> Cell:
    return record["allocation"], record["ratio"], record["method"]


def _task(folder: Path, state: str) -> list[str]:
    trained, found = read(folder, None, _cell)
    if not trained:
        return []
    one = next(iter(trained.values()))
    seeds = ", ".join(map(str, sorted(trained)))
    lines = [
        f"## {folder.name}: uncut {cell([record['accuracy'] for record in trained.values()])} %",
        "",
        f"{one['parameters']:,} parameters, {one['epochs']} epochs; n = {len(trained)}, seeds {seeds}.",
        "",
    ]
    records = [record for by_seed in found.values() for record in by_seed.values()]
    old = sum(record["method"] in OURS and record["state"] != state for record in records)
    if old:
        lines += [f"{old} of our results are of an older state of the package than the present one.", ""]
    for allocation, title in ALLOCATIONS.items():
        chosen = {(ratio, method): rows for (kind, ratio, method), rows in found.items() if kind == allocation}
        if chosen:
            uncut = fmean(record["accuracy"] for record in trained.values())
            off = f"Parameters left: off by at most {_off(chosen, one['parameters']):.1%} of the uncut network's."
            lines += [f"### {title}", "", off, "", *_tables(chosen, len(trained)), ""]
            lines += goals(folder.name, allocation, chosen, uncut)
    return lines


def _off(found: Mapping[tuple[int, str], Mapping[int, Record]], whole: int) -> float:
    """Largest miss of a parameter count, as a share of the uncut network's."""
    return max(
        abs(record["parameters"] / whole - (1 - ratio / 100))
        for (ratio, _), by_seed in found.items()
        for record in by_seed.values()
    )


def _tables(found: Mapping[tuple[int, str], Mapping[int, Record]], count: int) -> list[str]:
    ratios = sorted({ratio for ratio, _ in found})
    rows = [
        [label, *(_shown(found.get((ratio, method), {}), what, count) for ratio in ratios)]
        for (method, what), label in ONE_SHOT.items()
    ]
    after = [
        [label, *(_shown(found.get((ratio, method), {}), "after_epoch", count) for ratio in ratios)]
        for method, label in AFTER.items()
    ]
    titles = [f"{ratio} %" for ratio in ratios]
    return [*markdown(["one shot", *titles], rows), "", *markdown(["after an epoch", *titles], after)]


def _shown(by_seed: Mapping[int, Record], what: str, count: int) -> str:
    values = [record[what] for record in by_seed.values() if what in record]
    return cell(values) + (f" (n = {len(values)})" if 0 < len(values) < count else "")


def goals(task: str, allocation: str, found: Mapping[tuple[int, str], Mapping[int, Record]], uncut: float) -> list[str]:
    """The goal at each ratio, and whether it is met."""
    means = {
        (ratio, method, what): fmean(record[what] for record in by_seed.values())
        for (ratio, method), by_seed in found.items()
        for kind, what in ONE_SHOT
        if kind == method
    }
    lines = []
    for ratio in sorted({ratio for ratio, method in found if method == "ours"}):
        got = means[ratio, "ours", "as_cut"]
        least = GOALS.get((task, allocation), {}).get(ratio)
        peers = {
            ONE_SHOT[kind, what]: mean for (at, kind, what), mean in means.items() if at == ratio and kind not in OURS
        }
        if least is not None:
            lines.append(f"- {ratio} %: {_percent(got)} %, goal ≥ {_percent(least)} %: {_verdict(got >= least)}")
        elif task in HALF and peers:
            best = max(peers, key=lambda name: peers[name])
            lost, theirs = uncut - got, uncut - peers[best]
            lines.append(
                f"- {ratio} %: ours loses {100 * lost:.2f} points, the best peer ({best}) {100 * theirs:.2f}, "
                f"goal less than half of it: {_verdict(lost < theirs / 2)}"
            )
    return ["Goals for ours, one shot:", "", *lines, ""] if lines else []


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


def _verdict(met: bool) -> str:
    return "met" if met else "**not met**"

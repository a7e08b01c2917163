"""The page `experiments/compare/lowrank.md`, written from the results of `experiments.compare.lowrank`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from experiments.compare.lowrank_methods import METHODS
from experiments.compare.records import Record, read
from experiments.pages import commit, machine_line, markdown, span, write_whole

Results = Mapping[tuple[str, str], Mapping[int, Record]]
"""{(level, method): {seed: result}}."""

TITLES = {
    "mnist": "MNIST, residual network",
    "cifar10": "CIFAR-10 (JPEG), residual network",
    "mnist_vit": "MNIST, vision transformer",
    "mnist_dense": "MNIST, dense network",
}

EXPLANATION = """Columns: what is limited, and the share of it that is removed. Means over the seeds, in brackets the least and
the largest; without brackets it is one network alone. An empty cell was not run, or the method cannot do it; "–": it cannot
make the network so small.

- **output error**: Σ‖y' − y‖² / Σ‖y − mean‖² of the logits, over the 10,000 test images, one shot; **accuracy**: on the same
  images, %, right after the cut, nothing trained since. **After an epoch**: one epoch over all training images (AdamW at 1e-3,
  5 % warm-up, cosine to 0; the same order of images, augmentation and schedule for all methods; in bfloat16).
- **latency**: the least of several forward passes on one thread, over that of the uncut network, timed in turns with it; for a
  batch of 1 / of 64. **Latency** as a limit: that of a batch of 64. Both are as good as the machine is quiet: while other work
  takes its cores, a search for a latency that is timed then can cut far too much: one of `compress` on the MNIST residual network
  reached 0.33 in place of 0.70 (error 0.43), and was run again. Measure latencies with nothing beside.
- Methods with data measure on 512 random training images, the same for all. **widths alone**: `evolvenet.allocate` and
  `evolvenet.prune`; for multiply-accumulates and latency `evolvenet.compress(…, lowrank=False)`. **ranks**:
  `evolvenet.factorize` with the limit as its budget and one kind for kernels wider than 1 ("svd" for all other layers),
  **whitened** with the images, **plain** without. **widths and ranks**: `evolvenet.compress`.
- **truncated SVD, equal ratios**: each layer but the last at the rank that leaves the same share of its parameters.
  **tensorly-torch**: its `FactorizedConv.from_conv` (Tucker, full rank along the kernel) and `FactorizedLinear` (tensor-train
  matrix of two modes), the same share for each layer but the last. Its factorized dense layers multiply more often than whole
  ones; where multiply-accumulates are limited, dense layers stay whole. Neither peer uses data.
"""

TRAINING = "in_training.json"
"""In the cache: {"widths": [accuracy of each seed], "both": [the same]} of training under a budget of 5 % of the parameters."""


def _key(record: Record) -> tuple[str, str]:
    return record["level"], record["method"]


def write_page(path: Path, cache: Path) -> None:
    """Write the whole page.

    Args:
        path: of the file.
        cache: folder of the results, `network/seedN/…json`.
    """
    found = {name: read(cache / name, METHODS, _key) for name in [*TITLES, "digits"] if (cache / name).is_dir()}
    training = cache / TRAINING
    trained = json.loads(training.read_text(encoding="utf-8")) if training.exists() else {}
    lines = [
        "# Widths and ranks compared",
        "",
        f"Written by `make compare-lowrank` (`python -m experiments.compare.lowrank`) {machine_line()}; page at git "
        f"{commit()}, results at the commits named below.",
        "",
        *markdown(["goal, one shot", "measured, mean of n networks", ""], list(goals(found, trained)), text=(0, 1, 2)),
        "",
        EXPLANATION,
    ]
    for name, (uncut, results) in found.items():
        lines += _network(TITLES.get(name, name), uncut, results) if results else []
    write_whole(path, "\n".join(lines).rstrip() + "\n")


# Goals


def goals(
    found: Mapping[str, tuple[Mapping[int, Record], Results]], training: Mapping[str, Sequence[float]]
) -> Iterator[list[str]]:
    """A row for each goal: what it is, what was measured, whether it is met."""
    yield _never_worse(found)
    _, mnist = found.get("mnist", ({}, {}))
    for removed, most in ((50, 1e-4), (70, 7e-4), (90, 0.016)):
        error = _values(mnist, f"parameters-{removed}", "both", "error")
        goal = f"MNIST residual network, −{removed} % of parameters: output error ≤ {most:g}"
        yield _row(goal, error, lambda value, most=most: value <= most, "{:.2e}")
    for network, level, wanted, goal in (
        ("cifar10", "macs-50", -1.2, "CIFAR-10, −50 % of MACs: within 1.2 points of uncut"),
        ("mnist_dense", "parameters-90", -0.6, "dense network, −90 % of parameters: within 0.6 points of uncut"),
    ):
        uncut, results = found.get(network, ({}, {}))
        gained = _gain(results, level, "accuracy", lambda seed, uncut=uncut: uncut[seed]["accuracy"])
        yield _row(goal, gained, lambda value, wanted=wanted: value >= wanted, "{:+.2f} points")
    _, cifar = found.get("cifar10", ({}, {}))
    for level, what, wanted, goal in (
        ("macs-70", "accuracy", 2.5, "CIFAR-10, −70 % of MACs: at least 2.5 points above widths alone"),
        ("parameters-90", "accuracy", 5.0, "CIFAR-10, −90 % of parameters: at least 5 points above widths alone"),
        ("parameters-90", "after_epoch", 2.5, "the same after an epoch: at least 2.5 points above widths alone"),
    ):
        alone = cifar.get((level, "widths"), {})
        gained = _gain(cifar, level, what, lambda seed, what=what, alone=alone: alone.get(seed, {}).get(what))
        yield _row(goal, gained, lambda value, wanted=wanted: value >= wanted, "{:+.2f} points")
    pairs = zip(training["both"], training["widths"], strict=True) if training else []
    gained = [100 * (mine - beside) for mine, beside in pairs]
    goal = "in training, budget of 5 % of the parameters, 5 seeds: at least 0.5 points above widths alone"
    yield _row(goal, gained, lambda value: value >= 0.5, "{:+.2f} points")
    yield _never_slower(found)


def _never_slower(found: Mapping[str, tuple[Mapping[int, Record], Results]]) -> list[str]:
    ratios = [
        (record["latency_64"], f"{TITLES.get(name, name)}, {METHODS[method].label}, seed {seed}")
        for name, (_, results) in found.items()
        for (level, method), by_seed in results.items()
        for seed, record in by_seed.items()
        if level.startswith("latency") and "latency_64" in record
    ]
    goal = "no result of a limit on latency slower than the uncut network"
    if not ratios:
        return [goal, "not run", ""]
    ratio, where = max(ratios)
    return [goal, f"at most {ratio:.2f} of uncut ({where})", _verdict(ratio <= 1)]


def _never_worse(found: Mapping[str, tuple[Mapping[int, Record], Results]]) -> list[str]:
    ratios = [
        (record["error"] / other["error"], f"{TITLES.get(name, name)}, {level}, seed {seed}")
        for name, (_, results) in found.items()
        for (level, method), by_seed in results.items()
        if method == "both"
        for seed, record in by_seed.items()
        if "error" in record and "error" in (other := results.get((level, "widths"), {}).get(seed, {}))
    ]
    goal = "output error never more than 1.02 times that of widths alone"
    if not ratios:
        return [goal, "not run", ""]
    missed = [f"{ratio:.3f} ({where})" for ratio, where in sorted(ratios, reverse=True) if ratio > 1.02]
    value, where = max(ratios)
    shown = f"at most {value:.3f} times ({where}), {len(ratios)} pairs"
    return [goal, "; ".join(missed) if missed else shown, _verdict(not missed)]


def _values(results: Results, level: str, method: str, what: str) -> list[float]:
    return [record[what] for record in results.get((level, method), {}).values() if what in record]


def _gain(results: Results, level: str, what: str, other: Callable[[int], float | None]) -> list[float]:
    """Points that `compress` is above another accuracy of the same seed."""
    pairs = [
        (record[what], beside)
        for seed, record in results.get((level, "both"), {}).items()
        if what in record and (beside := other(seed)) is not None
    ]
    return [100 * (mine - beside) for mine, beside in pairs]


def _row(goal: str, values: Sequence[float], met: Callable[[float], bool], shown: str) -> list[str]:
    """A goal for the mean of one value a network."""
    if not values:
        return [goal, "not run", ""]
    value = fmean(values)
    return [goal, f"{shown.format(value)}, n = {len(values)}", _verdict(met(value))]


def _verdict(met: bool) -> str:
    return "met" if met else "**missed**"


# Tables


def _network(title: str, uncut: Mapping[int, Record], results: Results) -> list[str]:
    one = next(iter(uncut.values()))
    ran = sorted({seed for by_seed in results.values() for seed in by_seed})
    made = sorted(
        {record["commit"] for by_seed in results.values() for record in by_seed.values() if "commit" in record}
    )
    accuracy = _shown([uncut[seed]["accuracy"] for seed in ran], _percent)
    lines = [
        f"## {title}: uncut {accuracy} %",
        "",
        f"{one['parameters']:,} parameters, {one['epochs']} epochs; seeds {', '.join(map(str, ran))}; "
        f"ours at git {', '.join(made)}.",
        "",
    ]
    levels = sorted({level for level, _ in results}, key=lambda level: (_ORDER.index(level.split("-")[0]), level))
    titles = [f"−{level.split('-')[1]} % {level.split('-')[0]}" for level in levels]
    for heading, show in COLUMNS.items():
        rows = [
            [method.label, *(show(list(results.get((level, name), {}).values())) for level in levels)]
            for name, method in METHODS.items()
            if any(name == other for _, other in results)
        ]
        rows = [row for row in rows if any(row[1:])]
        lines += [*markdown([heading, *titles], rows), ""] if rows else []
    return lines


_ORDER = ("parameters", "macs", "latency")


def _figure(what: str, form: Callable[[float], str]) -> Callable[[Sequence[Record]], str]:
    def show(records: Sequence[Record]) -> str:
        if records and all("refused" in record for record in records):
            return "–"
        return _shown([record[what] for record in records if what in record], form)

    return show


def _two(one: str, other: str, form: Callable[[float], str]) -> Callable[[Sequence[Record]], str]:
    """Means of two figures."""

    def show(records: Sequence[Record]) -> str:
        pairs = [(record[one], record[other]) for record in records if one in record]
        return " / ".join(form(fmean(values)) for values in zip(*pairs, strict=True))

    return show


def _shown(values: Sequence[float], form: Callable[[float], str]) -> str:
    if not values:
        return ""
    spread = span([form(value) for value in sorted(values)])
    return form(fmean(values)) + (f" ({spread})" if len(values) > 1 else "")


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


COLUMNS: Mapping[str, Callable[[Sequence[Record]], str]] = {
    "output error": _figure("error", lambda error: f"{error:.1e}"),
    "accuracy, one shot": _figure("accuracy", _percent),
    "accuracy after an epoch": _figure("after_epoch", _percent),
    "latency, batch 1 / 64": _two("latency_1", "latency_64", lambda ratio: f"{ratio:.2f}"),
    "% of parameters / MACs left": _two("parameters", "macs", lambda share: f"{100 * share:.1f}"),
}

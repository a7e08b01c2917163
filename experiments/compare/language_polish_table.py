"""The page `experiments/compare/language_polish.md`, written from the results of `experiments.compare.language_polish`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from experiments.compare.language_networks import KINDS
from experiments.compare.language_table import GOALS, Results, key, shown_span, verdict
from experiments.compare.records import Record, read
from experiments.pages import by_hand, commit, machine_line, markdown, span, write_whole

LABELS = {
    "ffn": "**ours, inner units**",
    "widths": "**ours, all widths with heads**",
    "both": "**ours, widths and ranks (`compress`)**",
    "svd_llm": "ranks as in SVD-LLM",
    "slicegpt": "rotated stream as in SliceGPT",
    "tp_llm": "Torch-Pruning's recipe for LLMs",
}
"""Methods by name, see `experiments.compare.language`."""

OURS = ("ffn", "widths", "both")

COLUMNS = {"right after the cut": "cut", "polished": "polished"}

EXPLANATION = """The cuts, the samples and the figures are as in [language.md](language.md), **the networks are not**:
these were trained on a CPU, for as many steps as their heading says, on the text of another machine. Rows compare within this
page alone. Figures: by how much the mean cross-entropy of the next character rises on the test text, in nats.

- **polished**: after the cut `evolvenet.polish`, with the same settings for all methods, no labels and no other text: the 256
  sequences of the cut, of which an eighth decides whether the weights are kept, and for each of the others some that the uncut
  network itself writes from its first characters (data-free distillation, as in Liu et al. (2023), "LLM-QAT"). The divergence
  of the predicted probabilities is made less. Where the learning rate is too large for a method, a fifth of it is tried, and a
  fifth of that: then its steps are more.
- **ours**: sizes by `evolvenet.allocate(…, loss="kl")`; `evolvenet.compress(…, loss="kl")`.
- Of our methods the best on validation text counts for a goal, of the others the best on the test text; of each only methods
  that were run with as many seeds as any. Figures of several seeds are means, in brackets the least and the largest.
"""


def write_page(path: Path, cache: Path, size: str = "") -> None:
    """Write the page; what is written by hand in it stays, see `by_hand`.

    Args:
        path: of the file.
        cache: folder of the results, `network/seedN/…json`.
        size: option of the command that selects the networks' size.
    """
    command = f"python -m experiments.compare.language_polish {size}".strip()
    found = {kind: read(cache / kind, LABELS, key) for kind in KINDS}
    lines = ["# Language models, polished", ""]
    lines += [
        f"Written by `{command}` {machine_line()}; page at git {commit()}.",
        "",
    ]
    lines += [*markdown(["goal, polished", "measured, mean", ""], list(goals(found)), text=(0, 1, 2)), "", EXPLANATION]
    lines += [*kept, ""] if (kept := by_hand(path)) else []
    for kind, (uncut, results) in found.items():
        lines += _network(KINDS[kind], uncut, results) if results else []
    write_whole(path, "\n".join(lines).rstrip() + "\n")


def goals(found: Mapping[str, tuple[Mapping[int, Record], Results]]) -> Iterator[list[str]]:
    """A row for each goal: what it is, what was measured, whether it is met."""
    for kind, (_, results) in found.items():
        for level in sorted({level for level, _ in results}):
            done = {name: _polished(results, level, name) for name in LABELS}
            # Means over other networks do not compare.
            most = max(map(len, done.values()))
            full = {name: values for name, values in done.items() if len(values) == most > 0}
            means, tests = (
                {name: fmean(value[part] for value in values) for name, values in full.items()}
                for part in ("validation", "test")
            )
            ours = min((name for name in means if name in OURS), key=means.__getitem__, default=None)
            goal = GOALS[level]
            absolute = f"{KINDS[kind]}, −{level} %: at most {goal:+.3f}"
            if ours is None:
                yield [absolute, "not run with all seeds", "–"]
                continue
            shown = f"{tests[ours]:+.4f} ({LABELS[ours].replace('*', '')})"
            yield [absolute, shown, verdict(tests[ours] <= goal)]
            peer = min((name for name in means if name not in OURS), key=tests.__getitem__, default=None)
            if peer is not None:
                half = f"{KINDS[kind]}, −{level} %: at most half of the best other, polished too"
                against = f"{shown} against {tests[peer]:+.4f} ({LABELS[peer]})"
                yield [half, against, verdict(tests[ours] <= tests[peer] / 2)]


def _polished(results: Results, level: int, name: str) -> list[Mapping[str, float]]:
    """Of each seed the rises on validation and test text."""
    return [record["polished"] for record in results.get((level, name), {}).values() if "polished" in record]


def _network(title: str, uncut: Mapping[int, Record], results: Results) -> list[str]:
    one = next(iter(uncut.values()))
    records = [record for by_seed in results.values() for record in by_seed.values()]
    done = [record for record in records if "polished" in record]
    made = ", ".join(sorted({record["commit"] for record in records}))
    steps, sequences = (
        span(sorted({f"{record[what]:,}" for record in done})) if done else "–" for what in ("polish_steps", "samples")
    )
    lines = [
        f"## {title}: uncut {shown_span([record['test'] for record in uncut.values()], '{:.3f}')} nats a character",
        "",
        f"{one['parameters']:,} parameters; text {one['text']} of {one['characters']:,} characters; "
        f"{one['steps']:,} training steps on {one['device']}; seeds {', '.join(map(str, sorted(uncut)))}; at git {made}. "
        f"Processor seconds of one thread: {_seconds(done, 'seconds_to_cut')} to cut, "
        f"{_seconds(done, 'seconds_to_polish')} to polish ({steps} steps, {sequences} sequences).",
        "",
    ]
    levels = sorted({level for level, _ in results})
    for heading, what in COLUMNS.items():
        rows = [
            [
                LABELS[name],
                *(_cell(list(results.get((level, name), {}).values()), what, len(uncut)) for level in levels),
            ]
            for name in LABELS
        ]
        lines += [*markdown([heading, *(f"−{level} %" for level in levels)], [row for row in rows if any(row[1:])]), ""]
    return lines


def _seconds(records: Sequence[Record], what: str) -> str:
    return span([f"{value:.0f}" for value in sorted(record[what] for record in records)]) if records else "–"


def _cell(records: Sequence[Record], what: str, count: int) -> str:
    if records and all("refused" in record for record in records):
        return "–"
    values = [record[what]["test"] for record in records if what in record]
    return shown_span(values, "{:+.4f}") + (f" n = {len(values)}" if 0 < len(values) < count else "")

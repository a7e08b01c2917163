"""The page `experiments/compare/language.md`, written from the results of `experiments.compare.language`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from experiments.compare.language_methods import METHODS
from experiments.compare.language_networks import FULL, KINDS
from experiments.compare.records import Record, read
from experiments.pages import commit, machine_line, markdown, span, write_whole

Results = Mapping[tuple[int, str], Mapping[int, Record]]
"""{(percent removed, method): {seed: result}}."""

GOALS = {20: 0.010, 30: 0.018, 50: 0.060}
"""Percent removed → the most that the test loss may rise."""

EXPLANATION = f"""Characters of Python's documentation (`pydoc_data.topics`) and of the licences installed with it, each
paragraph once. Of each twenty pieces of 4,096 characters one is validation text, by which settings were chosen, and one test
text. The networks have {FULL.layers} blocks of width {FULL.width} with {FULL.heads} heads, LLaMA {FULL.heads // 2} for keys
and values, sequences of {FULL.context} characters, training steps of {FULL.batch} sequences. Columns: share of
the parameters that is removed. Figures: by how much the mean cross-entropy of the next character rises on the test text, in
nats; means over the seeds, in brackets the least and the largest.

- **right after**: nothing trained since. **After {FULL.steps_after} steps**: of training on, AdamW at {FULL.rate_after:g}, the
  same sequences for all methods. Rises are against the uncut network, which is not trained on: negative ones are possible.
- Methods with data measure on the same {FULL.calibration} sequences of the training text, without labels.
- **ours**: `evolvenet.allocate` and `evolvenet.prune`, for inner units of the feed-forward parts alone, and for stream, whole
  heads and inner units; **not fitted**: the same units, with the weights as they were; `evolvenet.factorize`;
  `evolvenet.compress`. For ranks GPT-2 has `nn.Linear` in the place of its Conv1D.
- **Torch-Pruning**: units by `GroupMagnitudeImportance(p=2)`, one share of all widths. Its recipe for LLMs
  (`examples/LLMs/prune_llm.py`): stream, whole heads (of LLaMA a key and value head with its queries) and inner units. The
  importance is computed by its formula on the graph's widths: its own search for groups takes minutes for each cut here.
- **SliceGPT**, **SVD-LLM**: minimal implementations (`experiments/compare/language_peers.py`); parameters of the added
  rotations count.
- What `evolvenet.polish` adds, after our cuts and the others', was measured on networks trained elsewhere:
  [language_polish.md](language_polish.md).
"""

COLUMNS = {"right after": "test", f"after {FULL.steps_after} steps": "after"}


def key(record: Record) -> tuple[int, str]:
    """Of a result: percent removed and method."""
    return record["level"], record["method"]


def write_page(path: Path, cache: Path) -> None:
    """Write the whole page.

    Args:
        path: of the file.
        cache: folder of the results, `network/seedN/…json`.
    """
    found = {kind: read(cache / kind, METHODS, key) for kind in KINDS}
    lines = [
        "# Language models compared",
        "",
        f"Written by `make compare-language` (`python -m experiments.compare.language`) {machine_line()}; page at git "
        f"{commit()}, results at the commits named below.",
        "",
        *markdown(["goal, right after", "measured, mean", ""], list(goals(found)), text=(0, 1, 2)),
        "",
        EXPLANATION,
    ]
    for kind, (uncut, results) in found.items():
        lines += _network(KINDS[kind], uncut, results) if results else []
    write_whole(path, "\n".join(lines).rstrip() + "\n")


def goals(found: Mapping[str, tuple[Mapping[int, Record], Results]]) -> Iterator[list[str]]:
    """A row for each goal: what it is, what was measured, whether it is met; ours is the best of our methods by validation."""
    for kind, (_, results) in found.items():
        for level in sorted({level for level, _ in results}):
            ours, name = _best(results, level, "validation", ours=True)
            rise = _mean(results, level, name, "test") if name else None
            if ours is None or rise is None:
                continue
            label = METHODS[name].label.replace("*", "")
            if (most := GOALS.get(level)) is not None:
                yield [
                    f"{KINDS[kind]}, −{level} %: at most {most:+.3f}",
                    f"{rise:+.4f} ({label})",
                    verdict(rise <= most),
                ]
            best, peer = _best(results, level, "test", ours=False)
            if best is not None:
                goal = f"{KINDS[kind]}, −{level} %: at most half of the best other"
                shown = f"{rise:+.4f} ({label}) against {best:+.4f} ({METHODS[peer].label})"
                yield [goal, shown, verdict(rise <= best / 2)]


def _best(results: Results, level: int, what: str, ours: bool) -> tuple[float | None, str]:
    means = [
        (mean, name)
        for name, method in METHODS.items()
        if method.ours == ours and (mean := _mean(results, level, name, what)) is not None
    ]
    return min(means) if means else (None, "")


def _mean(results: Results, level: int, name: str, what: str) -> float | None:
    values = [record[what] for record in results.get((level, name), {}).values() if what in record]
    return fmean(values) if values else None


def verdict(met: bool) -> str:
    """Whether a goal is met, as the page shows it."""
    return "met" if met else "**missed**"


def _network(title: str, uncut: Mapping[int, Record], results: Results) -> list[str]:
    one = next(iter(uncut.values()))
    records = [record for by_seed in results.values() for record in by_seed.values()]
    made = sorted({record["commit"] for record in records if "commit" in record})
    lines = [
        f"## {title}: uncut {shown_span([record['test'] for record in uncut.values()], '{:.3f}')} nats a character",
        "",
        f"{one['parameters']:,} parameters; text {one['text']} of {one['characters']:,} characters; "
        f"{one.get('steps', FULL.steps):,} training steps on {one['device']}; "
        f"seeds {', '.join(map(str, sorted(uncut)))}; ours at git {', '.join(made)}.",
        "",
    ]
    levels = sorted({level for level, _ in results})
    for heading, what in COLUMNS.items():
        rows = [
            [
                method.label,
                *(_cell(list(results.get((level, name), {}).values()), what, len(uncut)) for level in levels),
            ]
            for name, method in METHODS.items()
        ]
        rows = [row for row in rows if any(row[1:])]
        lines += [*markdown([heading, *(f"−{level} %" for level in levels)], rows), ""] if rows else []
    return lines


def _cell(records: Sequence[Record], what: str, count: int) -> str:
    if records and all("refused" in record for record in records):
        return "–"
    values = [record[what] for record in records if what in record]
    return shown_span(values, "{:+.4f}") + (f" n = {len(values)}" if 0 < len(values) < count else "")


def shown_span(values: Sequence[float], form: str) -> str:
    """The mean of some figures, with the least and the largest in brackets if there are several."""
    if not values:
        return ""
    spread = span([form.format(value) for value in sorted(values)])
    return form.format(fmean(values)) + (f" ({spread})" if len(values) > 1 else "")

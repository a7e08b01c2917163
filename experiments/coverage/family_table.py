"""The part of `experiments/coverage/coverage.md` about families of the transformers library, kind by kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.coverage.cells import Record, equal, figures_of, passed, short, trouble
from experiments.coverage.families import FAMILIES
from experiments.coverage.families.family import KINDS
from experiments.pages import markdown

EXPLANATION = """For each kind of units that the architecture has, 30 % of the units of every width of the kind are cut alone:

- a number: so many widths were cut, and the model ran in eval mode, in train mode and backward. A cross: it did not, or every
  width of the kind is frozen, and the reason. A dash: the architecture has no such units.
- **FFN**: inner units of feed-forward networks (of state-space models, of their layers). **heads**: whole heads. **groups**: a
  head of keys and values with the queries that share it. **head dimension**: places of all heads, in pairs where positions turn
  them. **experts**: inner units of each expert, and whole experts with their router's rows.
  Heads of BLOOM, which have slopes, get numbers first (`evolvenet.transformers.number_alibi_heads`).
- **generate**: six words greedily, the same with the cache as without, after each of these cuts. **saved and loaded**:
  to equal outputs after each of these cuts; "plain" where the transformers library alone loads the folder,
  "widths" where `evolvenet.transformers.from_pretrained` does.
- **removable**: share of the parameters of attention, FFN, stream and embeddings that falls to resizable widths, of what
  belongs to each. Other columns are those of the tables below.
"""


def family_lines(records: Mapping[str, Record]) -> list[str]:
    """Lines of the section.

    Args:
        records: of our own checks, by name of the family.
    """
    whole = [name for name in FAMILIES if name in records and is_whole(name, records[name])]
    head = ["family", "parameters", "seconds", "removable", *KINDS, "grown", "permuted", "generate", "saved and loaded"]
    rows = [[name, *_cells(name, records.get(name))] for name in FAMILIES]
    return [
        EXPLANATION,
        f"**{len(whole)} of {len(FAMILIES)} families** can be cut in every kind of units that they have, grow and permute to "
        "equal outputs, and load again.",
        "",
        *markdown(head, rows, text=(0, *range(3, len(head)))),
    ]


def is_whole(name: str, record: Record) -> bool:
    """Whether every kind of units of a family was cut, ran, generated and loaded, and growth and order keep its outputs."""
    kinds = [figures_of(record, kind) for kind in FAMILIES[name].kinds]
    same = all(figures_of(record, stage).get("equal") for stage in ("grow", "permute"))
    return same and all(_kind_passed(figures) for figures in kinds)


def _kind_passed(figures: Mapping[str, Any]) -> bool:
    generates = figures.get("generate", "yes") == "yes"
    return bool(figures.get("ok")) and passed(figures) and generates and figures.get("loaded") in ("plain", "widths")


def _cells(name: str, record: Record | None) -> list[str]:
    if record is None:
        return ["not run", *[""] * (len(KINDS) + 6)]
    parameters = figures_of(record, "model").get("parameters")
    if parameters is None:
        return [f"could not be built: {short(record['stopped'] or 'no message')}", *[""] * (len(KINDS) + 6)]
    trace, graphs = figures_of(record, "trace"), figures_of(record, "graphs")
    cells = [f"{parameters:,}", f"{trace['trace_seconds']:.1f}" if trace.get("ok") else trouble(record, "trace")]
    cells.append(_removable(graphs.get("kinds", {})))
    kinds = FAMILIES[name].kinds
    cells += [_kind(record, kind) if kind in kinds else "–" for kind in KINDS]
    for stage in ("grow", "permute"):
        figures = figures_of(record, stage)
        cells.append(equal(figures) if figures.get("ok") else trouble(record, stage))
    found = {kind: figures_of(record, kind) for kind in kinds if figures_of(record, kind).get("ok")}
    cells.append(_generated(found) if FAMILIES[name].generates else "–")
    return [*cells, _loaded(found)]


def _removable(kinds: Mapping[str, Sequence[float]]) -> str:
    shares = {kind: can / has for kind, (can, has) in kinds.items() if kind != "other" and has}
    return ", ".join(f"{kind} {share:.0%}" for kind, share in shares.items())


def _kind(record: Record, kind: str) -> str:
    figures = figures_of(record, kind)
    if not figures.get("ok"):
        return trouble(record, kind)
    if passed(figures):
        return str(figures["widths"])
    wrong = next(run for run in ("eval", "train", "backward") if figures[run] != "yes")
    return f"✗ {wrong}: {short(figures[wrong])}"


def _generated(found: Mapping[str, Mapping[str, Any]]) -> str:
    wrong = {kind: figures["generate"] for kind, figures in found.items() if figures.get("generate") != "yes"}
    return "; ".join(f"✗ {kind}: {short(text)}" for kind, text in wrong.items()) or (
        "yes" if found else "✗ nothing cut"
    )


def _loaded(found: Mapping[str, Mapping[str, Any]]) -> str:
    by_answer: dict[str, list[str]] = {}
    for kind, figures in found.items():
        by_answer.setdefault(figures["loaded"], []).append(kind)
    parts = []
    for answer, kinds in by_answer.items():
        good = answer in ("plain", "widths")
        parts.append(
            f"{'' if good else '✗ '}{short(answer)}" + (f" ({', '.join(kinds)})" if len(by_answer) > 1 else "")
        )
    return "; ".join(parts)

"""Every width is tried, up and down, on shadows of the model before it is offered.

A trial resizes, runs the model again under labels and compares: the outputs must have their old shapes, and what is tied
to what must be what the graph says, since a slice at a hard-coded place can pass by its shapes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from torch import nn

from evolvenet.graph import WidthGraph, Widths
from evolvenet.index_map import IndexMap
from evolvenet.labels import Ledger
from evolvenet.sandbox import sandbox
from evolvenet.surgery import compile_surgery, install

Rerun = Callable[[nn.Module], Ledger]


def prove(model: nn.Module, graph: WidthGraph, ledger: Ledger, device: str | None, rerun: Rerun) -> WidthGraph:
    """Freeze the widths that do not survive a trial.

    Two trials try all widths at once: every second one a unit down while the others go a unit up, and the reverse.
    Only where they fail, halves are tried, down to the widths that fail.

    Args:
        model: the traced model.
        graph: what the trace found.
        ledger: the run that the graph was made from.
        device: where the shadows live, "meta" or None for copies.
        rerun: runs the shadowed model under labels.
    """

    def trial(names: Sequence[str]) -> str | None:
        for turn in (0, 1):
            maps = {n: _nudge(graph, n, (k + turn) % 2 == 0) for k, n in enumerate(names)}
            reason = _failure(model, graph, ledger, device, rerun, maps)
            if reason is not None:
                return reason
        return None

    reasons = _search([width.name for width in graph.resizable], trial)
    widths = {
        name: replace(width, frozen=reasons[name]) if name in reasons else width for name, width in graph.widths.items()
    }
    return replace(graph, widths=Widths(widths))


def _search(names: Sequence[str], trial: Callable[[Sequence[str]], str | None]) -> dict[str, str]:
    """Names that fail, with the reason, by bisection; those that only fail together are added one by one."""
    reason = trial(names) if names else None
    if reason is None:
        return {}
    if len(names) == 1:
        return {names[0]: reason}
    half = len(names) // 2
    failed = {**_search(names[:half], trial), **_search(names[half:], trial)}
    passed: list[str] = []
    rest = [name for name in names if name not in failed]
    if failed and trial(rest) is None:
        return failed
    for name in rest:
        reason = trial([*passed, name])
        if reason is None:
            passed.append(name)
        else:
            failed[name] = reason
    return failed


def _nudge(graph: WidthGraph, name: str, down: bool) -> IndexMap:
    width = graph.widths[name]
    if not down or width.size - width.step < max(width.smallest, 2):
        # A size-1 axis carries no labels, so a trial that ends there could not be compared.
        return IndexMap.grow(width.size, width.step)
    middle = width.size // 2 // width.step * width.step
    gone = range(middle, middle + width.step)
    return IndexMap.keep([unit for unit in range(width.size) if unit not in gone], width.size)


def _failure(
    model: nn.Module, graph: WidthGraph, ledger: Ledger, device: str | None, rerun: Rerun, maps: dict[str, IndexMap]
) -> str | None:
    try:
        with sandbox(model, device):
            surgery = compile_surgery(model, graph, maps)
            install(model, surgery)
            again = rerun(model)
    except Exception as error:  # noqa: BLE001  the model's own code may raise anything on a shape it does not expect
        return f"a trial raised {type(error).__name__}: {_first_line(error)}"
    if again.outputs != ledger.outputs:
        return f"a trial changed the output's shape from {ledger.outputs} to {again.outputs}"
    place = _disagreement(surgery.graph, again)
    return f"a trial tied its units differently on {place}" if place else None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no message"


def _disagreement(graph: WidthGraph, again: Ledger) -> str | None:
    """Where the re-traced ties differ from what the graph predicts, or None."""
    component = again.components()
    predicted = {name: k for k, name in enumerate(graph.widths)}
    to_component: dict[tuple[int, int], int] = {}
    to_unit: dict[int, tuple[int, int]] = {}
    for axis in again.axes:
        at = axis.start
        for part in graph.layouts.get(axis.tensor, {}).get(axis.dim, ()):
            if part.width is not None:
                units = np.repeat(np.arange(part.length // part.repeat), part.repeat)
                for unit, found in zip(units.tolist(), component[at : at + part.length].tolist(), strict=True):
                    key = (predicted[part.width], unit)
                    if to_component.setdefault(key, found) != found or to_unit.setdefault(found, key) != key:
                        return f"axis {axis.dim} of {axis.tensor}"
            at += part.length
    return None

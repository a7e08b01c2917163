"""`evolvenet inspect`: the widths of a network, how much of it they hold, why some are frozen, and their spectra."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from evolvenet.graph.width_graph import WidthGraph
from evolvenet.linalg.spectrum import effective_rank
from evolvenet.measurement.cost import macs
from evolvenet.measurement.width_spectra import spectra
from evolvenet.tracing.trace import trace

BARS = "▁▂▃▄▅▆▇█"
CELLS = 16
"""Characters of a spectrum."""


def inspection(
    model: nn.Module, inputs: Any, batches: Sequence[Any] | None, heads: bool | None = None
) -> dict[str, Any]:
    """What `evolvenet inspect` shows, as plain data.

    Args:
        model: the network.
        inputs: example inputs.
        batches: to take the spectra of activations; None for those of the weights.
        heads: as for `trace`.

    Returns:
        {"class", "parameters", "macs", "coverage", "by_kind", "widths": [{"name", "size", "share", "frozen",
        "effective_rank", "spectrum"}]}, a spectrum as singular values over the largest one.

    Raises:
        TraceError: if the network does not run on the inputs.
    """
    graph = trace(model, inputs, heads=heads)
    values = spectra(model, graph, batches)
    return {
        "class": type(model).__name__,
        "parameters": graph.parameters,
        "macs": macs(model, inputs, graph.differentiates),
        "coverage": graph.coverage,
        "by_kind": {kind: list(pair) for kind, pair in graph.coverage_by_kind.items()},
        "measured_on": "weights" if batches is None else "activations",
        "widths": _widths(graph, values),
    }


def _widths(graph: WidthGraph, values: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    shares, found = graph.shares, list[dict[str, Any]]()
    for name, width in graph.widths.items():
        own = values.get(name)
        top = 0.0 if own is None else float(own.max())
        found.append(
            {
                "name": name,
                "size": width.size,
                "share": shares.get(name, 0.0),
                "frozen": width.frozen,
                "effective_rank": None if own is None else effective_rank(own),
                "spectrum": None if own is None or not top else [float(value) / top for value in own],
            }
        )
    return found


def sparkline(values: Sequence[float], cells: int = CELLS) -> str:
    """Numbers from 0 to 1 as a row of bars; of more numbers than cells, the largest of each cell.

    >>> sparkline([1.0, 0.5, 0.1, 0.0])
    '█▅▂▁'
    """
    count = min(cells, len(values))
    edges = [round(k * len(values) / count) for k in range(count + 1)] if count else []
    parts = [max(values[edges[k] : edges[k + 1]]) for k in range(count)]
    return "".join(BARS[min(int(value * (len(BARS) - 1) + 0.5), len(BARS) - 1)] for value in parts)


def inspection_table(found: Mapping[str, Any], most: int) -> Group:
    """What `inspection` returns, for a terminal.

    Args:
        found: the data.
        most: widths that are listed, those with the largest share of the parameters; 0 for all.
    """
    widths = [width for width in found["widths"] if width["frozen"] is None]
    largest = sorted(widths, key=lambda width: -width["share"])[: most or None]
    kept = {width["name"] for width in largest}
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("width", overflow="fold")
    for heading in ("units", "parameters", "rank"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column(f"spectrum of the {found['measured_on']}", no_wrap=True)
    for width in (width for width in widths if width["name"] in kept):
        rank = "" if width["effective_rank"] is None else f"{width['effective_rank']:.1f}"
        bars = "" if width["spectrum"] is None else sparkline(width["spectrum"])
        table.add_row(Text(width["name"]), f"{width['size']:,}", f"{width['share']:.1%}", rank, bars)
    lines = [f"{found['class']}: {found['parameters']:,} parameters, {found['macs']:,} MACs per sample"]
    count = len(widths)
    noun = "width that can change holds" if count == 1 else "widths that can change hold"
    lines.append(f"{count} {noun} {found['coverage']:.1%} of the parameters")
    lines += [
        f"  {kind}: {free:.1%} of the parameters can be removed, of {share:.1%}"
        for kind, (free, share) in found["by_kind"].items()
        if len(found["by_kind"]) > 1
    ]
    left = count - len(largest)
    below = [f"and {left} more: --all lists them"] if left else []
    reasons = Counter(width["frozen"] for width in found["widths"] if width["frozen"] is not None)
    below += [
        f"frozen, {number} {'width' if number == 1 else 'widths'}: {why}" for why, number in reasons.most_common()
    ]
    return Group(Text("\n".join(lines)), Text(), table, *(Text(line) for line in below))

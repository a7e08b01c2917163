"""`widths(model)`: the sizes of a model as data, as YAML, and as arguments of constructors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from evolvenet.engine.constructor_arguments import Arguments, of_own_classes, of_torch_layers
from evolvenet.errors import MissingPackageError, RecordError
from evolvenet.execution.chosen_outputs import Outputs
from evolvenet.graph.width_graph import Tie
from evolvenet.surgery.width_record import WidthRecord, record_of
from evolvenet.tracing.trace import trace

SHOWN = 4
"""Axes of a width in a printed table."""


@dataclass(frozen=True)
class WidthSize:
    """A width's size.

    Args:
        name: of the width.
        size: units now.
        original: units before anything was changed.
        frozen: None, or why it keeps its size.
        ties: the tensor axes in which it occurs.
    """

    name: str
    size: int
    original: int
    frozen: str | None
    ties: tuple[Tie, ...]

    @property
    def axes(self) -> list[str]:
        """`"fc1.weight[0]"` for axis 0 of that tensor, each once; `ties` also says in which places of the axis."""
        return list(dict.fromkeys(f"{tie.tensor}[{tie.dim}]" for tie in self.ties))

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        found: dict[str, Any] = {"size": self.size, "original": self.original, "axes": self.axes}
        return found | ({"frozen": self.frozen} if self.frozen else {})


class WidthTable(Mapping[str, WidthSize]):
    """The widths of a model by name, and what builds it at these widths.

    Args:
        widths: {name: width}.
        layers: {path: arguments} of torch's layers.
        classes: {path: arguments} of the modules of other classes whose arguments follow widths.
    """

    def __init__(
        self, widths: Mapping[str, WidthSize], layers: Mapping[str, Arguments], classes: Mapping[str, Arguments]
    ) -> None:
        self._widths = dict(widths)
        self.layers = dict(layers)
        self.classes = dict(classes)

    def __getitem__(self, name: str) -> WidthSize:
        return self._widths[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._widths)

    def __len__(self) -> int:
        return len(self._widths)

    @property
    def sizes(self) -> dict[str, int]:
        """{width: size} of those that can be resized."""
        return {name: width.size for name, width in self._widths.items() if width.frozen is None}

    def to_dict(self) -> dict[str, Any]:
        """As dicts, lists, strings and numbers."""
        classes = {
            path or "the model": {
                "class": each.type,
                "arguments": _plain(each.values),
                "reasons": dict(each.reasons),
                "ambiguous": dict(each.ambiguous),
            }
            for path, each in self.classes.items()
        }
        layers = {
            path or "the model": {"class": each.type, "arguments": _plain(each.values)}
            for path, each in self.layers.items()
        }
        return {"widths": {n: w.to_dict() for n, w in self._widths.items()}, "layers": layers, "classes": classes}

    def to_yaml(self) -> str:
        """What `to_dict` returns, as YAML.

        Raises:
            MissingPackageError: if PyYAML, which Lightning brings along, is not installed.
        """
        try:
            import yaml
        except ModuleNotFoundError as error:
            raise MissingPackageError(
                f"to_yaml: expected PyYAML, got {error}. Install it with pip install pyyaml, or use to_dict."
            ) from error
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=120)

    def __str__(self) -> str:
        rows = [("width", "size", "was", "axes")]
        rows += [(w.name, str(w.size), str(w.original), _first(w.axes)) for w in self._widths.values()]
        lines = _aligned(rows)
        lines += ["", *_aligned([("layer", "built by"), *((path or ".", str(a)) for path, a in self.layers.items())])]
        if self.classes:
            lines += ["", *_aligned([("module", "arguments"), *((p or ".", str(a)) for p, a in self.classes.items())])]
        for path, each in self.classes.items():
            told = [*each.reasons.items(), *((name, f"ambiguous: {why}") for name, why in each.ambiguous.items())]
            lines += [f"  {'.'.join(filter(None, (path, name)))}: {text}" for name, text in told]
        return "\n".join(lines)

    __repr__ = __str__


def _first(axes: list[str]) -> str:
    """The first axes, and how many others there are."""
    more = len(axes) - SHOWN
    return ", ".join(axes[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """Rows as lines, every column but the last as wide as its widest cell."""
    columns = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    padded = ([*(cell.ljust(size) for cell, size in zip(row, columns, strict=False)), row[-1]] for row in rows)
    return ["  ".join(cells).rstrip() for cells in padded]


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def widths(model: nn.Module, example_inputs: Any = None, outputs: Outputs | None = None) -> WidthTable:
    """The sizes of a model's widths, and the arguments that build it with them.

    Args:
        model: a network or a LightningModule whose widths EvolveNet has changed or loaded in this process.
        example_inputs: as `trace` takes them, for any other model; its sizes are the original ones then.
        outputs: as for `trace`, with example inputs.

    Returns:
        The table: `print` it, index it by the name of a width, or take `to_dict()` or `to_yaml()`. `layers` holds the arguments
        of each layer of torch. `classes` holds those of other classes which can be told: from `save_hyperparameters()`, or
        from attributes of the arguments' names, if they are the first size of one width. What is ambiguous is left out,
        and named.

    Raises:
        RecordError: if the widths are not known, and no `example_inputs` are given.
        TraceError: if the model does not run on them.

    >>> import torch, evolvenet
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> graph = evolvenet.prune(model, evolvenet.trace(model, torch.zeros(1, 4)), {"0": 3})
    >>> table = widths(model)
    >>> table["0"].size, table["0"].original, str(table.layers["2"])
    (3, 8, 'Linear(in_features=3, out_features=2)')
    """
    record = record_of(model)
    graph = None if record is None else record.graph_of(model)
    if graph is None and example_inputs is not None:
        record = WidthRecord.of(model, trace(model, example_inputs, outputs))
        graph = record.graph
    if record is None or graph is None:
        raise RecordError(
            f"The widths of this {type(model).__name__} are not known: expected a model that EvolveNet has changed or loaded "
            "in this process, got another one, or one that other code has changed since. Give example_inputs=, to trace it."
        )
    sizes = {
        name: WidthSize(name, width.size, record.original.get(name, width.size), width.frozen, width.ties)
        for name, width in graph.widths.items()
    }
    return WidthTable(sizes, of_torch_layers(model), of_own_classes(model, graph, record.original))

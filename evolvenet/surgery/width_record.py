"""`WidthRecord`: what a state dict's tensors do not say about widths. It travels in the state dict's metadata."""

# nn.Module.named_modules and named_buffers have no full types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from torch.utils.hooks import RemovableHandle

from evolvenet.graph.format_version import FORMAT, FORMAT_KEY
from evolvenet.graph.plain_data import check_types
from evolvenet.graph.renaming import Rename, in_child, in_parent, renamed, renamed_width
from evolvenet.graph.serialization import from_state_dict, to_state_dict
from evolvenet.graph.sizes import sizes_from_shapes
from evolvenet.graph.width_graph import WidthGraph
from evolvenet.surgery.norms import eps_numbers
from evolvenet.surgery.numbers import number_at

RECORD_KEY = "evolvenet"
"""The key of a `WidthRecord` in a state dict's metadata."""


@dataclass(frozen=True)
class WidthRecord:
    """The widths of a model, and what depends on them and is not in its state dict.

    All names and paths are relative to the model.

    Args:
        numbers: (module path, name) of the model's own numbers that follow widths (`num_heads`, `config.hidden_size`), see
            `evolvenet.surgery.numbers`, and the eps of norms, which do where streams grow.
        buffers: names of buffers that follow widths and are not persistent.
        graph: the widths, with any sizes: those that the model has are found by its shapes.
        original: {width: size before anything was changed}.
        replicas: {path of a replica: path of the module that it is a copy of}; it has the same widths.

    >>> record = WidthRecord((("", "in_features"),), ())
    >>> record.values(nn.Linear(3, 2))
    {'numbers': [['', 'in_features', 3]], 'buffers': {}}
    """

    numbers: tuple[tuple[str, str], ...]
    buffers: tuple[str, ...]
    graph: WidthGraph | None = None
    original: Mapping[str, int] = field(default_factory=dict[str, int])
    replicas: Mapping[str, str] = field(default_factory=dict[str, str])

    @classmethod
    def of(
        cls, model: nn.Module, graph: WidthGraph, root: str = "", original: Mapping[str, int] | None = None
    ) -> WidthRecord:
        """The record of a traced model.

        Args:
            model: the model of the graph.
            graph: its widths.
            root: path of the model in the module whose state dict will carry the record; paths and names start with it.
            original: sizes before anything was changed; by default those of the graph.
        """
        start = f"{root}." if root else ""
        kept = {name for name, _ in model.named_parameters(remove_duplicate=False)} | set(model.state_dict())
        numbers = {entry for width in graph.resizable for entry in (*width.patches, *eps_numbers(model, width))}
        sizes = {name: (original or {}).get(name, width.size) for name, width in graph.widths.items()}
        return cls(
            tuple(sorted((".".join(filter(None, (root, path))), name) for path, name in numbers)),
            tuple(start + name for name in graph.layouts if name not in kept),
            renamed(graph, in_parent(root)),
            {start + name: size for name, size in sizes.items()},
        )

    def with_replicas(self, pairs: Mapping[str, str]) -> WidthRecord:
        """The record with the entries of some modules repeated for their replicas.

        Args:
            pairs: {path of the replica: path of the module that it is a copy of}.

        >>> WidthRecord((("net", "num_heads"),), ()).with_replicas({"average": "net"}).numbers
        (('net', 'num_heads'), ('average', 'num_heads'))
        """
        numbers = [(copy, attribute) for path, attribute in self.numbers for copy in in_replicas(path, pairs)]
        buffers = [copy for name in self.buffers for copy in in_replicas(name, pairs)]
        return replace(
            self,
            numbers=(*self.numbers, *numbers),
            buffers=(*self.buffers, *buffers),
            replicas={**self.replicas, **pairs},
        )

    def renamed(self, rename: Rename) -> WidthRecord:
        """The record by other names, without what has none."""
        return WidthRecord(
            tuple((new, name) for path, name in self.numbers if (new := rename(path)) is not None),
            tuple(new for name in self.buffers if (new := rename(name)) is not None),
            self.graph and renamed(self.graph, rename),
            {renamed_width(name, rename): size for name, size in self.original.items()},
            _renamed_replicas(self.replicas, rename),
        )

    def values(self, model: nn.Module) -> dict[str, Any]:
        """The values of the numbers and buffers in the model as it is now.

        Returns:
            {"numbers": [[module path, name, value], …], "buffers": {name: a copy of the tensor}}.
        """
        return {
            "numbers": [[path, name, number_at(model.get_submodule(path), name)] for path, name in self.numbers],
            "buffers": {name: model.get_buffer(name).detach().clone() for name in self.buffers},
        }

    def graph_of(self, model: nn.Module) -> WidthGraph | None:
        """The widths that the model has now; None if its shapes are not those of these widths."""
        if self.graph is None:
            return None
        sizes, misfits = sizes_from_shapes(self.graph, shapes_of(model), self.original)
        return None if misfits else self.graph.with_sizes(sizes)

    def state_dict(self, model: nn.Module) -> dict[str, Any]:
        """What `values` returns, the version of the format, and the widths as they are now: "graph", "original", "replicas"."""
        graph = self.graph_of(model)
        found = {FORMAT_KEY: FORMAT, **self.values(model)}
        if graph is not None:
            found |= {"graph": to_state_dict(graph), "original": dict(self.original), "replicas": dict(self.replicas)}
        return found

    def register(self, module: nn.Module) -> RemovableHandle:
        """Write the record into the metadata of the module's state dicts, until the handle is removed."""
        return module.register_state_dict_post_hook(partial(write_record, self))

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> WidthRecord:
        """The record that `state_dict` was called on."""
        record = cls(
            tuple((path, name) for path, name, _ in state["numbers"]),
            tuple(state["buffers"]),
            from_state_dict(state["graph"]) if "graph" in state else None,
            dict(state.get("original", {})),
            dict(state.get("replicas", {})),
        )
        check_types(record, cls, "record")
        return record


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """{name: shape} of all parameters and buffers, tied ones under each of their names."""
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: tuple(tensor.shape) for name, tensor in named}


def renamed_state(state: Mapping[str, Any], rename: Rename) -> dict[str, Any]:
    """What `WidthRecord.state_dict` returned by other names, without what has none."""
    found: dict[str, Any] = {
        "numbers": [[new, name, value] for path, name, value in state["numbers"] if (new := rename(path)) is not None],
        "buffers": {new: tensor for name, tensor in state["buffers"].items() if (new := rename(name)) is not None},
    }
    if "graph" in state:
        found["graph"] = to_state_dict(renamed(from_state_dict(state["graph"]), rename))
        found["original"] = {renamed_width(name, rename): size for name, size in state["original"].items()}
        found["replicas"] = _renamed_replicas(state["replicas"], rename)
    return found


def _renamed_replicas(replicas: Mapping[str, str], rename: Rename) -> dict[str, str]:
    pairs = [(rename(copy), rename(own)) for copy, own in replicas.items()]
    return {copy: own for copy, own in pairs if copy is not None and own is not None}


def in_replicas(name: str, pairs: Mapping[str, str]) -> Iterator[str]:
    """The names that something has in the replicas of the module where it lies."""
    yield from (copy + name[len(own) :] for copy, own in pairs.items() if f"{name}.".startswith(f"{own}."))


def write_record(
    record: WidthRecord, module: nn.Module, state: Any, prefix: str, local_metadata: dict[str, Any]
) -> None:
    """A state-dict hook, with the record bound: a top-level function, so that a model that carries it can be pickled."""
    local_metadata[RECORD_KEY] = record.state_dict(module)


_records: WeakKeyDictionary[nn.Module, WidthRecord] = WeakKeyDictionary()
"""The records of models in this process. No model holds its own: it stays what it was, and can be pickled and copied."""


def remember(model: nn.Module, record: WidthRecord) -> None:
    """Keep the record of a model for as long as the model is there."""
    _records[model] = record


def forget(model: nn.Module) -> None:
    """Drop the record of a model, whose modules get other names."""
    _records.pop(model, None)


def remember_widths(model: nn.Module, graph: WidthGraph, original: Mapping[str, int] | None = None) -> None:
    """Keep the widths of a model for as long as the model is there.

    Args:
        model: the model.
        graph: its widths as they are.
        original: {width: size before anything was changed}; a size that is known from an earlier change counts.
    """
    known = record_of(model)
    earlier = known.original if known is not None and known.graph_of(model) is not None else {}
    remember(model, WidthRecord.of(model, graph, original={**(original or {}), **earlier}))


def record_of(model: nn.Module) -> WidthRecord | None:
    """The record of a model whose widths were traced to be changed, or were loaded; also of a part or a holder of one.

    >>> record_of(nn.Linear(2, 2)) is None
    True
    """
    if model in _records:
        return _records[model]
    for other, record in list(_records.items()):
        path = next((path for path, module in other.named_modules() if module is model), None)
        if path is not None:
            return record.renamed(in_child(path))
    for path, module in model.named_modules():
        if module in _records:
            return _records[module].renamed(in_parent(path))
    return None

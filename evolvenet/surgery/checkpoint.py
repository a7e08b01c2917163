"""A model reshaped to the widths of a checkpoint, and a record of what depends on widths and is not in a state dict."""

# nn.Module.named_modules and its hooks have no return types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from evolvenet._compat.torch import load_state_dict_pre_hooks, state_dict_metadata
from evolvenet.errors import RecordError, ResizeError
from evolvenet.graph.index_map import laid_out_as
from evolvenet.graph.width_graph import WidthGraph
from evolvenet.surgery.module_handlers import attributes, refresh, shape_sources
from evolvenet.surgery.module_replacement import (
    Record,
    behind,
    find_replacements,
    fit_replacements,
    replacements,
    whole_names,
)
from evolvenet.surgery.resize_model import exchange


@dataclass(frozen=True)
class WidthRecord:
    """What depends on a model's widths and is not in its state dict. It is written into the state dict's metadata.

    Args:
        numbers: (module path, attribute) of the model's own numbers that follow widths (`num_heads`).
        buffers: names of buffers that follow widths and are not persistent.

    >>> record = WidthRecord((("", "in_features"),), ())
    >>> record.state_dict(nn.Linear(3, 2))
    {'numbers': [['', 'in_features', 3]], 'buffers': {}}
    """

    numbers: tuple[tuple[str, str], ...]
    buffers: tuple[str, ...]

    @classmethod
    def of(cls, model: nn.Module, graph: WidthGraph, root: str = "") -> WidthRecord:
        """The record of a traced model.

        Args:
            model: the model of the graph.
            graph: its widths.
            root: path of the model in the module whose state dict will carry the record; paths and names start with it.
        """
        start = f"{root}." if root else ""
        kept = {name for name, _ in model.named_parameters(remove_duplicate=False)} | set(model.state_dict())
        numbers = {entry for width in graph.resizable for entry in width.patches}
        return cls(
            tuple(sorted((".".join(filter(None, (root, path))), name) for path, name in numbers)),
            tuple(start + name for name in graph.layouts if name not in kept),
        )

    def with_replicas(self, pairs: Mapping[str, str]) -> WidthRecord:
        """The record with the entries of some modules repeated for their replicas.

        Args:
            pairs: {path of the replica: path of the module that it is a copy of}.

        >>> WidthRecord((("net", "num_heads"),), ()).with_replicas({"average": "net"}).numbers
        (('net', 'num_heads'), ('average', 'num_heads'))
        """

        def in_replicas(name: str) -> list[str]:
            return [copy + name[len(own) :] for copy, own in pairs.items() if f"{name}.".startswith(f"{own}.")]

        numbers = [(copy, attribute) for path, attribute in self.numbers for copy in in_replicas(path)]
        buffers = [copy for name in self.buffers for copy in in_replicas(name)]
        return WidthRecord((*self.numbers, *numbers), (*self.buffers, *buffers))

    def state_dict(self, model: nn.Module) -> dict[str, Any]:
        """The values of the numbers and buffers in the model as it is now.

        Returns:
            {"numbers": [[module path, attribute, value], …], "buffers": {name: a copy of the tensor}}.
        """
        return {
            "numbers": [[path, name, getattr(model.get_submodule(path), name)] for path, name in self.numbers],
            "buffers": {name: model.get_buffer(name).detach().clone() for name in self.buffers},
        }

    def register(self, module: nn.Module) -> RemovableHandle:
        """Write the record into the metadata of the module's state dicts, until the handle is removed."""
        return module.register_state_dict_post_hook(partial(write_record, self))


RECORD_KEY = "evolvenet"
"""The key of a `WidthRecord` in a state dict's metadata."""


def write_record(
    record: WidthRecord, module: nn.Module, state: Any, prefix: str, local_metadata: dict[str, Any]
) -> None:
    """A state-dict hook, with the record bound: a top-level function, so that a model that carries it can be pickled."""
    local_metadata[RECORD_KEY] = record.state_dict(module)


def load(model: nn.Module, path: str | Path, map_location: Any = "cpu") -> nn.Module:
    """Reshape a freshly built model to a checkpoint's widths and load its weights.

    Layers that are factorized in the checkpoint are factorized here first.

    Args:
        model: the model as it is built, with any widths.
        path: a Lightning checkpoint or a plain state dict saved with `torch.save`. A network inside a LightningModule is
            found under any name that it has there.
        map_location: as in `torch.load`.

    Returns:
        The same model.

    Raises:
        RecordError: if the checkpoint is of another model; the message names what differs, and nothing has changed.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     torch.save(nn.Linear(3, 2).state_dict(), f"{folder}/weights.pt")
    ...     load(nn.Linear(8, 8), f"{folder}/weights.pt")
    Linear(in_features=3, out_features=2, bias=True)
    """
    found = torch.load(path, map_location=map_location, weights_only=True)
    whole = found["state_dict"] if isinstance(found, dict) and "state_dict" in found else found
    _fit_replacements(model, whole, find_replacements(found), path)
    state, prefix = _own_part(set(model.state_dict()), whole, path)
    fit_shapes(model, state, record=find_record(found, prefix))
    model.load_state_dict(state)
    return model


def _fit_replacements(
    model: nn.Module, state: Mapping[str, Any], records: Mapping[str, Record], path: str | Path
) -> None:
    """Give the model the replacements of a checkpoint, in which it may lie behind a prefix."""
    own = {name: module.record() for name, module in replacements(model).items()}
    if not records and not own:
        return
    whole = dict.fromkeys(whole_names(state, records))
    _, prefix = _own_part(whole_names(model.state_dict(), own), whole, path)
    names = [name.removeprefix(prefix) for name in state if name.startswith(prefix)]
    fit_replacements(model, behind(records, prefix), names)


def find_record(found: Any, prefix: str = "") -> dict[str, Any] | None:
    """The state of a `WidthRecord` in a file's contents, for the part of the model behind a prefix; None if there is none.

    Args:
        found: a Lightning checkpoint, or a state dict.
        prefix: of the part's names in the state dict.
    """
    # Callbacks that average weights put their own under "state_dict", without metadata.
    places = [found.get(key) for key in ("state_dict", "current_model_state")] if "state_dict" in found else [found]
    records = (_record_in_metadata(each, prefix) for each in places)
    return next((record for record in records if record is not None), None)


def _record_in_metadata(state: Any, prefix: str) -> dict[str, Any] | None:
    """The record in a state dict's metadata, its names without the prefix; entries of other parts are left out."""
    for root, metadata in state_dict_metadata(state).items():
        if RECORD_KEY in metadata:
            start = f"{root}." if root else ""
            record = metadata[RECORD_KEY]
            numbers = [[start + path, name, value] for path, name, value in record["numbers"]]
            buffers = {start + name: tensor for name, tensor in record["buffers"].items()}
            return {
                "numbers": [
                    [path.removeprefix(prefix), name, value]
                    for path, name, value in numbers
                    if f"{path}.".startswith(prefix)
                ],
                "buffers": {n.removeprefix(prefix): tensor for n, tensor in buffers.items() if n.startswith(prefix)},
            }
    return None


def _own_part(own: set[str], state: Mapping[str, Any], path: str | Path) -> tuple[dict[str, Any], str]:
    """The entries of a state dict under the model's own names, all of them or those behind one prefix, and the prefix."""
    some = min(own, default="")
    prefixes = [name.removesuffix(some) for name in state if name.endswith(f".{some}")]
    inside = [prefix for prefix in prefixes if all(prefix + name in state for name in own)]
    if own != set(state) and len(inside) == 1:
        return {name: state[inside[0] + name] for name in own}, inside[0]
    if inside and own - set(state):
        raise RecordError(
            f"{path} holds {len(inside)} networks like this one: expected one, got {', '.join(inside)}. Build the module "
            "that holds them all and load it as a whole."
        )
    _refuse_others(own, set(state), str(path))
    return dict(state), ""


def _refuse_others(own: set[str], state: set[str], what: str) -> None:
    missing, unexpected = sorted(own - state), sorted(state - own)
    if missing or unexpected:
        raise RecordError(
            f"{what} is of another model: expected entries that it lacks {missing[:5]}, and it has entries "
            f"unknown here {unexpected[:5]} ({len(missing)} and {len(unexpected)} in all). Build the model as it was built "
            "for that run; only its widths may differ."
        )


def fit_shapes(
    model: nn.Module, state: Mapping[str, Any], prefix: str = "", record: Mapping[str, Any] | None = None
) -> None:
    """Give every parameter and buffer the shape that it has in a state dict, and update the modules' attributes.

    The entries of a reshaped tensor are undefined until the state is loaded. Tensors of the right shape are left as they are.

    Args:
        model: the model to reshape.
        state: a state dict; entries that the model does not have are ignored.
        prefix: of the model's names in it.
        record: what depends on widths and is not in the state dict, from `WidthRecord.state_dict`.

    Raises:
        RecordError: if a tensor has another number of axes there, or shapes that no change of widths leads to; nothing
            has changed then.
    """
    hidden = (record or {}).get("buffers", {})
    planned = _shapes_there(model, prefix, {**state, **{prefix + name: tensor for name, tensor in hidden.items()}})
    updates: list[tuple[nn.Module, dict[str, Any]]] = []
    for path, module in model.named_modules():
        local = shape_sources(module)
        shapes = {name: planned.get(tensor, tuple(tensor.shape)) for name, tensor in local.items()}
        if any(shapes[name] != tuple(tensor.shape) for name, tensor in local.items()):
            updates.append((module, _numbers(f"{prefix}{path}." if path else prefix, module, shapes)))
    exchanges = [(t, _empty(t, shape)) for t, shape in planned.items() if shape != tuple(t.shape)]
    _apply_numbers(model, record)
    for tensor, value in exchanges:
        exchange(tensor, value, None)
    for module, found in updates:
        for name, value in found.items():
            setattr(module, name, value)
        refresh(module)
    with torch.no_grad():
        for name, value in hidden.items():
            model.get_buffer(name).copy_(value)


def _apply_numbers(model: nn.Module, record: Mapping[str, Any] | None) -> None:
    for path, name, value in (record or {}).get("numbers", ()):
        try:
            module = model.get_submodule(path)
        except AttributeError:
            continue
        if hasattr(module, name):
            setattr(module, name, value)


def _shapes_there(model: nn.Module, prefix: str, state: Mapping[str, Any]) -> dict[Tensor, tuple[int, ...]]:
    """The shape in the state dict of every tensor that it has. A tied one may have any of its names there."""
    found: dict[Tensor, tuple[int, ...]] = {}
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    for name, tensor in named:
        if prefix + name not in state:
            continue
        shape = tuple(state[prefix + name].shape)
        if len(shape) != tensor.dim():
            raise RecordError(
                f"The checkpoint is of another model: expected {prefix + name} with {tensor.dim()} axes, like "
                f"{tuple(tensor.shape)}, got {shape}. Only widths may differ."
            )
        if found.setdefault(tensor, shape) != shape:
            raise RecordError(
                f"The checkpoint is of another model: expected {prefix + name} of shape {found[tensor]}, since it is "
                f"tied to another weight here, got {shape}."
            )
    return found


def _numbers(start: str, module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    try:
        return attributes(module, shapes)
    except (ResizeError, KeyError) as error:
        raise RecordError(
            f"The checkpoint is of another model, at {start.removesuffix('.') or 'its root'}: {error}"
        ) from error


def _empty(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor of another shape in the memory format of this one."""
    return laid_out_as(tensor, tensor.detach().new_empty(shape))


def reshape_before_load(
    module: nn.Module,
    state: Mapping[str, Any],
    prefix: str,
    local_metadata: Mapping[str, Any],
    strict: bool = False,
    *unused: Any,
) -> None:
    """A load-state-dict pre-hook that gives the module the factors and widths of the state dict before it is loaded.

    A top-level function, so that a model that carries it can still be pickled and copied.

    Raises:
        RecordError: if the state dict is of another model and its widths differ too; nothing has changed then.
    """
    fit_replacements(
        module,
        behind(find_replacements(state), prefix),
        [name.removeprefix(prefix) for name in state if name.startswith(prefix)],
    )
    own = module.state_dict()
    if strict and any(
        tuple(state[prefix + k].shape) != tuple(t.shape) for k, t in own.items() if _both(t, state, prefix + k)
    ):
        named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
        saved = {id(tensor) for name, tensor in named if prefix + name in state}
        tied = {name for name, tensor in named if id(tensor) in saved}
        there = {name.removeprefix(prefix) for name in state if name.startswith(prefix)}
        _refuse_others(set(own) - (tied - there), there, "What is loaded")
    fit_shapes(module, state, prefix, local_metadata.get(RECORD_KEY))


def _both(own: Any, state: Mapping[str, Any], name: str) -> bool:
    return isinstance(own, Tensor) and isinstance(state.get(name), Tensor)


def register_reshape_before_load(module: nn.Module) -> None:
    """Register `reshape_before_load` on a module, unless it is registered already."""
    if reshape_before_load not in load_state_dict_pre_hooks(module):
        module.register_load_state_dict_pre_hook(reshape_before_load)

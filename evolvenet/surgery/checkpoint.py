"""What happened to the widths, as plain data, and a model reshaped to fit a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from evolvenet._compat.torch import load_state_dict_pre_hooks, own_tensors, state_dict_metadata
from evolvenet.errors import RecordError, ResizeError
from evolvenet.graph.index_map import laid_out_as
from evolvenet.graph.width_graph import WidthGraph
from evolvenet.surgery.module_handlers import attributes, refresh
from evolvenet.surgery.resize_model import exchange


@dataclass(frozen=True)
class Note:
    """What a state dict does not say about a model's widths. It is written into the state dict's metadata.

    Args:
        numbers: (module path, attribute) of the model's own numbers that follow widths (`num_heads`).
        buffers: names of buffers that follow widths and are not persistent.
    """

    numbers: tuple[tuple[str, str], ...]
    buffers: tuple[str, ...]

    @classmethod
    def of(cls, model: nn.Module, graph: WidthGraph, root: str = "") -> Note:
        """The note for a model, or for one that holds it under the path `root`; the names are the outer one's."""
        start = f"{root}." if root else ""
        kept = {name for name, _ in model.named_parameters(remove_duplicate=False)} | set(model.state_dict())
        numbers = {entry for width in graph.resizable for entry in width.patches}
        return cls(
            tuple(sorted((".".join(filter(None, (root, path))), name) for path, name in numbers)),
            tuple(start + name for name in graph.layouts if name not in kept),
        )

    def mirrored(self, pairs: Mapping[str, str]) -> Note:
        """The note with what it says of some modules said of their copies too: {path of the copy: path of its source}."""

        def said(name: str) -> list[str]:
            return [copy + name[len(own) :] for copy, own in pairs.items() if f"{name}.".startswith(f"{own}.")]

        numbers = [(copy, attribute) for path, attribute in self.numbers for copy in said(path)]
        buffers = [copy for name in self.buffers for copy in said(name)]
        return Note((*self.numbers, *numbers), (*self.buffers, *buffers))

    def read(self, model: nn.Module) -> dict[str, Any]:
        """The numbers and buffers as they are now, as plain data and tensors."""
        return {
            "numbers": [[path, name, getattr(model.get_submodule(path), name)] for path, name in self.numbers],
            "buffers": {name: model.get_buffer(name).detach().clone() for name in self.buffers},
        }

    def register(self, module: nn.Module) -> RemovableHandle:
        """Let the module's state dicts carry it, until the handle is removed."""
        return module.register_state_dict_post_hook(partial(write_note, self))


NOTE = "evolvenet"
"""The key of a `Note` in a state dict's metadata."""


def write_note(note: Note, module: nn.Module, state: Any, prefix: str, local_metadata: dict[str, Any]) -> None:
    """A state-dict hook, with the note bound: a top-level function, so that a model that carries it can be pickled."""
    local_metadata[NOTE] = note.read(module)


def load(model: nn.Module, path: str | Path, map_location: Any = "cpu") -> nn.Module:
    """Reshape a freshly built model to a checkpoint's widths and load its weights.

    Args:
        model: the model as it is built, of whatever widths.
        path: a Lightning checkpoint or a plain state dict saved with `torch.save`. A network inside a LightningModule is
            found under whatever name it has there.
        map_location: as in `torch.load`.

    Returns:
        The same model.

    Raises:
        RecordError: if the checkpoint is of another model; the message names what differs, and nothing has changed.
    """
    found = torch.load(path, map_location=map_location, weights_only=True)
    whole = found["state_dict"] if isinstance(found, dict) and "state_dict" in found else found
    state, prefix = _own_part(set(model.state_dict()), whole, path)
    fit_shapes(model, state, note=note_for(found, prefix))
    model.load_state_dict(state)
    return model


def note_for(found: Any, prefix: str = "") -> dict[str, Any] | None:
    """The note in a file's contents, for the part behind a prefix; None if there is none.

    Args:
        found: a Lightning checkpoint, or a state dict.
        prefix: of the part's names in the state dict.
    """
    # Callbacks that average weights put their own under "state_dict", without metadata.
    places = [found.get(key) for key in ("state_dict", "current_model_state")] if "state_dict" in found else [found]
    return next((note for note in (_noted(each, prefix) for each in places) if note is not None), None)


def _noted(state: Any, prefix: str) -> dict[str, Any] | None:
    """The note in a state dict's metadata, with the names that the part behind a prefix has by itself."""
    for root, metadata in state_dict_metadata(state).items():
        if NOTE in metadata:
            start = f"{root}." if root else ""
            note = metadata[NOTE]
            numbers = [[start + path, name, value] for path, name, value in note["numbers"]]
            buffers = {start + name: tensor for name, tensor in note["buffers"].items()}
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
    model: nn.Module, state: Mapping[str, Any], prefix: str = "", note: Mapping[str, Any] | None = None
) -> None:
    """Give every parameter and buffer the shape that it has in a state dict, and update the modules' attributes.

    Contents are undefined afterwards, until the state is loaded. Shapes that already fit are left alone.

    Args:
        model: the model to reshape.
        state: a state dict; other entries are passed over.
        prefix: of the model's names in it.
        note: what the state dict does not say, from `Note.read`.

    Raises:
        RecordError: if a tensor has another number of axes there, or shapes that no change of widths leads to; nothing
            has changed then.
    """
    hidden = (note or {}).get("buffers", {})
    planned = _shapes_there(model, prefix, {**state, **{prefix + name: tensor for name, tensor in hidden.items()}})
    updates: list[tuple[nn.Module, dict[str, Any]]] = []
    for path, module in model.named_modules():
        local = own_tensors(module)
        shapes = {name: planned.get(tensor, tuple(tensor.shape)) for name, tensor in local.items()}
        if any(shapes[name] != tuple(tensor.shape) for name, tensor in local.items()):
            updates.append((module, _numbers(f"{prefix}{path}." if path else prefix, module, shapes)))
    exchanges = [(t, _empty(t, shape)) for t, shape in planned.items() if shape != tuple(t.shape)]
    _apply_numbers(model, note)
    for tensor, value in exchanges:
        exchange(tensor, value, None)
    for module, found in updates:
        for name, value in found.items():
            setattr(module, name, value)
        refresh(module)
    with torch.no_grad():
        for name, value in hidden.items():
            model.get_buffer(name).copy_(value)


def _apply_numbers(model: nn.Module, note: Mapping[str, Any] | None) -> None:
    for path, name, value in (note or {}).get("numbers", ()):
        try:
            module = model.get_submodule(path)
        except AttributeError:
            continue
        if hasattr(module, name):
            setattr(module, name, value)


def _shapes_there(model: nn.Module, prefix: str, state: Mapping[str, Any]) -> dict[Tensor, tuple[int, ...]]:
    """The shape of every tensor that the state dict has; of a tied one under any of its names, as files may drop others."""
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
    """A `register_load_state_dict_pre_hook`: the model takes the widths of whatever is loaded into it.

    A top-level function, so that a model that carries it can still be pickled and copied.

    Raises:
        RecordError: if the state dict is of another model and widths differ too; nothing has changed then.
    """
    own = module.state_dict()
    if strict and any(
        tuple(state[prefix + k].shape) != tuple(t.shape) for k, t in own.items() if _both(t, state, prefix + k)
    ):
        named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
        saved = {id(tensor) for name, tensor in named if prefix + name in state}
        tied = {name for name, tensor in named if id(tensor) in saved}
        there = {name.removeprefix(prefix) for name in state if name.startswith(prefix)}
        _refuse_others(set(own) - (tied - there), there, "What is loaded")
    fit_shapes(module, state, prefix, local_metadata.get(NOTE))


def _both(own: Any, state: Mapping[str, Any], name: str) -> bool:
    return isinstance(own, Tensor) and isinstance(state.get(name), Tensor)


def let_load_reshape(module: nn.Module) -> None:
    """Register `reshape_before_load` on a module, once."""
    if reshape_before_load not in load_state_dict_pre_hooks(module):
        module.register_load_state_dict_pre_hook(reshape_before_load)

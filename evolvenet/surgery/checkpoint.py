"""A model reshaped to the widths of a state dict, and loaded, all or nothing."""

# nn.Module.named_modules and its hooks have no return types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from evolvenet._compat.torch import (
    load_state_dict_pre_hooks,
    state_dict_metadata,
    tensor_tables,
)
from evolvenet.errors import RecordError, ResizeError
from evolvenet.graph.format_version import checked_format
from evolvenet.graph.index_map import laid_out_as
from evolvenet.graph.plain_data import reading
from evolvenet.graph.renaming import in_child, in_parent
from evolvenet.graph.width_graph import WidthGraph
from evolvenet.signals import deferred_signals
from evolvenet.surgery.assignment import assign
from evolvenet.surgery.module_handlers import attributes, refresh, shape_sources
from evolvenet.surgery.module_replacement import behind, find_replacements, fit_replacements
from evolvenet.surgery.numbers import number_at, with_number
from evolvenet.surgery.resize_model import exchange, scaled_numbers
from evolvenet.surgery.state_parts import own_names, refuse_others, tied_to
from evolvenet.surgery.untrusted_files import refuse_unsafe
from evolvenet.surgery.width_check import (
    problem_by_graph,
    problem_by_record,
    problem_without_record,
    refuse_numbers_in_doubt,
)
from evolvenet.surgery.width_record import RECORD_KEY, WidthRecord, renamed_state

__all__ = [
    "RECORD_KEY",
    "WidthRecord",
    "find_record",
    "fit_shapes",
    "register_reshape_before_load",
    "reshape_before_load",
]

log = logging.getLogger("evolvenet")
RECORD = "The file's record of widths"
REMEDY = "Build the model as it was built for that file; only its widths may differ."


def find_record(found: Any, prefix: str = "") -> dict[str, Any] | None:
    """The state of a `WidthRecord` in a file's contents, for the part of the model behind a prefix; None if there is none.

    Args:
        found: a Lightning checkpoint, or a state dict.
        prefix: of the part's names in the state dict.
    """
    # Callbacks that average weights put their own under "state_dict", without metadata, and the network's under another key.
    places = [found, found.get("state_dict"), *found.values()]
    records = (_record_in_metadata(each, prefix) for each in places)
    return next((record for record in records if record is not None), None)


def _record_in_metadata(state: Any, prefix: str) -> dict[str, Any] | None:
    """The record in a state dict's metadata, its names without the prefix; entries of other parts are left out."""
    for root, metadata in state_dict_metadata(state).items():
        if RECORD_KEY in metadata:
            whole = renamed_state(checked_format(metadata[RECORD_KEY], RECORD), in_parent(root))
            return renamed_state(whole, in_child(prefix.removesuffix(".")))
    return None


@deferred_signals("the load")
def load_state(
    model: nn.Module,
    state: Mapping[str, Any],
    record: Mapping[str, Any] | None = None,
    graph: WidthGraph | None = None,
    what: str = "What is loaded",
    assigned: bool = False,
) -> None:
    """Reshape a model to a state dict's widths and load it; if anything fails, nothing has changed.

    Args:
        model: the model, with any widths.
        state: entries under the model's own names.
        record: of the state, from `WidthRecord.state_dict`.
        graph: the model's widths, which decide what may differ where there is no record.
        what: the name of the file, for messages.
        assigned: whether the model's tensors take the memory of the state's, where types and devices are the same, in place of
            a copy of its values. Tensors without data (on the device "meta") always do.

    Raises:
        RecordError: if the state is of another model, or a tensor of the model would be left without data.
    """
    copied = not assigned
    assigned |= any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    with reading(what):
        refuse_others(own_names(model), set(state) | tied_to(model, set(state)), what)
        _refuse_types(model, state, what)
        refuse_other_widths(model, state, record, what, graph)
        if graph is not None and "graph" not in (record or {}):
            shapes = {name: tuple(tensor.shape) for name, tensor in state.items() if isinstance(tensor, Tensor)}
            record = {"numbers": scaled_numbers(model, graph, shapes), "buffers": {}}
        elif graph is None and "graph" not in (record or {}):
            refuse_numbers_in_doubt(model, _shapes_there(model, "", state), what)
        restore = _snapshot(model, _shapes_there(model, "", state), assigned)
    try:
        with reading(what):
            fit_shapes(model, state, record=record)
        # What goes wrong from here on is not the file's fault: it is the model's code that loads it (`load_state_dict`).
        # A tied tensor may be in the file under one of its names; what is missing otherwise was refused above.
        if assigned:
            assign(model, state, what, copied=copied)
        else:
            model.load_state_dict(state, strict=False)
    except BaseException:
        restore()
        raise


def _snapshot(model: nn.Module, planned: Mapping[Tensor, tuple[int, ...]], assigned: bool) -> Callable[[], None]:
    """Keeps all that a load changes, and returns what puts it back."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    # The old memory of a tensor that gets another shape, or other memory, is not written to.
    kept = [
        (t, t.data, t.grad, None if assigned or planned.get(t, tuple(t.shape)) != t.shape else t.detach().clone())
        for t in tensors
    ]
    tables = [(table, dict(table)) for module in model.modules() for table in tensor_tables(module)]
    plain = [(module, dict(vars(module))) for module in model.modules()]

    def restore() -> None:
        for table, entries in tables:
            table.clear()
            table.update(entries)
        for module, before in plain:
            vars(module).clear()
            vars(module).update(before)
        with torch.no_grad():
            for tensor, data, grad, values in kept:
                if assigned or tensor.shape != data.shape:
                    exchange(tensor, data, grad)
                if values is not None:
                    tensor.copy_(values)
        for module in model.modules():
            refresh(module)

    return restore


def _refuse_types(model: nn.Module, state: Mapping[str, Any], what: str) -> None:
    """Raise for entries that the model's tensors cannot hold as they are: of a type that holds more, or without data."""
    for name, own in model.state_dict().items():
        if not isinstance(own, Tensor) or name not in state:
            continue
        there = state[name]
        if not isinstance(there, Tensor):
            raise RecordError(
                f"{what}: expected a tensor {name}, got {type(there).__name__}. The file may be damaged, or edited: use another "
                "one."
            )
        if torch.promote_types(own.dtype, there.dtype) != own.dtype:
            raise RecordError(
                f"{what} does not fit this model's number types: expected {name} of {own.dtype} or a type that it holds "
                f"exactly, got {there.dtype}. Convert the model first, model.to({there.dtype}), and back after the load "
                "if rounding is meant."
            )
        if there.is_meta and not own.is_meta:
            raise RecordError(
                f"{what} has no values: expected {name} with data, got a tensor on the device 'meta'. Load with "
                "map_location='cpu' or another device."
            )


def refuse_other_widths(
    model: nn.Module,
    state: Mapping[str, Any],
    record: Mapping[str, Any] | None,
    what: str,
    graph: WidthGraph | None = None,
) -> None:
    """Raise if a state dict differs from a model in more than widths, see `width_problem`.

    Raises:
        RecordError: naming the parameter.
    """
    problem = width_problem(model, state, record, graph)
    if problem is not None:
        raise RecordError(f"{what} is of another model: {problem}. {REMEDY}")


def width_problem(
    model: nn.Module,
    state: Mapping[str, Any],
    record: Mapping[str, Any] | None,
    graph: WidthGraph | None = None,
) -> str | None:
    """How a state dict differs from a model in more than widths, as a sentence; None if it does not.

    What is a width is known from the record, else from the graph, else as far as shapes tell (`bare_shapes`).

    Raises:
        RecordError: if a tensor has another number of axes, no entries, or a shape that its layer cannot have.
    """
    planned = _shapes_there(model, "", state)
    if all(shape == tuple(tensor.shape) for tensor, shape in planned.items()):
        return None
    _changed_numbers(model, "", planned)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items() if isinstance(tensor, Tensor)}
    if record and "graph" in record:
        return problem_by_record(model, shapes, record)
    return problem_by_graph(model, shapes, graph) if graph else problem_without_record(model, planned)


@deferred_signals("the change to a checkpoint's widths")
def fit_shapes(
    model: nn.Module, state: Mapping[str, Any], prefix: str = "", record: Mapping[str, Any] | None = None
) -> None:
    """Give every parameter and buffer the shape that it has in a state dict, and update the modules' attributes.

    The entries of a reshaped tensor are undefined until the state is loaded. Tensors of the right shape are left as they are.
    Which tensors may differ is not checked here.

    Args:
        model: the model to reshape.
        state: a state dict; entries that the model does not have are ignored.
        prefix: of the model's names in it.
        record: what depends on widths and is not in the state dict, from `WidthRecord.state_dict`.

    Raises:
        RecordError: if a tensor has another number of axes there, shapes that no change of widths leads to, or numbers that
            none writes, see `evolvenet.surgery.untrusted_files`; nothing has changed then.
    """
    refuse_unsafe(model, state, record, prefix)
    hidden = (record or {}).get("buffers", {})
    planned = _shapes_there(model, prefix, {**state, **{prefix + name: tensor for name, tensor in hidden.items()}})
    updates = _changed_numbers(model, prefix, planned)
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


def _changed_numbers(
    model: nn.Module, prefix: str, planned: Mapping[Tensor, tuple[int, ...]]
) -> list[tuple[nn.Module, dict[str, Any]]]:
    """For each module whose own tensors get other shapes, its attributes then."""
    updates: list[tuple[nn.Module, dict[str, Any]]] = []
    for path, module in model.named_modules():
        local = shape_sources(module)
        shapes = {name: planned.get(tensor, tuple(tensor.shape)) for name, tensor in local.items()}
        if any(shapes[name] != tuple(tensor.shape) for name, tensor in local.items()):
            updates.append((module, _numbers(f"{prefix}{path}." if path else prefix, module, shapes)))
    return updates


def _apply_numbers(model: nn.Module, record: Mapping[str, Any] | None) -> None:
    for path, name, value in (record or {}).get("numbers", ()):
        try:
            module = model.get_submodule(path)
        except AttributeError:
            continue
        # An eps of None is torch's own, and no missing number.
        if number_at(module, name) is not None or name in vars(module):
            attribute, changed = with_number(module, name, value)
            setattr(module, attribute, changed)


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
        if 0 in shape and 0 not in tensor.shape:
            raise RecordError(
                f"The checkpoint is of another model: expected {prefix + name} with at least one unit on every axis, like "
                f"{tuple(tensor.shape)}, got {shape}."
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
    own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    checked_format(local_metadata.get(RECORD_KEY) or {}, RECORD)
    fit_replacements(module, behind(find_replacements(state), prefix), own)
    if any(tuple(own[k].shape) != tuple(t.shape) for k, t in module.state_dict().items() if _both(t, own, k)):
        record = local_metadata.get(RECORD_KEY)
        if strict:
            refuse_others(own_names(module), set(own) | tied_to(module, set(own)), "What is loaded")
        problem = width_problem(module, own, record)
        if problem is not None and record is None:
            # Averages of weights, for one, are saved without the record of a run that may well go on here.
            log.warning("What is loaded may be of another model: %s. It is loaded as it is.", problem)
        elif problem is not None:
            raise RecordError(f"What is loaded is of another model: {problem}. {REMEDY}")
    fit_shapes(module, state, prefix, local_metadata.get(RECORD_KEY))


def _both(own: Any, state: Mapping[str, Any], name: str) -> bool:
    return isinstance(own, Tensor) and isinstance(state.get(name), Tensor)


def register_reshape_before_load(module: nn.Module) -> None:
    """Register `reshape_before_load` on a module, unless it is registered already."""
    if reshape_before_load not in load_state_dict_pre_hooks(module):
        module.register_load_state_dict_pre_hook(reshape_before_load)

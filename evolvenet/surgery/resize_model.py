"""Width changes of a model: a pure function computes all new values, a second one installs them."""

# nn.Module.named_modules and torch.sparse_coo_tensor have no full types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from evolvenet._compat.torch import own_tensors, sparse_parts
from evolvenet.errors import ResizeError, SpectrumError, concerning, stage
from evolvenet.graph.current import check_current
from evolvenet.graph.index_map import NEW_UNIT, IndexMap, laid_out_as
from evolvenet.graph.naming import named_tensors
from evolvenet.graph.sizes import sizes_from_shapes
from evolvenet.graph.width_graph import CONSUMES, WidthGraph
from evolvenet.linalg.host_transfers import values_of
from evolvenet.surgery.basis_change import BasisChange, along
from evolvenet.surgery.hooked_weights import hook_sources
from evolvenet.surgery.module_handlers import Shapes, attributes, new_unit_value, original_name, refresh
from evolvenet.surgery.numbers import attribute_of, number_at, with_number
from evolvenet.surgery.optimizer_state_rules import Change


@dataclass(frozen=True)
class TensorChange:
    """One tensor's new value.

    Args:
        tensor: the live parameter or buffer, whose identity is kept.
        name: its name in the model.
        axes: for each axis that changes, its map.
        value: the new value, of the new shape; kept in the memory format of the tensor.
        bases: for each axis whose units get another basis before they are mapped, the change.
    """

    tensor: Tensor
    name: str
    axes: Mapping[int, IndexMap]
    value: Tensor
    bases: Mapping[int, BasisChange] = field(default_factory=dict[int, BasisChange])

    def __post_init__(self) -> None:
        # The results of sums and fits over one channel or one place may have other strides.
        object.__setattr__(self, "value", laid_out_as(self.tensor, self.value))


@dataclass(frozen=True)
class AttributeChange:
    """One Python attribute's new value (`in_features`, `groups`, …)."""

    module: nn.Module
    name: str
    value: Any


@dataclass(frozen=True)
class Surgery:
    """All new values of tensors and attributes after a change of widths, and the graph after it.

    `maps` and `bases` are by width; a basis changes before the units are mapped. `updated` says that a growth has also moved
    the weights of present units, so that the loss falls.
    """

    changes: tuple[TensorChange, ...]
    attributes: tuple[AttributeChange, ...]
    maps: Mapping[str, IndexMap]
    graph: WidthGraph
    bases: Mapping[str, BasisChange] = field(default_factory=dict[str, BasisChange])
    updated: bool = False


def compile_surgery(
    model: nn.Module,
    graph: WidthGraph,
    maps: Mapping[str, IndexMap],
    bases: Mapping[str, BasisChange] | None = None,
) -> Surgery:
    """Compute all new tensors and attributes; nothing is changed.

    Args:
        model: the traced model.
        graph: its widths as they are now.
        maps: {width: map}. Entries of new units are 0 (1 for norm weights and running variances; those of units that are
            there in buffers that mask weights, and in what scales or gates units and is not trained, such as a grid of
            splines), so new units change no output and have no gradient; `grow` initialises them.
        bases: {width: change of the basis of its units, before they are mapped}; for widths with a map that fill every axis
            in which they occur, see `evolvenet.measurement.rank_spectra.is_rotatable`.

    Raises:
        ResizeError: if a width is unknown, frozen or cannot take the map, or the graph is not this model's.
    """
    tensors = check_current(model, graph)
    assert set(bases or {}) <= set(maps)
    axis_maps, axis_bases = graph.axis_maps(maps), _axis_bases(graph, bases or {})
    copied = graph.masks | {name for name in graph.gates if not tensors[name].requires_grad}
    copying = graph.axis_maps({name: index_map.copying() for name, index_map in maps.items()}) if copied else {}
    changes: list[TensorChange] = []
    for name, axes in axis_maps.items():
        tensor = tensors[name]
        owner = model.get_submodule(name.rpartition(".")[0])
        with concerning(name):
            value, changed = tensor.detach(), axis_bases.get(name, {})
            for dim, basis in changed.items():
                value = along(value, basis.values, dim)
            for dim, index_map in axes.items():
                filled = new_unit_value(owner, name.rpartition(".")[2], dim)
                # Torch's own masks (`torch.nn.utils.prune`) are filled with ones.
                is_copied = name in copied and not filled
                value = (copying[name][dim] if is_copied else index_map).apply(value, dim, filled)
            changes.append(TensorChange(tensor, name, axes, value, changed))
    after = graph.resized(maps)
    numbers = _attribute_changes(model, graph, after, set(axis_maps))
    return Surgery(tuple(changes), numbers, dict(maps), after, dict(bases or {}))


def _axis_bases(graph: WidthGraph, bases: Mapping[str, BasisChange]) -> dict[str, dict[int, BasisChange]]:
    """{tensor: {axis: change of basis}}; a consumer's columns change such that its products with the units stay."""
    found: dict[str, dict[int, BasisChange]] = {}
    for name, basis in bases.items():
        width = graph.widths[name]
        for tie in width.ties:
            assert (tie.start, tie.repeat, graph.shapes[tie.tensor][tie.dim]) == (0, 1, width.size)
            found.setdefault(tie.tensor, {})[tie.dim] = basis.dual if tie.role == CONSUMES else basis
    return found


def stale_attributes(model: nn.Module, graph: WidthGraph) -> tuple[AttributeChange, ...]:
    """Attributes of modules that contradict the shapes of their tensors, each with the value that fits them.

    Modules of which the attributes are unknown contradict nothing.
    """
    return _attribute_changes(model, graph, graph, None)


def _attribute_changes(
    model: nn.Module, before: WidthGraph, after: WidthGraph, touched: set[str] | None
) -> tuple[AttributeChange, ...]:
    """The attributes that change; those by a module's type take precedence over those in proportion to a width.

    Args:
        model: the model.
        before: its widths as they are.
        after: its widths as they will be.
        touched: names of the tensors that change; None for the attributes of all modules, as far as they are known.
    """
    changes = _number_changes(model, before, after)
    for path, module in model.named_modules():
        local = _local_shapes(path, module, after)
        shapes = {name: after.shapes[full] for name, full in local.items()}
        numbers: dict[str, Any] = {}
        if touched is None:
            with suppress(KeyError):
                numbers = attributes(module, shapes) if shapes else {}
        elif any(full in touched for full in local.values()):
            with concerning(*local.values()):
                numbers = _numbers(path, module, shapes)
        for name, value in numbers.items():
            changes[id(module), name] = AttributeChange(module, name, value)
    return tuple(change for change in changes.values() if getattr(change.module, change.name) != change.value)


def _local_shapes(path: str, module: nn.Module, graph: WidthGraph) -> dict[str, str]:
    """Name in the module of each of its tensors → name in the graph of the tensor that has its shape."""
    prefix = f"{path}." if path else ""
    own = {name: prefix + name for name in own_tensors(module)}
    made = cast(nn.ModuleDict, module.parametrizations).items() if is_parametrized(module) else ()
    own |= {name: f"{prefix}parametrizations.{name}.{original_name(made_by)}" for name, made_by in made}
    own |= {name: prefix + source for name, source in hook_sources(module).items()}
    found = {name: graph.aliases.get(full, full) for name, full in own.items()}
    return {name: full for name, full in found.items() if full in graph.shapes}


def _numbers(path: str, module: nn.Module, shapes: Shapes) -> dict[str, Any]:
    try:
        return attributes(module, shapes)
    except KeyError as missing:
        raise ResizeError(
            f"Expected the {type(module).__name__} {path!r} to hold {missing}, but it computes it from other tensors, so "
            "its attributes for the new shapes are unknown. Register evolvenet.surgery.module_handlers.attributes for it."
        ) from missing


def _following_numbers(model: nn.Module, before: WidthGraph, after: WidthGraph) -> Iterator[tuple[str, str, int]]:
    """(module path, name, new value) of numbers of the model's own code that are proportional to a width that changes."""
    for name, width in before.widths.items():
        new = after.widths[name].size
        for path, number in width.patches if new != width.size else ():
            yield path, number, number_at(model.get_submodule(path), number) * new // width.size


def _number_changes(model: nn.Module, before: WidthGraph, after: WidthGraph) -> dict[tuple[int, str], AttributeChange]:
    """The attributes in which such numbers lie, by module and name; several numbers may lie in one attribute."""
    changes: dict[tuple[int, str], AttributeChange] = {}
    for path, name, number in _following_numbers(model, before, after):
        module = model.get_submodule(path)
        known = changes.get((id(module), attribute_of(name)))
        attribute, value = with_number(module, name, number, None if known is None else known.value)
        changes[id(module), attribute] = AttributeChange(module, attribute, value)
    return changes


def scaled_numbers(model: nn.Module, graph: WidthGraph, shapes: Mapping[str, tuple[int, ...]]) -> list[list[Any]]:
    """[[module path, name, value], …] of the numbers of a model's own code that follow its widths to other shapes.

    Args:
        model: the model as it is.
        graph: its widths as they are.
        shapes: {tensor name: other shape}, which sizes of the widths give.
    """
    sizes, _ = sizes_from_shapes(graph, shapes)
    return [list(found) for found in _following_numbers(model, graph, graph.with_sizes(sizes))]


def with_values(model: nn.Module, surgery: Surgery, values: Mapping[str, Tensor]) -> Surgery:
    """The surgery with other values.

    Args:
        model: the surgery's model.
        surgery: the planned change.
        values: {tensor name: new value} of every tensor that changes; one that the surgery leaves alone keeps its shape.
    """
    tensors, _, _ = named_tensors(model)
    before = {change.name: change for change in surgery.changes}
    changes = (
        replace(before[name], value=value.to(tensors[name].device))
        if name in before
        else TensorChange(tensors[name], name, {}, value.to(tensors[name].device))
        for name, value in values.items()
    )
    return replace(surgery, changes=tuple(changes))


def check_finite(surgery: Surgery) -> Surgery:
    """The surgery, after refusing tensors with NaN or infinite entries: values computed from them would be broken too.

    Raises:
        SpectrumError: naming the first of them.
    """
    finite = values_of([change.tensor.isfinite().all() for change in surgery.changes])
    for change, each in zip(surgery.changes, finite, strict=True):
        if not each:
            raise SpectrumError(
                f"{change.name}: expected finite entries, got NaN or infinite ones. Training has diverged: lower the "
                "learning rate, clip gradients, or load an earlier checkpoint. resize alone moves them as they are."
            )
    return surgery


def install(model: nn.Module, surgery: Surgery) -> Callable[[], None]:
    """Put the compiled values into the model, all or nothing.

    Every parameter stays the object that it was, so optimizer groups, schedulers, hooks and tied weights stay valid.

    Returns:
        A function that puts everything back.
    """
    before = [(c.tensor, c.tensor.data, c.tensor.grad) for c in surgery.changes]
    attributes_before = [(c.module, c.name, getattr(c.module, c.name)) for c in surgery.attributes]
    modules = list(model.modules())

    def undo() -> None:
        for tensor, data, grad in before:
            exchange(tensor, data, grad)
        for module, name, value in attributes_before:
            setattr(module, name, value)
        for module in modules:
            refresh(module)

    try:
        gradients = [carried_gradient(change) for change in surgery.changes]
        for change, grad in zip(surgery.changes, gradients, strict=True):
            with stage("tensor exchange"):
                exchange(change.tensor, change.value, grad)
        with stage("module attributes"):
            for change in surgery.attributes:
                setattr(change.module, change.name, change.value)
            for module in modules:
                refresh(module)
    except BaseException:
        undo()
        raise
    torch.clear_autocast_cache()
    return undo


@stage("gradient")
def carried_gradient(change: Change) -> Tensor | None:
    """The gradient of a tensor after its change, 0 for new units; None if it has none."""
    grad = change.tensor.grad
    if grad is None:
        return None
    for dim, basis in change.bases.items():
        grad = along(grad, basis.gradients, dim)
    for dim, index_map in change.axes.items():
        grad = _sparse(grad, index_map, dim) if grad.is_sparse else index_map.apply(grad, dim)
    return grad


def _sparse(grad: Tensor, index_map: IndexMap, dim: int) -> Tensor:
    """An embedding's sparse gradient after a change of one axis; it stays sparse, as SparseAdam requires."""
    # A sparse tensor cannot be filled in place: new units are taken from one more unit without stored entries.
    shape = [1 if axis == dim % grad.dim() else size for axis, size in enumerate(grad.shape)]
    indices, values = sparse_parts(grad)
    nothing = torch.sparse_coo_tensor(
        indices.new_empty(grad.sparse_dim(), 0),
        values.new_empty(0, *shape[grad.sparse_dim() :]),
        shape,
        check_invariants=False,
    )
    index = index_map.tensor(grad.device)
    return torch.cat([grad, nothing], dim).index_select(dim, index.where(index != NEW_UNIT, index_map.size))


def exchange(tensor: Tensor, value: Tensor, grad: Tensor | None) -> None:
    """Give a parameter new data of another shape under its old identity.

    Passing through another dtype drops the gradient accumulator that an old graph may keep alive; without it the next
    backward fails with "invalid gradient".
    """
    with torch.inference_mode(False), torch.no_grad():
        tensor.grad = None
        other = torch.float32 if tensor.dtype != torch.float32 else torch.float16
        tensor.data = torch.empty(0, dtype=other, device=tensor.device)
        tensor.data = _ordinary(value)
        tensor.grad = None if grad is None else _ordinary(grad)


def _ordinary(tensor: Tensor) -> Tensor:
    """A tensor that can be trained: one made under inference mode cannot, its clone outside of that mode can."""
    return tensor.clone() if tensor.is_inference() else tensor


def moved(change: TensorChange) -> Tensor:
    """Boolean tensor of the new shape: which entries come from an old one (the others belong to new units)."""
    kept = torch.ones(change.value.shape, dtype=torch.bool, device="cpu")
    for dim, index_map in change.axes.items():
        is_old = torch.tensor([index != NEW_UNIT for index in index_map.indices], device="cpu")
        kept &= is_old.view([-1 if d == dim else 1 for d in range(kept.dim())])
    return kept

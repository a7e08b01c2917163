"""What happened to the widths, as plain data, and a model reshaped to fit a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evolvenet.errors import RecordError, ResizeError
from evolvenet.layers import attributes, refresh
from evolvenet.surgery import exchange


@dataclass(frozen=True)
class WidthChange:
    """One width that changed at an event, from how many units to how many, and why."""

    width: str
    before: int
    after: int
    reason: str


@dataclass(frozen=True)
class Event:
    """The network after an event.

    Args:
        step: optimizer steps done before it.
        changes: the widths that changed.
        sizes: every resizable width's units after it.
        parameters_before: parameters of the network before it.
        parameters: parameters after it.
        macs: multiply-accumulates of one sample's forward pass after it.
        seconds: what the event took.
        skipped: None, or why nothing was changed although it was due.
    """

    step: int
    changes: tuple[WidthChange, ...]
    sizes: dict[str, int]
    parameters_before: int
    parameters: int
    macs: int
    seconds: float
    skipped: str | None = None


@dataclass
class History:
    """A run's events. `initial` is the network before the first one."""

    initial: Event
    events: list[Event] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As plain dicts, lists, numbers and strings, fit for JSON and for `weights_only` checkpoints."""
        plain = asdict(self)
        for event in (plain["initial"], *plain["events"]):
            event["changes"] = list(event["changes"])
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> History:
        """The history that `to_dict` was called on."""

        def event(entry: Mapping[str, Any]) -> Event:
            changes = tuple(WidthChange(**change) for change in entry["changes"])
            return Event(**{**entry, "changes": changes, "sizes": dict(entry["sizes"])})

        return cls(event(plain["initial"]), [event(entry) for entry in plain["events"]])


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
    state = found["state_dict"] if isinstance(found, dict) and "state_dict" in found else found
    state = _own_part(set(model.state_dict()), state, path)
    fit_shapes(model, state)
    model.load_state_dict(state)
    return model


def _own_part(own: set[str], state: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    """The entries of a state dict under the model's own names: all of them, or those behind one prefix."""
    some = min(own, default="")
    prefixes = [name.removesuffix(some) for name in state if name.endswith(f".{some}")]
    inside = [prefix for prefix in prefixes if all(prefix + name in state for name in own)]
    if own != set(state) and len(inside) == 1:
        return {name: state[inside[0] + name] for name in own}
    missing, unexpected = sorted(own - set(state)), sorted(set(state) - own)
    if missing and inside:
        raise RecordError(
            f"{path} holds {len(inside)} networks like this one: expected one, got {', '.join(inside)}. Build the module "
            "that holds them all and load it as a whole."
        )
    if missing or unexpected:
        raise RecordError(
            f"{path} is a checkpoint of another model: expected entries that it lacks {missing[:5]}, and it has entries "
            f"unknown here {unexpected[:5]} ({len(missing)} and {len(unexpected)} in all). Build the model as it was built "
            "for that run; only its widths may differ."
        )
    return dict(state)


def fit_shapes(model: nn.Module, state: Mapping[str, Any], prefix: str = "") -> None:
    """Give every parameter and buffer the shape that it has in a state dict, and update the modules' attributes.

    Contents are undefined afterwards, until the state is loaded. Shapes that already fit are left alone.

    Args:
        model: the model to reshape.
        state: a state dict; other entries are passed over.
        prefix: of the model's names in it.

    Raises:
        RecordError: if a tensor has another number of axes there, or shapes that no change of widths leads to; nothing
            has changed then.
    """
    planned: dict[Tensor, tuple[int, ...]] = {}
    updates: list[tuple[nn.Module, dict[str, Any]]] = []
    for path, module in model.named_modules():
        start = f"{prefix}{path}." if path else prefix
        local = {k: t for table in (module._parameters, module._buffers) for k, t in table.items() if t is not None}
        shapes = {name: _shape_there(start + name, tensor, state) for name, tensor in local.items()}
        for name, tensor in local.items():
            if planned.setdefault(tensor, shapes[name]) != shapes[name]:
                raise RecordError(
                    f"The checkpoint is of another model: expected {start + name} of shape {planned[tensor]}, since it is "
                    f"tied to another weight here, got {shapes[name]}."
                )
        if any(shapes[name] != tuple(tensor.shape) for name, tensor in local.items()):
            updates.append((module, _numbers(start, module, shapes)))
    exchanges = [(t, _empty(t, shape)) for t, shape in planned.items() if shape != tuple(t.shape)]
    for tensor, value in exchanges:
        exchange(tensor, value, None)
    for module, found in updates:
        for name, value in found.items():
            setattr(module, name, value)
        refresh(module)


def _shape_there(name: str, tensor: Tensor, state: Mapping[str, Any]) -> tuple[int, ...]:
    shape = tuple(state[name].shape) if name in state else tuple(tensor.shape)
    if len(shape) != tensor.dim():
        raise RecordError(
            f"The checkpoint is of another model: expected {name} with {tensor.dim()} axes, like {tuple(tensor.shape)}, "
            f"got {shape}. Only widths may differ."
        )
    return shape


def _numbers(start: str, module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    try:
        return attributes(module, shapes)
    except (ResizeError, KeyError) as error:
        raise RecordError(
            f"The checkpoint is of another model, at {start.removesuffix('.') or 'its root'}: {error}"
        ) from error


def _empty(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor of another shape in the memory format of this one."""
    empty = tensor.detach().new_empty(shape)
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim())
    if last is not None and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=last):
        empty = empty.contiguous(memory_format=last)
    return empty


def reshape_before_load(module: nn.Module, state: Mapping[str, Any], prefix: str, *unused: Any) -> None:
    """A `register_load_state_dict_pre_hook`: the model takes the widths of whatever is loaded into it.

    A top-level function, so that a model that carries it can still be pickled and copied.
    """
    fit_shapes(module, state, prefix)

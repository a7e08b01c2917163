"""What a file may say about a model: whole numbers where whole numbers are, and tensors whose values it holds.

A file that torch loads with `weights_only=True` cannot run code, but its record of widths names attributes of modules, and
its tensors can have strides of zero: any size without any data. Both are checked before anything changes.
"""

# nn.Module.get_submodule has no full type.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from evolvenet.errors import RecordError
from evolvenet.surgery.numbers import number_at, numbers_in


def refuse_unsafe(
    model: nn.Module, state: Mapping[str, Any], record: Mapping[str, Any] | None, prefix: str = ""
) -> None:
    """Raise if a state dict or its record would write what no change of widths writes.

    Args:
        model: that it is loaded into.
        state: a state dict, with any other entries.
        record: what `WidthRecord.state_dict` returned, from the same file.
        prefix: of the model's names in the state dict.

    Raises:
        RecordError: for a number that is no whole number here or there, a buffer that the model does not have, or a tensor
            that is larger than the data behind it and than the model's own. Nothing has changed then.

    >>> refuse_unsafe(nn.Linear(4, 2), {}, {"numbers": [["", "forward", 7]], "buffers": {}})
    Traceback (most recent call last):
    ...
    evolvenet.errors.RecordError: The file's record of widths sets 'forward' of Linear to 7: expected a whole number of units...
    """
    known: dict[str, dict[str, int]] = {}
    for path, name, value in (record or {}).get("numbers", ()):
        try:
            module = model.get_submodule(path)
        except AttributeError:
            continue
        if path not in known:
            known[path] = dict(numbers_in(module))
        _refuse_number(module, path, name, value, known[path])
    named = dict(model.named_buffers(remove_duplicate=False))
    hidden = (record or {}).get("buffers", {})
    for name, value in hidden.items():
        if name not in named or not isinstance(value, Tensor):
            raise RecordError(
                f"The file's record of widths sets {name!r} to a {type(value).__name__}: expected a tensor for one of the "
                f"model's {len(named)} buffers. Save the file again with evolvenet.save."
            )
    named |= dict(model.named_parameters(remove_duplicate=False))
    for name, own in named.items():
        _refuse_size(prefix + name, own, hidden.get(name, state.get(prefix + name)))


def _refuse_number(module: nn.Module, path: str, name: str, value: Any, known: Mapping[str, int]) -> None:
    own = known[name] if name in known else number_at(module, name)
    # Numbers of another version of the model's code are passed over, as they are when they are applied.
    if own is None and name not in known and name not in vars(module):
        return
    if name in known and type(value) is int and (value >= 0 or value == own):
        return
    # The eps of a norm follows a stream that grows. It is told by its name: the model may lie on meta while it is loaded.
    # None is torch's own eps, to which an undone growth returns.
    if (
        (own is None or type(own) is float)
        and "eps" in name
        and (value is None or (type(value) is float and 0 <= value < 1))
    ):
        return
    at = f"{path} ({type(module).__name__})" if path else type(module).__name__
    raise RecordError(
        f"The file's record of widths sets {name!r} of {at} to {value!r}: expected a whole number of units, for an attribute "
        "that holds a whole number. Files of evolvenet.save write no others; do not load this one."
    )


def _refuse_size(name: str, own: Tensor, there: Any) -> None:
    if not isinstance(there, Tensor) or there.is_meta or there.layout != torch.strided or there.numel() <= own.numel():
        return
    try:
        held = there.untyped_storage().nbytes() // there.element_size()
    except (NotImplementedError, RuntimeError):  # tensors of other libraries have no storage of their own
        return
    if there.numel() > held:
        raise RecordError(
            f"{name} of shape {tuple(there.shape)} repeats {held} numbers of the file: expected a tensor with a number for each "
            f"entry. Save it with .contiguous() if that is meant."
        )

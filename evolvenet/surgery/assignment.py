"""A state dict loaded without a copy: the model's tensors take the memory of its entries, for example that of a mapped file."""

# nn.Module.load_state_dict and the tables of a module have no full types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from evolvenet._compat.torch import tensor_tables
from evolvenet.errors import RecordError
from evolvenet.surgery.module_handlers import refresh
from evolvenet.surgery.resize_model import exchange


def assign(model: nn.Module, state: Mapping[str, Any], what: str = "What is loaded", *, copied: bool = False) -> None:
    """Load a state dict by `load_state_dict(assign=True)`, with the model's own parameters, and its ties, as they were.

    torch puts new parameters in the place of the old ones, which optimizers, hooks and tied weights would not know. Here the
    old ones get the new memory. Entries of another type or device than the model's tensors are converted first, which is a
    copy; so is one that shares memory with the entry of another tensor, or in itself. Tensors on the device "meta" can get no
    data: there the new parameters stay, in all places of the old ones.

    Args:
        model: of the shapes of the state.
        state: entries under the model's names; some may be missing.
        what: the name of the file, for the message.
        copied: whether the memory is that of a copy of each entry.

    Raises:
        RecordError: for a tensor that is still without data, as it is in no file.

    >>> model, weight = nn.Linear(2, 3), torch.ones(3, 2)
    >>> known = model.weight
    >>> assign(model, {"weight": weight})
    >>> model.weight is known, known.data_ptr() == weight.data_ptr()
    (True, True)
    """
    before = [(table, dict(table)) for module in model.modules() for table in tensor_tables(module)]
    own = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    alike = {name: _alike(value, own.get(name), copied) for name, value in state.items()}
    model.load_state_dict(alike | _unshared(model, alike), strict=False, assign=True)
    _put_back(before)
    for module in model.modules():
        refresh(module)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise RecordError(
                f"{what} has no values of {name}: expected one for each tensor of a model on the device 'meta', got none, as it "
                "is in no state dict. Build the model on the CPU (load's mmap=True copies nothing either); models of the "
                "transformers library are opened by evolvenet.transformers.from_pretrained."
            )


def _unshared(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Copies of the entries that share memory with another one before them, or in themselves (an expanded tensor)."""
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    owners = {name: id(tensor) for name, tensor in named}
    parts = {
        name: range(value.data_ptr(), value.data_ptr() + _extent(value) * value.element_size())
        for name, value in state.items()
        if isinstance(value, Tensor) and name in owners and value.layout == torch.strided and value.numel()
        if not value.is_meta
    }
    copies: dict[str, Tensor] = {}
    end, owner = 0, 0
    for name in sorted(parts, key=lambda name: parts[name].start):
        if (parts[name].start < end and owners[name] != owner) or _overlaps_itself(state[name]):
            copies[name] = state[name].clone()
        else:
            end, owner = max(end, parts[name].stop), owners[name]
    return copies


def _extent(tensor: Tensor) -> int:
    """How many entries of memory a tensor reaches over."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _overlaps_itself(tensor: Tensor) -> bool:
    repeated = any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return repeated or _extent(tensor) < tensor.numel()


def _put_back(before: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    """Put the tensors that were in some tables back there, with the memory of those that took their places."""
    found: dict[int, Tensor] = {}
    for table, entries in before:
        for name, old in entries.items():
            if old is not None and table[name] is not old and id(old) not in found:
                found[id(old)] = table[name]
                if not old.is_meta:
                    exchange(old, table[name].detach(), old.grad)
    for table, entries in before:
        table.update(
            {name: found.get(id(old), old) if old is not None and old.is_meta else old for name, old in entries.items()}
        )


def _alike(value: Any, own: Tensor | None, copied: bool) -> Any:
    """An entry of the type and on the device of the model's tensor."""
    if not isinstance(value, Tensor) or own is None:
        return value
    return value.to(value.device if own.is_meta else own.device, own.dtype, copy=copied)

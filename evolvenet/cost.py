"""What widths cost: parameters, bytes, and multiply-accumulates of a forward pass."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from evolvenet.errors import TraceError
from evolvenet.inputs import arguments
from evolvenet.sandbox import op_by_op, sandbox


def parameters(model: nn.Module) -> int:
    """Number of parameters, tied ones counted once.

    >>> parameters(nn.Linear(4, 3))
    15
    """
    return sum(parameter.numel() for parameter in model.parameters())


def size_in_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers in their own dtypes, tied ones counted once.

    >>> size_in_bytes(nn.Linear(4, 3).half())
    30
    """
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


def macs(model: nn.Module, example_inputs: Any) -> int:
    """Multiply-accumulates of the matrix products and convolutions in one eval forward pass, per sample.

    Counted by torch's `FlopCounterMode` (which counts two operations each) on shadows without data, where the model's
    code allows that. The number of samples is the first axis of the first tensor among the inputs.

    Args:
        model: any module; it is left as it was.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments.

    Raises:
        TraceError: if the model does not run on the example inputs.

    >>> import torch
    >>> macs(nn.Linear(4, 3), torch.zeros(2, 4))
    12
    """
    first = next((leaf for leaf in tree_flatten(example_inputs)[0] if isinstance(leaf, Tensor) and leaf.dim()), None)
    samples = first.shape[0] if first is not None else 1
    failure: Exception | None = None
    for device in ("meta", None):
        args, kwargs = arguments(tree_map_only(Tensor, lambda t: t.detach().clone(), example_inputs), device, model)
        try:
            with sandbox(model, device), op_by_op(), FlopCounterMode(display=False) as counter:
                model.eval()
                model(*args, **kwargs)
        except Exception as error:  # noqa: BLE001  the model's own code may raise anything
            failure = error
            continue
        return counter.get_total_flops() // 2 // samples
    raise TraceError(f"The model does not run on the example inputs: {type(failure).__name__}: {failure}.") from failure

"""Quantised weights: their entries are codes of numbers, so no width of theirs can change."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from evolvenet.errors import TraceError

CODES = frozenset(
    {torch.int8, torch.uint8, *(getattr(torch, name) for name in dir(torch) if name.startswith(("float8", "float4")))}
)
"""Types of weights that are stored as codes; networks have no others of whole numbers but indices, which are longer."""
PACKED = ("qweight", "_packed_params")
"""Names of weights in which several codes lie in one entry."""


def quantised_layers(model: nn.Module) -> dict[str, str]:
    """{path of a module: type} of the modules with quantised weights.

    They are known by torch's own quantised modules, tensors of torchao's types, and weights of one byte an entry, as
    bitsandbytes has them, or packed ones, as those of GPTQ and AWQ.

    >>> layer = nn.Linear(4, 2)
    >>> layer.weight = nn.Parameter(torch.zeros(2, 4, dtype=torch.int8), requires_grad=False)
    >>> quantised_layers(nn.Sequential(layer)), quantised_layers(nn.Linear(4, 2))
    ({'0': 'Linear'}, {})
    """
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        own = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
        packed = isinstance(getattr(module, "_packed_params", None), nn.Module)
        known = packed and type(module).__module__.startswith("torch.ao.nn.quantized")
        if known or any(_is_quantised(name, tensor) for name, tensor in own.items()):
            found[path] = type(module).__name__
    return found


def _is_quantised(name: str, tensor: Tensor) -> bool:
    # A buffer of unsigned bytes is more likely a mask.
    mask = tensor.dtype == torch.uint8 and not isinstance(tensor, nn.Parameter)
    codes = tensor.dim() > 1 and tensor.dtype in CODES and not mask
    return codes or tensor.is_quantized or type(tensor.data).__module__.startswith("torchao.") or name in PACKED


def refuse_quantised(model: nn.Module) -> None:
    """Raise if a model, of which no width can change, has quantised weights.

    Raises:
        TraceError: naming the first of its quantised layers.
    """
    found = quantised_layers(model)
    if found:
        first, kind = next(iter(found.items()))
        raise TraceError(
            f"The model is quantised: {len(found)} layers, {first!r} ({kind}) first, hold codes in the place of weights, so none "
            "of its widths can change. Trace, prune and grow the model before it is quantised, and quantise the result."
        )

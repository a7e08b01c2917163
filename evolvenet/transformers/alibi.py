"""Whole heads of attention with ALiBi (BLOOM, Falcon, MPT): each head keeps its own slope when others go.

These models compute one bias for all layers from the number of heads (Press et al. 2022, "Train short, test long"): with a head
less, all slopes would be others. So each attention gets a buffer with the numbers of its heads, and takes its rows of the bias of
all heads by them. The buffer is resized with the heads, and saved with the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.bloom.modeling_bloom import BloomAttention
from transformers.models.falcon.modeling_falcon import FalconAttention
from transformers.models.mpt.modeling_mpt import MptAttention

from evolvenet.errors import TraceError

BUFFER = "alibi_heads"
"""Name of the buffer of each attention: the numbers that its heads had at first, `[heads]`, as floating-point numbers."""
BIASES: dict[type[nn.Module], Mapping[str, Callable[[Tensor, Tensor, int], Tensor]]] = {}
"""{type of attention: {argument of its forward pass: function of the bias, the heads' numbers and the batch size}}."""


def number_alibi_heads(model: nn.Module) -> int:
    """Let whole heads of a model with ALiBi go, grow and be saved: `trace(model, …, heads=True)` finds them then.

    The model computes what it did. Do the same to a freshly built model before `evolvenet.load`;
    `evolvenet.transformers.from_pretrained` does it by itself where heads have gone or layers differ. A model that has all of its
    heads, and widths that a configuration says, is saved without numbers, as the transformers library alone loads it. A new
    head has the slope of one that is there.

    Args:
        model: BLOOM, Falcon with `alibi=True`, MPT, or a model that holds one; it is changed in place, once.

    Returns:
        The number of attention layers that have numbers of their heads now.

    Raises:
        TraceError: if the model has no such layer.

    >>> import evolvenet
    >>> from transformers import BloomConfig, BloomModel
    >>> model = BloomModel(BloomConfig(vocab_size=20, hidden_size=16, n_layer=1, n_head=4))
    >>> evolvenet.transformers.number_alibi_heads(model)
    1
    >>> graph = evolvenet.trace(model, {"input_ids": torch.arange(6)[None]}, heads=True)
    >>> keep = evolvenet.IndexMap.keep([0, 2, 3], size=4)
    >>> graph = evolvenet.resize(model, graph, {"h.0.self_attention.query_key_value": keep})
    >>> model.h[0].self_attention.alibi_heads
    tensor([0., 2., 3.])
    """
    found = [module for module in model.modules() if _biases_of(module) and _has_slopes(module)]
    if not found:
        names = ", ".join(kind.__name__ for kind in BIASES)
        raise TraceError(
            f"number_alibi_heads: expected a model with slopes for its heads ({names}), got a {type(model).__name__} without. "
            "Heads of other attention need no numbers: trace(model, example_inputs, heads=True)."
        )
    for module in found:
        if not hasattr(module, BUFFER):
            heads: Any = module.n_heads if isinstance(module, MptAttention) else module.num_heads
            weight = next(module.parameters())
            module.register_buffer(BUFFER, torch.arange(heads, dtype=weight.dtype, device=weight.device))
            module.register_forward_pre_hook(take_own_rows, with_kwargs=True)
    return len(found)


def take_own_rows(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A hook before an attention's forward pass: of the bias of all heads it gets the rows of its own."""
    heads = getattr(module, BUFFER).long()
    samples = (args[0] if args else kwargs["hidden_states"]).shape[0]
    own = {
        name: take(kwargs[name], heads, samples)
        for name, take in _biases_of(module).items()
        if kwargs.get(name) is not None
    }
    return args, {**kwargs, **own}


def _biases_of(module: nn.Module) -> Mapping[str, Callable[[Tensor, Tensor, int], Tensor]]:
    """The entry of a module's class in `BIASES`, or of the first class that it is derived from; {} if there is none."""
    return next((BIASES[kind] for kind in type(module).__mro__ if kind in BIASES), {})


def _has_slopes(module: nn.Module) -> bool:
    return not isinstance(module, FalconAttention) or bool(module.config.alibi)


def _of_each_sample(bias: Tensor, heads: Tensor, samples: int) -> Tensor:
    """Rows of `[samples · heads, …]`."""
    return bias.unflatten(0, (samples, -1))[:, heads].flatten(0, 1)


def _of_second_axis(bias: Tensor, heads: Tensor, samples: int) -> Tensor:
    """Rows of `[samples, heads, …]`, if it has one for each head, or of `[samples · heads, …]`."""
    if bias.dim() == 3:
        return _of_each_sample(bias, heads, samples)
    return bias if bias.shape[1] == 1 else bias[:, heads]


BIASES[BloomAttention] = {"alibi": _of_each_sample}
BIASES[FalconAttention] = {"alibi": _of_second_axis, "attention_mask": _of_second_axis}
BIASES[MptAttention] = {"position_bias": lambda bias, heads, samples: bias[heads]}

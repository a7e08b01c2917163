"""`nn.MultiheadAttention` with a linear layer for each projection, which can then be factorized like any other."""

# nn.Module's tables have no full types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrize import is_parametrized

from evolvenet._compat.torch import adopt_hooks, child_table, parameter_table, runs_forward_of, without_tensors
from evolvenet.surgery.module_replacement import BUILDERS, Record, Replacement, exchange_modules

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
"""Names of the layers of a `SplitAttention`."""


class SplitAttention(Replacement, nn.MultiheadAttention):
    """What `nn.MultiheadAttention` computes, by four linear layers: queries, keys, values, outputs.

    `nn.TransformerEncoderLayer` has a fused path for inference that multiplies with the weights itself. It gets
    `in_proj_weight`, put together from the projections, so its outputs are the same, but factors save nothing there;
    `torch.backends.mha.set_fastpath_enabled(False)` switches to the layers.

    Args:
        attention: without `bias_k`, `bias_v` and `add_zero_attn`. Its output layer becomes this module's.
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        nn.Module.__init__(self)
        self._original = (without_tensors(attention),)
        self.embed_dim, self.kdim, self.vdim = attention.embed_dim, attention.kdim, attention.vdim
        self.num_heads, self.head_dim = attention.num_heads, attention.head_dim
        self.dropout, self.batch_first = attention.dropout, attention.batch_first
        self.bias_k, self.bias_v, self.add_zero_attn = None, None, False
        self._qkv_same_embed_dim = parameter_table(attention).get("in_proj_weight") is not None
        biases = parameter_table(attention)["in_proj_bias"]
        shares = [None] * 3 if biases is None else biases.detach().chunk(3)
        for name, weight, bias in zip(PROJECTIONS, _in_weights(attention), shares, strict=False):
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
            table = parameter_table(layer)
            table["weight"] = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
            if bias is not None and biases is not None:
                table["bias"] = nn.Parameter(bias.clone(), requires_grad=biases.requires_grad)
            self.add_module(name, layer)
        self.add_module("out_proj", attention.out_proj)
        adopt_hooks(self, attention)
        self.train(attention.training)
        self.record_in_checkpoints()

    @property
    def in_proj_weight(self) -> Tensor | None:  # type: ignore[override]
        """The weights of queries, keys and values, one below the other; None where the widths of their inputs differ."""
        weights = [self._projection(name).weight for name in PROJECTIONS[:3]]
        return torch.cat(weights) if self._qkv_same_embed_dim else None

    @property
    def in_proj_bias(self) -> Tensor | None:  # type: ignore[override]
        """The biases of queries, keys and values."""
        biases = [self._projection(name).bias for name in PROJECTIONS[:3]]
        return None if biases[0] is None else torch.cat(biases)

    def _projection(self, name: str) -> Any:
        return child_table(self)[name]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`."""
        if is_causal and attn_mask is None:
            raise RuntimeError("Expected attn_mask with the hint is_causal, got None. Pass the causal mask too.")
        batched = query.dim() == 3
        if not batched:
            query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        inputs = zip(PROJECTIONS, (query, key, value), strict=False)
        # [batch, heads, positions, width of a head]
        q, k, v = (self._projection(name)(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for name, x in inputs)
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else _merged(attn_mask, key_padding_mask, len(q), q.dtype)
        rate = self.dropout if self.training else 0.0
        if need_weights:
            scores = q * k.shape[-1] ** -0.5 @ k.mT
            weights = functional.dropout((scores if mask is None else scores + mask).softmax(-1), rate)
            attended = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            weights = None
            attended = functional.scaled_dot_product_attention(q, k, v, mask, rate, causal)
        out: Tensor = self._projection("out_proj")(attended.transpose(1, 2).flatten(2))
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights

    def record(self) -> dict[str, Any]:
        """See `Replacement`."""
        weights = ["in_proj_weight"] if self._qkv_same_embed_dim else [f"{name}_weight" for name in PROJECTIONS[:3]]
        biased = self._projection("q_proj").bias is not None
        out = ["out_proj.weight"] + ["out_proj.bias"] * (self._projection("out_proj").bias is not None)
        return {"type": "attention", "whole": [*weights, *["in_proj_bias"] * biased, *out]}

    def whole(self) -> nn.MultiheadAttention:
        """See `Replacement`."""
        made = without_tensors(self._original[0])
        assert isinstance(made, nn.MultiheadAttention)
        projections = [self._projection(name) for name in PROJECTIONS[:3]]
        weights = [projection.weight.detach() for projection in projections]
        trained = next(projections[0].parameters()).requires_grad
        table = parameter_table(made)
        if self._qkv_same_embed_dim:
            table["in_proj_weight"] = nn.Parameter(torch.cat(weights), requires_grad=trained)
        else:
            for name, weight in zip(PROJECTIONS, weights, strict=False):
                table[f"{name}_weight"] = nn.Parameter(weight.clone(), requires_grad=trained)
        if projections[0].bias is not None:
            biases = torch.cat([projection.bias.detach() for projection in projections])
            table["in_proj_bias"] = nn.Parameter(biases, requires_grad=projections[0].bias.requires_grad)
        out = self._projection("out_proj")
        child_table(made)["out_proj"] = out.whole() if isinstance(out, Replacement) else out
        made.embed_dim, made.kdim, made.vdim = len(weights[0]), weights[1].shape[1], weights[2].shape[1]
        made.num_heads, made.head_dim = self.num_heads, len(weights[0]) // self.num_heads
        adopt_hooks(made, self)
        return made.train(self.training)


def _merged(attn_mask: Tensor | None, key_padding_mask: Tensor | None, batch: int, dtype: torch.dtype) -> Tensor | None:
    """Both masks as one that is added to the scores, broadcast over `[batch, heads, queries, keys]`."""
    found: Tensor | None = None
    for mask in (attn_mask, None if key_padding_mask is None else key_padding_mask[:, None, None]):
        if mask is None:
            continue
        mask = mask.unflatten(0, (batch, -1)) if mask.dim() == 3 else mask
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))
        found = mask if found is None else found + mask
    return found


def _in_weights(attention: nn.MultiheadAttention) -> Sequence[Tensor]:
    """The weights of queries, keys and values."""
    table = parameter_table(attention)
    together = table.get("in_proj_weight")
    if together is None:
        return [attention.get_parameter(f"{name}_weight") for name in PROJECTIONS[:3]]
    parts = together.chunk(3)
    return [part.requires_grad_(together.requires_grad) if part.is_leaf else part for part in parts]


def refusal(attention: nn.MultiheadAttention, shared: Mapping[int, int]) -> str | None:
    """Why an attention cannot be split into its projections; None if it can.

    Args:
        attention: any module of that type.
        shared: {id of a parameter: number of modules that have it}.
    """
    if isinstance(attention, SplitAttention):
        return "it is split already"
    if not runs_forward_of(attention, nn.MultiheadAttention):
        return f"{type(attention).__name__} has a forward of its own"
    if attention.bias_k is not None or attention.bias_v is not None or attention.add_zero_attn:
        return "its bias_k, bias_v or add_zero_attn has no place between separate projections"
    if is_parametrized(attention):
        return "its weights are computed by a parametrization: remove that first (torch.nn.utils.parametrize)"
    if any(shared.get(id(own), 1) > 1 for own in parameter_table(attention).values() if own is not None):
        return "its weights are shared with another module"
    return None


def parameters_of_split(attention: nn.MultiheadAttention, split: SplitAttention) -> dict[Tensor, list[Tensor]]:
    """{parameter of an attention: those of the projections in its place}."""
    projections = [split.get_submodule(name) for name in PROJECTIONS[:3]]
    table = parameter_table(attention)
    weights: list[Tensor] = [projection.get_parameter("weight") for projection in projections]
    together = table.get("in_proj_weight")
    if together is not None:
        found: dict[Tensor, list[Tensor]] = {together: weights}
    else:
        found = {attention.get_parameter(f"{n}_weight"): [w] for n, w in zip(PROJECTIONS, weights, strict=False)}
    bias = table.get("in_proj_bias")
    if bias is not None:
        found[bias] = [projection.get_parameter("bias") for projection in projections]
    return found


@dataclass(frozen=True, eq=False)
class Split:
    """An attention and the module in its place.

    Args:
        attention: the original.
        made: with separate projections.
        replaced: {parameter of the original: those in its place}.
    """

    attention: nn.MultiheadAttention
    made: SplitAttention
    replaced: Mapping[Tensor, list[Tensor]]


def split_attentions(model: nn.Module, named: Iterable[str] | None, undo: ExitStack) -> dict[str, Split]:
    """Split attentions into their projections, in place.

    Args:
        model: is changed.
        named: paths of the attentions or of their projections; None for all.
        undo: closing it puts everything back.

    Returns:
        {path: split}, under every path of an attention.
    """
    shared = Counter(id(own) for module in model.modules() for own in parameter_table(module).values())
    splits: dict[nn.Module, Split] = {}
    found: dict[str, Split] = {}
    for path, module in list(model.named_modules(remove_duplicate=False)):
        wanted = named is None or any(f"{name}.".startswith(f"{path}.") for name in named)
        if not wanted or module is model or not isinstance(module, nn.MultiheadAttention) or refusal(module, shared):
            continue
        if module not in splits:
            made = SplitAttention(module)
            splits[module] = Split(module, made, parameters_of_split(module, made))
        found[path] = splits[module]
    exchange_modules(model, {module: split.made for module, split in splits.items()}, undo)
    return found


def of_projections(given: Any, splits: Mapping[str, Split]) -> Any:
    """{layer: value} with the entry of each attention repeated for its projections; anything else as it is.

    >>> of_projections({"attention": 4, "fc": 8}, {"attention": None})
    {'attention.q_proj': 4, 'attention.k_proj': 4, 'attention.v_proj': 4, 'attention.out_proj': 4, 'fc': 8}
    """
    if not isinstance(given, Mapping):
        return given
    return {
        each: value
        for name, value in given.items()
        for each in ([f"{name}.{part}" for part in PROJECTIONS] if name in splits else [name])
    }


def _rebuilt(attention: nn.Module, record: Record) -> nn.Module:
    """A split attention as a checkpoint records it."""
    if not isinstance(attention, nn.MultiheadAttention):
        raise ValueError(f"expected an nn.MultiheadAttention, got a {type(attention).__name__}")
    if (reason := refusal(attention, {})) is not None:
        raise ValueError(f"the attention cannot be split into its projections: {reason}")
    return SplitAttention(attention)


BUILDERS["attention"] = _rebuilt

"""What language models are compared with: Torch-Pruning, a rotation of the stream as in SliceGPT, ranks as in SVD-LLM.

The last two are minimal implementations of what their papers describe. Each takes a copy of the uncut network, with
`nn.Linear` in the place of GPT-2's Conv1D, and returns the network that is left.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from evolvenet import Width, WidthGraph
from evolvenet.graph.naming import tensor_named
from experiments.compare.copies import copied


@dataclass(frozen=True)
class Names:
    """Where the parts of a network are.

    Args:
        blocks: the list of blocks.
        final: the last norm.
        embeddings: whose sum is the stream.
        norms: of a block, before attention and feed-forward.
        attention: of a block.
        feed_forward: of a block.
        consumers: layers that read the stream after each norm.
        producers: layers whose outputs are added to the stream.
    """

    blocks: str
    final: str
    embeddings: tuple[str, ...]
    norms: tuple[str, str]
    attention: str
    feed_forward: str
    consumers: tuple[tuple[str, ...], tuple[str, ...]]
    producers: tuple[str, str]


NAMES = {
    "llama": Names(
        "model.layers",
        "model.norm",
        ("model.embed_tokens",),
        ("input_layernorm", "post_attention_layernorm"),
        "self_attn",
        "mlp",
        (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")),
        ("self_attn.o_proj", "mlp.down_proj"),
    ),
    "gpt2": Names(
        "transformer.h",
        "transformer.ln_f",
        ("transformer.wte", "transformer.wpe"),
        ("ln_1", "ln_2"),
        "attn",
        "mlp",
        (("attn.c_attn",), ("mlp.c_fc",)),
        ("attn.c_proj", "mlp.c_proj"),
    ),
}


def with_dense_layers(model: nn.Module) -> nn.Module:
    """The network, changed in place, with `nn.Linear` where GPT-2 has the transformers library's Conv1D: the same function."""
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "Conv1D":
            weight = module.get_parameter("weight")
            dense = nn.Linear(weight.shape[0], weight.shape[1], device=weight.device)
            dense.weight.data, dense.bias.data = weight.data.T.contiguous(), module.get_parameter("bias").data
            model.set_submodule(name, dense)
    return model


def parameters(model: nn.Module) -> int:
    """Of a network, each once."""
    return sum(parameter.numel() for parameter in model.parameters())


# Torch-Pruning

NORMS = (nn.LayerNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
"""Whose weights count."""


def torch_pruning_scores(model: nn.Module, graph: WidthGraph) -> dict[str, Tensor]:
    """The importance of every unit, `GroupMagnitudeImportance(p=2, group_reduction="mean")` of Torch-Pruning 1.6.1.

    The mean over all weights, and scales of layer and batch norms, of a group of the sums of squares that belong to a unit. Its
    groups are the graph's widths, not searched for by Torch-Pruning itself: with rotary positions its search takes minutes
    for each ratio that is tried (tests/experiments/compare_torch_pruning.py compares the scores on a small network).
    """
    return {width.name: _magnitude(model, width) for width in graph.resizable}


def _magnitude(model: nn.Module, width: Width) -> Tensor:
    found = []
    for tie in width.ties:
        module, tensor = model.get_submodule(tie.module), tensor_named(model, tie.tensor).detach()
        weight = tensor.dim() > 1 and not isinstance(module, nn.Embedding)
        if weight or (isinstance(module, NORMS) and tensor is module.weight):
            rows = tensor.narrow(tie.dim, tie.start, width.size * tie.repeat).movedim(tie.dim, 0)
            found.append(rows.reshape(width.size, -1).square().sum(1))
    return torch.stack(found).mean(0).cpu() if found else torch.ones(width.size)


def equal_shares(graph: WidthGraph, target: int) -> dict[str, int]:
    """The largest sizes that are one share of all widths, of those above 64 in multiples of 4, as the recipe rounds."""

    def at(share: float) -> dict[str, int]:
        return {width.name: _rounded(width, share * width.size) for width in graph.resizable}

    shares = [place / 1000 for place in range(1001)]
    fitting = [share for share in shares if graph.proposed_parameters(at(share)) <= target]
    if not fitting:
        raise ValueError(f"cannot be made as small as {target:,} parameters")
    return at(max(fitting))


def _rounded(width: Width, size: float) -> int:
    step = 4 if width.size > 64 else 1
    return max(width.smallest, step, int(size / step) * step)


def _blocks(model: nn.Module, names: Names) -> Iterator[nn.Module]:
    yield from model.get_submodule(names.blocks).children()


# SliceGPT


class Slice(nn.Module):
    """A block on the stream in fewer coordinates, whose shortcuts are multiplied with a change of basis.

    Args:
        block: a block, its layers cut.
        names: of its parts.
        shortcuts: `[size before, size after]` of attention and feed-forward.
        in_tuple: whether the block returned its output in a tuple, as in some versions of the transformers library.
    """

    def __init__(self, block: nn.Module, names: Names, shortcuts: Sequence[Tensor], in_tuple: bool) -> None:
        super().__init__()
        self.block, self.names, self.in_tuple = block, names, in_tuple
        self.shortcuts = nn.ParameterList([nn.Parameter(each) for each in shortcuts])

    def forward(self, hidden: Tensor, *arguments: Any, **options: Any) -> Tensor | tuple[Tensor]:
        """As the block's own."""
        for half, shortcut in enumerate(self.shortcuts):
            hidden = hidden @ shortcut + branch(self.block, self.names, half, hidden, arguments, options)
        return (hidden,) if self.in_tuple else hidden


def branch(
    block: nn.Module, names: Names, half: int, hidden: Tensor, arguments: Sequence[Any], options: Mapping[str, Any]
) -> Tensor:
    """What attention (half 0) or feed-forward (half 1) of a block add to the stream."""
    normed = block.get_submodule(names.norms[half])(hidden)
    if half:
        return block.get_submodule(names.feed_forward)(normed)
    return block.get_submodule(names.attention)(normed, *arguments, **options)[0]


class Rms(nn.Module):
    """RMSNorm without weights, the mean over the uncut size."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.size, self.eps = size, eps

    def forward(self, hidden: Tensor) -> Tensor:
        """`[…, k]` → the same."""
        return hidden * (hidden.square().sum(-1, keepdim=True) / self.size + self.eps).rsqrt()


def slicegpt(model: nn.Module, kind: str, batches: Sequence[Mapping[str, Tensor]], target: int) -> nn.Module:
    """As Ashkboos et al., "SliceGPT: compress large language models by deleting rows and columns", ICLR 2024.

    The norms' weights are multiplied into the layers after them (a layer norm's centring into those before it). In front of each
    norm the stream is rotated into the principal directions of its values on the batches, computed in the network
    cut so far, and all but the first ones are deleted: the same number at all places.
    """
    prepared = without_norm_weights(model, NAMES[kind])
    width = model.get_submodule(NAMES[kind].embeddings[0]).get_parameter("weight").shape[1]
    best = None
    low, high = 1, width
    # The number of parameters does not depend on the directions: only the last network is made with data.
    while low <= high:
        middle = (low + high) // 2
        if parameters(_sliced(copied(prepared), NAMES[kind], batches[:1], middle)) <= target:
            best, low = middle, middle + 1
        else:
            high = middle - 1
    if best is None:
        raise ValueError(f"cannot be made as small as {target:,} parameters")
    return _sliced(prepared, NAMES[kind], batches, best)


@torch.no_grad()
def without_norm_weights(model: nn.Module, names: Names) -> nn.Module:
    """The network, changed in place, with `Rms` for all norms: the same function."""
    width = model.get_submodule(names.embeddings[0]).get_parameter("weight").shape[1]
    for block in _blocks(model, names):
        for norm, consumers in zip(names.norms, names.consumers, strict=True):
            _fold(block, norm, [block.get_submodule(name) for name in consumers], width)
    _fold(model, names.final, [model.get_submodule("lm_head")], width)
    if "wpe" in names.embeddings[-1]:
        for name in names.embeddings:
            _centre(model.get_submodule(name).get_parameter("weight"), 1)
        for block in _blocks(model, names):
            for name in names.producers:
                _centre(block.get_submodule(name).get_parameter("weight"), 0)
                _centre(block.get_submodule(name).get_parameter("bias"), 0)
    return model


def _centre(weight: Tensor, dim: int) -> None:
    weight -= weight.mean(dim, keepdim=True)


def _fold(parent: nn.Module, name: str, consumers: Sequence[nn.Module], width: int) -> None:
    norm: Any = parent.get_submodule(name)
    for consumer in consumers:
        weight = consumer.get_parameter("weight")
        shift = getattr(norm, "bias", None)
        if shift is not None:
            if consumer.bias is None:
                consumer.bias = nn.Parameter(torch.zeros_like(weight[:, 0]))
            consumer.get_parameter("bias").add_(weight @ shift)
        weight.mul_(norm.weight)
    parent.set_submodule(name, Rms(width, getattr(norm, "variance_epsilon", None) or norm.eps))


@torch.no_grad()
def _sliced(model: nn.Module, names: Names, batches: Sequence[Mapping[str, Tensor]], size: int) -> nn.Module:
    blocks: Any = model.get_submodule(names.blocks)
    calls = [_call_of(blocks[0], model, batch) for batch in batches]
    streams = [hidden for hidden, _, _ in calls]
    in_tuple = isinstance(blocks[0](streams[0], *calls[0][1], **calls[0][2]), tuple)
    basis = principal(torch.cat(streams), size)
    for name in names.embeddings:
        _multiply(model.get_submodule(name), right=basis)
    hidden = [stream @ basis for stream in streams]
    for place, block in enumerate(list(blocks)):
        shortcuts = []
        for half in (0, 1):
            for name in names.consumers[half]:
                _multiply(block.get_submodule(name), right=basis)
            added = (
                branch(block, names, half, each, arguments, options)
                for each, (_, arguments, options) in zip(hidden, calls, strict=True)
            )
            # In uncut coordinates: what is left of the stream, and what the whole producer adds to it.
            streams = [each @ basis.T + more for each, more in zip(hidden, added, strict=True)]
            fresh = principal(torch.cat(streams), size)
            _multiply(block.get_submodule(names.producers[half]), left=fresh.T)
            shortcuts.append(basis.T @ fresh)
            basis, hidden = fresh, [stream @ fresh for stream in streams]
        blocks[place] = Slice(block, names, shortcuts, in_tuple)
    _multiply(model.get_submodule("lm_head"), right=basis)
    return model


def _multiply(layer: nn.Module, left: Tensor | None = None, right: Tensor | None = None) -> None:
    """Replace a weight W by left·W, and the bias, or by W·right."""
    weight, bias = layer.get_parameter("weight"), getattr(layer, "bias", None)
    if right is not None:
        weight.data = weight @ right
    if left is not None:
        weight.data = left @ weight
        if bias is not None:
            bias.data = left @ bias


class _ReachedError(Exception):
    """Ends a forward pass whose rest is not needed."""


def _call_of(module: nn.Module, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Any, Any]:
    """The stream that enters the first block, and the other arguments of its call."""
    found: list[tuple[Tensor, Any, Any]] = []

    def record(_: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        found.append((arguments[0], arguments[1:], options))
        raise _ReachedError

    hook = module.register_forward_pre_hook(record, with_kwargs=True)
    try:
        model(**batch)
    except _ReachedError:
        pass
    finally:
        hook.remove()
    return found[0]


def principal(values: Tensor, size: int) -> Tensor:
    """The first principal directions about 0 of values `[…, columns]`: `[columns, size]`, largest first."""
    rows = values.flatten(0, -2).double()
    return torch.linalg.eigh(rows.T @ rows).eigenvectors.flip(1)[:, :size].to(values.dtype).contiguous()


# SVD-LLM


class Factors(nn.Module):
    """A dense layer as two: W ≈ B·A.

    Args:
        first: A, `[rank, inputs]`.
        second: B, `[outputs, rank]`.
        bias: of the layer, or None.
    """

    def __init__(self, first: Tensor, second: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(first), nn.Parameter(second)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def forward(self, inputs: Tensor) -> Tensor:
        """`[…, inputs]` → `[…, outputs]`."""
        return nn.functional.linear(inputs @ self.first.T, self.second, self.bias)


def svd_llm(model: nn.Module, kind: str, batches: Sequence[Mapping[str, Tensor]], target: int) -> nn.Module:
    """As Wang et al., "SVD-LLM: truncation-aware singular value decomposition", ICLR 2025.

    Every dense layer of the blocks is replaced by the truncated SVD of W·S, S·Sᵀ the second moment of its inputs, times S⁻¹,
    at the rank that leaves the same share of the parameters of each. Block by block, on the inputs in the network factorized
    so far.
    """
    names = NAMES[kind]
    dense = [
        layer for block in _blocks(model, names) for _, layer in block.named_modules() if isinstance(layer, nn.Linear)
    ]
    others = parameters(model) - sum(layer.weight.numel() for layer in dense)
    share = (target - others) / sum(layer.weight.numel() for layer in dense)
    if share <= 0:
        raise ValueError(f"cannot be made as small as {target:,} parameters")
    for block in _blocks(model, names):
        layers = [name for name, layer in block.named_modules() if isinstance(layer, nn.Linear)]
        moments = _moments(model, [block.get_submodule(name) for name in layers], batches)
        for name, moment in zip(layers, moments, strict=True):
            layer: Any = block.get_submodule(name)
            rank = max(1, int(share * layer.weight.numel() / sum(layer.weight.shape)))
            block.set_submodule(name, factors(layer, moment, rank))
    return model


@torch.no_grad()
def _moments(model: nn.Module, layers: Sequence[nn.Module], batches: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
    found: dict[nn.Module, Tensor] = {}

    def add(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows = inputs[0].flatten(0, -2).double()
        found[layer] = found.get(layer, 0) + rows.T @ rows

    hooks = [layer.register_forward_pre_hook(add) for layer in layers]
    for batch in batches:
        model(**batch)
    for hook in hooks:
        hook.remove()
    return [found[layer] for layer in layers]


@torch.no_grad()
def factors(layer: Any, moment: Tensor, rank: int) -> Factors:
    """The factors of a layer that are best for its outputs.

    Args:
        layer: a dense one.
        moment: of its inputs, `[inputs, inputs]` float64.
        rank: of the factors.
    """
    values, vectors = torch.linalg.eigh(moment)
    roots = values.clamp(min=1e-9 * float(values[-1])).sqrt()
    whitened = layer.weight.double() @ (vectors * roots)
    left, singular, right = torch.linalg.svd(whitened, full_matrices=False)
    first = (right[:rank] / roots) @ vectors.T
    second = left[:, :rank] * singular[:rank]
    return Factors(first.to(layer.weight.dtype).contiguous(), second.to(layer.weight.dtype).contiguous(), layer.bias)

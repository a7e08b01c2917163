"""Layers that can be factorized, one registered function per type, and the module that stands for a factorized one.

To register a layer type of your own, register `canonical`, `written` and `step_layer` for it.
"""

# nn.Module's tables have no full types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportPrivateUsage=false
from __future__ import annotations

from collections.abc import Sequence
from functools import singledispatch
from typing import Any, cast

import torch
from torch import Tensor, nn

from evolvenet._compat.torch import (
    ConvNd,
    ConvTransposeNd,
    adopt_hooks,
    parameter_table,
    without_tensors,
)
from evolvenet.errors import FactorizationError
from evolvenet.graph.index_map import laid_out_as
from evolvenet.lowrank.base import LayerShape, Ranks, Step
from evolvenet.lowrank.kinds import kind_named
from evolvenet.surgery.module_handlers import attributes
from evolvenet.surgery.module_replacement import BUILDERS, Record, Replacement

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@singledispatch
def canonical(layer: nn.Module, weight: Tensor, groups: int) -> Tensor:
    """A layer's weight as `[groups, out, in, k…]`, per channel group.

    Args:
        layer: whose type says how the weight is stored.
        weight: of the layer.
        groups: of the factorized layer: a factor may be grouped within them.

    Raises:
        FactorizationError: for a type that is not registered.

    >>> canonical(nn.Conv2d(4, 6, 3, groups=2), torch.zeros(6, 2, 3, 3), 2).shape
    torch.Size([2, 3, 2, 3, 3])
    """
    raise FactorizationError(
        f"Expected a dense layer or a convolution, got a {type(layer).__name__}. Register canonical, written and step_layer "
        "of evolvenet.lowrank.layers for it."
    )


@canonical.register(nn.Linear)
@canonical.register(ConvNd)
def _(layer: nn.Linear | ConvNd, weight: Tensor, groups: int) -> Tensor:
    return weight.unflatten(0, (groups, -1))


@canonical.register
def _(layer: ConvTransposeNd, weight: Tensor, groups: int) -> Tensor:
    inner = layer.groups // groups
    return weight.unflatten(0, (groups, inner, -1)).transpose(2, 3).flatten(1, 2)


@singledispatch
def written(layer: nn.Module, weight: Tensor) -> Tensor:
    """The reverse of `canonical`: `[groups, out, in, k…]` as the layer stores it.

    >>> written(nn.ConvTranspose2d(4, 6, 3), torch.zeros(1, 6, 4, 3, 3)).shape
    torch.Size([4, 6, 3, 3])
    """
    return weight.flatten(0, 1)


@written.register
def _(layer: ConvTransposeNd, weight: Tensor) -> Tensor:
    inner = layer.groups // len(weight)
    return weight.unflatten(1, (inner, -1)).transpose(2, 3).flatten(0, 2)


@singledispatch
def step_layer(layer: nn.Module, step: Step, groups: int, bias: bool) -> nn.Module:
    """The layer of one step of a chain, on device "meta".

    Args:
        layer: the factorized layer, from which stride, padding, padding mode, dilation and output padding are taken on the
            axes that the step covers.
        step: the channels for one group, and the axes.
        groups: of the factorized layer.
        bias: whether the step has one.
    """
    return nn.Linear(step.inputs, step.outputs, bias, device="meta")


@step_layer.register
def _(layer: ConvNd, step: Step, groups: int, bias: bool) -> nn.Module:
    channels = step.inputs * groups, step.outputs * groups
    count = groups * step.groups
    if not step.axes:
        return CONVOLUTIONS[len(layer.kernel_size)](*channels, 1, groups=count, bias=bias, device="meta")
    options: dict[str, Any] = {
        name: tuple(value if axis in step.axes else neutral for axis, value in enumerate(values))
        for name, values, neutral in (
            ("stride", layer.stride, 1),
            ("dilation", layer.dilation, 1),
            ("kernel_size", layer.kernel_size, 1),
        )
    }
    options |= {"groups": count, "bias": bias, "padding_mode": layer.padding_mode, "device": "meta"}
    if isinstance(layer, ConvTransposeNd):
        options["output_padding"] = _on_axes(layer.output_padding, step)
        options["padding"] = _on_axes(cast("tuple[int, ...]", layer.padding), step)
        made = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[len(layer.kernel_size)]
    else:
        options["padding"] = layer.padding if isinstance(layer.padding, str) else _on_axes(layer.padding, step)
        made = CONVOLUTIONS[len(layer.kernel_size)]
    return made(*channels, **options)


def _on_axes(values: Sequence[int], step: Step) -> tuple[int, ...]:
    return tuple(value if axis in step.axes else 0 for axis, value in enumerate(values))


def layer_shape(layer: nn.Module) -> LayerShape:
    """The shape of a layer's weight.

    >>> layer_shape(nn.Conv2d(4, 6, 3, groups=2))
    LayerShape(outputs=3, inputs=2, kernel=(3, 3), groups=2)
    """
    groups = groups_of(layer)
    _, outputs, inputs, *kernel = canonical(layer, layer.get_parameter("weight"), groups).shape
    return LayerShape(outputs, inputs, tuple(kernel), groups)


def groups_of(layer: nn.Module) -> int:
    """The layer's channel groups; 1 if it has none."""
    return int(getattr(layer, "groups", 1))


class FactoredLayer(Replacement, nn.Sequential):
    """A chain of ordinary layers that stands for one layer.

    Build it with `factored`. It exports, compiles and is traced like any `nn.Sequential`; the bias of the layer, the same
    parameter, is that of the last one. A call with `output_size`, which transposed convolutions accept, is refused by
    Python.

    Args:
        layer: the layer that it stands for.
        kind: name of the kind.
        chain: the layers, as the kind's steps say.
    """

    # TorchScript would compile them.
    __jit_unused_properties__ = ("kind", "ranks", "factors", "merged_weight", "weight", "bias")

    def __init__(self, layer: nn.Module, kind: str, chain: Sequence[nn.Module]) -> None:
        nn.Sequential.__init__(self, *chain)
        # In a tuple it is no child: a model's tables list the chain alone.
        self._original = (without_tensors(layer),)
        self._kind, self._grouped = kind, kind != "slicewise"
        self._bias = parameter_table(layer).get("bias") is not None
        adopt_hooks(self, layer)
        self.train(layer.training)
        self.record_in_checkpoints()

    @property
    def kind(self) -> str:
        """The name of its kind."""
        return self._kind

    @property
    def factors(self) -> list[nn.Module]:
        """The layers of the chain that have a weight."""
        return [layer for layer in self if parameter_table(layer)]

    @property
    def ranks(self) -> Ranks:
        """The widths between its layers, per channel group."""
        groups = self._groups()
        # Shapes alone: weights of a quantized chain are of a type that has no views.
        shapes = [(layer, layer.get_parameter("weight").shape) for layer in self.factors]
        factors = [canonical(layer, torch.empty(shape, device="meta"), groups)[0] for layer, shape in shapes]
        return kind_named(self.kind).ranks_of(factors, self._inputs())

    @property
    def merged_weight(self) -> Tensor:
        """The weight of the layer that it stands for, as that stores it; differentiable."""
        return self.merged([factor.get_parameter("weight") for factor in self.factors])

    def canonical_factors(self) -> list[Tensor]:
        """The factors as `[groups, out, in, k…]`, in the order of execution; differentiable."""
        return self._canonical([factor.get_parameter("weight") for factor in self.factors])

    def merged(self, weights: Sequence[Tensor]) -> Tensor:
        """`merged_weight` for other values of the factors' weights, of the same shapes."""
        kind, inputs = kind_named(self.kind), self._inputs()
        groups = zip(*(factor.unbind(0) for factor in self._canonical(weights)), strict=True)
        return written(self._like_original(), torch.stack([kind.merged(factors, inputs) for factors in groups]))

    @property
    def weight(self) -> Tensor:
        """`merged_weight`, for code that multiplies with a layer's weight itself."""
        return self.merged_weight

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias of its last layer."""
        return parameter_table(self.factors[-1]).get("bias")

    def chain(self) -> Sequence[nn.Module]:
        """See `Replacement`."""
        return self.factors

    def record(self) -> dict[str, Any]:
        """See `Replacement`."""
        whole = ["weight", "bias"] if self._bias else ["weight"]
        return {"type": "factors", "kind": self.kind, "ranks": list(self.ranks), "whole": whole}

    def whole(self) -> nn.Module:
        """See `Replacement`."""
        first = self.factors[0].get_parameter("weight")
        made = self._like_original()
        with torch.no_grad():
            weight = self.merged_weight.detach().contiguous()
        for name, value in attributes(made, {"weight": tuple(weight.shape)}).items():
            setattr(made, name, value)
        parameter_table(made)["weight"] = nn.Parameter(laid_out_as(first, weight), requires_grad=first.requires_grad)
        parameter_table(made)["bias"] = self.bias
        adopt_hooks(made, self)
        return made.train(self.training)

    def _groups(self) -> int:
        return groups_of(self.factors[0]) if self._grouped else 1

    def _inputs(self) -> int:
        first = self.factors[0]
        channels = first.in_channels if isinstance(first, ConvNd) else first.get_parameter("weight").shape[1]
        return channels // self._groups()

    def _canonical(self, weights: Sequence[Tensor]) -> list[Tensor]:
        groups = self._groups()
        return [canonical(layer, weight, groups) for layer, weight in zip(self.factors, weights, strict=True)]

    def _like_original(self) -> nn.Module:
        """The original layer without tensors, its groups as they are now."""
        made = without_tensors(self._original[0])
        if isinstance(made, ConvNd):
            made.groups = self._groups()
        return made


def factored(
    layer: nn.Module,
    kind: str,
    ranks: Ranks,
    factors: Sequence[Sequence[Tensor]] | None = None,
    shared: Sequence[nn.Parameter] | None = None,
) -> FactoredLayer:
    """A chain in the place of a layer.

    Args:
        layer: dense or a convolution; its bias becomes that of the chain.
        kind: name of a kind.
        ranks: between the chain's layers.
        factors: from the kind's `decompose` for each channel group; None leaves the weights undefined.
        shared: weights of another chain that are used in place of new ones.

    >>> layer = nn.Linear(10, 10)
    >>> chain = factored(layer, "svd", (2,), [kind_named("svd").decompose(layer.weight.detach(), (2,))])
    >>> chain.kind, chain.ranks, chain.bias is layer.bias, chain.merged_weight.shape
    ('svd', (2,), True, torch.Size([10, 10]))
    """
    weight, bias = layer.get_parameter("weight"), parameter_table(layer).get("bias")
    shape = layer_shape(layer)
    steps = kind_named(kind).steps(shape, ranks)
    chain: list[nn.Module] = []
    for number, step in enumerate(steps):
        made = step_layer(layer, step, shape.groups, bias is not None and number == len(steps) - 1)
        size = made.get_parameter("weight").shape
        if shared is not None:
            own = shared[number]
        else:
            value = (
                torch.empty(size, dtype=weight.dtype, device=weight.device)
                if factors is None
                else written(made, torch.stack([group[number] for group in factors])).to(weight.device, weight.dtype)
            )
            own = nn.Parameter(laid_out_as(weight, value.contiguous()), requires_grad=weight.requires_grad)
        assert own.shape == size
        parameter_table(made)["weight"] = own
        if parameter_table(made).get("bias") is not None:
            parameter_table(made)["bias"] = bias
        chain += [nn.ChannelShuffle(step.shuffle), made] if step.shuffle else [made]
    return FactoredLayer(layer, kind, chain)


def _rebuilt(layer: nn.Module, record: Record) -> nn.Module:
    """A chain as a checkpoint records it."""
    kind = kind_named(record["kind"])
    shape = layer_shape(layer)
    reason = kind.refusal(shape)
    if reason is not None:
        raise FactorizationError(f"{kind.name!r}: {reason}")
    return factored(layer, record["kind"], tuple(record["ranks"]))


BUILDERS["factors"] = _rebuilt

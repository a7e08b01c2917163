"""What every kind of factorization has in common: its chain of layers, its decomposition, its cost.

A kind sees weights in one canonical form, `[out, in, k…]` of one channel group, whatever the layer: a dense layer has no
spatial axes, a transposed convolution's first two axes are exchanged. `evolvenet.lowrank.layers` converts.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import ClassVar

import torch
from torch import Tensor

from evolvenet.errors import FactorizationError

Ranks = tuple[int, ...]
"""Widths between the layers of a chain, per channel group, in the order of execution."""


@dataclass(frozen=True)
class LayerShape:
    """Shape of a layer's weight.

    Args:
        outputs: of one channel group.
        inputs: of one channel group.
        kernel: on each spatial axis; empty for a dense layer.
        groups: of channels.
    """

    outputs: int
    inputs: int
    kernel: tuple[int, ...] = ()
    groups: int = 1

    @property
    def places(self) -> int:
        """Entries of the kernel for each pair of channels."""
        return math.prod(self.kernel)

    @property
    def parameters(self) -> int:
        """Entries of the weight.

        >>> LayerShape(8, 4, (3, 3), groups=2).parameters
        576
        """
        return self.groups * self.outputs * self.inputs * self.places


@dataclass(frozen=True)
class Step:
    """One layer of a chain, for one channel group of the original.

    Args:
        inputs: channels.
        outputs: channels.
        axes: spatial axes that its kernel covers, with the original's stride, padding and dilation; it is 1 wide on others.
        groups: of channels within the original's group.
        shuffle: number of groups by which its input channels are shuffled (`nn.ChannelShuffle`); 0 if they are not.
    """

    inputs: int
    outputs: int
    axes: tuple[int, ...] = ()
    groups: int = 1
    shuffle: int = 0

    def entries(self, kernel: tuple[int, ...]) -> int:
        """Entries of its weight, for an original of this kernel."""
        return self.outputs * (self.inputs // self.groups) * math.prod(kernel[axis] for axis in self.axes)


class Kind(ABC):
    """A way to replace a layer by a chain of smaller ones. One instance of each kind is in `evolvenet.lowrank.kinds.KINDS`."""

    name: ClassVar[str]

    @abstractmethod
    def refusal(self, shape: LayerShape) -> str | None:
        """Why a layer of this shape has no such factors, with the remedy; None if it has."""

    @abstractmethod
    def full_rank(self, shape: LayerShape) -> Ranks:
        """The ranks at which the factors equal any weight of this shape."""

    @abstractmethod
    def steps(self, shape: LayerShape, ranks: Ranks) -> tuple[Step, ...]:
        """The chain's layers for one channel group."""

    @abstractmethod
    def decompose(self, weight: Tensor, ranks: Ranks, second_moment: Tensor | None = None) -> list[Tensor]:
        """The factors of a weight.

        Args:
            weight: `[out, in, k…]` of one channel group, float64.
            ranks: from `checked_ranks`.
            second_moment: E[x·xᵀ] `[in·k…, in·k…]` of the patches that are multiplied with the weight, or their covariance
                where the layer has an offset. With it the factors approximate the outputs, without it the weight.

        Returns:
            A weight `[outputs, inputs / groups, k…]` for each step, 1 wide on the axes that it does not cover.
        """

    @abstractmethod
    def unfoldings(self, weight: Tensor, second_moment: Tensor | None = None) -> list[Tensor]:
        """Matrices whose singular values say how much each rank keeps; arguments as in `decompose`."""

    @abstractmethod
    def ranks_of(self, factors: Sequence[Tensor], inputs: int) -> Ranks:
        """The ranks that factors of one channel group with so many inputs have, from their shapes."""

    def capped(self, shape: LayerShape, ranks: Ranks) -> Ranks:
        """The ranks, none above what the shape and the other ranks allow."""
        return tuple(min(rank, most) for rank, most in zip(ranks, self.full_rank(shape), strict=True))

    def combined(self, ranks: Sequence[int]) -> Ranks:
        """The kind's ranks from one rank for each of its unfoldings."""
        return tuple(ranks)

    def checked_ranks(self, shape: LayerShape, ranks: int | Sequence[int]) -> Ranks:
        """The ranks as a tuple, none above the full rank; one number stands for all of them.

        Raises:
            FactorizationError: for ranks below 1, or another number of them.
        """
        most = self.full_rank(shape)
        given = (ranks,) * len(most) if isinstance(ranks, int) else tuple(ranks)
        if len(given) != len(most) or min(given) < 1:
            raise FactorizationError(
                f"Ranks of {self.name!r}: expected {len(most)} number(s) of 1 or more, got {ranks}. Ranks are the widths "
                "between the chain's layers, in the order of execution."
            )
        return self.capped(shape, given)

    def merged(self, factors: Sequence[Tensor], inputs: int) -> Tensor:
        """The weight `[out, in, k…]` of one channel group with so many inputs that the factors multiply to."""
        return reduce(_followed_by, factors)

    def parameters(self, shape: LayerShape, ranks: Ranks) -> int:
        """Entries of all factors."""
        return shape.groups * sum(step.entries(shape.kernel) for step in self.steps(shape, ranks))

    def macs(
        self, shape: LayerShape, ranks: Ranks, before: Sequence[int], after: Sequence[int], transposed: bool
    ) -> int:
        """Multiply-accumulates for one sample.

        Args:
            shape: of the layer.
            ranks: of the factors.
            before: size of the layer's input on each spatial axis; for a dense layer one number, the positions in a sample.
            after: size of its output.
            transposed: whether it is a transposed convolution, which multiplies once for each input position.
        """
        sizes, total = list(before), 0
        for step in self.steps(shape, ranks):
            reached = [after[axis] if axis in step.axes else size for axis, size in enumerate(sizes)]
            places = math.prod(sizes if transposed and step.axes else reached)
            total += shape.groups * step.entries(shape.kernel) * places
            sizes = reached
        return total


def _followed_by(first: Tensor, second: Tensor) -> Tensor:
    """The kernel of two convolutions in sequence, which cover different axes; the second one may be grouped."""
    groups = len(first) // second.shape[1]
    inner = first.unflatten(0, (groups, -1))
    outer = second.unflatten(0, (groups, -1))
    return torch.einsum("goc...,gci...->goi...", outer, inner).flatten(0, 1)


def spatial_weight(weight: Tensor, axes: Sequence[int], spatial: int) -> Tensor:
    """A factor `[out, in, sizes of axes…]` with an axis of size 1 in the place of each spatial axis that it lacks."""
    shape = list(weight.shape[:2]) + [1] * spatial
    for axis, size in zip(axes, weight.shape[2:], strict=True):
        shape[2 + axis] = size
    return weight.reshape(shape)


def partial_moment(second_moment: Tensor, shape: LayerShape, axes: Sequence[int] = ()) -> Tensor:
    """The second moment of the inputs and some spatial axes of a patch, averaged over the other axes.

    Args:
        second_moment: `[in·k…, in·k…]`.
        shape: of the layer.
        axes: spatial axes that stay beside the inputs, ascending.

    Returns:
        `[in·k(axes), in·k(axes)]`.

    >>> partial_moment(torch.eye(8), LayerShape(1, 2, (2, 2)))
    tensor([[1., 0.],
            [0., 1.]])
    """
    spatial = len(shape.kernel)
    whole = second_moment.reshape(shape.inputs, *shape.kernel, shape.inputs, *shape.kernel)
    rows = [0, *(1 + axis for axis in range(spatial))]
    columns = [
        1 + spatial if not number else (1 + spatial + number if number - 1 in axes else number) for number in rows
    ]
    kept = [0, *(1 + axis for axis in axes)]
    out = [rows[number] for number in kept] + [columns[number] for number in kept]
    size = shape.inputs * math.prod(shape.kernel[axis] for axis in axes)
    summed = torch.einsum(whole, [*rows, *columns], out).reshape(size, size)
    return summed / max(1, shape.places // math.prod(shape.kernel[axis] for axis in axes))


def shape_of(weight: Tensor) -> LayerShape:
    """The shape of a weight `[out, in, k…]` of one channel group."""
    return LayerShape(weight.shape[0], weight.shape[1], tuple(weight.shape[2:]))

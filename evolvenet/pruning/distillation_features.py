"""Features inside of two networks, compared through linear maps: those of a network that was cut have fewer channels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from evolvenet.errors import DistillationError
from evolvenet.execution.inputs import tensors_of
from evolvenet.execution.sampling import evenly
from evolvenet.linalg.host_transfers import to_device

ROWS = 8192
"""Most places of a feature that its map is fitted on."""
STEP_ROWS = 2048
"""Most places of a feature that a step compares."""
RIDGE = 1e-4
"""Added to the diagonal of the fit, as a share of its mean."""


def feature_names(model: nn.Module, teacher: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Modules of both networks whose names match any of the patterns.

    Raises:
        DistillationError: if none matches a pattern.

    >>> feature_names(nn.Sequential(nn.ReLU(), nn.ReLU()), nn.Sequential(nn.ReLU(), nn.ReLU()), ["[1-9]"])
    ['1']
    """
    there = dict(teacher.named_modules())
    names = [name for name, _ in model.named_modules() if name and name in there]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise DistillationError(
                f"features={pattern!r}: expected the name of a module that both networks have, or a pattern of some, got none. "
                f"There are {', '.join(names[:12])}{' …' if len(names) > 12 else ''}."
            )
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


@contextmanager
def recorded(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """What modules put out in the body, {name: the first floating-point tensor of it with channels}; of several calls the last.

    >>> with recorded(net := nn.Sequential(nn.Linear(2, 3)), ["0"]) as seen:
    ...     _ = net(torch.zeros(1, 2))
    >>> seen["0"].shape
    torch.Size([1, 3])
    """
    seen: dict[str, Tensor] = {}

    def note(name: str, output: Any) -> None:
        found = [tensor for tensor in tensors_of(output) if tensor.is_floating_point() and tensor.dim() > 1]
        if found:
            seen[name] = found[0]

    handles = [
        model.get_submodule(name).register_forward_hook(lambda module, args, output, name=name: note(name, output))
        for name in names
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True, eq=False)
class _Map:
    """From the channels of one network to those of the other: weight `[to, from + 1]` with the constant in the last column."""

    axis: int
    weight: Tensor
    scale: float


@dataclass(frozen=True, eq=False)
class FeatureMaps:
    """Linear maps from features of one network to those of another one, fitted by least squares, then trained with it.

    Args:
        each: {name of the module: its map}.
    """

    each: Mapping[str, _Map]

    @classmethod
    def of(cls, mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> FeatureMaps:
        """The maps that fit best.

        Args:
            mine: {name: features of the network that is trained}.
            theirs: the same of its teacher, for the same samples.

        Raises:
            DistillationError: for a module without features, or with features that differ in more than one axis.
        """
        return cls({name: _fitted(name, mine.get(name), theirs.get(name)) for name in {**mine, **theirs}})

    @property
    def weights(self) -> list[Tensor]:
        """What is trained with the network."""
        return [each.weight for each in self.each.values()]

    def loss(self, mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Tensor:
        """Mean over the modules of the squared error of the features over their variance."""
        errors = [
            (_rows(mine[name], each.axis) @ each.weight[:, :-1].T + each.weight[:, -1] - _rows(theirs[name], each.axis))
            .square()
            .mean()
            / each.scale
            for name, each in self.each.items()
        ]
        return torch.stack(errors).mean()


def _fitted(name: str, one: Tensor | None, two: Tensor | None) -> _Map:
    if one is None or two is None:
        raise DistillationError(
            f"features: expected {name} to put out a floating-point tensor with channels in both networks, it does not. "
            "Leave it out."
        )
    axes = [axis for axis, (a, b) in enumerate(zip(one.shape, two.shape, strict=False)) if a != b]
    if one.dim() != two.dim() or len(axes) > 1 or axes == [0]:
        raise DistillationError(
            f"features: expected outputs of {name} that differ in their channels alone, got {tuple(one.shape)} and the teacher's "
            f"{tuple(two.shape)}. Leave it out."
        )
    # Channels stand on the second axis of images, on the last one of everything else.
    axis = axes[0] if axes else 1 if one.dim() > 3 else one.dim() - 1
    start, goal = (_rows(tensor.detach(), axis, ROWS).double() for tensor in (one, two))
    start = torch.cat([start, start.new_ones(len(start), 1)], dim=1)
    gram = start.T @ start
    gram.diagonal().add_(RIDGE * float(gram.diagonal().mean()) + torch.finfo(torch.float64).tiny)
    weight = torch.linalg.solve(gram, start.T @ goal).T
    scale = float((goal - goal.mean(0)).square().mean()) or 1.0
    return _Map(axis, weight.to(torch.promote_types(one.dtype, torch.float32)).contiguous().requires_grad_(), scale)


def _rows(features: Tensor, axis: int, most: int = STEP_ROWS) -> Tensor:
    """`[places, channels]`, in 32 bits at least: as many places of each sample as `most` allows for all, taken evenly."""
    samples = features.movedim(axis, 1)
    places = samples.flatten(2) if samples.dim() > 2 else samples[:, :, None]
    count = max(1, most // max(1, len(places)))
    if count < places.shape[2]:
        places = places[:, :, to_device(evenly(places.shape[2], count), places.device)]
    return places.movedim(1, -1).flatten(0, 1).to(torch.promote_types(features.dtype, torch.float32))

"""Which differences between a model and a bare state dict can be widths, where no record and no trace says what is one.

A width is produced by one layer and consumed by a later one. So a layer's inputs may have another size where an earlier
layer's outputs have it too, in the same proportion (or several layers' outputs together, which are concatenated), and its
outputs where a later layer's inputs have. The number of classes, of a model's inputs or of words has no such partner.
"Earlier" is the order in which the modules were registered. What cannot be told so is refused, rather than guessed.
"""

# nn.Module.named_modules has no full type.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from evolvenet.surgery.module_handlers import Shapes, attributes, shape_sources

INPUT, OUTPUT, FOLLOWER, FIXED, ANY = "input", "output", "follower", "fixed", "any"
"""What an axis is for its layer: consumed, produced, both in one (a norm), no width of units at all, or not known."""
ROLES: Mapping[str, tuple[str, ...]] = {
    "in_features": (INPUT,),
    "in1_features": (INPUT,),
    "in2_features": (INPUT,),
    "out_features": (OUTPUT,),
    "in_channels": (INPUT,),
    "out_channels": (OUTPUT,),
    "input_size": (INPUT,),
    "hidden_size": (OUTPUT,),
    "proj_size": (OUTPUT,),
    "embedding_dim": (OUTPUT,),
    "num_embeddings": (FIXED,),
    "num_features": (FOLLOWER,),
    "num_channels": (FOLLOWER,),
    "num_parameters": (FOLLOWER,),
    "normalized_shape": (FOLLOWER,),
    "embed_dim": (INPUT, OUTPUT),
    "kdim": (INPUT,),
    "vdim": (INPUT,),
    "groups": (),
    "num_groups": (),
}
"""For each attribute of torch's layers that repeats a size, what the axis of that size is."""


@dataclass(frozen=True)
class Side:
    """One size of one layer.

    Args:
        order: number of the layer in the order of registration.
        path: of the layer.
        name: of the attribute, or of the tensor and its axis.
        role: what the axis is for the layer.
        old: its size in the model.
        new: its size in the state dict.
    """

    order: int
    path: str
    name: str
    role: str
    old: int
    new: int

    @property
    def changed(self) -> bool:
        """Whether model and state dict differ."""
        return self.old != self.new

    def follows(self, other: Side) -> bool:
        """Whether the other side may produce what this one takes in; a norm may be registered before either."""
        any_order = {self.role, other.role} & {ANY, FOLLOWER}
        return other.path != self.path and (other.order < self.order or bool(any_order))

    def repeats(self, other: Side) -> bool:
        """Whether this size is a multiple of the other one, the same before and after."""
        return self.old * other.new == self.new * other.old and self.old % other.old == 0

    def in_proportion(self, other: Side) -> bool:
        """Whether both differ, by the same factor."""
        return self.changed and self.old * other.new == self.new * other.old


def unexplained(model: nn.Module, shapes: Mapping[Tensor, tuple[int, ...]]) -> list[Side]:
    """The sizes that differ and cannot be told to be widths.

    Args:
        model: the model as it is.
        shapes: new shapes of its tensors; a change of them must be one that the layers' types allow.

    >>> model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> changed = {model[0].weight: (5, 6), model[0].bias: (5,), model[2].weight: (7, 5), model[2].bias: (7,)}
    >>> [(side.path, side.name, side.old, side.new) for side in unexplained(model, changed)]
    [('2', 'out_features', 2, 7)]
    """
    sides = list(_sides(model, shapes))
    producers = [side for side in sides if side.role in (OUTPUT, ANY)]
    consumers = [side for side in sides if side.role in (INPUT, FOLLOWER, ANY)]
    # A layer whose inputs are in proportion to one producer's outputs consumes no others.
    sums = [t for t in consumers if not any(t.follows(p) and (t.in_proportion(p) or t.repeats(p)) for p in producers)]

    def consumed(side: Side) -> bool:
        return any(t.follows(side) and side.in_proportion(t) for t in consumers if t.role != FOLLOWER) or any(
            t.follows(side) and _adds_up(t, [p for p in producers if t.follows(p)], side)
            for t in sums
            if t.role != FOLLOWER
        )

    def produced(side: Side) -> bool:
        return side not in sums or _adds_up(side, [producer for producer in producers if side.follows(producer)])

    def explained(side: Side) -> bool:
        if side.role == ANY:
            return consumed(side) or produced(side)
        return consumed(side) if side.role == OUTPUT else side.role != FIXED and produced(side)

    return [side for side in sides if side.changed and not explained(side)]


def _sides(model: nn.Module, shapes: Mapping[Tensor, tuple[int, ...]]) -> Iterator[Side]:
    for order, (path, module) in enumerate(model.named_modules()):
        if isinstance(module, ParametrizationList):
            continue  # the layer whose weight it computes has the same sizes
        local = shape_sources(module)
        before: dict[str, tuple[int, ...]] = {name: tuple(tensor.shape) for name, tensor in local.items()}
        after = {name: tuple(shapes.get(tensor, before[name])) for name, tensor in local.items()}
        known = attributes(module, before) if local else {}
        if known:
            now = attributes(module, after)
            for name, old in known.items():
                yield from _of_attribute(order, path, module, name, old, now[name])
        else:
            yield from _of_axes(order, path, before, after)


def _of_attribute(order: int, path: str, module: nn.Module, name: str, old: object, new: object) -> Iterator[Side]:
    roles = ROLES.get(name, (ANY,))
    if name == "hidden_size" and getattr(module, "proj_size", 0):
        roles = ()  # consumed by the projection inside
    pairs = zip(old, new, strict=True) if isinstance(old, tuple) and isinstance(new, tuple) else [(old, new)]
    for one, other in pairs:
        if isinstance(one, int) and isinstance(other, int):
            yield from (Side(order, path, name, role, one, other) for role in roles)


def _of_axes(order: int, path: str, before: Shapes, after: Shapes) -> Iterator[Side]:
    """A layer of a type that is not known: any of its axes may be consumed or produced."""
    for name, shape in before.items():
        for dim, (old, new) in enumerate(zip(shape, after[name], strict=True)):
            yield Side(order, path, f"{name} axis {dim}", ANY, old, new)


def _adds_up(consumer: Side, producers: Sequence[Side], needed: Side | None = None) -> bool:
    """Whether some producers' sizes, each used once at most, add up to the consumer's, before and after.

    Args:
        consumer: the side whose sizes are the sums.
        producers: what may be among the summands.
        needed: one that must be.
    """
    old, new = consumer.old - (needed.old if needed else 0), consumer.new - (needed.new if needed else 0)
    if old < 0 or new < 0:
        return False
    reached = np.zeros((old + 1, new + 1), dtype=np.bool_)
    reached[0, 0] = True
    for producer in producers:
        if producer is not needed and 0 < producer.old <= old and 0 < producer.new <= new:
            # A copy, so that each summand is used once.
            reached[producer.old :, producer.new :] |= reached[: -producer.old, : -producer.new].copy()
            if reached[old, new]:
                return True
    return bool(reached[old, new])

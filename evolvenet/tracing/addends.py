"""Which tensors are only added to units (biases, running means), which scale or gate units, and which mask weights.

That is known from the ops that use them. An entry of 0 in what is added leaves a new unit as it is. In what scales its units
it would keep the unit at 0 for good, in a mask the weights of a new unit, and in a grid of splines it would give 0/0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from evolvenet._compat.torch import schema_of
from evolvenet.tracing.labels import LabelGraph
from evolvenet.tracing.rules import Call, elementwise, rule

ADDENDS = {
    "add": ("self", "other"),
    "sub": ("self", "other"),
    "rsub": ("self", "other"),
    "addcmul": ("self",),
    "addcdiv": ("self",),
    "addmm": ("self",),
    "addmv": ("self",),
    "addbmm": ("self",),
    "baddbmm": ("self",),
}
"""Ops that add some of their arguments to the units; besides these, arguments called "bias", and the means of norms."""

NORMS = ("bias", "running_mean", "mean")
GATING = frozenset({"aten::convolution", "aten::masked_fill", "aten::masked_fill_"})
"""Ops besides those of corresponding elements that scale or gate units by a tensor's entries: convolutions with groups do, and
the weight of one without has a role, see `build_graph`."""


@rule("rsub")
def reverse_difference(call: Call) -> None:
    """The difference b − a: elementwise, which torch does not say of this op."""
    elementwise(call)


def record_addends(call: Call, label_graph: LabelGraph) -> None:
    """Record of each tensor of the model that an op combines with data whether it is added to it.

    What an op in place writes to is not used by it. What is computed from the model's own tensors alone counts where it meets
    data.
    """
    origins = {call.label_of(tensor).origin for tensor in call.tensors}
    if None not in origins or len(origins) == 1:
        return
    added = ADDENDS.get(call.op.rpartition("::")[2].removesuffix("_"), NORMS)
    first, *_ = arguments = schema_of(call.func).arguments
    in_place = first.alias_info is not None and first.alias_info.is_write
    for argument in arguments[1:] if in_place else arguments:
        tensor = call.argument(argument.name)
        origin = call.label_of(tensor).origin if isinstance(tensor, Tensor) else None
        if origin is not None:
            label_graph.only_added[origin] = label_graph.only_added.get(origin, True) and argument.name in added
            if argument.name not in added and (torch.Tag.pointwise in call.func.tags or call.op in GATING):
                label_graph.gates.add(origin)


def record_masks(call: Call, label_graph: LabelGraph) -> None:
    """Record the buffers that an op multiplies a parameter with, entry by entry: `linear(x, weight * mask)`.

    New units get the entries of units that are there, see `IndexMap.copying`: which entries of a weight are masked follows a
    rule that is not known here (degrees in MADE), and the new unit's weights, which are 0, can be trained under any of them.
    """
    if call.op not in ("aten::mul", "aten::mul_"):
        return
    origins = [call.label_of(tensor).origin for tensor in call.tensors]
    known = {origin for origin in origins if origin is not None}
    if None not in origins and not known.isdisjoint(label_graph.trainable):
        label_graph.masks |= known - label_graph.trainable

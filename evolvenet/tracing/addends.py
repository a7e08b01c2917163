"""Which tensors are only added to units (biases, running means): known from the ops that use them, by whatever name.

An entry of 0 in one of them leaves a new unit as it is; in one that scales its units it would keep the unit at 0 for good.
"""

from __future__ import annotations

from torch import Tensor

from evolvenet._compat.torch import schema_of
from evolvenet.tracing.labels import LabelGraph
from evolvenet.tracing.rules import Call

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

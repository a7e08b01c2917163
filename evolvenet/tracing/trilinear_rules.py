"""The label rule of sums of products of three tensors.

Importing this module registers it in `rules.RULES`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from evolvenet.tracing.labels import CONSTANT, Label, varying
from evolvenet.tracing.merging import merge
from evolvenet.tracing.rules import Call, rule


@rule("_trilinear")
def trilinear(call: Call) -> None:
    """A sum of products of three tensors, such as `x · W · y` for each output: units along the summed dimensions are tied."""
    tensors = [call.args[0], call.args[1], call.args[2]]
    summed = set(call.args[6])
    labels = [call.label_of(t) for t in tensors]
    shaped: list[list[Tensor]] = []
    for label, added in zip(labels, call.args[3:6], strict=True):
        layers = list(label.layers)
        for dim in sorted(added):
            layers = [layer.unsqueeze(dim) for layer in layers]
        shaped.append(layers)
        for layer in layers:
            call.label_graph.set_role(label.origin, layer, consumed=bool(summed & set(varying(layer))))
    for axis in summed:
        _tie_summed(call, labels, shaped, axis, [axis in added for added in call.args[3:6]])
    layers = merge(
        call.label_graph, [[each for each in layers if not summed & set(varying(each))] for layers in shaped]
    )
    kept = [dim for dim in range(max(3, *(each.dim() for each in layers))) if dim not in summed] if layers else []
    call.label_output(call.out, [layer.reshape([layer.shape[dim] for dim in kept]) for layer in layers])


def _tie_summed(
    call: Call, labels: Sequence[Label], shaped: Sequence[Sequence[Tensor]], axis: int, added: Sequence[bool]
) -> None:
    """Tie what a sum along an axis runs over; what meets data there is frozen."""
    found = [[layer for layer in layers if axis in varying(layer)] for layers in shaped]
    merge(call.label_graph, found)
    for label, layers, absent in zip(labels, found, added, strict=True):
        if not layers and not absent and label.kind != CONSTANT:
            for layer in (each for others in found for each in others):
                call.label_graph.freeze(layer, f"{call.location} reads data of a fixed size with it")
    if all(label.origin is None for label, layers in zip(labels, found, strict=True) if layers):
        for layer in (each for layers in found for each in layers):
            call.label_graph.mark_mixed(layer, f"{call.location} multiplies it with another activation", {axis})

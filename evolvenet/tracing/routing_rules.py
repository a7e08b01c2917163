"""Label rules of routers: units that compete for each row, of which the best few are picked by their places.

`topk` returns the values and the *places* of the largest units. A mixture of experts picks weights by these places, or sorts
rows by them and counts how many each expert gets. So a tensor of places has the ids of the units that it numbers in its label,
and what is picked by places has these units along the axis. Any other op on places freezes the units.

Units that compete, in a softmax or in `topk`, are frozen unless something is picked or counted by their places. Then a unit
is an expert with its row of the router. It is mixed: a new one would take rows from the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor

from evolvenet.graph.block_kinds import EXPERTS
from evolvenet.tracing.labels import CONSTANT, LABELLED, Label, LabelGraph, varying
from evolvenet.tracing.rules import Call, apply_rule

COUNTS = "counts"
"""Kind of the label of a tensor `[units]` that counts how often each place occurs."""
_MOVING = """view _unsafe_view _reshape_copy expand alias detach clone _to_copy lift_fresh slice select split split_with_sizes
unbind t transpose permute unsqueeze squeeze"""
KEEPING = frozenset(f"aten::{name}" for name in _MOVING.split())
"""Ops that move places, or change their type, and leave them what they are."""
HARMLESS = frozenset({"aten::aminmax"})
"""Ops on places by which the code checks a range: `one_hot` does."""


def route(call: Call) -> bool:
    """Pass labels through an op of a router; False for any other op, which goes by its own rule.

    Places that an op without a rule here computes with have their units frozen.
    """
    numbered = [tensor for tensor in call.tensors if call.label_of(tensor).places is not None]
    special = (PICKING if numbered else SELECTING).get(call.op)
    if special is not None and special(call):
        return True
    if not numbered:
        return _passes_counts(call)
    if call.op in KEEPING:
        apply_rule(call)
        _number(call, call.outputs, call.label_of(numbered[0]).places)
        return True
    if call.op not in HARMLESS and not call.op.endswith("_like"):
        for tensor in numbered:
            places = call.label_of(tensor).places
            assert places is not None
            call.label_graph.freeze(places, f"{call.location} computes with the places of its units")
    return False


def settle_competition(label_graph: LabelGraph) -> None:
    """Freeze the units that compete, but for those of which something is picked or counted by their places, which are mixed."""
    if not label_graph.competing:
        return
    component = label_graph.components()
    routed = {number for ids in label_graph.routed for number in component[ids.numpy()].tolist()}
    for ids, reason in reversed(label_graph.competing):
        real = ids[ids >= 0]
        if routed.issuperset(component[real.numpy()].tolist()):
            label_graph.mark_mixed(real, reason)
        elif len(real):
            label_graph.frozen.insert(0, (real.unique(), reason))


def _number(call: Call, tensors: list[Tensor], places: Tensor | None) -> None:
    for tensor in tensors:
        call.set_label(tensor, replace(call.label_of(tensor), places=places))


def _along(call: Call, tensor: Tensor, dim: int) -> Tensor | None:
    """The units along one axis of a tensor, if these alone are along it; None for none, and for units on a grid."""
    found = [layer for layer in call.label_of(tensor).layers if dim in varying(layer)]
    whole = len(found) == 1 and varying(found[0]) == (dim,) and bool((found[0] >= 0).all())
    return found[0].reshape(-1) if whole else None


def without_units(call: Call, chosen: Tensor, dim: int) -> Call:
    """The same call, for a rule that need not know of the units along an axis of one tensor."""

    def label_of(tensor: Tensor) -> Label:
        label = call.label_of(tensor)
        if tensor is not chosen:
            return label
        return replace(label, layers=tuple(layer for layer in label.layers if dim not in varying(layer)))

    return replace(call, label_of=label_of)


def _selected(call: Call) -> bool:
    """`topk`, `argmax` and `max` along an axis of units: values without units, and places of units."""
    source, dim = call.args[0], call.argument("dim")
    if dim is None or not source.dim():
        return False
    axis = dim % source.dim()
    units = _along(call, source, axis)
    if units is None:
        return call.op == "aten::topk" and _selected_in_groups(call, source, axis)
    count = call.argument("k", 1)
    call.label_graph.mark_competing(units, f"{call.location} works along its units")
    call.label_graph.fewest.append((units, count))
    call.label_graph.mark_kind(units, EXPERTS)
    call.mark_changed(source)
    kept = [layer for layer in call.label_of(source).layers if axis not in varying(layer)]
    shrunk = call.outputs[0].dim() < source.dim()
    kept = [layer.squeeze(axis) if shrunk else layer for layer in kept]
    for out in call.outputs:
        call.label_output(out, kept)
    _number(call, call.outputs[-1:], units)
    return True


def _selected_in_groups(call: Call, source: Tensor, axis: int) -> bool:
    """`topk` inside each row of a grid of groups × experts: they compete inside a group alone, which can go as a whole."""
    label = call.label_of(source)
    found = [layer for layer in label.layers if axis in varying(layer)]
    if len(found) != 1 or len(varying(found[0])) != 2 or bool((found[0] < 0).any()):
        return False
    call.label_graph.tie_rows(found[0], {axis})
    call.label_graph.mark_kind(found[0], EXPERTS)
    call.mark_changed(source)
    groups = [layer.narrow(axis, 0, 1) if axis in varying(layer) else layer for layer in label.layers]
    for out in call.outputs:
        call.label_output(out, groups)
    return True


def _picked(call: Call) -> bool:
    """`index`, `index_select`, `embedding` and `gather` by places: the axis has the units that the places number."""
    source = call.args[0]
    if call.op == "aten::index":
        indices = call.args[1]
        found = [
            dim for dim, index in enumerate(indices) if index is not None and call.label_of(index).places is not None
        ]
        index = indices[found[0]] if len(found) == 1 else None
        axis = found[0] if found else 0
    elif call.op == "aten::embedding":
        index, axis = call.args[1], 0
    else:
        index, axis = call.args[2], call.args[1] % source.dim()
    places = None if index is None else call.label_of(index).places
    if call.label_of(source).places is not None:
        # Places in another order, or some of them.
        if places is None:
            apply_rule(call)
            _number(call, call.outputs, call.label_of(source).places)
        return places is None
    units = _along(call, source, axis)
    if places is None or units is None or len(units) != len(places):
        return False
    call.label_graph.union(units, places)
    call.label_graph.routed.append(places)
    apply_rule(without_units(call, source, axis))
    return True


def _scattered(call: Call) -> bool:
    """`scatter` by places into zeros: an axis of the units that the places number."""
    target, axis, index = call.args[0], call.args[1] % call.args[0].dim(), call.args[2]
    label, places = call.label_of(target), call.label_of(index).places
    units = _along(call, target, axis)
    others = [tensor for tensor in call.tensors if tensor is not target and call.label_of(tensor).layers]
    fits = label.kind == CONSTANT if units is None else len(label.layers) == 1
    if places is None or others or not fits or target.shape[axis] != len(places):
        return False
    if units is not None:
        call.label_graph.union(units, places)
    call.label_graph.routed.append(places)
    layer = places.view([-1 if dim == axis else 1 for dim in range(target.dim())])
    for out in {id(each): each for each in (*call.outputs, *([target] if call.op.endswith("_") else []))}.values():
        call.label_output(out, [layer])
    return True


def _tallied(call: Call) -> bool:
    """`histc` and `bincount` of places: how many each unit has got."""
    places = call.label_of(call.args[0]).places
    weights = call.argument("weights")
    if places is None or weights is not None or call.out.shape != places.shape:
        return False
    if call.op == "aten::histc" and (call.argument("min"), call.argument("max")) != (0, len(places) - 1):
        return False
    call.label_graph.routed.append(places)
    call.set_label(call.out, Label((places,), COUNTS))
    return True


def _sorted(call: Call) -> bool:
    """`sort` of places: places in order, and the rows that they come from."""
    places = call.label_of(call.args[0]).places
    for out in call.outputs:
        call.set_label(out, Label())
    _number(call, call.outputs[:1], places)
    return True


def _passes_counts(call: Call) -> bool:
    """Counts added up in order are the last row of each unit's rows, where these are sorted by unit."""
    label = call.label_of(call.args[0]) if call.args and isinstance(call.args[0], Tensor) else Label()
    if label.kind != COUNTS or call.op not in ("aten::cumsum", "aten::_to_copy"):
        return False
    call.set_label(call.out, replace(label, kind=COUNTS if call.op == "aten::_to_copy" else LABELLED))
    return True


Rule = Callable[[Call], bool]
"""Whether it knows the case; it leaves the labels alone otherwise."""
SELECTING: Mapping[str, Rule] = {"aten::topk": _selected, "aten::argmax": _selected, "aten::max": _selected}
"""Rules of ops on values that compete."""
PICKING: Mapping[str, Rule] = {
    **dict.fromkeys(("aten::index", "aten::index_select", "aten::embedding", "aten::gather"), _picked),
    **dict.fromkeys(("aten::scatter", "aten::scatter_"), _scattered),
    **dict.fromkeys(("aten::histc", "aten::bincount"), _tallied),
    "aten::sort": _sorted,
}
"""Rules of ops that are given places."""

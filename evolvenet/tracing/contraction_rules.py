"""Label rules of ops with weights: norms, embeddings, matrix products and convolutions.

Importing this module registers them in `rules.RULES`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from evolvenet.tracing.labels import CONSTANT, KERNEL, MET_DATA, Label, align, arrange, is_constant, varying
from evolvenet.tracing.merging import merge
from evolvenet.tracing.normalised import mark_normalised
from evolvenet.tracing.partitions import partners
from evolvenet.tracing.rules import Call, rule
from evolvenet.tracing.shared_heads import meets_shared_places


@rule("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm")
@rule("_batch_norm_with_update", "_native_batch_norm_legit_functional", "miopen_batch_norm", "batch_norm")
def batch_norm(call: Call) -> None:
    """Elementwise over channels: affine parameters and statistics are tied to the channels."""
    source, outputs = call.args[0], call.outputs
    affine = [t for t in call.tensors[1:] if t.dim() == 1 and t.shape[0] == source.shape[1]]
    shaped = [[layer.view(1, -1, *[1] * (source.dim() - 2)) for layer in call.label_of(t).layers] for t in affine]
    call.label_output(outputs[0], _normed(call, source, shaped))


def _normed(call: Call, source: Tensor, affine: Sequence[Sequence[Tensor]]) -> tuple[Tensor, ...]:
    """The layers of the input merged with those of the norm's parameters, which are frozen if the input is data."""
    label = call.label_of(source)
    axes = {axis for layer in label.layers for axis in varying(layer)}
    for layers in affine:
        for layer in layers:
            if label.kind != CONSTANT and not axes & set(varying(layer)):
                call.label_graph.freeze(layer, f"{call.location} scales data of a fixed size with it")
    return merge(call.label_graph, [label.layers, *affine])


@rule("native_group_norm")
def group_norm(call: Call) -> None:
    """Channels of one group are tied, so that whole groups are resized; a single group mixes its units."""
    source, groups = call.args[0], call.argument("group")
    affine = [t for t in (call.argument("weight"), call.argument("bias")) if t is not None]
    shaped = [[layer.view(1, -1, *[1] * (source.dim() - 2)) for layer in call.label_of(t).layers] for t in affine]
    layers = _normed(call, source, shaped)
    for layer in layers:
        channels = layer.reshape(layer.shape[0], layer.shape[1], -1)[:, :, 0]
        if 1 not in varying(layer):
            continue
        if groups == 1:
            mark_normalised(call, layer, f"{call.location} normalises across its units")
        else:
            whole_groups(call, channels[0], groups)
    call.label_output(call.outputs[0], layers)


def whole_groups(call: Call, channels: Tensor, groups: int) -> None:
    """Tie the channels `[C]` of each of `groups` equal groups together; at least two groups must remain."""
    blocks = channels.view(groups, -1)
    call.label_graph.union(blocks, blocks[:, :1])
    call.label_graph.whole_groups.append(channels)


@rule("native_layer_norm", "_fused_rms_norm")
def layer_norm(call: Call) -> None:
    """Elementwise with its affine parameters; the normalised dimensions mix their units."""
    source = call.args[0]
    normalised = set(range(source.dim() - len(call.args[1]), source.dim()))
    affine = [t for t in call.tensors[1:] if t.dim() <= source.dim()]
    shaped = [[align(layer, source.dim()) for layer in call.label_of(t).layers] for t in affine]
    layers = _normed(call, source, shaped)
    for layer in layers:
        if normalised & set(varying(layer)):
            mark_normalised(call, layer, f"{call.location} normalises across its units", normalised)
    call.label_output(call.outputs[0], layers)


@rule("_weight_norm_interface", "_weight_norm")
def weight_norm(call: Call) -> None:
    """A direction times a length along one axis: elementwise; zeros do not change the norm over the other axes."""
    weight = call.args[0]
    kept = call.argument("dim") % weight.dim()
    origin = call.label_of(weight).origin
    if origin is not None and weight.shape[kept] > 1:
        call.label_graph.lengths.append((origin, kept, call.location))
    # The direction last: of equal layers the last one is kept, which should be the origin's.
    layers = merge(call.label_graph, [call.label_of(tensor).layers for tensor in reversed(call.tensors)])
    call.label_output(call.outputs[0], layers, origin=call.label_of(weight).origin)
    for norms in call.outputs[1:]:
        call.label_output(norms, [layer for layer in layers if set(varying(layer)) <= {kept}])


@rule("embedding")
def embedding(call: Call) -> None:
    """Rows are selected by data and frozen; units along the columns pass."""
    indices = call.args[1]
    call.label_output(call.out, [layer.view((1,) * indices.dim() + (-1,)) for layer in _looked_up(call)])


@rule("_embedding_bag", "_embedding_bag_forward_only")
def embedding_bag(call: Call) -> None:
    """Sums, means or largest entries of rows that are selected by data: rows are frozen, units along the columns pass."""
    call.label_output(call.outputs[0], _looked_up(call))


def _looked_up(call: Call) -> list[Tensor]:
    """The layers of a table along its columns; its rows are frozen."""
    label = call.label_of(call.args[0])
    columns = []
    for layer in label.layers:
        if 0 in varying(layer):
            call.label_graph.freeze(layer, f"{call.location} looks its rows up by data")
        else:
            call.label_graph.set_role(label.origin, layer, consumed=False)
            columns.append(layer)
    return columns


@rule("mm", "addmm", "bmm", "baddbmm", "mv", "dot", "vdot", "addmv", "addbmm", "_sparse_mm", "_sparse_addmm")
def matrix_product(call: Call) -> None:
    """Units along the contracted dimension are tied, the others pass to the output; a bias is elementwise."""
    operands = call.tensors
    bias = operands.pop(0) if "add" in call.op else None
    names = {
        "aten::bmm": ("bnk", "bkm", "bnm"),
        "aten::baddbmm": ("bnk", "bkm", "bnm"),
        "aten::mv": ("nk", "k", "n"),
        "aten::addmv": ("nk", "k", "n"),
        "aten::dot": ("k", "k", ""),
        "aten::vdot": ("k", "k", ""),
    }.get(call.op, ("nk", "km", "nm"))
    layers = contract(call, operands[0], names[0], operands[1], names[1], names[2])
    if bias is not None:
        added = [align(layer, len(names[2])) for layer in call.label_of(bias).layers]
        known = {axis for layer in layers for axis in varying(layer)}
        for layer in added:
            if not known & set(varying(layer)) and not is_constant(layer):
                call.label_graph.freeze(layer, f"{call.location} {MET_DATA}")
        layers = merge(call.label_graph, [layers, added])
    call.label_output(
        call.out, layers, origin=call.label_of(operands[0]).origin if _of_weights(call, operands) else None
    )


def _of_weights(call: Call, operands: Sequence[Tensor]) -> bool:
    """Whether all operands are computed from weights alone (LoRA), or one is a vector of a spectral norm.

    A matrix product with a buffer (a table of coordinates, for example) is a product with data.
    """
    origins = [call.label_of(operand).origin for operand in operands]
    vectors = min(operand.dim() for operand in operands) == 1
    return None not in origins and (vectors or call.label_graph.trainable.issuperset(origins))


def contract(
    call: Call, one: Tensor, one_names: str, two: Tensor, two_names: str, out_names: str
) -> tuple[Tensor, ...]:
    """The output's layers of a product summed over the dimensions that the output does not have, as in einsum.

    Units along summed dimensions are tied to those of the other operand, or frozen if it has none.

    Args:
        call: the op.
        one: first operand.
        one_names: a letter for each of its dimensions.
        two: second operand.
        two_names: a letter for each of its dimensions.
        out_names: a letter for each dimension of the output.
    """
    every = {name: position for position, name in enumerate(dict.fromkeys(one_names + two_names))}
    summed, places = {name for name in every if name not in out_names}, {every[n] for n in every if n not in out_names}
    sides = [(call.label_of(t), names, t) for t, names in ((one, one_names), (two, two_names))]
    passed: list[list[Tensor]] = [[], []]
    of_weights = _of_weights(call, (one, two))
    for side, (label, names, _) in enumerate(sides):
        other, other_names, _ = sides[1 - side]
        for layer in label.layers:
            over = {names[dim] for dim in varying(layer)}
            if not of_weights:
                call.label_graph.set_role(label.origin, layer, consumed=bool(over & summed))
            elif over & summed and min(len(one_names), len(two_names)) > 1:
                # W = B·A: A produces what B consumes; the roles of the outer axes are those that W is used in.
                call.label_graph.set_role(label.origin, layer, consumed=side == 0)
            if not over & summed:
                passed[side].append(layer)
                continue
            along = [
                [arrange(p, each, every) for p in layers if {each[d] for d in varying(p)} & over & summed]
                for layers, each in ((label.layers, names), (other.layers, other_names))
            ]
            found = arrange(layer, names, every)
            heads = [(p, {other_names[d] for d in varying(p)}) for p in other.layers]
            beside = [arrange(p, other_names, every) for p, own in heads if own & over and not own & summed]
            met, of_activations = partners(found, *along), not (label.origin or other.origin)
            if not (of_activations and meets_shared_places(call.label_graph, found, met, beside, other, places)):
                _tie(call, found, met, other, beside, places)
            if of_activations:
                dims = {dim for dim, name in enumerate(names) if name in summed}
                call.label_graph.mark_mixed(layer, f"{call.location} multiplies it with another activation", dims)
                if call.label_graph.keeps_heads and over - summed and bool((layer >= 0).all()):
                    passed[side].append(call.label_graph.add_placeholders(layer, dims))
    target = {name: position for position, name in enumerate(out_names)}
    return merge(
        call.label_graph,
        _finest([list(_onto(layers, names, target)) for layers, (_, names, _) in zip(passed, sides, strict=True)]),
    )


def _finest(sides: Sequence[list[Tensor]]) -> list[list[Tensor]]:
    """The layers of both operands without those for which the other operand has a finer one.

    A batched product pairs batch with batch: the head layer of one operand must not tie all places in a head of the other.
    """
    one, two = (
        [layer for layer in layers if not any(_is_finer(other, layer) for other in others)]
        for layers, others in (sides, sides[::-1])
    )
    return [one, two]


@rule("_cdist_forward", "_euclidean_dist")
def distances(call: Call) -> None:
    """Distances between the rows of two tensors: their units are tied and mixed, as a new one changes all distances."""
    one, two = call.args[0], call.args[1]
    dims = call.out.dim()
    across = [
        [align(layer, dims) for layer in call.label_of(t).layers if t.dim() - 1 in varying(layer)] for t in (one, two)
    ]
    for t, layers, others in ((one, *across), (two, *across[::-1])):
        for layer in layers:
            call.label_graph.mark_mixed(layer, f"{call.location} takes distances over its units", {dims - 1})
            if not others and call.label_of(two if t is one else one).kind != CONSTANT:
                call.label_graph.freeze(layer, f"{call.location} reads data of a fixed size with it")
    merge(call.label_graph, across)
    rows = [
        [align(layer, dims) for layer in call.label_of(t).layers if t.dim() - 1 not in varying(layer)]
        for t in (one, two)
    ]
    for layer in rows[1]:
        call.label_graph.set_role(call.label_of(two).origin, layer, consumed=False)
    call.label_output(call.out, merge(call.label_graph, [rows[0], [layer.transpose(-1, -2) for layer in rows[1]]]))


def _is_finer(one: Tensor, two: Tensor) -> bool:
    return set(varying(two)) < set(varying(one)) and not is_constant(one)


def _tie(
    call: Call, layer: Tensor, found: Sequence[Tensor], other: Label, beside: Sequence[Tensor], summed: set[int]
) -> None:
    """Tie a layer to those of the other operand along the summed dimensions.

    Where the other one has heads without units for their places (the states of Mamba-2), these keep their number, and whole
    heads can still go, so the places of each head are tied.
    """
    for partner in found:
        call.label_graph.union(*_beside_data(call, layer, partner, summed))
    if found or other.kind == CONSTANT:
        return
    if beside and bool((layer >= 0).all()):
        call.label_graph.tie_rows(layer, summed & set(varying(layer)))
        for heads in beside:
            call.label_graph.union(layer, heads)
    else:
        call.label_graph.freeze(layer, f"{call.location} reads data of a fixed size with it")


def _beside_data(call: Call, one: Tensor, two: Tensor, summed: set[int]) -> tuple[Tensor, Tensor]:
    """Two layers without those summed places at which one has data where the other has heads × places.

    These keep their number, and whole heads can still go, so these places of each head are tied. The keys of multi-head
    latent attention share the places that a rotary embedding turns.
    """
    for dim in summed & set(varying(one)) & set(varying(two)):
        for layer, other in ((one, two), (two, one)):
            data = (other == -1).movedim(dim, 0).reshape(other.shape[dim], -1).all(1)
            met = layer.index_select(dim, data.nonzero().flatten())
            if 0 < met.shape[dim] < layer.shape[dim] and len(varying(layer)) == 2 and bool((met >= 0).all()):
                call.label_graph.tie_rows(met, {dim})
                rest = (~data).nonzero().flatten()
                return one.index_select(dim, rest), two.index_select(dim, rest)
    return one, two


def _onto(layers: Sequence[Tensor], names: str, target: dict[str, int]) -> Iterator[Tensor]:
    for layer in layers:
        dims = [dim for dim, name in enumerate(names) if name in target]
        kept = layer.reshape([layer.shape[dim] for dim in dims])
        yield arrange(kept, [names[dim] for dim in dims], target)


@rule("convolution", "_convolution", "mkldnn_convolution", "cudnn_convolution")
def convolution(call: Call) -> None:
    """A contraction over the input channels; with groups, all input and output channels of a group are tied."""
    source, weight = call.args[0], call.args[1]
    bias, groups, transposed = call.argument("bias"), call.argument("groups", 1), call.argument("transposed", False)
    if source.dim() != weight.dim():
        return call.freeze_all(f"{call.location} runs without a batch dimension")
    space = "xyz"[: weight.dim() - 2]
    names = ("co" if transposed else "oc") + space
    inputs = call.label_of(source).layers
    _freeze_kernel_axes(call, weight)
    for layer in inputs:
        if 1 not in varying(layer):
            call.label_graph.freeze(layer, f"{call.location} works along its units")
    if groups == 1:
        layers = contract(call, source, "bc" + space.upper(), weight, names, "bo" + space.upper())
        layers = tuple(layer for layer in layers if 1 in varying(layer))
    else:
        layers = grouped(call, inputs, weight, groups, names.index("o"))
    if bias is not None:
        shape = (1, -1) + (1,) * len(space)
        layers = merge(call.label_graph, [layers, [layer.view(shape) for layer in call.label_of(bias).layers]])
    call.label_output(call.out, layers)
    return None


@rule("conv_tbc")
def convolution_over_steps(call: Call) -> None:
    """A contraction over the channels of `[steps, batch, channels]` with a weight `[kernel, channels, outputs]`."""
    source, weight, bias = call.args[0], call.args[1], call.args[2]
    label = call.label_of(weight)
    for layer in label.layers:
        if 0 in varying(layer):
            call.label_graph.freeze(layer, KERNEL)
    call.set_label(weight, replace(label, layers=tuple(layer for layer in label.layers if 0 not in varying(layer))))
    for layer in call.label_of(source).layers:
        if 0 in varying(layer):
            call.label_graph.freeze(layer, f"{call.location} works along its units")
    layers = contract(call, source, "tbc", weight, "xco", "Tbo")
    layers = merge(call.label_graph, [layers, [align(layer, 3) for layer in call.label_of(bias).layers]])
    call.label_output(call.out, layers)


def _freeze_kernel_axes(call: Call, weight: Tensor) -> None:
    """Freeze the spatial axes of the kernel and, with groups, its second axis, which counts within one group."""
    label = call.label_of(weight)
    units = 2 if call.argument("groups", 1) == 1 else 1
    kept = tuple(layer for layer in label.layers if min(varying(layer)) < units)
    for layer in label.layers:
        if min(varying(layer)) >= units:
            call.label_graph.freeze(layer, KERNEL)
    call.set_label(weight, replace(label, layers=kept))


def grouped(call: Call, inputs: Sequence[Tensor], weight: Tensor, groups: int, out_dim: int) -> tuple[Tensor, ...]:
    """The output's layers of a grouped convolution; inputs, weight rows and outputs of a group are tied.

    The weight's first axis counts over all groups (outputs; inputs if transposed), its second within one, so the second
    keeps its size. A depthwise convolution has one input channel per group.
    """
    label = call.label_of(weight)
    rows = next((layer for layer in label.layers if 0 in varying(layer)), None)
    if rows is None:
        return ()
    channels = rows.reshape(-1)
    whole_groups(call, channels, groups)
    firsts = channels.view(groups, -1)[:, :1]
    carried = [layer for layer in inputs if 1 in varying(layer)]
    if not carried:
        call.label_graph.freeze(channels, f"{call.location} reads data of a fixed size with it")
    for layer in carried:
        per_channel = layer.transpose(0, 1).reshape(layer.shape[1], -1)
        call.label_graph.union(per_channel.view(groups, -1), firsts)
    if out_dim == 0:
        return (channels.view(1, -1, *[1] * (weight.dim() - 2)),)
    spread = firsts.expand(groups, weight.shape[1]).reshape(1, -1, *[1] * (weight.dim() - 2))
    return (spread,)

"""Label rules of ops along an axis: reductions, softmax, pooling, sorting.

Importing this module registers them in `rules.RULES`.
"""

from __future__ import annotations

from torch import Tensor

from evolvenet.tracing.labels import varying
from evolvenet.tracing.normalised import mark_normalised
from evolvenet.tracing.rules import Call, elementwise, rule

WITH_POSITIONS = frozenset(f"aten::{name}" for name in ("max", "min", "median", "nanmedian", "kthvalue", "mode"))
"""Reductions that also return where along the dimension they have found the number."""


@rule("sum", "mean", "amax", "amin", "prod", "var", "std", "norm", "linalg_vector_norm", "logsumexp", "any", "all")
@rule("max", "min", "argmax", "argmin", "var_mean", "std_mean", "median", "_logcumsumexp", "count_nonzero")
@rule("_is_all_true", "_is_any_true", "kthvalue", "mode", "nanmedian")
def reduction(call: Call) -> None:
    """Units along the reduced dimensions are mixed, or frozen if the op returns their positions; the others pass.

    Of units on a grid (heads × places, branches × channels) a placeholder passes for each remaining row or column.
    """
    source = call.args[0]
    if len(call.tensors) > 1:
        return elementwise(call)
    given = call.argument("dim")
    dims = range(source.dim()) if given is None or given == [] else ([given] if isinstance(given, int) else given)
    reduced = {dim % source.dim() for dim in dims} if source.dim() else set()
    positions = "arg" in call.op or (call.op in WITH_POSITIONS and given is not None)
    kept = []
    for layer in call.label_of(source).layers:
        over = reduced & set(varying(layer))
        if over:
            reason = f"{call.location} runs over its units"
            if positions:
                call.label_graph.freeze(layer, reason)
            else:
                mark_normalised(call, layer, reason, over)
        if not over:
            kept.append(layer)
        elif over != set(varying(layer)) and not positions and bool((layer >= 0).all()):
            kept.append(call.label_graph.add_placeholders(layer, over))
    for out in call.outputs:
        shrunk = out.dim() != source.dim()
        call.label_output(
            out, [_squeeze(layer, reduced) if shrunk else layer for layer in kept], origin=call.label_of(source).origin
        )
    return None


def _squeeze(layer: Tensor, dims: set[int]) -> Tensor:
    return layer.reshape([size for dim, size in enumerate(layer.shape) if dim not in dims])


@rule("_softmax", "_log_softmax", "_safe_softmax", "softmax", "log_softmax")
def softmax(call: Call) -> None:
    """Units along the normalised dimension compete, see `routing_rules.settle_competition`; the others pass.

    Of units on a grid (branches × channels), those that are normalised together are tied.
    """
    source = call.args[0]
    axis = call.argument("dim") % max(source.dim(), 1)
    layers = call.label_of(source).layers
    for layer in layers:
        if axis not in varying(layer):
            continue
        if len(varying(layer)) > 1:
            call.label_graph.union(layer, layer.narrow(axis, 0, 1))
        else:
            call.label_graph.mark_competing(layer, f"{call.location} makes its units compete")
    call.label_output(call.out, layers)


SPATIAL = {"1d": 1, "2d": 2, "3d": 3}


@rule("max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool1d", "avg_pool2d", "avg_pool3d")
@rule("_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_max_pool2d", "adaptive_max_pool3d")
@rule("adaptive_avg_pool1d", "max_pool1d", "max_pool2d", "max_pool3d", "reflection_pad1d", "reflection_pad2d")
@rule("reflection_pad3d", "replication_pad1d", "replication_pad2d", "replication_pad3d", "upsample_linear1d")
@rule("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_bilinear2d", "upsample_bicubic2d")
@rule(
    "fractional_max_pool2d",
    "fractional_max_pool3d",
    "upsample_trilinear3d",
    "_upsample_nearest_exact1d",
    "_upsample_nearest_exact2d",
    "_upsample_bilinear2d_aa",
)
def spatial(call: Call) -> None:
    """Units along the last one to three dimensions are frozen, the others pass."""
    source = call.args[0]
    last = next((count for mark, count in SPATIAL.items() if mark in call.op), 2)
    freeze_along(call, set(range(source.dim() - last, source.dim())))


@rule("cumsum", "cumprod", "logcumsumexp", "cummax", "cummin", "sort", "topk", "tril", "triu")
def by_place(call: Call) -> None:
    """The output depends on the position along a dimension: units along it are frozen, the others pass."""
    source = call.args[0]
    matrix = call.op in ("aten::tril", "aten::triu")
    dims = (-2, -1) if matrix else (call.argument("dim"),)
    freeze_along(call, {dim % max(source.dim(), 1) for dim in dims})


def freeze_along(call: Call, worked: set[int]) -> None:
    """Freeze the units along the dimensions that an op works along; the others pass to its outputs."""
    source = call.args[0]
    kept = []
    for layer in call.label_of(source).layers:
        if worked & set(varying(layer)):
            call.label_graph.freeze(layer, f"{call.location} works along its units")
        else:
            kept.append(layer)
    for out in call.outputs:
        call.label_output(out, kept)

"""Label rules of linear algebra on matrices in the last two dimensions: batches of matrices pass, the matrices' axes are frozen.

Importing this module registers them in `rules.RULES`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from torch import Tensor

from evolvenet.tracing.labels import Label, align, varying
from evolvenet.tracing.merging import freeze_met_by_data, merge
from evolvenet.tracing.rules import Call, rule, tie_elements


@rule(
    "linalg_qr", "_linalg_svd", "_linalg_eigh", "linalg_eig", "_linalg_eigvals", "linalg_cholesky_ex", "linalg_inv_ex"
)
@rule("linalg_lu", "linalg_lu_factor_ex", "_linalg_det", "_linalg_slogdet", "linalg_matrix_exp")
def of_matrices(call: Call) -> None:
    """Decompositions, inverses, determinants: every entry of a result depends on all entries of its matrix."""
    source = call.args[0]
    batch = source.dim() - 2
    layers = _beside(call, source, {batch, batch + 1}).layers
    for out in call.outputs:
        call.label_output(out, [layer.reshape(layer.shape[:batch] + (1,) * (out.dim() - batch)) for layer in layers])


@rule("_linalg_solve_ex", "linalg_solve_triangular")
def solved(call: Call) -> None:
    """Systems A·X = B, or X·A = B: what stands beside A in B passes, and batches of systems; the other axes are frozen."""
    matrix, known = call.args[0], call.args[1]
    out = call.outputs[0]
    if known.dim() != out.dim() or matrix.dim() > out.dim():
        return call.freeze_all(f"{call.location} works along its units")
    dims = out.dim()
    labels = [
        _beside(call, matrix, {matrix.dim() - 2, matrix.dim() - 1}),
        _beside(call, known, {dims - 2 if call.argument("left") else dims - 1}),
    ]
    # Of the matrix only its batch meets what it is solved for.
    fixed = freeze_met_by_data(call.label_graph, call.location, [matrix[..., :1, :1], known], labels, dims)
    layers = merge(call.label_graph, [[align(layer, dims) for layer in label.layers] for label in labels])
    call.label_output(out, [layer for layer in layers if not fixed & set(varying(layer))])
    return None


@rule("linalg_cross")
def cross_product(call: Call) -> None:
    """Products of vectors of three numbers along a dimension, which is frozen; elementwise along the others."""
    labels = [_beside(call, tensor, {call.argument("dim") % tensor.dim()}) for tensor in call.tensors]
    tie_elements(call, call.tensors, labels)


def _beside(call: Call, tensor: Tensor, worked: Collection[int]) -> Label:
    """The label of a tensor without the layers that vary along dimensions that the op works along: their units are frozen."""
    label = call.label_of(tensor)
    kept = []
    for layer in label.layers:
        if set(worked) & set(varying(layer)):
            call.label_graph.freeze(layer, f"{call.location} works along its units")
        else:
            kept.append(layer)
    return replace(label, layers=tuple(kept))

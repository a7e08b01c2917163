"""Label rules of products with one matrix for each group of rows, as the experts of a mixture multiply them.

Importing this module registers them in `rules.RULES`.
"""

from __future__ import annotations

from torch import Tensor

from evolvenet.tracing.contraction_rules import contract
from evolvenet.tracing.labels import varying
from evolvenet.tracing.needed_sizes import mark_multiple
from evolvenet.tracing.routing_rules import without_units
from evolvenet.tracing.rules import RULES, Call, rule

LINE = 8
"""Entries of 16 bytes in half precision, which is what `_grouped_mm` reads at a time.

Widths that have a multiple of as many keep one also in single precision, where 4 entries take 16 bytes: the network may be
cast to half precision later.
"""


@rule("_grouped_mm")
def grouped_product(call: Call) -> None:
    """Rows `[rows, in]`, sorted by group, times `[groups, in, out]`: a matrix for each group."""
    source, weight = call.args[0], call.args[1]
    rows_by_group = source.dim() == 2 and weight.dim() == 3 and call.argument("bias") is None
    if not rows_by_group:
        call.freeze_all(f"{call.location} has no rule for groups that are no groups of rows")
        return call.label_output(call.out, ())
    for operand in (source, weight):
        _mark_lines(call, operand)
    return by_group(call, source, weight, call.argument("offs"))


def by_group(call: Call, source: Tensor, weight: Tensor, ends: Tensor | None) -> None:
    """The labels of such a product; the groups are tied to the units of which `ends` has the last row, or frozen.

    Args:
        call: the op.
        source: `[rows, in]`.
        weight: `[groups, in, out]`.
        ends: `[groups]`.
    """
    counted = [] if ends is None else [layer for layer in call.label_of(ends).layers if varying(layer) == (0,)]
    for layer in call.label_of(weight).layers:
        if 0 not in varying(layer):
            continue
        if counted and varying(layer) == (0,):
            call.label_graph.union(layer.reshape(-1), counted[0])
        else:
            call.label_graph.freeze(layer, f"{call.location} has as many groups of rows as it has")
    call.label_output(call.out, contract(without_units(call, weight, 0), source, "rk", weight, "gkn", "rn"))


def _mark_lines(call: Call, operand: Tensor) -> None:
    """Keep that the rows (or columns) of an operand that lie in one piece take a multiple of 16 bytes."""
    for dim in (operand.dim() - 2, operand.dim() - 1):
        if operand.stride(dim) != 1 or operand.shape[dim] == 1:
            continue
        line = LINE if operand.shape[dim] % LINE == 0 else max(16 // operand.element_size(), 1)
        for layer in call.label_of(operand).layers:
            if dim in varying(layer):
                mark_multiple(call.label_graph, layer, line, call.location)


def _product_of_transformers(call: Call) -> None:
    """The product that the transformers library falls back to, which reads entries one by one."""
    by_group(call, *call.args, *call.kwargs.values())


RULES["transformers::grouped_mm_fallback"] = _product_of_transformers

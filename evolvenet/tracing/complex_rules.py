"""Label rules of Fourier transforms and of views of complex numbers.

Importing this module registers them in `rules.RULES`.
"""

from __future__ import annotations

from evolvenet._compat.torch import base_of
from evolvenet.tracing.labels import compress, varying
from evolvenet.tracing.needed_sizes import mark_multiple
from evolvenet.tracing.reduction_rules import freeze_along
from evolvenet.tracing.rules import Call, elementwise, rule


@rule("_fft_r2c", "_fft_c2r", "_fft_c2c")
def fourier(call: Call) -> None:
    """Every output depends on all places along the transformed dimensions: units along them are frozen, others pass."""
    dims = call.args[0].dim()
    freeze_along(call, {dim % dims for dim in call.argument("dim")})


@rule("_conj", "_neg_view", "_conj_physical", "_neg_view_copy", "_conj_copy")
def same_places(call: Call) -> None:
    """Another sign for the same places."""
    label = call.label_of(call.args[0])
    call.label_output(call.out, label.layers, label.kind, label.origin)


@rule("view_as_real", "view_as_real_copy")
def as_real(call: Call) -> None:
    """Real and imaginary parts along a new last dimension."""
    label = call.label_of(call.args[0])
    call.label_output(call.out, [layer.unsqueeze(-1) for layer in label.layers], label.kind, label.origin)


@rule("view_as_complex", "view_as_complex_copy")
def as_complex(call: Call) -> None:
    """Complex numbers of the real and imaginary parts along the last dimension, whose size is always two.

    Units that the code has laid out in such pairs (rotary embeddings do) are tied in pairs. Of a slice of a tensor, the op
    needs pairs in the whole tensor too: its strides must be even.
    """
    label = call.label_of(call.args[0])
    last = call.args[0].dim() - 1
    base = base_of(call.args[0])
    for layer in () if base is None or base.numel() == call.args[0].numel() else call.label_of(base).layers:
        mark_multiple(call.label_graph, layer, 2, call.location)
    kept = []
    for layer in label.layers:
        if varying(layer) == (last,):
            call.label_graph.freeze(layer, f"{call.location} takes them for a real and an imaginary part")
        else:
            call.label_graph.tie_rows(layer, {last})
            kept.append(compress(layer.select(-1, 0)))
    call.label_output(call.out, kept, label.kind, label.origin)


@rule("complex", "polar")
def from_parts(call: Call) -> None:
    """Real and imaginary part, or length and angle, in two tensors: elementwise."""
    elementwise(call)

"""Label rules of Fourier transforms and of views of complex numbers.

Importing this module registers them in `rules.RULES`.
"""

from __future__ import annotations

from evolvenet.tracing.labels import compress, varying
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
    """Complex numbers of the real and imaginary parts along the last dimension, whose size is always two."""
    label = call.label_of(call.args[0])
    last = call.args[0].dim() - 1
    kept = []
    for layer in label.layers:
        if last in varying(layer):
            call.label_graph.freeze(layer, f"{call.location} takes them for a real and an imaginary part")
        else:
            kept.append(compress(layer.select(-1, 0)))
    call.label_output(call.out, kept, label.kind, label.origin)


@rule("complex", "polar")
def from_parts(call: Call) -> None:
    """Real and imaginary part, or length and angle, in two tensors: elementwise."""
    elementwise(call)

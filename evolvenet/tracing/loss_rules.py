"""Label rules of loss functions that are one op. A traced training step runs them on what its networks return.

Importing this module registers them in `rules.RULES`.
"""

from __future__ import annotations

from evolvenet.tracing.labels import varying
from evolvenet.tracing.rules import Call, elementwise, rule


@rule("mse_loss", "smooth_l1_loss", "huber_loss", "soft_margin_loss", "binary_cross_entropy")
@rule("binary_cross_entropy_with_logits")
def loss_of_elements(call: Call) -> None:
    """Compares element by element: units of two activations are one, units compared with data keep their number.

    A mean or sum over the units mixes them: a unit more changes the loss of the others.
    """
    elementwise(call)
    if call.out.dim() == 0:
        for tensor in call.tensors:
            for layer in call.read(tensor).layers:
                call.ledger.mix(layer, f"{call.place} averages over its units")


@rule("nll_loss_forward", "nll_loss2d_forward", "multi_margin_loss", "multilabel_margin_loss_forward", "_ctc_loss")
def loss_of_classes(call: Call) -> None:
    """Picks classes by their number, which the targets know: units along the class axis keep their number."""
    source = call.args[0]
    for layer in call.read(source).layers:
        if varying(layer):
            call.ledger.freeze(layer, f"{call.place} picks them by the targets")
    for out in call.outputs:
        call.put(out, ())

"""Label rules of loss functions that are one op. A traced training step runs them on what its networks return.

Importing this module registers them in `rules.RULES`.
"""

from __future__ import annotations

from evolvenet.tracing.labels import varying
from evolvenet.tracing.rules import Call, elementwise, rule


@rule("mse_loss", "smooth_l1_loss", "huber_loss", "soft_margin_loss", "binary_cross_entropy")
@rule("binary_cross_entropy_with_logits")
def loss_of_elements(call: Call) -> None:
    """Elementwise: units of two activations are tied, units compared with data are frozen.

    A mean or sum over the units mixes them: one more unit changes the weight of the others in the loss.
    """
    elementwise(call)
    if call.out.dim() == 0:
        for tensor in call.tensors:
            for layer in call.label_of(tensor).layers:
                call.label_graph.mark_mixed(layer, f"{call.location} averages over its units")


@rule("nll_loss_forward", "nll_loss2d_forward", "multi_margin_loss", "multilabel_margin_loss_forward", "_ctc_loss")
def loss_of_classes(call: Call) -> None:
    """Selects classes by the indices in the targets: units along the class axis are frozen."""
    source = call.args[0]
    for layer in call.label_of(source).layers:
        if varying(layer):
            call.label_graph.freeze(layer, f"{call.location} picks them by the targets")
    for out in call.outputs:
        call.label_output(out, ())

"""How far a network's outputs have moved: the figure in which cuts of widths and of ranks are compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from evolvenet.execution.inputs import first_samples
from evolvenet.execution.isolation import model_outputs
from evolvenet.execution.sampling import evenly, samples_in
from evolvenet.graph.width_graph import WidthGraph
from evolvenet.linalg.host_transfers import to_device, values_of
from evolvenet.linalg.precision import in_float64


def first_batches(batches: Sequence[Any], samples: int) -> list[Any]:
    """As many batches as hold so many samples, the last one cut.

    >>> [len(batch) for batch in first_batches([torch.zeros(4), torch.zeros(4), torch.zeros(4)], 6)]
    [4, 2]
    """
    found: list[Any] = []
    for batch in batches:
        if samples <= 0:
            break
        found.append(first_samples(batch, samples))
        samples -= samples_in(batch)
    return found


MOST = 2**23
"""Numbers of an output tensor that are compared, of all batches together: the logits of a language model have many more."""


def outputs_on(
    model: nn.Module,
    batches: Sequence[Any],
    graph: WidthGraph | None = None,
    most: int | None = MOST,
    run: Callable[[Any], Sequence[Tensor]] | None = None,
) -> list[Tensor]:
    """Every output tensor of the model that counts in float64, concatenated over the batches where their shapes allow that.

    Args:
        model: is left as it was.
        batches: inputs of the model.
        graph: of the model: whether it runs with autograd on (`differentiates`), and which outputs count (`outputs`).
        most: numbers of each tensor, see `MOST`; of a larger one some places are taken evenly, always the same ones, with all
            entries of its last axis: `[places, entries]`. None for all.
        run: batch → its outputs, in the place of `model_outputs`.

    >>> outputs_on(nn.Linear(2, 3), [torch.zeros(4, 2), torch.zeros(1, 2)])[0].shape
    torch.Size([5, 3])
    """
    gradients, outputs = (False, None) if graph is None else (graph.differentiates, graph.outputs)
    share = None if most is None else most // max(1, len(batches))
    each: list[list[Tensor]] = []
    sampled: list[bool] = []
    for batch in batches:
        found = [
            tensor
            for tensor in (model_outputs(model, batch, gradients, outputs) if run is None else run(batch))
            if tensor.is_floating_point() or tensor.is_complex()
        ]
        # The first batch decides for all, so that they can be put together: of a small last one all places are taken.
        sampled = sampled or [share is not None and tensor.dim() > 1 and tensor.numel() > share for tensor in found]
        if len(found) != len(sampled):
            # An output for each sample, say: batches of other sizes have others.
            return each[0]
        each.append(
            [
                real(_some_places(tensor, share) if some and share is not None and tensor.dim() > 1 else tensor)
                for tensor, some in zip(found, sampled, strict=True)
            ]
        )
    if len({tuple(tensor.shape[1:] if tensor.dim() else () for tensor in found) for found in each}) > 1:
        return each[0]
    return [
        torch.cat([tensor if tensor.dim() else tensor[None] for tensor in parts]) for parts in zip(*each, strict=True)
    ]


def _some_places(tensor: Tensor, most: int) -> Tensor:
    """`[places, entries]`: as many places as `most` numbers hold, taken evenly, two at least; all if there are no more."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    count = max(2, most // tensor.shape[-1])
    return rows if len(rows) <= count else rows[to_device(evenly(len(rows), count), tensor.device)]


def real(tensor: Tensor) -> Tensor:
    """A tensor in float64; a complex one as its parts: twice as many entries of its last axis, a single axis gets one more."""
    if not tensor.is_complex():
        return in_float64(tensor)
    parts = torch.view_as_real(tensor.resolve_conj())
    return in_float64(parts.flatten(-2) if tensor.dim() > 1 else parts)


def output_divergence(whole: Sequence[Tensor], moved: Sequence[Tensor]) -> float:
    """KL(p ‖ q) in nats, of the probabilities p and q that a softmax over the last axis makes of the outputs before and after.

    The mean over all other axes; of several outputs, the sum. Outputs that are themselves cut are left out.

    Args:
        whole: logits of the network before, from `outputs_on`.
        moved: its logits after a change.

    >>> output_divergence([torch.zeros(1, 2)], [torch.tensor([[0.0, 2.0]])])
    0.433...
    """
    pairs = [(one, two) for one, two in zip(whole, moved, strict=True) if one.shape == two.shape and one.dim()]
    each = [(one.log_softmax(-1), two.log_softmax(-1)) for one, two in pairs]
    total = sum(values_of([divergences(one, two).mean() for one, two in each]))
    # The greater one of 0 and NaN would be 0.
    return total if math.isnan(total) else max(0.0, total)


def divergences(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) for each place; a class of probability 0 adds nothing, also where both are 0 (logits of −∞).

    Args:
        log_p: `[..., classes]`, logarithms of probabilities.
        log_q: the same.

    >>> divergences(torch.tensor([0.0, -torch.inf]), torch.tensor([0.0, -torch.inf]))
    tensor(0.)
    """
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)


def output_error(whole: Sequence[Tensor], moved: Sequence[Tensor]) -> float:
    """Σ‖moved − whole‖² / Σ‖whole − mean‖²; outputs that are themselves cut are left out.

    The mean is that over all axes but the last one, whether or not `outputs_on` has taken some places of an output.

    Args:
        whole: outputs of the network before, from `outputs_on`.
        moved: its outputs after a change.

    >>> output_error([torch.tensor([[1.0], [-1.0]])], [torch.tensor([[1.1], [-1.0]])])
    0.005...
    """
    pairs = [(one, two) for one, two in zip(whole, moved, strict=True) if one.shape == two.shape]
    apart = [(one - two).square().sum() for one, two in pairs]
    rows = [one.reshape(-1, one.shape[-1]) if one.dim() > 1 else one for one, _ in pairs if one.dim()]
    level = [(one - one.mean(0, keepdim=True)).square().sum() for one in rows]
    found = values_of([*apart, *level])
    apart, level = sum(found[: len(apart)]), sum(found[len(apart) :])
    return apart / max(level, torch.finfo(torch.float64).tiny)


OutputMeasure = Literal["outputs", "kl"]
"""How outputs are compared with those before: "outputs" for `output_error`, "kl" for `output_divergence`."""

MEASURES: dict[OutputMeasure, Callable[[Sequence[Tensor], Sequence[Tensor]], float]] = {
    "outputs": output_error,
    "kl": output_divergence,
}

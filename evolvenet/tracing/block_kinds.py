"""Which units are those of a residual stream, of attention, or rows of a table that is looked up, from the ops of a run.

A stream: an addition of two activations of which one was computed from the other through a weight (x + f(x)). Attention: what
a softmax of products of activations (queries with keys) is multiplied with (values), and the units of these products. Names of
modules play no part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from evolvenet.graph.block_kinds import ATTENTION, EMBEDDINGS, STREAM
from evolvenet.tracing.rules import PARTING, Call

PRODUCTS = frozenset(f"aten::{name}" for name in ("mm", "bmm", "addmm", "baddbmm"))
CONVOLUTIONS = frozenset(f"aten::{name}" for name in ("convolution", "_convolution", "mkldnn_convolution"))
SOFTMAXES = frozenset(f"aten::{name}" for name in ("_softmax", "_safe_softmax", "softmax"))
LOOK_UPS = frozenset(f"aten::{name}" for name in ("embedding", "_embedding_bag", "_embedding_bag_forward_only"))
SUMS = frozenset({"aten::add", "aten::add_"})
SAME = PARTING | {f"aten::{name}" for name in ("native_dropout", "permute", "transpose", "t", "roll", "flip")}
"""Ops whose result counts as the same activation as what they were given."""


@dataclass(frozen=True)
class Source:
    """Where an activation comes from; sets of activations are bits of a number.

    Args:
        itself: its own bit.
        before: all from which it was computed, itself included.
        weighed: those of them from which a product with a weight lies between.
        factors: label layers of the two activations whose product it is, by elementwise ops at most.
        normed: whether a softmax lies between that product and it.
    """

    itself: int
    before: int
    weighed: int
    factors: tuple[Tensor, ...] | None = None
    normed: bool = False


class BlockKinds:
    """Follows the activations of one run, and marks units in the label graph of each call."""

    def __init__(self) -> None:
        self._sources = WeakTensorKeyDictionary()
        self._count = 0

    def record(self, call: Call) -> None:
        """Mark what an op says about its units, once its rule has labelled its outputs."""
        tensors = call.tensors
        sources = [self._sources.get(tensor) for tensor in tensors]
        known = [source for source in sources if source is not None]
        if call.op in LOOK_UPS:
            _mark(call, [layer for layer in call.label_of(tensors[0]).layers if layer.shape[0] > 1], EMBEDDINGS)
        if not known and call.op in SAME:
            return
        if call.op in SUMS and len(sources) == len(known) == 2 and _is_residual(*known):
            _mark(call, call.label_of(call.out).layers, STREAM)
        factors, normed = self._product(call, tensors, sources)
        weighed = 0
        for source in known:
            weighed |= source.weighed | (source.before if call.op in PRODUCTS | CONVOLUTIONS else 0)
        if call.op in SAME and len(known) == 1:
            found = Source(known[0].itself, known[0].before, weighed, factors, normed)
        else:
            self._count += 1
            itself = before = 1 << self._count
            for source in known:
                before |= source.before
            found = Source(itself, before, weighed, factors, normed)
        for out in call.outputs:
            self._sources[out] = found

    def _product(
        self, call: Call, tensors: Sequence[Tensor], sources: Sequence[Source | None]
    ) -> tuple[tuple[Tensor, ...] | None, bool]:
        """`factors` and `normed` of an op's result; the units of attention are marked."""
        if call.op in CONVOLUTIONS | LOOK_UPS:
            return None, False
        if call.op not in PRODUCTS:
            carried = next((each for each in sources if each is not None and each.factors), None)
            if carried is None:
                return None, False
            return carried.factors, carried.normed or call.op in SOFTMAXES
        (one, two), (left, right) = tensors[-2:], sources[-2:]
        if left is None or right is None:
            return None, False
        layers = (*call.label_of(one).layers, *call.label_of(two).layers)
        normed = next((each for each in (left, right) if each.normed), None)
        if normed is None:
            return layers, False
        _mark(call, (*layers, *(normed.factors or ())), ATTENTION)
        return None, False


def _mark(call: Call, layers: Sequence[Tensor], kind: str) -> None:
    for layer in layers:
        call.label_graph.mark_kind(layer, kind)


def _is_residual(one: Source, two: Source) -> bool:
    """Whether one of two activations was computed from the other through a weight; scores of attention are no stream."""
    return not (one.factors or two.factors) and bool(one.itself & two.weighed or two.itself & one.weighed)

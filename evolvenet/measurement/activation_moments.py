"""Streaming mean and covariance of the inputs of each consumer of a width."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from evolvenet.errors import SpectrumError, TraceError, concerning
from evolvenet.execution.early_stop import without_cache, without_logits
from evolvenet.execution.isolation import isolated, op_by_op
from evolvenet.execution.residual_sums import ResidualSumMode
from evolvenet.execution.sampling import evenly, in_halves
from evolvenet.execution.step import run_model
from evolvenet.execution.weight_ops import WeightOp
from evolvenet.graph.naming import named_tensors
from evolvenet.graph.width_graph import Tie, WidthGraph
from evolvenet.linalg.full_precision import full_precision
from evolvenet.linalg.gram import gram
from evolvenet.linalg.host_transfers import to_device, to_host
from evolvenet.linalg.precision import in_float64
from evolvenet.measurement.weight_uses import Bias, UseRecorder, WeightUses

CAP = 8192
"""Most samples taken for one consumer from one batch; more positions are sampled evenly."""

MOST_ON_DEVICE = 2**30
"""Bytes of moments beyond which they are moved from the device to the CPU after a batch, which the host waits for."""


@dataclass(frozen=True, eq=False)
class Moments:
    """Number, mean and covariance of samples.

    The covariance is kept, not the raw second moment: subtracting a large mean afterwards would lose the digits.

    Args:
        count: number of samples.
        mean: `[n]` float64.
        covariance: `[n, n]` float64, divided by `count`; about the mean. Both on the device of the samples, if that has float64.

    >>> moments = Moments.of(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
    >>> moments.mean.tolist(), moments.second[0, 0].item()
    ([2.0, 0.0], 5.0)
    """

    count: int
    mean: Tensor
    covariance: Tensor

    @property
    def second(self) -> Tensor:
        """The uncentred second moment E[x·xᵀ], `[n, n]`."""
        return self.second_about(torch.zeros_like(self.mean))

    def second_about(self, point: Tensor) -> Tensor:
        """The second moment about a point `[n]`, E[(x − point)·(x − point)ᵀ], `[n, n]`."""
        apart = self.mean - point
        return torch.addr(self.covariance, apart, apart)

    @classmethod
    def empty(cls, size: int) -> Moments:
        """The moments of no sample of `size` features; all entries are one zero in memory."""
        zero = torch.zeros((), dtype=torch.float64, device="cpu")
        return cls(0, zero.expand(size), zero.expand(size, size))

    @classmethod
    def of(cls, samples: Tensor) -> Moments:
        """The moments of samples `[N, n]` of any floating type and device, without a wait for it.

        Products of float32 and the half types are made in float32 about the batch's mean, in full precision whatever is set
        for training; everything else is float64.
        """
        if not len(samples):
            return cls.empty(samples.shape[1])
        wide = samples if samples.dtype == torch.float64 else samples.float()
        centre = wide.mean(0)
        about = wide - centre
        with full_precision():
            covariance = in_float64(gram(about)).div_(len(about))
        # What the rounding of the mean left over; exact for float64, worth seven digits for float32.
        rest = in_float64(about.mean(0))
        return cls(len(about), in_float64(centre) + rest, covariance.addr_(rest, rest, alpha=-1))

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets of samples together.

        From Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances",
        COMPSTAT 1982.
        """
        if not other.count or not self.count:
            return self if self.count else other
        count = self.count + other.count
        share = other.count / count
        apart = other.mean - self.mean
        covariance = torch.lerp(self.covariance, other.covariance, share)
        return Moments(count, self.mean + share * apart, covariance.addr_(apart, apart, alpha=share * (1 - share)))


def moments_on_host(moments: Sequence[Moments]) -> list[Moments]:
    """The same on the CPU, transferred together."""
    found = to_host([tensor for each in moments for tensor in (each.mean, each.covariance)])
    return [
        Moments(each.count, mean, covariance)
        for each, mean, covariance in zip(moments, found[::2], found[1::2], strict=True)
    ]


@dataclass(frozen=True, eq=False)
class ActivationMoments(Mapping[Tie, Moments]):
    """{consumer's tie: moments of its inputs, `n` the size of the width}.

    Two halves of the samples are kept apart, so that a fit on one half can be tested on the other.

    Args:
        even: moments of the samples of the batches 0, 2, 4 …; of the first half of a single batch.
        odd: those of the others, over the same ties.
        uses: the biases and the other uses of the consumers.
    """

    even: Mapping[Tie, Moments]
    odd: Mapping[Tie, Moments]
    uses: WeightUses = field(default_factory=lambda: WeightUses({}, {}))

    def __getitem__(self, tie: Tie) -> Moments:
        return self.even[tie].merge(self.odd[tie])

    def count(self, tie: Tie) -> int:
        """Number of samples of both halves."""
        return self.even[tie].count + self.odd[tie].count

    def bias_of(self, tie: Tie) -> Bias | None:
        """The bias of a consumer, which takes a change of the mean; None if it has none, or shares it."""
        return self.uses.biases.get(tie.tensor)

    def second_moment(self, tie: Tie, moments: Moments | None = None) -> Tensor:
        """The covariance of a consumer's inputs where it has a bias, else E[x·xᵀ]; `[n, n]`.

        Args:
            tie: of the consumer.
            moments: those of its inputs in other coordinates; None for those that were measured.
        """
        found = self[tie] if moments is None else moments
        return found.second if self.bias_of(tie) is None else found.covariance

    def is_refittable(self, tie: Tie) -> bool:
        """Whether a consumer's columns may be changed: it is trained, and nothing but these products uses it."""
        return self.uses.axes.get(tie.tensor) == tie.dim

    def __iter__(self) -> Iterator[Tie]:
        return iter(self.even)

    def __len__(self) -> int:
        return len(self.even)


class RunBeside(Protocol):
    """Measures something else in a run for the moments."""

    def mode(self, model: nn.Module, before: Callable[[WeightOp], None], uses: UseRecorder) -> ResidualSumMode:
        """The mode of the run, which calls `before` with each weight op before it runs, and adds what weights are used for."""
        ...

    def finish(self, mode: ResidualSumMode, result: Any) -> None:
        """Called with that mode after the run, and what the model returned."""
        ...


def collect(
    model: nn.Module,
    graph: WidthGraph,
    batches: Iterable[Any],
    names: Collection[str] | None = None,
    beside: RunBeside | None = None,
) -> ActivationMoments:
    """Run the model on a few batches and gather the moments of the inputs of every consumer of a resizable width.

    Samples are those of the batch and all positions; a channel that a flatten spread over `repeat` places counts as
    `repeat` samples, and so does each group of a grouped convolution. More than `CAP` of them in a batch are sampled
    evenly, always the same ones. The model runs in eval mode without gradients; training flags, buffers and random
    states are afterwards as before. Every second batch, or the second half of a single one, is kept apart from the others, see
    `evolvenet.execution.sampling.held_out`; samples are told apart by the first axis of the model's inputs.

    Args:
        model: the model of the graph.
        graph: its widths.
        batches: what the model is called with: a tensor, a tuple or list of arguments, a dict of keyword arguments.
        names: of the widths; all that can be resized by default.
        beside: makes the mode of the run on the first batch, of which it measures something else as well.

    Returns:
        The moments of each consumer whose weight was multiplied with data in a dense product or a convolution, whatever
        module it belongs to. Complex ones are left out: a width that only they consume is measured by its weights.

    Raises:
        TraceError: if there is no batch, or no sample in any.
        SpectrumError: for NaN or infinite inputs of a consumer.

    >>> from evolvenet.tracing.trace import trace
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> statistics = collect(model, trace(model, torch.zeros(1, 4)), [torch.randn(10, 4), torch.randn(6, 4)])
    >>> [(tie.tensor, moments.count, moments.mean.shape) for tie, moments in statistics.items()]
    [('2.weight', 16, torch.Size([8]))]
    """
    if isinstance(batches, Tensor):
        raise TraceError("Batches: expected an iterable of model inputs, got one tensor. Wrap it in a list: [inputs].")
    wanted = [width for width in graph.resizable if names is None or width.name in names]
    gathered = {tie: Halves(width.size) for width in wanted for tie in width.consumers}
    by_tensor: dict[str, dict[Tie, Halves]] = {}
    for tie, halves in gathered.items():
        by_tensor.setdefault(tie.tensor, {})[tie] = halves
    seen, ran, uses = 0, False, UseRecorder(model)
    tensors, _, _ = named_tensors(model)
    needed = [tensors[name] for name in by_tensor if name in tensors]
    with isolated(model, gradients=graph.differentiates):
        for given, odd in in_halves(batches):
            batch = without_cache(model, without_logits(model, given, needed))
            add = partial(gather, by_tensor, odd)
            watched = beside if not ran else None
            alone = partial(ResidualSumMode, model, add, lambda op, _: uses.add_op(op), on_bias=uses.add_bias)
            mode = alone() if watched is None else watched.mode(model, add, uses)
            with op_by_op(mode):
                result = run_model(model, batch)
            if watched is not None:
                watched.finish(mode, result)
            # What weight norm takes is used by that.
            uses.add_other_uses({*mode.other_uses, *mode.normed, *(each.length for each in mode.normed.values())})
            if sum(halves.bytes_on_device for halves in gathered.values()) > MOST_ON_DEVICE:
                _move_to_host(gathered)
            seen += len(odd)
            ran = True
    if not ran or not seen:
        got = "batches without a sample" if ran else "none"
        raise TraceError(f"Batches: expected at least one batch of model inputs, got {got}.")
    even, odd = halves_on_host({tie: halves for tie, halves in gathered.items() if halves.seen})
    return ActivationMoments(even, odd, uses.found(graph))


def halves_on_host(gathered: Mapping[Tie, Halves]) -> tuple[dict[Tie, Moments], dict[Tie, Moments]]:
    """The moments of both halves on the CPU, transferred together.

    Raises:
        SpectrumError: for NaN or infinite inputs of a consumer.
    """
    _move_to_host(gathered)
    for tie, halves in gathered.items():
        # The sums of squares: no product of two units is larger.
        if not all(half.covariance.diagonal().isfinite().all() for half in halves.on_host):
            with concerning((tie.tensor, tie.dim)):
                raise SpectrumError(
                    f"{tie.module or 'The root module'}: expected finite inputs while measuring, got NaN or infinite "
                    "ones. Training has diverged, or the batch holds such values: check both."
                )
    even, odd = ({tie: halves.on_host[half] for tie, halves in gathered.items()} for half in (0, 1))
    return even, odd


def _move_to_host(gathered: Mapping[Tie, Halves]) -> None:
    """Add the moments on the device to those on the CPU, transferred together."""
    moved = moments_on_host([half for halves in gathered.values() for half in halves.moments])
    for halves, *pair in zip(gathered.values(), moved[::2], moved[1::2], strict=True):
        halves.on_host = [half.merge(more) for half, more in zip(halves.on_host, pair, strict=True)]
        halves.moments = [Moments.empty(halves.size), Moments.empty(halves.size)]


class Halves:
    """Moments of one tie so far: of the samples that are fitted, and of those held out. Of earlier batches also on the CPU."""

    def __init__(self, size: int) -> None:
        self.size, self.seen = size, False
        self.moments = [Moments.empty(size), Moments.empty(size)]
        self.on_host = [Moments.empty(size), Moments.empty(size)]

    @property
    def bytes_on_device(self) -> int:
        """Of the covariances, 0 on the CPU."""
        return sum(half.covariance.nbytes for half in self.moments if half.covariance.device.type != "cpu")

    def add(self, rows: Tensor, odd: Tensor) -> None:
        """Add rows `[N, n]`; `odd` `[N]`, on the CPU, says which of them are held out."""
        for half, chosen in enumerate((~odd, odd)):
            places = to_device(chosen.nonzero().flatten(), rows.device)
            self.moments[half] = self.moments[half].merge(Moments.of(rows[places]))
        self.seen = True


def gather(by_tensor: Mapping[str, Mapping[Tie, Halves]], held_out: Tensor, op: WeightOp) -> None:
    """Add the inputs of a weight op to the moments of all its ties; `held_out` `[samples]` says to which half."""
    for tie, halves in by_tensor.get(op.tensor, {}).items():
        if tie.dim != op.axis or not op.input_positions or op.weight.is_complex():
            continue
        size = halves.size
        with concerning((tie.tensor, tie.dim)), torch.autocast(op.inputs.device.type, enabled=False):
            row = evenly(op.input_positions, max(1, CAP // (tie.repeat * op.groups)))
            features = op.input_rows(to_device(row, op.inputs.device)).detach()
            part = features[:, tie.start : tie.start + size * tie.repeat].reshape(len(features), size, tie.repeat)
            odd = held_out[row * len(held_out) // op.input_positions]
            halves.add(part.movedim(1, -1).reshape(-1, size), odd.repeat_interleave(op.groups * tie.repeat))

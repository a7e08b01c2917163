"""Streaming second moments of what each consumer of a width reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn

from evolvenet.errors import SpectrumError, TraceError
from evolvenet.graph import Tie, Width, WidthGraph
from evolvenet.inputs import arguments

CAP = 16_384
"""Most samples taken for one consumer from one batch; more positions are sampled evenly."""

GOLDEN = 0.6180339887498949
"""Multiples of the golden ratio, modulo 1, fall in step with no grid."""


@dataclass(frozen=True, eq=False)
class Moments:
    """How many samples were seen, their mean and their covariance.

    The covariance is kept, not the raw second moment: subtracting a large mean afterwards would lose the digits.

    Args:
        count: number of samples.
        mean: `[n]` float64.
        covariance: `[n, n]` float64, divided by `count`; about the mean.

    >>> moments = Moments.of(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
    >>> moments.mean.tolist(), moments.second[0, 0].item()
    ([2.0, 0.0], 5.0)
    """

    count: int
    mean: Tensor
    covariance: Tensor

    @property
    def second(self) -> Tensor:
        """The uncentred second moment E[x xᵀ], `[n, n]`."""
        return self.covariance + torch.outer(self.mean, self.mean)

    @classmethod
    def empty(cls, size: int) -> Moments:
        """No sample of `size` features seen yet."""
        return cls(0, torch.zeros(size, dtype=torch.float64), torch.zeros(size, size, dtype=torch.float64))

    @classmethod
    def of(cls, samples: Tensor) -> Moments:
        """The moments of samples `[N, n]` of any floating type and device; kept on the CPU.

        Products of float32 and the half types are made in float32 about the batch's mean, everything else is float64.
        """
        if not len(samples):
            return cls.empty(samples.shape[1])
        wide = samples if samples.dtype == torch.float64 else samples.float()
        centre = wide.mean(0)
        about = wide - centre
        covariance = (about.T @ about).to("cpu", torch.float64) / len(about)
        # What the rounding of the mean left over; exact for float64, worth seven digits for float32.
        rest = about.mean(0).to("cpu", torch.float64)
        return cls(len(about), centre.to("cpu", torch.float64) + rest, covariance - torch.outer(rest, rest))

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
        covariance = (
            (1 - share) * self.covariance + share * other.covariance + share * (1 - share) * torch.outer(apart, apart)
        )
        return Moments(count, self.mean + share * apart, covariance)


@dataclass(frozen=True, eq=False)
class Statistics(Mapping[Tie, Moments]):
    """The moments of what each consumer reads, `n` being the size of the width; {tie: moments}.

    Even and odd samples are kept apart, so that what is fitted on one half can be judged on the other.

    Args:
        even: moments of the samples 0, 2, 4 … of all batches one after the other.
        odd: those of the others, over the same ties.
    """

    even: Mapping[Tie, Moments]
    odd: Mapping[Tie, Moments]

    def __getitem__(self, tie: Tie) -> Moments:
        return self.even[tie].merge(self.odd[tie])

    def __iter__(self) -> Iterator[Tie]:
        return iter(self.even)

    def __len__(self) -> int:
        return len(self.even)


@singledispatch
def channel_axis(module: nn.Module) -> int | None:
    """The axis of the module's input, counted from the end, along which its weight's axis 1 reads; None if not known.

    A consumer of a type that is not registered is left out of the statistics.

    >>> channel_axis(nn.Conv2d(3, 8, 3)), channel_axis(nn.Conv2d(4, 8, 3, groups=2))
    (-3, None)
    """
    return None


@channel_axis.register
def _(module: nn.Linear) -> int | None:
    return -1


@channel_axis.register(nn.Conv1d)
@channel_axis.register(nn.Conv2d)
@channel_axis.register(nn.Conv3d)
def _(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> int | None:
    return -1 - len(module.kernel_size) if module.groups == 1 else None


def collect(model: nn.Module, graph: WidthGraph, batches: Iterable[Any]) -> Statistics:
    """Run the model on a few batches and gather the moments of what every consumer of a resizable width reads.

    Samples are those of the batch and all positions; a channel that a flatten spread over `repeat` places counts as
    `repeat` samples. More than `CAP` of them in a batch are sampled evenly, always the same ones. The model runs in
    eval mode without gradients; training flags, buffers and random states are afterwards as before.

    Args:
        model: the model of the graph.
        graph: its widths.
        batches: what the model is called with: a tensor, a tuple or list of arguments, a dict of keyword arguments.

    Returns:
        The moments of each consumer that is a dense or an ungrouped convolution layer and was run.

    Raises:
        TraceError: if there is no batch.
        SpectrumError: if a consumer reads NaN or infinite values.

    >>> from evolvenet.trace import trace
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> statistics = collect(model, trace(model, torch.zeros(1, 4)), [torch.randn(10, 4), torch.randn(6, 4)])
    >>> [(tie.tensor, moments.count, moments.mean.shape) for tie, moments in statistics.items()]
    [('2.weight', 16, torch.Size([8]))]
    """
    if isinstance(batches, Tensor):
        raise TraceError("Batches: expected an iterable of model inputs, got one tensor. Wrap it in a list: [inputs].")
    gathered = {tie: _Halves(width.size) for tie, width in _measured(model, graph)}
    seen = 0
    with quiet(model), ExitStack() as hooks:
        for module, ties in _by_module(model, gathered).items():
            hook = module.register_forward_pre_hook(_Reader(ties), with_kwargs=True)
            hooks.callback(hook.remove)
        for batch in batches:
            args, kwargs = arguments(batch)
            model(*args, **kwargs)
            seen += 1
    if not seen:
        raise TraceError("Batches: expected at least one batch of model inputs, got none.")
    run = {tie: halves for tie, halves in gathered.items() if halves.seen}
    for tie, halves in run.items():
        halves.check(tie)
    return Statistics({tie: h.moments[0] for tie, h in run.items()}, {tie: h.moments[1] for tie, h in run.items()})


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; on leaving, training flags, buffers and random states are as before.

    >>> model = nn.Dropout()
    >>> with quiet(model):
    ...     model.training
    False
    >>> model.training
    True
    """
    flags = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer._version, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        model.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=sorted(devices, key=str)):
            yield
    finally:
        for module, flag in flags:
            module.training = flag
        for module, name, buffer, version, value in buffers:
            module._buffers[name] = buffer
            # Written back only if it changed: a write would spoil a live autograd graph that saved the buffer.
            if buffer._version != version:
                with torch.no_grad():
                    buffer.copy_(value)


class _Halves:
    """Growing moments of one tie: even samples, odd samples, and how many samples came before."""

    def __init__(self, size: int) -> None:
        self.moments = [Moments.empty(size), Moments.empty(size)]
        self.seen = 0

    def add(self, rows: Tensor, sample: Tensor, samples: int) -> None:
        """Add rows `[N, n]`; `sample` `[N]` says which of the batch's `samples` each belongs to."""
        odd = (sample + self.seen) % 2 == 1
        for half, chosen in enumerate((~odd, odd)):
            self.moments[half] = self.moments[half].merge(Moments.of(rows[chosen]))
        self.seen += samples

    def check(self, tie: Tie) -> None:
        """Refuse NaN and infinite values."""
        if not all(half.covariance.isfinite().all() for half in self.moments):
            raise SpectrumError(
                f"{tie.module or 'The root module'}: expected finite inputs while measuring, got NaN or infinite ones. "
                "Training has diverged, or the batch holds such values: check both."
            )


class _Reader:
    """The forward pre-hook of one consumer module: its input goes into the moments of all its ties."""

    def __init__(self, ties: Mapping[Tie, _Halves]) -> None:
        self.ties = ties

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        axis = channel_axis(module)
        value: Any = args[0] if args else kwargs.get("input")
        if axis is None or not isinstance(value, Tensor):
            return
        # movedim is a view: only the chosen rows are ever copied.
        last = value.detach().movedim(axis, -1)
        lead = last.shape[:-1]
        if not lead.numel():
            return
        positions = lead[1:].numel()
        for tie, halves in self.ties.items():
            row = evenly(lead.numel(), max(1, CAP // tie.repeat)).to(last.device)
            features = last[torch.unravel_index(row, lead)] if lead else last[None]
            size = len(halves.moments[0].mean)
            part = features[:, tie.start : tie.start + size * tie.repeat].reshape(len(row), size, tie.repeat)
            samples = part.movedim(1, -1).reshape(-1, size)
            with torch.autocast(value.device.type, enabled=False):
                halves.add(samples, (row // positions).repeat_interleave(tie.repeat), lead[0] if lead else 1)


def evenly(count: int, cap: int) -> Tensor:
    """At most `cap` of `count` indices, one in each of equal parts, shifted so as not to fall in step with a grid."""
    if count <= cap:
        return torch.arange(count)
    edges = torch.arange(cap + 1) * count // cap
    shift = (torch.arange(cap, dtype=torch.float64) * GOLDEN) % 1
    return edges[:-1] + (shift * edges.diff()).long()


def _measured(model: nn.Module, graph: WidthGraph) -> Iterator[tuple[Tie, Width]]:
    """The consumer ties that statistics can be gathered for, each with its width."""
    for width in graph.resizable:
        for tie in width.consumers:
            if tie.dim == 1 and channel_axis(model.get_submodule(tie.module)) is not None:
                yield tie, width


def _by_module(model: nn.Module, gathered: Mapping[Tie, _Halves]) -> dict[nn.Module, dict[Tie, _Halves]]:
    found: dict[nn.Module, dict[Tie, _Halves]] = {}
    for tie, halves in gathered.items():
        found.setdefault(model.get_submodule(tie.module), {})[tie] = halves
    return found

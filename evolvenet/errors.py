"""All errors that EvolveNet raises. Each message states what was expected, what was got, where, and the remedy.

`stage` marks the steps of an event, so that whatever fails in one carries its name, and its seconds can be told.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch


class EvolveNetError(Exception):
    """Base of every error that EvolveNet raises on purpose."""


class IndexMapError(EvolveNetError, ValueError):
    """An index map is malformed, or does not fit the size that it is applied to."""


class TraceError(EvolveNetError, RuntimeError):
    """The model could not be run on the example inputs, or nothing in it can be resized."""


class OutputNameError(TraceError):
    """There is no output of a name that was given, or it holds no tensor; the message lists the names."""


class CollectiveError(TraceError):
    """The model's code, or that of its loss, exchanges tensors between processes, where one of them runs it alone."""


class ResizeError(EvolveNetError, ValueError):
    """A requested width does not exist, is frozen, or cannot take the requested size."""


class FactorizationError(EvolveNetError, ValueError):
    """A layer cannot be factorized as requested, or the request is malformed."""


class DistillationError(EvolveNetError, ValueError):
    """Outputs of a teacher do not fit the samples or the network, or there is nothing to train."""


class PolicyError(EvolveNetError, ValueError):
    """A policy was configured with values outside their range."""


class SpectrumError(EvolveNetError, ValueError):
    """A weight has no spectrum: it holds NaN or infinite entries, or has a shape without a matrix form."""


class OptimizerStateError(EvolveNetError, RuntimeError):
    """An optimizer's state does not fit its parameters, before or after a resize."""


class RecordError(EvolveNetError, RuntimeError):
    """A checkpoint does not belong to this model."""


class UnsupportedStrategyError(EvolveNetError, RuntimeError):
    """The trainer's strategy shards parameters, so widths cannot change under it."""


class ValidationError(EvolveNetError, RuntimeError):
    """A model failed a check after a change of its widths; the change was undone."""


class OutputError(ValidationError):
    """A model does not run after a change of its widths, or its outputs are wrong: which width is at fault is not known."""


class SkippedEvent(EvolveNetError, RuntimeError):  # noqa: N818  no error: the event is put off
    """An event cannot be measured (NaN weights, too few samples): it is skipped, a later one may succeed."""


class RankMismatchError(EvolveNetError, RuntimeError):
    """The processes of a run have different models. Always raised: going on, they would train different networks."""


class MissingPackageError(EvolveNetError, ImportError):
    """An optional package that a part of EvolveNet builds on is not installed."""


def error_of_rank(rank: int, message: str) -> EvolveNetError:
    """The error for what another rank has raised, of the same class if that is one of these.

    Args:
        rank: the number of that process.
        message: "name of the class: text".

    >>> error_of_rank(1, "TraceError: no")
    TraceError('rank 1: TraceError: no')
    """
    kind = globals().get(message.partition(":")[0])
    known = kind if isinstance(kind, type) and issubclass(kind, EvolveNetError) else EvolveNetError
    return known(f"rank {rank}: {message}")


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Tag an exception that leaves the body with the name of this stage; of nested stages the innermost names it.

    >>> try:
    ...     with stage("validation"), stage("forward pass"):
    ...         1 / 0
    ... except ZeroDivisionError as error:
    ...     stage_of(error)
    'forward pass'
    """
    times, started = _times.get(), time.perf_counter()
    if times is not None:
        times.inner.append(0.0)
    try:
        stage_boundary(name, entering=True)
        yield
        stage_boundary(name, entering=False)
    except BaseException as error:
        if stage_of(error) is None:
            error._evolvenet_stage = name  # type: ignore[attr-defined]
        raise
    finally:
        if times is not None:
            times.add(name, time.perf_counter() - started)


@dataclass
class StageTimes:
    """The seconds of each stage, without those of stages inside of it.

    Args:
        seconds: {stage: seconds}.
        inner: of every stage that is running, the outermost first, the seconds of stages inside of it that have ended.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    inner: list[float] = field(default_factory=list)

    def add(self, name: str, seconds: float) -> None:
        """A stage has ended after so many seconds, those of stages inside of it included."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds - self.inner.pop()
        if self.inner:
            self.inner[-1] += seconds


_times: ContextVar[StageTimes | None] = ContextVar("stage times", default=None)


@contextmanager
def stage_times() -> Iterator[dict[str, float]]:
    """Measures the stages in the body: {stage: seconds}, complete when it is left.

    >>> with stage_times() as seconds:
    ...     with stage("validation"), stage("forward pass"):
    ...         pass
    >>> list(seconds)
    ['forward pass', 'validation']
    """
    times = StageTimes()
    token = _times.set(times)
    try:
        yield times.seconds
    finally:
        _times.reset(token)


Place = str | tuple[str, int]
"""A width or a tensor by name, or an axis of a tensor."""


@contextmanager
def concerning(*places: Place) -> Iterator[None]:
    """Tag an exception that leaves the body with what was worked on; of nested ones the innermost tags it.

    >>> try:
    ...     with concerning("fc1"):
    ...         1 / 0
    ... except ZeroDivisionError as error:
    ...     places_of(error)
    ('fc1',)
    """
    try:
        yield
    except Exception as error:
        if not places_of(error):
            error._evolvenet_places = places  # type: ignore[attr-defined]
        raise


def places_of(error: BaseException) -> tuple[Place, ...]:
    """What was worked on when an exception was raised, as far as that is known."""
    return getattr(error, "_evolvenet_places", ())


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether memory ran out: here or on another rank, or as the cause of an error.

    That says nothing about a network: an event is put off, and nothing is concluded from it.

    >>> is_out_of_memory(RuntimeError("CUDA error: out of memory")), is_out_of_memory(RuntimeError("boom"))
    (True, False)
    """
    while error is not None:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            return True
        said = str(error).lower() if isinstance(error, (RuntimeError, EvolveNetError)) else ""
        # The last two are the CPU allocator's.
        words = ("out of memory", "outofmemoryerror", "not enough memory: you tried", "allocate memory: you tried")
        if any(each in said for each in words):
            return True
        error = error.__cause__
    return False


@contextmanager
def memory_for_tracing() -> Iterator[None]:
    """Memory that runs out in the body raises a TraceError, which says so."""
    try:
        yield
    except Exception as error:
        if isinstance(error, TraceError) or not is_out_of_memory(error):
            raise
        raise TraceError(
            f"Tracing: expected memory for a few runs of a copy of the model, got {type(error).__name__}: {error}. Give fewer "
            "or smaller example inputs, or trace the model on the CPU, before it is moved to the device, and pass the graph."
        ) from error


def stage_boundary(name: str, entering: bool) -> None:
    """Called where a stage begins and where it has ended. It does nothing; tests replace it, so that a stage fails there."""


def stage_of(error: BaseException) -> str | None:
    """The stage in which an exception was raised, None if it was raised outside of all stages."""
    return getattr(error, "_evolvenet_stage", None)

"""Modules observed on batches: which of them return their input, or next to nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from evolvenet._compat.torch import version_of
from evolvenet.execution.isolation import isolated
from evolvenet.execution.step import run_model
from evolvenet.execution.surroundings import plain_surroundings
from evolvenet.linalg.precision import in_float64
from evolvenet.surgery.module_replacement import Replacement


@dataclass
class Observed:
    """What a module returned, summed over all batches.

    Args:
        argument: place or name of its first tensor among the arguments.
        outputs: see `RemovedBlock`.
        calls: in all batches.
        change: Σ‖y − x‖².
        energy: Σ‖y‖².
        shape: of the last output.
    """

    argument: int | str
    outputs: int
    calls: int = 0
    change: float = 0.0
    energy: float = 0.0
    shape: tuple[int, ...] = ()


def observe_blocks(model: nn.Module, inputs: Sequence[Any]) -> dict[str, Observed]:
    """{path: what it returned} of each module with parameters that returns a tensor of its input's shape, once a batch."""
    found: dict[str, Observed] = {}
    # Hooks that are there before would find what they have written taken back.
    with plain_surroundings(), isolated(model), _hooks(model, found):
        for batch in inputs:
            run_model(model, batch)
    return {path: each for path, each in found.items() if each.calls == len(inputs)}


@contextmanager
def _hooks(model: nn.Module, found: dict[str, Observed]) -> Iterator[None]:
    versions: dict[str, int | None] = {}
    observed = [
        (path, module)
        for path, module in model.named_modules()
        if path and not isinstance(module, Replacement) and any(True for _ in module.parameters())
    ]
    handles = [
        handle
        for path, module in observed
        for handle in (
            module.register_forward_pre_hook(partial(_note_version, versions, path), with_kwargs=True),
            module.register_forward_hook(partial(_observe, found, versions, path), with_kwargs=True),
        )
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _given(args: Any, kwargs: Mapping[str, Any]) -> tuple[int | str, Tensor] | None:
    """Place or name of the first tensor among the arguments, and the tensor."""
    return next(((key, each) for key, each in (*enumerate(args), *kwargs.items()) if isinstance(each, Tensor)), None)


def _version(tensor: Tensor) -> int | None:
    """None for a tensor made under inference mode: it does not count, and cannot be written to outside of that mode."""
    return None if tensor.is_inference() else version_of(tensor)


def _note_version(versions: dict[str, int | None], path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
    given = _given(args, kwargs)
    versions[path] = None if given is None else _version(given[1])


def _observe(
    found: dict[str, Observed],
    versions: Mapping[str, int | None],
    path: str,
    module: nn.Module,
    args: Any,
    kwargs: Mapping[str, Any],
    result: Any,
) -> None:
    given = _given(args, kwargs)
    several = isinstance(result, tuple) and bool(result) and all(each is None for each in result[1:])
    main = result[0] if several else result
    if given is None or not isinstance(main, Tensor) or not main.is_floating_point():
        return
    if versions[path] != _version(given[1]):
        # It has written to its input, which is not what it was given any more.
        return
    argument, x = given
    if x.shape != main.shape or x.dtype != main.dtype:
        return
    entry = found.setdefault(path, Observed(argument, len(result) if several else 0))
    entry.calls += 1
    entry.change += float(in_float64(main - x).square().sum())
    entry.energy += float(in_float64(main).square().sum())
    entry.shape = tuple(main.shape)

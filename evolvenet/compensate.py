"""Sequential compensation: after a cut every reader is fitted, in execution order, to what it used to answer.

A reader that is fitted to the units it has lost knows nothing of what the readers before it still get wrong. Here each
one is fitted on the inputs that it now really gets, errors from before included, against its original outputs: one
forward pass of the uncut model that remembers outputs, one of the cut model that stops at every reader and fits it.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from evolvenet.components import named_tensors
from evolvenet.graph import WidthGraph
from evolvenet.inputs import arguments, first_samples
from evolvenet.prune import is_own
from evolvenet.sandbox import sandbox
from evolvenet.statistics import channel_axis, evenly, quiet
from evolvenet.surgery import Surgery, TensorChange, compile_surgery, install

SAMPLES = 1024
"""Most samples of the batches that are used; a thousand images were enough on MNIST."""

ENTRIES = 8_000_000
"""Most entries of the inputs that are used: all run in one pass, and a thousand photographs would not fit in memory."""

ROWS = 8192
"""Most places (samples × positions) that one reader is fitted on."""

RIDGES = (1e-6, 1e-4, 1e-2, 1e-1, 1.0)
"""Pulls towards the weights as cut, relative to the mean energy of an input."""


@dataclass(frozen=True, eq=False)
class Places:
    """Where a reader's outputs are compared.

    Args:
        sample: `[rows]` number of the sample of each row.
        position: `[rows]` number of its place among the sample's output places.
    """

    sample: Tensor
    position: Tensor

    @classmethod
    def spread(cls, samples: int, positions: int) -> Places:
        """At most `ROWS` places, evenly over all samples and positions; always the same."""
        row = evenly(samples * positions, ROWS)
        return cls(row // positions, row % positions)


@dataclass(frozen=True, eq=False)
class Remembered:
    """What a reader of the uncut model answers: `outputs` `[rows, out]` at `places`."""

    places: Places
    outputs: Tensor


@singledispatch
def reads(module: nn.Module, x: Tensor, places: Places) -> Tensor | None:
    """The rows `[rows, columns]` of the matrix that the module multiplies its weight with, at the places asked for.

    None for a type that is not registered, or an input or a setting that is not understood: that reader stays as cut.
    """
    return None


@reads.register
def _(module: nn.Linear, x: Tensor, places: Places) -> Tensor | None:
    if x.dim() < 2:
        return None
    return x.flatten(1, -2)[places.sample, places.position] if x.dim() > 2 else x[places.sample]


@reads.register(nn.Conv1d)
@reads.register(nn.Conv2d)
@reads.register(nn.Conv3d)
def _(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor, places: Places) -> Tensor | None:
    space = len(module.kernel_size)
    if module.groups != 1 or x.dim() != space + 2 or module.padding_mode != "zeros" or isinstance(module.padding, str):
        return None
    padded = nn.functional.pad(x, [amount for side in reversed(module.padding) for amount in (side, side)]).contiguous()
    extents = list(zip(padded.shape[2:], module.kernel_size, module.stride, module.dilation, strict=True))
    counts = [(size - dilation * (kernel - 1) - 1) // stride + 1 for size, kernel, stride, dilation in extents]
    steps = padded.stride()
    # A view with the kernel's places as axes of their own: only the chosen patches are ever copied.
    patches = padded.as_strided(
        (len(x), x.shape[1], *counts, *module.kernel_size),
        (
            *steps[:2],
            *(step * stride for step, (_, _, stride, _) in zip(steps[2:], extents, strict=True)),
            *(step * dilation for step, (_, _, _, dilation) in zip(steps[2:], extents, strict=True)),
        ),
    )
    at = torch.unravel_index(places.position, counts)
    return patches.movedim(1, 1 + space)[(places.sample, *at)].flatten(1)


def outputs_first(module: nn.Module, y: Tensor) -> Tensor:
    """The output of a module that `reads` knows as `[samples, positions, out]`."""
    axis = channel_axis(module)
    assert axis is not None, f"{type(module).__name__} has no channel axis"
    last = y.movedim(axis, -1)
    return last.flatten(1, -2) if last.dim() > 2 else last[:, None]


def compensate(model: nn.Module, graph: WidthGraph, surgery: Surgery, batches: Iterable[Any]) -> Surgery:
    """The surgery with every reader of a cut width fitted to its original outputs. Nothing is changed yet.

    Dense and ungrouped convolution layers that run once in a forward pass and whose weight no other module uses; their
    weights are fitted by ridge least squares towards what the surgery holds, the bias takes the mean. What it holds is
    the fit of `plan_prune`, exact where units depend on each other, and all that other readers get. One half of the
    samples chooses the ridge that was fitted on the other half; a reader for which none beats the weights as they are
    keeps them.

    Args:
        model: the model, uncut.
        graph: its widths.
        surgery: what is going to be done to it.
        batches: inputs of the model; at most `SAMPLES` samples and `ENTRIES` entries of them are used, in one pass.

    Returns:
        The surgery with other values for the readers' weights and biases.

    >>> from evolvenet.index_map import IndexMap
    >>> from evolvenet.trace import trace
    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    >>> model[0].weight.data = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    >>> graph = trace(model, torch.zeros(1, 2))
    >>> cut = compile_surgery(model, graph, {"0": IndexMap.keep([0], size=2)})
    >>> x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    >>> fitted = compensate(model, graph, cut, [x])
    >>> undo, before = install(model, fitted), model(x)
    >>> undo()
    >>> bool((before - model(x)).abs().max() < 1e-3)
    True
    """
    batch = _joined(batches)
    readers = _readers(model, graph, surgery)
    if batch is None or not readers:
        return surgery
    args, kwargs = arguments(batch)
    remembered = _remember(model, readers, args, kwargs)
    fitted: dict[str, Tensor] = {}
    by_name = {change.name: change for change in surgery.changes}
    with sandbox(model, None):
        install(model, compile_surgery(model, graph, surgery.maps))
        shadows, _, _ = named_tensors(model)
        with torch.no_grad():
            for name, change in by_name.items():
                shadows[name].copy_(change.value)
        with quiet(model), ExitStack() as hooks:
            for path in remembered:
                fit = _Fit(path, remembered[path], by_name.get(_inside(path, "weight")), fitted)
                hook = model.get_submodule(path).register_forward_pre_hook(fit, with_kwargs=True)
                hooks.callback(hook.remove)
            model(*args, **kwargs)
    for name, value in fitted.items():
        tensor = model.get_parameter(name)
        change = by_name.get(name) or TensorChange(tensor, name, {}, tensor.detach())
        by_name[name] = replace(change, value=value.to(tensor.device, tensor.dtype))
    return replace(surgery, changes=tuple(by_name.values()))


def _readers(model: nn.Module, graph: WidthGraph, surgery: Surgery) -> list[str]:
    """Paths of the modules that read a cut width and can be fitted: nobody else uses their weight and bias."""
    ties = [
        tie for name, index_map in surgery.maps.items() if index_map.removed for tie in graph.widths[name].consumers
    ]
    found = []
    for path in dict.fromkeys(tie.module for tie in ties):
        module = model.get_submodule(path)
        known = reads.dispatch(type(module)) is not reads.dispatch(object)
        held = [_inside(path, name) for name, tensor in module._parameters.items() if tensor is not None]
        if known and {"weight"} <= module._parameters.keys() <= {"weight", "bias"}:
            found += [path] if all(is_own(graph, name) for name in held) else []
    return found


def _inside(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _remember(model: nn.Module, readers: list[str], args: Any, kwargs: Any) -> dict[str, Remembered]:
    """What the readers that run exactly once answer."""
    found: dict[str, Remembered] = {}
    calls: dict[str, int] = dict.fromkeys(readers, 0)

    def hook_for(path: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            calls[path] += 1
            if not isinstance(output, Tensor) or output.dim() < 2:
                return
            rows = outputs_first(module, output)
            places = Places.spread(*rows.shape[:2])
            found[path] = Remembered(places, rows[places.sample, places.position].clone())

        return hook

    with quiet(model), ExitStack() as hooks:
        for path in readers:
            hooks.callback(model.get_submodule(path).register_forward_hook(hook_for(path)).remove)
        model(*args, **kwargs)
    return {path: kept for path, kept in found.items() if calls[path] == 1}


class _Fit:
    """The forward pre-hook of one reader of the cut model: fits its weight before it runs."""

    def __init__(self, path: str, goal: Remembered, change: TensorChange | None, fitted: dict[str, Tensor]) -> None:
        self.path = path
        self.goal = goal
        self.change = change
        self.fitted = fitted

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        value: Any = args[0] if args else kwargs.get("input")
        inputs = reads(module, value, self.goal.places) if isinstance(value, Tensor) else None
        if inputs is None:
            return
        weight, bias = module.get_parameter("weight"), module._parameters.get("bias")
        kept = self.change.axes.get(0) if self.change else None
        wanted = self.goal.outputs if kept is None else self.goal.outputs[:, list(kept.indices)]
        made = fit_reader(
            _exact(inputs),
            _exact(wanted),
            _exact(weight.detach()).flatten(1),
            None if bias is None else _exact(bias.detach()),
            self.goal.places.sample % 2 == 1,
        )
        if made is None:
            return
        with torch.no_grad():
            weight.copy_(made[0].reshape(weight.shape))
            self.fitted[_inside(self.path, "weight")] = weight.detach().clone()
            if bias is not None:
                bias.copy_(made[1])
                self.fitted[_inside(self.path, "bias")] = bias.detach().clone()


def _exact(tensor: Tensor) -> Tensor:
    """In float64; on the CPU where the device has none (MPS)."""
    return tensor.to("cpu", torch.float64) if tensor.device.type == "mps" else tensor.double()


def fit_reader(
    inputs: Tensor, wanted: Tensor, weight: Tensor, bias: Tensor | None, odd: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Weights nearer to what is wanted, or None if none of the ridges does better on samples that it has not seen.

    Minimises ‖X·Wᵀ + b − Y‖² + λ‖W − W₀‖²; λ is chosen on the odd rows after a fit on the even ones, then the fit is made
    on all.

    Args:
        inputs: X, `[rows, columns]` float64.
        wanted: Y, `[rows, out]`.
        weight: W₀, `[out, columns]`.
        bias: `[out]`, or None where there is none: then the fit goes through zero.
        odd: `[rows]` booleans, the half to judge on.

    Returns:
        (weight `[out, columns]`, bias `[out]`), or None.

    >>> x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> y = x @ torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64) + 4
    >>> zeros = torch.zeros(1, 3, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    >>> weight, bias = fit_reader(x, y, *zeros, odd=torch.arange(40) % 2 == 1)
    >>> weight.round(decimals=2).tolist(), round(bias.item(), 2)
    ([[1.0, 2.0, 3.0]], 4.0)
    """
    start = weight.new_zeros(len(weight)) if bias is None else bias
    missing = wanted - inputs @ weight.T - start
    if not bool(missing.isfinite().all()) or not bool((~odd).any()) or not bool(odd.any()):
        return None
    even_half, odd_half = (_Sums.of(inputs[half], missing[half]) for half in (~odd, odd))
    best, chosen = odd_half.rest, None
    for ridge in RIDGES:
        made = even_half.solve(ridge, centred=bias is not None)
        error = odd_half.error(*made) if made else best
        if error < best:
            best, chosen = error, ridge
    if chosen is None:
        return None
    made = (even_half + odd_half).solve(chosen, centred=bias is not None)
    return None if made is None else (weight + made[0], start + made[1])


@dataclass(frozen=True, eq=False)
class _Sums:
    """What a least-squares problem X·Sᵀ + o ≈ R needs: sums over rows, so that the halves add up to the whole."""

    count: int
    inputs: Tensor
    missing: Tensor
    gram: Tensor
    cross: Tensor
    rest: float

    @classmethod
    def of(cls, inputs: Tensor, missing: Tensor) -> _Sums:
        gram, cross = inputs.T @ inputs, inputs.T @ missing
        return cls(len(inputs), inputs.sum(0), missing.sum(0), gram, cross, float(missing.square().sum()))

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(
            self.count + other.count,
            self.inputs + other.inputs,
            self.missing + other.missing,
            self.gram + other.gram,
            self.cross + other.cross,
            self.rest + other.rest,
        )

    def solve(self, ridge: float, *, centred: bool) -> tuple[Tensor, Tensor] | None:
        """(step `[out, columns]`, offset `[out]`), or None if the ridge is too small for the rounding."""
        middle, level = self.inputs / self.count, self.missing / self.count
        gram, cross = self.gram, self.cross
        if centred:
            gram = gram - self.count * torch.outer(middle, middle)
            cross = cross - self.count * torch.outer(middle, level)
        energy = gram.diagonal().mean()
        if not energy > 0:
            return None
        shifted = gram.clone()
        shifted.diagonal().add_(ridge * energy)
        factor, failed = torch.linalg.cholesky_ex(shifted)
        if failed:
            return None
        step = torch.cholesky_solve(cross, factor).T
        return step, (level - step @ middle) if centred else torch.zeros_like(level)

    def error(self, step: Tensor, offset: Tensor) -> float:
        """‖R − X·stepᵀ − offset‖² over the rows."""
        made = step @ self.gram
        fitted = (made * step).sum() + self.count * offset @ offset + 2 * offset @ (step @ self.inputs)
        return self.rest + float(fitted - 2 * (step * self.cross.T).sum() - 2 * offset @ self.missing)


def _joined(batches: Iterable[Any]) -> Any:
    """The batches as one, or the first alone where their leaves cannot be put together; no more than is to be used."""
    made = list(batches)
    if not made:
        return None
    flat = [tree_flatten(batch) for batch in made]
    leaves = [each[0] for each in flat]
    sizes = [{len(leaf) for leaf in each if isinstance(leaf, Tensor) and leaf.dim()} for each in leaves]
    alike = all(
        len(size) == 1 and len(each) == len(leaves[0]) and all(isinstance(leaf, Tensor) and leaf.dim() for leaf in each)
        for size, each in zip(sizes, leaves, strict=True)
    )
    shapes = [[leaf.shape[1:] for leaf in each] for each in leaves] if alike else []
    if not alike or any(shape != shapes[0] for shape in shapes):
        return _few(made[0])
    return _few(tree_unflatten([torch.cat(parts) for parts in zip(*leaves, strict=True)], flat[0][1]))


def _few(batch: Any) -> Any:
    """As many samples as fit the limits."""
    sizes = [
        leaf[0].numel() for leaf in tree_flatten(batch)[0] if isinstance(leaf, Tensor) and leaf.dim() and len(leaf)
    ]
    return first_samples(batch, max(2, min(SAMPLES, ENTRIES // max([1, *sizes]))))

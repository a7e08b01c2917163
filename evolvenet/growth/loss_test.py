"""A test whether new units would lower the loss: their step is computed on even samples and tested on odd ones."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from evolvenet.errors import concerning, is_out_of_memory
from evolvenet.execution.inputs import first_samples
from evolvenet.execution.step import network_outputs
from evolvenet.graph.index_map import IndexMap
from evolvenet.graph.width_graph import CONSUMES, PRODUCES, Width, WidthGraph
from evolvenet.growth.expanded_model import Growth, expanded, finite
from evolvenet.growth.initializers import METHODS
from evolvenet.linalg.precision import in_float64
from evolvenet.surgery.resize_model import compile_surgery


@dataclass(frozen=True)
class Evidence:
    """The result of the test for one width.

    Args:
        share: of the squared norm of the loss's gradient at the outputs, the part that the new units follow and the
            present columns do not, 0 … 1.
        t_statistic: mean over the samples of what they follow, in standard errors (Student's t); 0 or less where the
            new units do not lower the loss.
    """

    share: float
    t_statistic: float


log = logging.getLogger("evolvenet")

Gradients = Sequence[Tensor | None]
"""Of the loss, for the first samples of each tensor in the model's output; None for tensors without one."""

Step = dict[str, Tensor]
"""{tensor: what is added to it}."""

STEP = 1e-2
"""Norm of the step whose effect on the outputs is compared, as a share of the norm of the weights."""

ROUNDING = 1e-9
"""Share of the new units' squared effect below which its part orthogonal to that of the present columns is rounding."""


def evidence(
    model: nn.Module,
    graph: WidthGraph,
    sizes: Mapping[str, int],
    batches: Sequence[Any],
    gradients: Sequence[Gradients],
    generator: torch.Generator | None = None,
) -> dict[str, Evidence]:
    """Test for each width whether growing it, alone, to a size would lower the loss.

    The new units' rows are those of `grow`'s "orthogonal"; for a width that a norm mixes, whose new units start with columns
    of their own, read row for column. The step of their fan-out, which is 0, is minus its gradient on
    the even samples; the change of the outputs on the odd samples is compared with minus the loss's gradient there. The
    part that a gradient step of the present columns explains is projected out of both. That is the expressivity bottleneck
    of Verbockhaven, Rudkiewicz, Charpiat and Chevallier, "Growing tiny networks: spotting expressivity bottlenecks and
    fixing them optimally", TMLR 2024, with gradient steps for exact updates. The share is of the squared norm, so the
    scale of the loss has no effect.

    Args:
        model: the model of the graph.
        graph: its widths.
        sizes: {width: new size}, above the present ones.
        batches: model inputs.
        gradients: of the loss at the outputs for each of them, from the training step; batches without any are left out.
        generator: of the new units' rows, a CPU generator; None for PyTorch's global one.

    Returns:
        {width: result}; {} if the test cannot be made: without gradients, or if the model's output in eval mode has another
        structure than in training, or no backward pass.

    Raises:
        SpectrumError: for NaN or infinite weights or gradients.
        ResizeError: as `grow`.

    >>> from evolvenet.tracing.trace import trace
    >>> _ = torch.manual_seed(0)
    >>> model, inputs = nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 2)), torch.randn(512, 4)
    >>> gradient = model(inputs).detach() - inputs[:, :2].abs()  # the gradient of half the squared error
    >>> found = evidence(model, trace(model, inputs), {"0": 8}, [inputs], [[gradient]])["0"]
    >>> found.share > 0.1, found.t_statistic > 3
    (True, True)
    """
    known = [
        (first_samples(inputs, _samples(each)), each)
        for inputs, each in zip(batches, gradients, strict=True)
        if is_known(each)
    ]
    if not known:
        return {}
    maps = {
        name: IndexMap.grow(graph.widths[name].size, size - graph.widths[name].size) for name, size in sizes.items()
    }
    growth = Growth(model, graph, compile_surgery(model, graph, maps), generator)
    start = METHODS["orthogonal"](growth)
    with expanded(growth, start) as shadows:
        found = _LossTest(growth, dict(shadows), known)
        try:
            return found.found() if found.fits() else {}
        except RuntimeError as problem:
            if is_out_of_memory(problem):
                raise  # Without a test widths would grow by their spectra alone.
            # Autograd's: the network trains, but has no backward pass as it is run here.
            log.debug("No loss test of new units: %s", problem)
            return {}


def is_known(gradients: Gradients) -> bool:
    """Whether there are any, all finite, for two samples at least: loss scaling may have overflowed."""
    found = [each for each in gradients if each is not None]
    return _samples(gradients) > 1 and all(bool(each.isfinite().all()) for each in found)


def _samples(gradients: Gradients) -> int:
    return min((len(each) for each in gradients if each is not None), default=0)


class _LossTest:
    """The expanded model, the fan-out of its new units 0, on batches with gradients."""

    def __init__(self, growth: Growth, shadows: dict[str, Tensor], known: Sequence[tuple[Any, Gradients]]) -> None:
        self.growth, self.shadows, self.known = growth, shadows, known
        self.widths = (*growth.widths, *growth.mixed_widths)
        # Under a norm new units have columns at once, and it is their rows that move them first.
        self.first_moved = {width.name: growth.matrices(width, CONSUMES) for width in growth.widths}
        self.first_moved |= {width.name: growth.matrices(width, PRODUCES) for width in growth.mixed_widths}
        self.slots = {tie: growth.slot(tie, width) for width in self.widths for tie in self.first_moved[width.name]}

    def fits(self) -> bool:
        """Whether the gradients have the shapes of the model's outputs."""
        with torch.no_grad():
            return all(_shapes_match(self._outputs(inputs), each) for inputs, each in self.known)

    def found(self) -> dict[str, Evidence]:
        """{width: result}."""
        steps = self._steps()
        with torch.no_grad():
            before = [self._outputs(inputs) for inputs, _ in self.known]
            found: dict[str, Evidence] = {}
            for name, step in steps.items():
                with concerning(name):
                    found[name] = self._of(before, *step)
            return found

    def _steps(self) -> dict[str, tuple[Step, Step]]:
        """{width: (step of the new columns, step of the present ones)}, from the even samples."""
        names = list(dict.fromkeys(tie.tensor for tie in self.slots))
        tensors = [self.shadows[name].requires_grad_() for name in names]
        totals = [torch.zeros_like(tensor) for tensor in tensors]
        for inputs, gradients in self.known:
            pairs = _pairs(self._outputs(inputs), gradients)
            value = torch.stack([(output[::2] * each[::2]).sum() for output, each in pairs]).sum()
            made = torch.autograd.grad(value, tensors, allow_unused=True)
            for total, gradient, name in zip(totals, made, names, strict=True):
                if gradient is not None:
                    total += finite(gradient, name)
        for tensor in tensors:
            tensor.requires_grad_(False)
        by_name = dict(zip(names, totals, strict=True))
        return {width.name: self._split(width, by_name) for width in self.widths}

    def _split(self, width: Width, gradients: Mapping[str, Tensor]) -> tuple[Step, Step]:
        """Minus the gradient, for the columns (under a norm: the rows) of the new units and of the present ones."""
        names = {tie.tensor for tie in self.first_moved[width.name]}
        new = {name: torch.zeros_like(gradients[name]) for name in names}
        for tie in self.first_moved[width.name]:
            self.slots[tie].put(new[tie.tensor], -self.slots[tie].take(gradients[tie.tensor]))
        return self._sized(new), self._sized({name: -gradients[name] - new[name] for name in names})

    def _sized(self, step: Step) -> Step:
        """The step scaled to the norm that `STEP` prescribes."""
        length = torch.stack([each.norm() for each in step.values()]).norm()
        weights = torch.stack([self.shadows[name].norm() for name in step]).norm()
        return {name: each * (STEP * weights / length) for name, each in step.items()} if length > 0 else step

    def _of(self, before: Sequence[Sequence[Tensor]], new: Step, old: Step) -> Evidence:
        found: list[Tensor] = []
        for (inputs, gradients), outputs in zip(self.known, before, strict=True):
            with self._moved(new):
                by_new = self._outputs(inputs)
            with self._moved(old):
                by_old = self._outputs(inputs)
            descent = [None if g is None else -g for g in gradients]
            parts = zip(_pairs(outputs, descent), _pairs(by_new, descent), _pairs(by_old, descent), strict=True)
            rows = [_products(here, one, other, down) for (here, down), (one, _), (other, _) in parts]
            found.append(torch.stack(rows).sum(0))
        return _compared(torch.cat(found))

    @contextmanager
    def _moved(self, steps: Step) -> Iterator[None]:
        before = {name: self.shadows[name].clone() for name in steps}
        for name, step in steps.items():
            self.shadows[name] += step
        yield
        for name, value in before.items():
            self.shadows[name].copy_(value)

    def _outputs(self, inputs: Any) -> list[Tensor]:
        with torch.set_grad_enabled(torch.is_grad_enabled() or self.growth.graph.differentiates):
            return network_outputs(self.growth.model, inputs)


def _shapes_match(outputs: Sequence[Tensor], gradients: Gradients) -> bool:
    return len(outputs) == len(gradients) and all(
        each is None or (output.dim() > 0 and each.shape[1:] == output.shape[1:])
        for output, each in zip(outputs, gradients, strict=True)
    )


def _pairs(outputs: Sequence[Tensor], gradients: Gradients) -> list[tuple[Tensor, Tensor]]:
    """(output, gradient) of each output tensor that has one, `[samples, numbers]`, cut to the samples of all."""
    known = [(output, each) for output, each in zip(outputs, gradients, strict=True) if each is not None]
    count = min(min(len(output), len(each)) for output, each in known)
    return [(one[:count].reshape(count, -1), two[:count].reshape(count, -1).to(one)) for one, two in known]


def _products(before: Tensor, by_new: Tensor, by_old: Tensor, descent: Tensor) -> Tensor:
    """⟨g, n⟩, ⟨g, o⟩, ⟨n, o⟩, ⟨n, n⟩, ⟨o, o⟩, ⟨g, g⟩ of each odd sample, `[samples / 2, 6]`.

    g is minus the loss's gradient, n the change of the outputs by the new columns' step, o by that of the present ones.
    """
    g, n, o = (in_float64(each[1::2]) for each in (descent, by_new - before, by_old - before))
    pairs = ((g, n), (g, o), (n, o), (n, n), (o, o), (g, g))
    return torch.stack([(one * two).sum(1) for one, two in pairs], dim=1)


def _compared(rows: Tensor) -> Evidence:
    """The share of g along n, both after the projection of o out of n and g, and its t-statistic."""
    _, with_old, shared, energy, old, whole = rows.sum(0).tolist()
    alike, known = (shared / old, with_old / old) if old > 0 else (0.0, 0.0)
    samples = rows[:, 0] - alike * rows[:, 1] - known * (rows[:, 2] - alike * rows[:, 4])
    along, left = float(samples.sum()), energy - alike * shared
    if along <= 0 or left <= ROUNDING * energy or whole <= 0:
        return Evidence(0.0, min(0.0, _t_statistic(samples)))
    return Evidence(min(1.0, along**2 / left / whole), _t_statistic(samples))


def _t_statistic(samples: Tensor) -> float:
    if len(samples) < 2:
        return 0.0
    error = float(samples.std()) / math.sqrt(len(samples))
    return float(samples.mean()) / error if error > 0 else 0.0

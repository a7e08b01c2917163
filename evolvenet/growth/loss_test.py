"""Whether the loss asks for new units: what they could do about it, on samples that did not choose how."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from evolvenet.execution.inputs import first_samples
from evolvenet.execution.step import network_outputs
from evolvenet.graph.index_map import IndexMap
from evolvenet.graph.width_graph import CONSUMES, Width, WidthGraph
from evolvenet.growth.expanded_model import Growth, finite, trial
from evolvenet.growth.initializers import METHODS
from evolvenet.surgery.resize_model import compile_surgery


@dataclass(frozen=True)
class Evidence:
    """What new units of one width could do about the loss.

    Args:
        share: of the loss's gradient at the outputs, the part that they can follow and that the columns which are there
            cannot, 0 … 1.
        certainty: the mean over the samples in standard errors (Student's t); 0 or less where they do not help.
    """

    share: float
    t_statistic: float


log = logging.getLogger("evolvenet")

Gradients = Sequence[Tensor | None]
"""Of the loss, for the first samples of each tensor that the model answered with; None where it has none."""

Step = dict[str, Tensor]
"""What is added to each tensor."""

STEP = 1e-2
"""Length of the step that shows how outputs move, as a share of the weights'."""


ROUNDING = 1e-9
"""Share of the new units' squared effect that is left beside that of the others, below which it is rounding."""


def evidence(
    model: nn.Module,
    graph: WidthGraph,
    sizes: Mapping[str, int],
    batches: Sequence[Any],
    gradients: Sequence[Gradients],
    generator: torch.Generator | None = None,
) -> dict[str, Evidence]:
    """What growing each width alone to a size could do about the loss.

    The new units' rows are those of `grow`'s "orthogonal". On the even samples the gradient of their fan-out, which is 0,
    says how they would be read; on the odd ones, whether outputs then move as the loss wants. What a step of the columns
    that are there already does is taken out of both (Verbockhaven, Rudkiewicz, Charpiat and Chevallier, "Growing tiny
    networks: spotting expressivity bottlenecks and fixing them optimally", TMLR 2024, ask the same of exact updates). The
    share is that of the squared norm, so no scale of the loss matters.

    Args:
        model: the model of the graph.
        graph: its widths.
        sizes: {width: new size}, above the present ones.
        batches: model inputs.
        gradients: of the loss at the outputs for each of them, as training saw them; batches of which none is known are left out.
        generator: of the new units' rows, a CPU generator; None for PyTorch's global one.

    Returns:
        {width: what speaks for its growth}; {} if that cannot be known, for want of gradients, or since the model answers with
        something else in eval mode than in training, or cannot go backward there.

    Raises:
        SpectrumError: for NaN or infinite ones.
        ResizeError: as `grow`.

    >>> from evolvenet.tracing.trace import trace
    >>> _ = torch.manual_seed(0)
    >>> model, inputs = nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 2)), torch.randn(512, 4)
    >>> wanted = model(inputs).detach() - inputs[:, :2].abs()  # the gradient of half the squared error
    >>> found = evidence(model, trace(model, inputs), {"0": 8}, [inputs], [[wanted]])["0"]
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
    with trial(growth, start) as shadows:
        found = _Trial(growth, dict(shadows), known)
        try:
            return found.found() if found.fits() else {}
        except RuntimeError as problem:
            # Autograd's: the network trains, but has no backward pass as it is run here.
            log.debug("what the loss asks for is not known: %s", problem)
            return {}


def is_known(gradients: Gradients) -> bool:
    """Whether there are any, all finite, for two samples at least: loss scaling may have overflowed."""
    found = [each for each in gradients if each is not None]
    return _samples(gradients) > 1 and all(bool(each.isfinite().all()) for each in found)


def _samples(gradients: Gradients) -> int:
    return min((len(each) for each in gradients if each is not None), default=0)


class _Trial:
    """The widened model, its new units not read yet, on batches with gradients."""

    def __init__(self, growth: Growth, shadows: dict[str, Tensor], known: Sequence[tuple[Any, Gradients]]) -> None:
        self.growth, self.shadows, self.known = growth, shadows, known
        self.readers = {width.name: growth.matrices(width, CONSUMES) for width in growth.widths}
        self.slots = {tie: growth.slot(tie, width) for width in growth.widths for tie in self.readers[width.name]}

    def fits(self) -> bool:
        """Whether the gradients can be those of the model's answers."""
        with torch.no_grad():
            return all(_fit(self._answers(inputs), each) for inputs, each in self.known)

    def found(self) -> dict[str, Evidence]:
        """Of each width."""
        steps = self._steps()
        with torch.no_grad():
            before = [self._answers(inputs) for inputs, _ in self.known]
            return {name: self._of(before, *steps[name]) for name in steps}

    def _steps(self) -> dict[str, tuple[Step, Step]]:
        """Of each width the two steps to compare, from the even samples."""
        names = list(dict.fromkeys(tie.tensor for tie in self.slots))
        tensors = [self.shadows[name].requires_grad_() for name in names]
        totals = [torch.zeros_like(tensor) for tensor in tensors]
        for inputs, gradients in self.known:
            wanted = _pairs(self._answers(inputs), gradients)
            value = torch.stack([(answer[::2] * each[::2]).sum() for answer, each in wanted]).sum()
            made = torch.autograd.grad(value, tensors, allow_unused=True)
            for total, gradient, name in zip(totals, made, names, strict=True):
                if gradient is not None:
                    total += finite(gradient, name)
        for tensor in tensors:
            tensor.requires_grad_(False)
        by_name = dict(zip(names, totals, strict=True))
        return {width.name: self._split(width, by_name) for width in self.growth.widths}

    def _split(self, width: Width, gradients: Mapping[str, Tensor]) -> tuple[Step, Step]:
        """What would read the new units, and what reads the others, downhill."""
        names = {tie.tensor for tie in self.readers[width.name]}
        new = {name: torch.zeros_like(gradients[name]) for name in names}
        for tie in self.readers[width.name]:
            self.slots[tie].put(new[tie.tensor], -self.slots[tie].take(gradients[tie.tensor]))
        return self._sized(new), self._sized({name: -gradients[name] - new[name] for name in names})

    def _sized(self, step: Step) -> Step:
        """A step as long as `STEP` says, in the same direction."""
        length = torch.stack([each.norm() for each in step.values()]).norm()
        weights = torch.stack([self.shadows[name].norm() for name in step]).norm()
        return {name: each * (STEP * weights / length) for name, each in step.items()} if length > 0 else step

    def _of(self, before: Sequence[Sequence[Tensor]], new: Step, old: Step) -> Evidence:
        found: list[Tensor] = []
        for (inputs, gradients), answers in zip(self.known, before, strict=True):
            with self._moved(new):
                ours = self._answers(inputs)
            with self._moved(old):
                theirs = self._answers(inputs)
            wanted = [None if g is None else -g for g in gradients]
            parts = zip(_pairs(answers, wanted), _pairs(ours, wanted), _pairs(theirs, wanted), strict=True)
            rows = [_products(here, one, other, want) for (here, want), (one, _), (other, _) in parts]
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

    def _answers(self, inputs: Any) -> list[Tensor]:
        return network_outputs(self.growth.model, inputs)


def _fit(answers: Sequence[Tensor], gradients: Gradients) -> bool:
    return len(answers) == len(gradients) and all(
        each is None or (answer.dim() > 0 and each.shape[1:] == answer.shape[1:])
        for answer, each in zip(answers, gradients, strict=True)
    )


def _pairs(answers: Sequence[Tensor], gradients: Gradients) -> list[tuple[Tensor, Tensor]]:
    """Each answer with its gradient, `[samples, numbers]`, as far as all go."""
    known = [(answer, each) for answer, each in zip(answers, gradients, strict=True) if each is not None]
    count = min(min(len(answer), len(each)) for answer, each in known)
    return [(one[:count].reshape(count, -1), two[:count].reshape(count, -1).to(one)) for one, two in known]


def _products(here: Tensor, ours: Tensor, theirs: Tensor, wanted: Tensor) -> Tensor:
    """Of each odd sample ⟨g, n⟩, ⟨g, o⟩, ⟨n, o⟩, ⟨n, n⟩, ⟨o, o⟩, ⟨g, g⟩, `[samples / 2, 6]`.

    g is what is wanted, n what the new units do, o what the others do.
    """
    g, n, o = ((each[1::2]).double() for each in (wanted, ours - here, theirs - here))
    pairs = ((g, n), (g, o), (n, o), (n, n), (o, o), (g, g))
    return torch.stack([(one * two).sum(1) for one, two in pairs], dim=1)


def _compared(rows: Tensor) -> Evidence:
    """What is left of the new units' agreement with the loss once the others' is taken out."""
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

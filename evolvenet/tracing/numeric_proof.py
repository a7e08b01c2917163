"""Comparison of numbers: a copy of the model with permuted and zero-padded widths has to compute what the model computes.

Trials compare shapes and ties. Neither tells `weight * sqrt(2 / weight.shape[1])`, or a factor that the code computes
from a number of units in any other way. So the outputs are compared too, once: the units of all widths are permuted, and
units of zeros are added, by unequal amounts in different widths. A width for which the outputs change is frozen, with the
first op that computes other values as the reason.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from evolvenet._compat.torch import storage_id, tensor_tables, tree_leaves, tree_map_only
from evolvenet.errors import is_out_of_memory
from evolvenet.execution.inputs import tensors_of
from evolvenet.execution.isolation import isolated
from evolvenet.graph.coverage import TRIAL
from evolvenet.graph.exact_growth import COPY, ExactGrowth
from evolvenet.graph.index_map import NEW_UNIT, IndexMap
from evolvenet.graph.width_graph import Width, WidthGraph, Widths
from evolvenet.linalg.precision import has_float64
from evolvenet.surgery.norm_expansion import expand_norms
from evolvenet.surgery.resize_model import compile_surgery, install
from evolvenet.tracing.bisection import bisect, classes_of
from evolvenet.tracing.coupled_dims import structure
from evolvenet.tracing.exact_growth import with_proved_growth, without_exact_growth
from evolvenet.tracing.numbers_mode import FirstDifference, NumbersMode, Sampled
from evolvenet.tracing.reasons import first_line, frozen_for, source_line
from evolvenet.tracing.tracing_mode import run_under_mode

log = logging.getLogger("evolvenet")

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Dtype that the copy computes in, in the order in which they are tried → difference, relative to the outputs' norm."""
COMPLEX = {torch.float64: torch.complex128, torch.float32: torch.complex64}
LARGE = 200_000_000
"""A model of more parameters is compared in float32, since a copy in float64 takes twice the model's memory."""
SMALL = 4_096
"""Tensors of at most as many entries, and those that hold one number everywhere, are changed by random numbers: what is
zero, or the same for all units, would hide a difference."""
CASTABLE = 20_000_000
"""Parameters of a model of which all are in the dtype of the comparison before their widths grow, where a norm mixes them."""
ROUNDED = 1e-6
"""Difference, as in `TOLERANCES`, where new units under a norm are computed in a larger model's single precision."""
ROUNDS = 3
TOGETHER = "the outputs change when it changes together with other widths"
NOT_FINITE = "a new unit, which is 0, makes its outputs NaN or infinite"
"""Why a width whose code divides by what each unit computes gets no new units."""
PERMUTED, WIDENED = "once its units are permuted", "once units of zeros are added"


def compare_numbers(
    model: nn.Module, example_inputs: Any, graph: WidthGraph, modes: Sequence[bool], gradients: bool
) -> WidthGraph:
    """The graph, in which every width is frozen whose permutation or growth by zeros changes the model's outputs.

    The model itself stays as it is. Random numbers are replaced by constants, on both sides of the comparison.

    Args:
        model: the traced model.
        example_inputs: as of `trace`.
        graph: of the model, as verified by trials.
        modes: training flags of the runs.
        gradients: whether the model's own code computes gradients.
    """
    if not graph.resizable or any(tensor.is_meta for tensor in model.parameters()):
        return without_exact_growth(graph)
    comparison = _comparison(model, example_inputs, modes, gradients)
    if comparison is None:
        return without_exact_growth(graph)
    growing = any(width.exact_growth is not None for width in graph.resizable)
    together = growing and comparison.casts_first
    if together and comparison.failure(graph, [width.name for width in graph.resizable]) is None:
        return graph
    verified = _verified(comparison, without_exact_growth(graph))
    return with_proved_growth(verified, graph, comparison.failure)


def _verified(comparison: Comparison, graph: WidthGraph) -> WidthGraph:
    """The graph, without growth of mixed widths, in which every width is frozen for which the outputs change."""
    for _ in range(ROUNDS):
        names = [width.name for width in graph.resizable]
        if comparison.failure(graph, names) is None:
            return graph
        if comparison.failure(graph, []) is not None:
            log.warning(
                "The model computes other outputs each time it is run, so the proof that its widths can change compares "
                "shapes and ties alone. Where that is not intended, take what differs (random numbers of another library, "
                "the time, counters) out of the forward pass."
            )
            return graph
        reasons = _reasons(comparison, graph, names)
        graph = frozen_for(graph, {name: reason for name, reason in reasons.items() if reason != NOT_FINITE})
        graph = _without_growth(graph, [name for name, reason in reasons.items() if reason == NOT_FINITE])
    rest = [width.name for width in graph.resizable]
    failure = comparison.failure(graph, rest) if rest else None
    return graph if failure is None else frozen_for(graph, dict.fromkeys(rest, failure))


def _without_growth(graph: WidthGraph, names: Sequence[str]) -> WidthGraph:
    """The graph, in which these widths get no new units."""
    widths = {
        name: replace(width, mixed=NOT_FINITE) if name in names else width for name, width in graph.widths.items()
    }
    return replace(graph, widths=Widths(widths))


def _reasons(comparison: Comparison, graph: WidthGraph, names: Sequence[str]) -> dict[str, str]:
    """{width: reason} of the widths for which the outputs change; of all, if they only change with all of them together."""
    classes = classes_of(names, lambda name: structure(graph.widths[name]))
    failed = bisect(classes, lambda chosen: comparison.failure(graph, chosen))
    reasons: dict[str, str] = {}
    for members in classes:
        found = [name for number, name in members if number in failed]
        if found:
            reasons |= dict.fromkeys(found, comparison.reason(graph, found[0]))
    return reasons or dict.fromkeys(names, TOGETHER)


def _comparison(model: nn.Module, example_inputs: Any, modes: Sequence[bool], gradients: bool) -> Comparison | None:
    """The comparison in the first dtype, and with the first inputs, that the model runs with; None if it does not run."""
    large = sum(parameter.numel() for parameter in model.parameters()) > LARGE
    tensors = (*model.parameters(), *model.buffers(), *tensors_of(example_inputs))
    double = not large and all(has_float64(device) for device in {tensor.device for tensor in tensors})
    error: Exception | None = None
    for dtype, cast in product(TOLERANCES, (False, True)):
        if (dtype == torch.float64 and not double) or (not cast and (gradients or dtype == torch.float32)):
            continue
        for inputs in _inputs(example_inputs, dtype):
            comparison = Comparison(model, inputs, tuple(modes), gradients, dtype, cast)
            try:
                comparison.expected = comparison.run(None, {}, NumbersMode(dtype))
            except Exception as raised:  # noqa: BLE001  the model's own code may raise anything
                error = raised
                continue
            if all(bool(tensor.isfinite().all()) for tensor in comparison.expected):
                return comparison
    if is_out_of_memory(error):
        assert error is not None
        raise error
    log.warning(
        "The model gives no finite outputs on the example inputs (%s), so the proof that its widths can change compares "
        "shapes and ties alone. Give example_inputs with values that the model can be run on.",
        "NaN or infinite ones" if error is None else f"{type(error).__name__}: {first_line(error)}",
    )
    return None


@dataclass
class Comparison:
    """The outputs of a model, and of copies with other widths.

    Args:
        model: the model, replaced by copies in every run.
        inputs: what it is run on.
        modes: training flags of the runs.
        gradients: whether autograd is on.
        dtype: that the copies compute in.
        cast: whether all parameters of the copies have this dtype. Otherwise each has it while its module runs, which
            takes half of the memory; code that compares dtypes of other modules' parameters, or writes to parameters,
            raises then.
        expected: the outputs of the model as it is.
    """

    model: nn.Module
    inputs: Any
    modes: tuple[bool, ...]
    gradients: bool
    dtype: torch.dtype
    cast: bool
    expected: list[Tensor] = field(default_factory=list[Tensor])

    @cached_property
    def casts_first(self) -> bool:
        """Whether what new units under a norm start with is computed in the dtype of the comparison."""
        return sum(parameter.numel() for parameter in self.model.parameters()) <= CASTABLE

    def run(self, graph: WidthGraph | None, maps: dict[str, IndexMap], mode: NumbersMode) -> list[Tensor]:
        """The floating-point outputs of a copy of the model, in all modes, after a change of widths."""
        with (
            isolated(self.model, shadows=True, copied=self.cast, gradients=self.gradients),
            _default_dtype(self.dtype),
        ):
            if not self.cast:
                mode.shared = frozenset(storage_id(parameter) for parameter in self.model.parameters())
            _vary(self.model)
            growing = graph is not None and _grows_under_norms(graph, maps)
            if growing and self.casts_first:
                self._cast(everything=True)
            if graph is not None and maps:
                surgery = compile_surgery(self.model, graph, maps)
                generator = torch.Generator().manual_seed(0)
                install(self.model, expand_norms(self.model, graph, surgery, generator))
            # Tensor by tensor, and last: both values of a change in double precision would take twice the memory.
            self._cast(everything=self.cast)
            found: list[Tensor] = []
            for training in self.modes:
                found += tensors_of(run_under_mode(self.model, self.inputs, None, training, mode))
            return [each.detach() for each in found if each.is_floating_point() or each.is_complex()]

    def _cast(self, *, everything: bool) -> None:
        """Give the tensors of the copy the dtype: the buffers, and parameters too if everything is to have it."""
        for tensor in _own_tensors(self.model):
            if everything or not isinstance(tensor, nn.Parameter):
                tensor.data = tensor.data.to(self.dtype if tensor.is_floating_point() else COMPLEX[self.dtype])

    def failure(self, graph: WidthGraph, names: Sequence[str], *, zeros: bool = True) -> str | None:
        """How the outputs change with widths permuted and, with `zeros`, widened; None if they stay."""
        maps = _maps(graph, names, zeros)
        try:
            found = self.run(graph, maps, NumbersMode(self.dtype))
        except Exception as error:
            # The model's own code may raise anything on a shape it does not expect.
            if is_out_of_memory(error):
                raise
            line = source_line(traceback.extract_tb(error.__traceback__))
            return f"a trial with data raised {type(error).__name__}: {first_line(error)}{line}"
        if [tensor.shape for tensor in found] != [tensor.shape for tensor in self.expected]:
            return "a trial with data changed the output's shape"
        if zeros and not all(bool(tensor.isfinite().all()) for tensor in found):
            return NOT_FINITE
        moved = max(map(_distance, found, self.expected), default=0.0)
        rounded = _grows_under_norms(graph, maps) and not self.casts_first
        tolerance = max(TOLERANCES[self.dtype], ROUNDED) if rounded else TOLERANCES[self.dtype]
        return None if moved <= tolerance else f"the outputs change by {moved:.1e} of their norm"

    def reason(self, graph: WidthGraph, name: str) -> str:
        """Why the outputs change with a width: the first op that computes other values."""
        permuted = self.failure(graph, [name], zeros=False)
        failure = permuted or self.failure(graph, [name])
        if failure is None or failure == NOT_FINITE or failure.startswith(TRIAL):
            return failure or TOGETHER
        sampled = Sampled(self.dtype)
        self.run(None, {}, sampled)
        compared = FirstDifference(self.dtype, sampled.values, 100 * TOLERANCES[self.dtype])
        self.run(graph, _maps(graph, [name], zeros=permuted is None), compared)
        how = PERMUTED if permuted else WIDENED
        if compared.found is None:
            return f"{failure} {how}"
        return f"{compared.found[0]} computes other values {how}{compared.found[1]}"


def _maps(graph: WidthGraph, names: Sequence[str], zeros: bool) -> dict[str, IndexMap]:
    """A permutation of each width, with new units among the others where these can keep the function.

    Of zeros, one to three; of a width that a norm mixes, as its `exact_growth` says.
    """
    return {
        name: _map(graph.widths[name], number, zeros and graph.widths[name].can_grow)
        for number, name in enumerate(names)
    }


def _grows_under_norms(graph: WidthGraph, maps: Mapping[str, IndexMap]) -> bool:
    """Whether a width gets new units that a norm mixes."""
    return any(index_map.adds_units and graph.widths[name].exact_growth for name, index_map in maps.items())


def _map(width: Width, number: int, zeros: bool) -> IndexMap:
    count = width.size if width.exact_growth == ExactGrowth(COPY) else (1 + number % 3) * width.multiple
    order = [*range(width.size), *([NEW_UNIT] * count if zeros else ())]
    Random(number).shuffle(order)
    if order == sorted(order):
        order.reverse()
    return IndexMap.of(order, width.size).turned(width.parts)


def _distance(one: Tensor, two: Tensor) -> float:
    """Norm of the difference over that of the second tensor, which is taken to be at least 1e-6."""
    scale = float(torch.linalg.vector_norm(two))
    return float(torch.linalg.vector_norm(one - two)) / max(scale, 1e-6)


def _inputs(example_inputs: Any, dtype: torch.dtype) -> Iterator[Any]:
    """The inputs in a dtype: with random numbers where an input holds one number everywhere, then as they are."""

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    def varied(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or tensor.layout != torch.strided or not _is_uniform(tensor):
            return cast(tensor)
        generator = torch.Generator().manual_seed(0)
        return torch.rand(tensor.shape, generator=generator, dtype=torch.float32).to(tensor.device, dtype)

    leaves = [leaf for leaf in tree_leaves(example_inputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if any(leaf.layout == torch.strided and _is_uniform(leaf) for leaf in leaves):
        yield tree_map_only(Tensor, varied, example_inputs)
    yield tree_map_only(Tensor, cast, example_inputs)


def _is_uniform(tensor: Tensor) -> bool:
    """Whether a tensor holds one number everywhere, of more than one place."""
    return tensor.numel() > 1 and not tensor.is_meta and bool((tensor == tensor.reshape(-1)[0]).all())


def _vary(model: nn.Module) -> None:
    """Change small or uniform parameters of a copy by random numbers."""
    generator = torch.Generator().manual_seed(0)
    for tensor in _own_tensors(model):
        data = tensor.data
        corner = data.reshape(-1)[:SMALL] if data.layout == torch.strided else data
        if isinstance(tensor, nn.Parameter) and data.numel() and (data.numel() <= SMALL or _is_uniform(corner)):
            noise = torch.randn(data.shape, generator=generator, dtype=torch.float32).to(data.device, data.dtype)
            tensor.data = data + noise * (0.1 * float(data.abs().mean()) or 0.1)


def _own_tensors(model: nn.Module) -> list[Tensor]:
    """Each parameter and buffer with real or complex numbers, once."""
    tables = (table for module in model.modules() for table in tensor_tables(module))
    every = {id(tensor): tensor for table in tables for tensor in table.values() if tensor is not None}
    return [tensor for tensor in every.values() if tensor.is_floating_point() or tensor.is_complex()]


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)

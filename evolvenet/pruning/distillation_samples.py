"""Samples to distil a network on: inputs with the outputs to reach, from a teacher or given, some of them held out."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from evolvenet._compat.torch import tree_map_only
from evolvenet.errors import DistillationError, TraceError
from evolvenet.execution.chosen_outputs import chosen, counted_outputs
from evolvenet.execution.inputs import first_samples, tensors_of
from evolvenet.execution.isolation import isolated, model_outputs, op_by_op
from evolvenet.execution.own_gradients import GradientsNeededError, own_gradients
from evolvenet.execution.sampling import samples_in
from evolvenet.graph.width_graph import ChosenOutputs
from evolvenet.linalg.host_transfers import to_device
from evolvenet.measurement.output_error import first_batches, output_error, real
from evolvenet.pruning.distillation_features import recorded
from evolvenet.pruning.reconstruction_batch import joined

log = logging.getLogger("evolvenet")

Augment = Callable[[Any], Any]
"""Inputs of a step → changed inputs for the network and its teacher."""

Pair = tuple[Any, list[Tensor]]
"""Inputs, and the outputs to reach on them; none if a teacher has to be run for them."""

HELD_OUT = 8
"""One of so many samples is held out, one at least."""
TRIED = 8
"""Samples on which it is tried whether each one's outputs are its own."""
ROUNDING = 1e-3
"""Error of outputs that is taken for one of rounding, squared."""
LARGEST = 2**26
"""Numbers of a teacher's outputs that are kept for all steps; more than that are computed anew in each."""


@dataclass(frozen=True, eq=False)
class Teacher:
    """Where the outputs to reach come from.

    Args:
        model: the network; None where its outputs are given.
        outputs: those that count.
        differentiates: whether the network runs with autograd on alone.
    """

    model: nn.Module | None
    outputs: ChosenOutputs
    differentiates: bool

    def on(self, inputs: Any) -> list[Tensor]:
        """Its outputs for some inputs."""
        assert self.model is not None
        return floating(model_outputs(self.model, inputs, self.differentiates, self.outputs))

    def with_features(self, inputs: Any, names: Sequence[str]) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Its outputs for some inputs, and those of modules inside of it."""
        assert self.model is not None
        with isolated(self.model, gradients=self.differentiates), op_by_op(), recorded(self.model, names) as seen:
            found = floating(counted_outputs(self.model, inputs, self.outputs))
        return [each.detach() for each in found], {name: each.detach() for name, each in seen.items()}

    def targets(self, inputs: Any, targets: list[Tensor]) -> list[Tensor]:
        """Those of a pair, computed if they are not there."""
        return targets or self.on(inputs)


def needs_gradients(model: nn.Module, inputs: Any, outputs: ChosenOutputs) -> bool:
    """Whether a model's own code computes gradients, so that it does not run without autograd."""
    try:
        with own_gradients():
            model_outputs(model, inputs, False, outputs)
    except GradientsNeededError:
        return True
    return False


def with_targets(
    teacher: nn.Module | Sequence[Any], batches: Sequence[Any], outputs: ChosenOutputs
) -> tuple[Teacher, list[Pair]]:
    """The batches with what the teacher puts out for them, as far as that is not too much to be kept.

    Args:
        teacher: a network, or what it returns for each batch.
        batches: its inputs.
        outputs: those that count.

    Raises:
        TraceError: if there is no batch.
        DistillationError: if there are more or fewer outputs than batches, or none is a floating-point tensor.
    """
    if not batches:
        raise TraceError("Polish: expected at least one batch of model inputs, got none.")
    if not isinstance(teacher, nn.Module):
        if len(teacher) != len(batches):
            raise DistillationError(
                f"Polish: expected what the teacher puts out for each of {len(batches)} batches, got {len(teacher)} entries."
            )
        found = [[tensor.detach() for tensor in floating(tensors_of(chosen(each, outputs)))] for each in teacher]
        if not all(found):
            raise DistillationError("Polish: expected floating-point tensors among the teacher's outputs, got none.")
        return Teacher(None, outputs, False), list(zip(batches, found, strict=True))
    source = Teacher(teacher, outputs, needs_gradients(teacher, batches[0], outputs))
    pairs, room = list[Pair](), LARGEST
    for batch in batches:
        found = source.on(batch) if room > 0 else []
        if room > 0 and not found:
            raise DistillationError("Polish: expected floating-point tensors among the teacher's outputs, got none.")
        room -= sum(tensor.numel() for tensor in found)
        pairs.append((batch, found))
    return source, pairs if room > 0 else [(batch, []) for batch in batches]


def imitation(
    model: nn.Module, batches: Sequence[Any], outputs: ChosenOutputs, runs: bool
) -> tuple[Teacher, list[Pair]]:
    """What a network is to imitate after it was changed in place: its outputs, and a copy of it where these are not enough.

    Args:
        model: as it is to be imitated.
        batches: its inputs.
        outputs: those that count.
        runs: whether it is to be run afterwards, for changed inputs or its features.

    Raises:
        DistillationError: if it cannot be copied.
    """
    teacher, pairs = with_targets(model, batches, outputs)
    if not runs and pairs[0][1]:
        return replace(teacher, model=None), pairs
    try:
        return replace(teacher, model=copy.deepcopy(model)), pairs
    except Exception as error:
        raise DistillationError(
            f"Expected a network that copy.deepcopy copies, as its outputs are needed after it has changed, got {error!r}. "
            "Take fewer samples, no `augment` and no `features`, or no steps."
        ) from error


def floating(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The outputs that an error can be measured on; complex ones as pairs of numbers."""
    found = [torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor for tensor in tensors]
    return [tensor for tensor in found if tensor.is_floating_point()]


def together(model: nn.Module, teacher: Teacher, pairs: Sequence[Pair], differentiates: bool) -> Pair | None:
    """All samples as one pair; None where single ones cannot be taken, or their outputs depend on the others that they are with.

    That is tried on a few samples: nodes of a graph and steps of a sequence stand on first axes, too.

    Args:
        model: whose inputs they are.
        teacher: what counts.
        pairs: one for each batch.
        differentiates: whether the model runs with autograd on alone.
    """
    whole = joined(pairs)
    total = 0 if whole is None else samples_in(whole)
    if whole is None or samples_in(first_samples(whole, 1)) != 1 or total < 2:
        return whole if total == 1 else None
    first = torch.arange(min(TRIED, total), device="cpu")
    others = first.flip(0)[: len(first) // 2]
    try:
        some, fewer = (
            floating(model_outputs(model, _samples_at(whole, places)[0], differentiates, teacher.outputs))
            for places in (first, others)
        )
    except Exception as error:
        # Inputs whose parts belong to each other otherwise than by their place.
        log.debug("polish: batches are taken as they are", exc_info=error)
        return None
    alike = [
        one.dim() > 0 and one.shape[1:] == two.shape[1:] and len(two) == len(others)
        for one, two in zip(some, fewer, strict=True)
    ]
    taken = [real(one[to_device(others, one.device)]) for one in some] if all(alike) else []
    return whole if taken and output_error(taken, [real(two) for two in fewer]) < ROUNDING else None


def held_out(pairs: Sequence[Pair], whole: Pair | None, size: int) -> tuple[Sequence[Pair], Sequence[Pair]]:
    """Pairs to fit on and others to judge on: the last samples of all, or the last batches where those are not in one.

    A single sample, or a single batch that cannot be taken apart, is in both.

    Args:
        pairs: one for each batch.
        whole: all in one, from `together`.
        size: most samples of a pair to judge on.

    >>> one, two = held_out([], (torch.zeros(16, 2), [torch.zeros(16)]), 64)
    >>> [len(inputs) for inputs, _ in one], [len(inputs) for inputs, _ in two]
    ([14], [2])
    """
    if whole is None:
        count = max(1, len(pairs) // HELD_OUT)
        return (pairs[:-count], pairs[-count:]) if len(pairs) > 1 else (pairs, pairs)
    total = samples_in(whole)
    if total < 2:
        return [whole], [whole]
    order, count = torch.arange(total, device="cpu"), max(1, total // HELD_OUT)
    return [_samples_at(whole, order[:-count])], [_samples_at(whole, part) for part in order[-count:].split(size)]


def before_judged(batches: Sequence[Any], pairs: Sequence[Pair]) -> Sequence[Any]:
    """The batches without what `held_out` leaves to judge on: the last samples where all can be one pair, else the last batches.

    Args:
        batches: inputs.
        pairs: of the batches, from `with_targets`.
    """
    total = sum(map(samples_in, batches))
    if joined(pairs) is not None and total > 1:
        return first_batches(batches, total - max(1, total // HELD_OUT))
    return batches[: -max(1, len(batches) // HELD_OUT)] if len(batches) > 1 else batches


def minibatches(pairs: Sequence[Pair], size: int | None, seed: int) -> Iterator[Pair]:
    """Pairs without end, each round in a new order.

    Args:
        pairs: to fit on, from `held_out`.
        size: samples of the single pair at a time; where that leaves a rest, the rest is not in this round. None for whole pairs.
        seed: of the orders.

    >>> [len(inputs) for inputs, _ in (next(minibatches([(torch.zeros(5, 2), [])], size, 0)) for size in (2, 8, None))]
    [2, 5, 5]
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    while True:
        if size is None:
            yield from (pairs[int(place)] for place in torch.randperm(len(pairs), generator=generator, device="cpu"))
            continue
        places = torch.randperm(samples_in(pairs[0]), generator=generator, device="cpu").split(size)
        whole = [part for part in places if len(part) == size] or places
        yield from (_samples_at(pairs[0], part) for part in whole)


def _samples_at(pair: Pair, places: Tensor) -> Pair:
    return tree_map_only(Tensor, lambda tensor: tensor[to_device(places, tensor.device)], pair)

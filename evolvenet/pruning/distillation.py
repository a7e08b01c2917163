"""After a cut, some steps of gradient descent towards the outputs of the uncut network, on the same samples without labels.

The closed-form fit of a cut corrects each layer by itself. What errors do in the layers after it, only this sees.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from evolvenet.errors import DistillationError
from evolvenet.execution.chosen_outputs import Outputs, counted_outputs, normalized
from evolvenet.execution.inputs import copied
from evolvenet.execution.isolation import isolated, model_outputs, op_by_op, random_streams_kept
from evolvenet.execution.surroundings import autocast_without_cache
from evolvenet.measurement.output_error import OutputMeasure
from evolvenet.pruning.distillation_features import FeatureMaps, feature_names, recorded
from evolvenet.pruning.distillation_losses import UNITS, OutputDistance
from evolvenet.pruning.distillation_samples import (
    LARGEST,
    Augment,
    Pair,
    Teacher,
    floating,
    held_out,
    minibatches,
    needs_gradients,
    together,
    with_targets,
)
from evolvenet.signals import deferred_signals

log = logging.getLogger("evolvenet")

SLOWER = 5
"""What a learning rate that is too large is divided by."""
TRIES = 3
"""Learning rates that are tried, at most."""
TOO_LARGE = 4.0
"""A rate is given up if, after a quarter of the steps, the error is more than so many times that at the start."""
FEATURES = 0.5
"""Weight of the features' error, beside 1 for that of the outputs."""
FITTED = 4
"""Minibatches that the maps of features are fitted on first."""
WARM = 0.1
"""Share of the steps in which the learning rate rises."""


@dataclass(frozen=True)
class Polish:
    """What `polish` has done; printed, one line.

    Args:
        steps: of gradient descent that were taken, those at rates that were given up included.
        rate: the last learning rate that was tried.
        before: error of the outputs on samples that were held out, over the variance of
            the outputs to reach; of all samples if there is one. For the loss "kl" their mean divergence, nats.
        after: the same after the steps.
        kept: whether the weights after the steps were kept: they were if that error was less. Else they are those from before.
        loss: what the error is, see `polish`.
    """

    steps: int
    rate: float
    before: float
    after: float
    kept: bool
    loss: OutputMeasure = "outputs"

    def __str__(self) -> str:
        """One line."""
        end = "" if self.kept else ", not kept"
        name, unit = UNITS[self.loss]
        return f"{self.steps} steps: {name} {self.before:.2g} → {self.after:.2g}{unit} on samples held out{end}"


def polish(  # noqa: PLR0913  public: each is one setting
    model: nn.Module,
    teacher: nn.Module | Sequence[Any],
    batches: Sequence[Any],
    steps: int = 200,
    *,
    rate: float = 1e-2,
    batch_size: int = 64,
    augment: Augment | None = None,
    features: Sequence[str] = (),
    outputs: Outputs | None = None,
    loss: OutputMeasure = "outputs",
    seed: int = 0,
) -> Polish:
    """Train a network that was cut for a few steps, in place, to put out what the uncut one puts out. It needs no labels.

    The loss is the squared error of all outputs over their variance, or the divergence of what they predict. Adam (Kingma and
    Ba 2015) takes the steps, at a rate that falls along a cosine. The model is in eval mode: running statistics of norms stay,
    dropout is off. Parameters that do not require gradients stay. An eighth of the samples is held out, and the weights are
    kept only if the error on these is less than before. If it is not, or no number, the rate was too large: a fifth of it is
    tried, and a fifth of that.

    Imitating outputs is from Hinton et al. (2015), "Distilling the Knowledge in a Neural Network". That a few samples are enough
    after pruning is from Wang et al. (2022), "Compressing Models with Few Samples: Mimicking then Replacing", and Wang and Wu
    (2023), "Practical Network Acceleration with Tiny Sets", which imitate the features before the head.

    Args:
        model: the network that was cut. Gradients of its parameters, modes of its modules, buffers and random generators
            are afterwards as they were; after an exception or Ctrl-C the weights are, too.
        teacher: the network before the cut; or what it returned for each of the batches, so that no second network is in
            memory. It is left as it was.
        batches: inputs of the model. The samples that the cut was fitted on will do; best it was fitted on all but the last
            eighth of them, as those are the ones held out: an error that it was fitted to is hard to beat.
        steps: of gradient descent, for each rate that is tried. Under `torch.autocast` both networks run in 16 bits, which takes
            half of the time where a processor computes in them; weights and their steps stay in theirs.
        rate: largest learning rate.
        batch_size: samples a step, drawn from all batches. Where these cannot be put together or taken apart (a sample's outputs
            depend on the others, inputs are no tensors), a step takes a batch as it is.
        augment: inputs of a step → changed inputs: shifted or mirrored images, for instance. The outputs to reach are what
            the teacher puts out for the changed inputs, so it has to be a network.
        features: names or patterns of modules ("blocks.*") whose outputs are imitated too, through linear maps from their
            channels to the teacher's, which are trained along. Needs a network as teacher.
        outputs: as for `trace`.
        loss: "outputs" for their squared error over their variance. "kl" where they are logits, for the mean of KL(p ‖ q) in
            nats, of the probabilities that the teacher and the model predict: for vocabularies, where most logits do not matter.
        seed: of the order of the samples. `augment` draws from torch's, NumPy's and Python's generators as they are.

    Raises:
        DistillationError: if no parameter requires gradients; for teacher's outputs that do not fit the batches or the model;
            for changed inputs or features without a network as teacher, or modules that have none; for steps, rate or batch
            size out of range, another loss, or "kl" and outputs that are no logits. Nothing has changed.
        TraceError: if there is no batch.

    >>> from evolvenet import prune, trace
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3))
    >>> batches = [torch.randn(32, 8) for _ in range(8)]
    >>> whole = [model(batch) for batch in batches]
    >>> _ = prune(model, trace(model, batches[0]), {"0": 8, "2": 8}, batches)
    >>> done = polish(model, whole, batches, steps=50)
    >>> done.kept, done.after < 0.7 * done.before
    (True, True)
    """
    # Over 40 lines: the signature, whose arguments are listed one a line.
    if (augment is not None or features) and not isinstance(teacher, nn.Module):
        raise DistillationError(
            "Polish: expected a network as teacher, for changed inputs and for features, got outputs for the inputs as they are. "
            "Give a copy of the network before the cut, copy.deepcopy(model)."
        )
    settings = Descent(steps, rate, batch_size, augment, tuple(features), seed, loss)
    with torch.inference_mode(False), torch.no_grad():
        return distil(model, *with_targets(teacher, list(batches), normalized(outputs)), settings)


@dataclass(frozen=True)
class Descent:
    """How steps are taken, see `polish`.

    Args:
        steps: for each rate that is tried.
        rate: the largest one.
        size: samples a step.
        augment: changes the inputs.
        features: names or patterns of modules.
        seed: of the order of the samples.
        loss: of the outputs.

    Raises:
        DistillationError: for numbers out of range, or another loss.
    """

    steps: int
    rate: float = 1e-2
    size: int = 64
    augment: Augment | None = None
    features: tuple[str, ...] = ()
    seed: int = 0
    loss: OutputMeasure = "outputs"

    def __post_init__(self) -> None:
        if self.steps < 0 or self.size < 1 or not 0 < self.rate < math.inf:
            raise DistillationError(
                "Polish: expected steps of 0 or more, a batch size of 1 or more and a finite rate above 0, got "
                f"steps={self.steps}, batch_size={self.size}, rate={self.rate}."
            )
        if self.loss not in UNITS:
            raise DistillationError(f'Polish: expected loss to be "outputs" or "kl", got {self.loss!r}.')


def distil(model: nn.Module, teacher: Teacher, pairs: Sequence[Pair], settings: Descent) -> Polish:
    """Train a network towards outputs, see `polish`.

    Args:
        model: is changed in place.
        teacher: where outputs come from that the pairs lack.
        pairs: inputs with outputs, from `with_targets`.
        settings: of the steps.

    Raises:
        DistillationError: see `polish`.
    """
    with torch.inference_mode(False), torch.no_grad(), random_streams_kept(model), autocast_without_cache():
        return _Run.of(model, teacher, pairs, settings).best()


@dataclass(frozen=True, eq=False)
class _Run:
    """The training of one network towards outputs of another one.

    Args:
        model: is changed in place.
        teacher: where outputs come from that are not there.
        differentiates: whether the model runs with autograd on alone.
        fitting: pairs to train on.
        judging: pairs that decide, their outputs there.
        settings: of the steps.
        names: of modules whose features are compared.
        apart: whether samples to train on are drawn from a single pair.
        distance: of outputs from those to reach.
    """

    model: nn.Module
    teacher: Teacher
    differentiates: bool
    fitting: Sequence[Pair]
    judging: Sequence[Pair]
    settings: Descent
    names: Sequence[str]
    apart: bool
    distance: OutputDistance

    @classmethod
    def of(cls, model: nn.Module, teacher: Teacher, pairs: Sequence[Pair], settings: Descent) -> _Run:
        """The training on some pairs, as many of those that are held out as `LARGEST` numbers of outputs hold.

        Raises:
            DistillationError: if the model puts out other shapes than those to reach.
        """
        differentiates = needs_gradients(model, pairs[0][0], teacher.outputs)
        whole = together(model, teacher, pairs, differentiates)
        fitting, judging = held_out(pairs, whole, settings.size)
        judged, room = list[Pair](), LARGEST
        for inputs, targets in judging:
            if room > 0:
                judged.append((inputs, teacher.targets(inputs, targets)))
                room -= sum(tensor.numel() for tensor in judged[-1][1])
        names = (
            feature_names(model, teacher.model, settings.features)
            if teacher.model is not None and settings.features
            else []
        )
        expected = [tuple(tensor.shape) for tensor in judged[0][1]]
        outputs = floating(model_outputs(model, judged[0][0], differentiates, teacher.outputs))
        if (got := [tuple(tensor.shape) for tensor in outputs]) != expected:
            raise DistillationError(
                f"Polish: expected outputs of the shapes that the teacher's have, {expected}, got {got}. "
                "Name those that the cut has left as they were by outputs=."
            )
        return cls(
            model,
            teacher,
            differentiates,
            fitting,
            judged,
            settings,
            names,
            whole is not None,
            OutputDistance.of(settings.loss, [targets for _, targets in judged]),
        )

    def best(self) -> Polish:
        """Train at the first of some rates that makes the error less; if there is none, the weights stay."""
        steps = self.settings.steps
        weights = [each for each in self.model.parameters() if each.requires_grad]
        if not weights:
            raise DistillationError(
                "Polish: expected parameters that require gradients, got none. Call model.requires_grad_() before."
            )
        before = self.error()
        saved, grads = [each.detach().clone() for each in weights], [each.grad for each in weights]
        rates = [self.settings.rate / SLOWER**k for k in range(TRIES)]
        done = Polish(0, rates[0], before, before, False, self.settings.loss)
        try:
            for rate in rates if steps and math.isfinite(before) else ():
                taken, after = self.descend(weights, rate, TOO_LARGE * before)
                done = replace(done, steps=done.steps + taken, rate=rate, after=after, kept=after < before)
                if done.kept:
                    return done
                _write(weights, saved)
        except BaseException:
            with deferred_signals("the return to the weights from before"):
                _write(weights, saved)
            raise
        finally:
            for each, grad in zip(weights, grads, strict=True):
                each.grad = grad
        if steps:
            log.warning("Polish: the weights stay as they were. %s.", done)
        return done

    def descend(self, weights: Sequence[nn.Parameter], rate: float, most: float) -> tuple[int, float]:
        """Take steps, the weights changed in place; fewer if the error is more than `most` after a quarter of them.

        Returns:
            How many were taken, and the error after them.
        """
        steps, size = self.settings.steps, self.settings.size if self.apart else None
        drawn = minibatches(self.fitting, size, self.settings.seed)
        maps = self._maps(drawn)
        trained = [*weights, *maps.weights]
        # A step of a thousandth of a weight is lost in 16 bits: those are held in float32 meanwhile.
        held = [each.float() if each.dtype in (torch.bfloat16, torch.float16) else each for each in trained]
        adam = torch.optim.Adam(held, lr=rate)
        for step in range(steps):
            warm = min(1.0, (step + 1) / max(1.0, WARM * steps))
            adam.param_groups[0]["lr"] = rate * warm * (1 + math.cos(math.pi * step / steps)) / 2
            gradients = self._gradients(trained, maps, *next(drawn))
            with deferred_signals("a step"):
                for each, gradient in zip(held, gradients, strict=True):
                    each.grad = None if gradient is None else gradient.to_dense().to(each.dtype)
                adam.step()
                _write(trained, held)
            if step + 1 == steps // 4 and not (error := self.error()) <= most:
                return step + 1, error
        return steps, self.error()

    def error(self) -> float:
        """Of the outputs on the samples that decide."""
        sums: list[tuple[Tensor, float]] = []
        for inputs, targets in self.judging:
            found = floating(model_outputs(self.model, inputs, self.differentiates, self.teacher.outputs))
            self.distance.add(sums, found, targets)
        return self.distance.mean(sums)

    def _maps(self, drawn: Iterator[Pair]) -> FeatureMaps:
        """Between the features of the two networks as they are; none if none are asked for."""
        if not self.names:
            return FeatureMaps({})
        sides: tuple[list[Mapping[str, Tensor]], list[Mapping[str, Tensor]]] = [], []
        for inputs, _ in islice(drawn, FITTED):
            for model, found in zip((self.model, self.teacher.model), sides, strict=True):
                side = Teacher(model, self.teacher.outputs, self.differentiates or self.teacher.differentiates)
                found.append(side.with_features(inputs, self.names)[1])
        joined = [
            # Of one length: where batches have several, the steps see the others.
            {
                name: torch.cat(
                    [each[name] for each in found if name in each and each[name].shape[1:] == one.shape[1:]]
                )
                for name, one in found[0].items()
            }
            for found in sides
        ]
        return FeatureMaps.of(*joined)

    def _gradients(
        self, weights: Sequence[Tensor], maps: FeatureMaps, inputs: Any, targets: list[Tensor]
    ) -> Sequence[Tensor | None]:
        """Of the loss on a minibatch."""
        if self.settings.augment is not None:
            inputs, targets = self.settings.augment(copied(inputs)), []
        theirs: Mapping[str, Tensor] = {}
        if self.names:
            targets, theirs = self.teacher.with_features(inputs, self.names)
        targets = self.teacher.targets(inputs, targets)
        with isolated(self.model, gradients=True), op_by_op(), recorded(self.model, self.names) as mine:
            found = floating(counted_outputs(self.model, inputs, self.teacher.outputs))
            loss = self.distance.loss(found, targets)
            if self.names:
                loss = loss + FEATURES * maps.loss(mine, theirs)
            if not loss.requires_grad:
                raise DistillationError(
                    "Polish: expected outputs that depend on parameters that require gradients, got others."
                )
            return torch.autograd.grad(loss, weights, allow_unused=True)


def _write(weights: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for weight, value in zip(weights, values, strict=True):
        if weight is not value:
            weight.copy_(value)

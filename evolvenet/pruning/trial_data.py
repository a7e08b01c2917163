"""What trials run on, and what a cut loses there: the error of the outputs, their divergence, or the loss of a task."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from evolvenet._compat.torch import tree_leaves
from evolvenet.errors import PolicyError
from evolvenet.execution.chosen_outputs import counted_outputs
from evolvenet.execution.isolation import model_outputs
from evolvenet.execution.op_cache import OpCache
from evolvenet.execution.sampling import samples_in
from evolvenet.graph.width_graph import WidthGraph
from evolvenet.measurement.output_error import MEASURES, OutputMeasure, first_batches, outputs_on
from evolvenet.pruning.reconstruction import fit_to_targets
from evolvenet.pruning.reconstruction_batch import TRAINING_LIMITS, ReconstructionLimits, concatenated, held_out_of
from evolvenet.pruning.recording import Recording, record
from evolvenet.surgery.resize_model import Surgery, install

log = logging.getLogger("evolvenet")

Loss = OutputMeasure | Callable[[Any, Any], Any]
"""What a cut loses: "outputs" for the relative error of the outputs, see `output_error`; "kl" for the divergence of the classes'
probabilities, see `output_divergence`; or a function (outputs, labels) → loss, one number, the mean over the samples. Outputs
are one tensor, or a list where the model has several."""


@dataclass(frozen=True, eq=False)
class TrialData:
    """The samples of all trials of one model.

    Args:
        model: uncut between the trials.
        graph: its widths.
        all: every batch of inputs.
        fitted: those that consumers are fitted on, as one where they can be.
        held_out: of its samples; None for what `record` makes of the batches.
        judged: the batches that the loss is measured on; with a function as the loss, with labels.
        limits: on the data of the fits.
        loss: see `Loss`.
        cache: of results of the model's ops, so that those before the first one that a cut reaches run once for all trials;
            None where results belong to one run.
    """

    model: nn.Module
    graph: WidthGraph
    all: Sequence[Any]
    fitted: Sequence[Any]
    held_out: Tensor | None
    judged: Sequence[Any]
    limits: ReconstructionLimits
    loss: Loss
    cache: OpCache | None

    @classmethod
    def of(cls, model: nn.Module, graph: WidthGraph, batches: Sequence[Any], samples: int, loss: Loss) -> TrialData:
        """Some samples of the batches.

        Raises:
            PolicyError: for an unknown loss, or a function as the loss and a batch that is no pair of inputs and labels.
        """
        if callable(loss):
            _check_pairs(batches)
        elif loss not in MEASURES:
            raise PolicyError(f'Expected loss to be "outputs", "kl" or a function of outputs and labels, got {loss!r}.')
        few = _whole_batches(batches, samples) if _labels_apart(loss, batches) else first_batches(batches, samples)
        limits = replace(TRAINING_LIMITS, samples=max(samples, sum(map(samples_in, few))))
        inputs = partial(_inputs, loss)
        joined = concatenated(few, limits)
        # With autograd on, results belong to the graph of one run.
        found = cls(
            model,
            graph,
            [inputs(batch) for batch in batches],
            [inputs(batch) for batch in few],
            None,
            few,
            limits,
            loss,
            None if graph.differentiates else OpCache(),
        )
        if joined is None:
            return found
        if samples_in(joined) == sum(map(samples_in, few)) and len(few) > 1:
            try:
                outputs_on(model, [inputs(joined)], graph)
            except Exception as problem:
                # A training step may count on the size of its batches.
                log.debug("The model does not run on several batches as one", exc_info=problem)
                return replace(found, cache=None)
        whole = samples_in(joined) == sum(map(samples_in, few))
        return replace(
            found,
            fitted=[inputs(joined)],
            held_out=held_out_of([inputs(batch) for batch in few], inputs(joined)),
            judged=[joined] if whole else few,
        )

    def recording(self, names: Sequence[str]) -> Recording | None:
        """What the consumers of some widths are fitted to."""
        found = record(self.model, self.graph, names, self.fitted, self.limits, self.cache)
        return found if found is None or self.held_out is None else replace(found, held_out=self.held_out)

    def measured(self, run: Run | None = None) -> list[Tensor]:
        """The outputs of the model; with a function as the loss `[2, batches]`, its value on each and the number of samples.

        Args:
            run: inputs → outputs; None for those of the uncut model.
        """
        run = run or self._run(())
        if not callable(self.loss):
            return outputs_on(self.model, self.judged, self.graph, run=run)
        losses = list[float]()
        for inputs, labels in self.judged:
            # The loss may write to them, and they are the cache's.
            outputs = [each.clone() for each in run(inputs)]
            losses.append(float(self.loss(outputs[0] if len(outputs) == 1 else outputs, labels)))
        counts = [float(samples_in(inputs)) for inputs, _ in self.judged]
        return [torch.tensor([losses, counts], dtype=torch.float64, device="cpu")]

    def lost(self, whole: Sequence[Tensor], surgery: Surgery, recording: Recording | None) -> float:
        """What a surgery with the fit of its consumers loses; 0 where it makes the loss less. The model is left as it was.

        Args:
            whole: of the uncut model, from `measured`.
            surgery: of the model.
            recording: to fit to.
        """
        moved = self._moved(surgery, recording)
        if not callable(self.loss):
            return MEASURES[self.loss](whole, moved)
        before, after = (float(each[0] @ each[1] / each[1].sum()) for (each,) in (whole, moved))
        return max(0.0, after - before)

    def _moved(self, surgery: Surgery, recording: Recording | None) -> list[Tensor]:
        """`measured` after a surgery and the fit: in the run of the fit itself, if its samples are those that are judged."""
        fit = None if recording is None or not recording.targets else recording.copy()
        if fit is not None and fit.choices.none and self._judges(fit.batch):
            found = list[Tensor]()

            def run(model: nn.Module, batch: Any) -> None:
                found.extend(each.detach() for each in counted_outputs(model, fit.batch, self.graph.outputs))

            fit_to_targets(self.model, self.graph, surgery, fit, run)
            return self.measured(lambda inputs: found)
        if fit is not None:
            surgery = fit_to_targets(self.model, self.graph, surgery, fit)
        undo = install(self.model, surgery)
        try:
            return self.measured(self._run([change.name for change in surgery.changes]))
        finally:
            undo()

    def _judges(self, batch: Any) -> bool:
        """Whether this batch is all that the loss is measured on."""
        (ones, others) = (tree_leaves(each) for each in (batch, _inputs(self.loss, self.judged[0])))
        return len(self.judged) == 1 and len(ones) == len(others) and all(map(_is_same, ones, others))

    def _run(self, changed: Collection[str]) -> Run:
        def run(inputs: Any) -> list[Tensor]:
            mode = None if self.cache is None else self.cache.on(self.model, inputs, changed)
            return model_outputs(self.model, inputs, self.graph.differentiates, self.graph.outputs, mode)

        return run


Run = Callable[[Any], list[Tensor]]


def _is_same(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return one is other
    return one.data_ptr() == other.data_ptr() and (one.shape, one.stride()) == (other.shape, other.stride())


def _inputs(loss: Loss, batch: Any) -> Any:
    """Without the labels, if there are some."""
    return batch[0] if callable(loss) else batch


def _labels_apart(loss: Loss, batches: Sequence[Any]) -> bool:
    """Whether labels have another number of entries than their batch has samples, words in one row say: they cannot be cut."""
    return callable(loss) and any(
        isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) != samples_in(inputs)
        for inputs, labels in batches
        for leaf in tree_leaves(labels)
    )


def _whole_batches(batches: Sequence[Any], samples: int) -> list[Any]:
    """As many batches as hold so many samples, none of them cut."""
    found, held = [], 0
    for batch in batches:
        if held >= samples:
            break
        found.append(batch)
        held += samples_in(batch[0])
    return found


def _check_pairs(batches: Sequence[Any]) -> None:
    for number, batch in enumerate(batches):
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            got = f"a tuple of {len(batch)}" if isinstance(batch, (tuple, list)) else f"a {type(batch).__name__}"
            raise PolicyError(
                f"Batch {number}: expected a pair of inputs and labels, as loss is a function of outputs and labels, got {got}. "
                'Give labels, or take loss="outputs".'
            )

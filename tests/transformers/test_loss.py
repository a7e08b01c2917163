"""Runs of the transformers library's `Trainer` whose `compute_loss` is a method of their own."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Trainer

from evolvenet._compat.torch import tree_leaves
from evolvenet.transformers.callback import WidthEvolutionCallback
from evolvenet.transformers.running import running_trainer
from tests.helpers.transformers_runs import HEADS, INNER, STREAM, bert, evolution, trainer

SIZES = {HEADS: 5, INNER: 20}


def run_with(folder: Path, kind: type[Trainer], callback: WidthEvolutionCallback, **options: Any) -> Any:
    """A run of a BERT whose trainer is of that kind."""
    resume = options.pop("resume", None)
    run = trainer(folder, bert(), callback, **options)
    run.__class__ = kind
    kind.prepare(run)  # type: ignore[attr-defined]
    run.train(resume_from_checkpoint=resume)
    return run


class Distils(Trainer):
    """A teacher of another width in an attribute, counts and logs of its own."""

    teacher: Any
    seen: list[int]

    def prepare(self) -> None:
        self.teacher, self.seen, self.steps = bert(seed=1, layers=2), [], 0

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        self.seen.append(len(inputs["input_ids"]))
        self.steps += 1
        labels = inputs.pop("labels")
        out = model(**inputs)
        with torch.no_grad():
            goal = self.teacher(**inputs).logits.softmax(-1)
        self.log({"mine": 0.0})
        loss = functional.cross_entropy(out.logits.flatten(0, 1), labels.flatten())
        return loss + functional.kl_div(out.logits.log_softmax(-1), goal, reduction="batchmean")


def test_a_distilled_student_evolves_and_the_trainers_own_attributes_are_left_alone(tmp_path: Path) -> None:
    callback = evolution({**SIZES, STREAM: 24})
    run = run_with(tmp_path, Distils, callback)
    assert callback.history is not None
    assert [event.skipped for event in callback.history.events] == [None]
    assert callback.history.events[0].sizes.items() >= {**SIZES, STREAM: 24}.items()
    assert run.model.classifier.in_features == 24
    assert (run.steps, run.seen) == (6, [16] * 6)
    assert sum("mine" in entry for entry in run.state.log_history) == 6
    assert not vars(run).get("compute_loss")
    assert run.teacher.bert.encoder.layer[0].intermediate.dense.out_features == 48


class Contrasts(Trainer):
    """Two calls of the encoder inside of the model, whose head is never called; a projection of the trainer itself."""

    def prepare(self) -> None:
        torch.manual_seed(0)
        self.projection = nn.Linear(32, 8)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        one, two = (
            functional.normalize(self.projection(model.bert(words).last_hidden_state.mean(1)), dim=-1)
            for words in (inputs["input_ids"], inputs["input_ids"].roll(1, 1))
        )
        return functional.cross_entropy(one @ two.T / 0.1, torch.arange(len(one)))


def test_networks_inside_of_a_model_that_is_not_called_itself_evolve(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback = evolution({INNER: 20})
    with caplog.at_level(logging.WARNING, "evolvenet"):
        run_with(tmp_path, Contrasts, callback)
    assert callback.history is not None
    assert [event.skipped for event in callback.history.events] == [None]
    assert callback.history.events[0].sizes == {INNER: 20}
    assert callback.evolver is not None
    widths = callback.evolver.graph.widths
    assert "a fixed size" in str(widths[STREAM].frozen), "the trainer's own projection reads it"
    assert "classifier has not run on the example inputs" in caplog.text
    assert callback.evolver.state_dict()["observed"] == 6


class ReadsHidden(Trainer):
    """A loss of the hidden states, one unit of which is more to it than the others."""

    def prepare(self) -> None:
        pass

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        inner: list[Tensor] = []
        layer = model.bert.encoder.layer[0].intermediate
        handle = layer.register_forward_hook(lambda module, args, out: inner.append(out))
        loss = model(**inputs).loss
        handle.remove()
        return loss + inner[0].softmax(-1).amax(-1).mean()


def test_what_the_loss_reads_in_a_way_that_is_tied_to_its_size_stays(tmp_path: Path) -> None:
    callback = evolution({HEADS: 5})
    run_with(tmp_path, ReadsHidden, callback)
    assert callback.evolver is not None
    assert callback.history is not None
    assert callback.history.events[0].sizes[HEADS] == 5
    assert "makes its units compete" in str(callback.evolver.graph.widths[INNER].frozen)


class Untraceable(Trainer):
    """Its loss only runs within training."""

    def prepare(self) -> None:
        pass

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss = model(**inputs).loss
        assert loss.requires_grad
        return loss


def test_a_loss_that_does_not_run_beside_training_leaves_the_model_alone_to_be_traced(tmp_path: Path) -> None:
    callback = evolution({**SIZES, STREAM: 24})
    run = run_with(tmp_path, Untraceable, callback)
    assert callback.history is not None
    assert callback.history.events[0].sizes.items() >= {**SIZES, STREAM: 24}.items()
    assert run.model.classifier.in_features == 24


def test_a_resumed_run_of_a_traced_loss_is_the_uninterrupted_one(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 5}
    whole = run_with(tmp_path, Contrasts, evolution({INNER: 20}), max_steps=8, **options)
    callback = evolution({INNER: 20})
    resumed = run_with(tmp_path, Contrasts, callback, max_steps=8, resume=str(tmp_path / "checkpoint-5"))
    assert callback.history is not None
    assert [event.step for event in callback.history.events] == [4]
    torch.testing.assert_close(resumed.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)


def test_outside_of_a_trainer_there_is_none() -> None:
    assert running_trainer() is None


class Overwrites(Trainer):
    """Clears each batch after its step, as a loader does that writes the next one into the same memory."""

    overwrites = True

    def prepare(self) -> None:
        pass

    def training_step(self, model: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
        words = inputs["input_ids"]
        loss = super().training_step(model, inputs, *rest, **options)
        if self.overwrites:
            words.zero_()
        return loss


class OverwritesOfItsOwn(Overwrites):
    """With a loss that does not call the model itself, so that batches are kept rather than its calls."""

    def compute_loss(self, model: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
        logits = model.classifier(model.bert(input_ids=inputs["input_ids"]).last_hidden_state)
        return functional.cross_entropy(logits.flatten(0, 1), inputs["labels"].flatten())


@pytest.mark.parametrize("kind", [Overwrites, OverwritesOfItsOwn])
def test_batches_that_are_kept_are_copies(
    kind: type[Overwrites], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[list[Tensor]] = []
    for overwrites in (True, False):
        monkeypatch.setattr(Overwrites, "overwrites", overwrites)
        callback = evolution({})
        run_with(tmp_path, kind, callback, max_steps=3)
        assert callback.evolver is not None
        kept.append(
            [each for each in tree_leaves(callback.evolver.state_dict()["batches"]) if isinstance(each, Tensor)]
        )
    assert len(kept[0]) >= 3
    assert all(torch.equal(one, other) for one, other in zip(*kept, strict=True))

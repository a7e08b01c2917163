"""`WidthEvolutionCallback` inside real runs of the transformers library's `Trainer`, on a BERT with random weights."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertForMaskedLM,
    BertForTokenClassification,
    EarlyStoppingCallback,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from evolvenet import MissingPackageError, PolicyError, RecordError, Threshold, Tolerance, UnsupportedStrategyError
from evolvenet.engine.history import History
from evolvenet.graph.format_version import FORMAT, FORMAT_KEY
from evolvenet.transformers.callback import WidthEvolutionCallback
from tests.helpers.policies import Fixed
from tests.helpers.transformers_runs import HEADS, INNER, SIZES, STREAM, bert, evolution, sentences, trainer


def events(callback: WidthEvolutionCallback) -> History:
    assert callback.history is not None
    return callback.history


class Watch(TrainerCallback):
    """Comes after the evolution: what stands on the model at the moments that matter to others."""

    def __init__(self, callback: WidthEvolutionCallback) -> None:
        self.callback, self.hooks, self.gradients = callback, [], []

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **unused: Any) -> None:
        self.gradients += [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **unused: Any) -> None:
        self.hooks.append(len(model._forward_pre_hooks))

    on_save = on_evaluate


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated")
@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_accumulation_steps": 3}, {"bf16": True}, {"gradient_checkpointing": True}],
    ids=["plain", "accumulation", "mixed_precision", "checkpointing"],
)
def test_widths_change_while_training(options: dict[str, Any], tmp_path: Path) -> None:
    model, callback = bert(layers=2), evolution()
    run = trainer(tmp_path, model, callback, watch := Watch(callback), **options)
    run.train()
    history = events(callback)
    assert [(event.step, event.skipped) for event in history.events] == [(4, None)]
    assert history.events[0].sizes.items() >= SIZES.items()
    assert model.classifier.in_features == 24
    assert model.bert.encoder.layer[0].attention.self.attention_head_size == 5
    assert history.events[0].parameters == sum(p.numel() for p in model.parameters()) < history.initial.parameters
    bare = run.optimizer.optimizer  # type: ignore[attr-defined]
    assert callback.evolver is not None
    assert callback.evolver.optimizers == [bare], "not accelerate's wrapper around it"
    states = bare.state
    assert all(states[p]["exp_avg"].shape == p.shape for p in model.parameters() if p in states)
    assert {parameter.grad for parameter in model.parameters()} == {None}
    assert watch.gradients == [], "an event must lie between two optimizer steps"
    # Of the first step, after which the model is traced, the first batch is kept.
    assert callback.evolver.state_dict()["observed"] == 1 + 5 * options.get("gradient_accumulation_steps", 1)
    assert not model._forward_pre_hooks
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert len(losses) == 3
    assert all(0 < loss < 10 for loss in losses)


def test_only_what_was_chosen_changes(tmp_path: Path) -> None:
    for options, expected in (
        ({"network": "bert.encoder"}, {HEADS: 5, INNER: 20}),
        ({"fixed": ["bert.embeddings", "*.self"]}, {INNER: 20}),
    ):
        trainer(tmp_path, bert(), callback := evolution(expected, **options)).train()
        assert events(callback).events[0].sizes == expected
    trainer(tmp_path, bert(), callback := evolution(multiple=16)).train()
    assert events(callback).events[0].sizes == {STREAM: 32, HEADS: 8, INNER: 32}
    with pytest.raises(PolicyError, match=r"'bert\.encode', which matches none"):
        trainer(tmp_path, bert(), evolution(network="bert.encode")).train()


def test_what_is_logged_says_the_size(tmp_path: Path) -> None:
    seen = []

    class Reads(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **unused: Any) -> None:
            seen.append(logs.get("evolve/parameters"))

    callback = evolution()
    run = trainer(tmp_path, bert(), callback, Reads())
    run.train()
    initial, after = events(callback).initial, events(callback).events[0]
    assert seen[:3] == [initial.parameters, initial.parameters, after.parameters]
    assert run.state.log_history[2]["evolve/macs"] == after.macs < initial.macs


def test_evaluation_in_the_middle_is_unharmed_and_unheard(tmp_path: Path) -> None:
    def trained(*callbacks: TrainerCallback) -> tuple[nn.Module, list[float]]:
        run = trainer(tmp_path, model := bert(), *callbacks, eval_strategy="steps", eval_steps=1)
        run.train()
        return model, [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]

    callback = evolution({})
    watch = Watch(callback)
    model, losses = trained(callback, watch)
    plain, expected = trained()
    assert losses == expected
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert watch.hooks == [0] * 6
    assert callback.evolver is not None
    assert callback.evolver.state_dict()["observed"] == 6


@pytest.mark.parametrize("kind", [BertForTokenClassification, BertForMaskedLM], ids=["separate", "tied"])
def test_a_resumed_run_is_the_uninterrupted_one(kind: type[PreTrainedModel], tmp_path: Path) -> None:
    sizes = {HEADS: 5, INNER: 20, (STREAM if kind is BertForTokenClassification else _stream_of_tied()): 24}
    whole, callback = bert(kind), evolution(sizes, start_step=3, stop=0.6)
    trainer(tmp_path, whole, callback, max_steps=8, save_strategy="steps", save_steps=6).train()

    fresh, again = bert(kind, seed=1), evolution(sizes, start_step=3, stop=0.6)
    run = trainer(tmp_path, fresh, again, max_steps=8)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert [event.step for event in events(again).events] == [4]
    assert events(again) == events(callback)
    assert fresh.bert.encoder.layer[0].attention.self.attention_head_size == 5
    for (name, one), (_, other) in zip(whole.named_parameters(), fresh.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert History.from_dict(state["stateful_callbacks"]["evolvenet"]["history"]) == events(callback)


def _stream_of_tied() -> str:
    """The word embedding of a masked language model is tied to the head, so the stream has another first producer."""
    return "bert.embeddings.token_type_embeddings"


def test_a_run_resumed_right_at_an_event_makes_up_for_it(tmp_path: Path) -> None:
    trainer(tmp_path, bert(), evolution(), max_steps=4, save_strategy="steps", save_steps=4).train()
    callback = evolution()
    trainer(tmp_path, model := bert(), callback).train(resume_from_checkpoint=True)
    assert [event.step for event in events(callback).events] == [5]
    assert model.classifier.in_features == 24


def test_callbacks_that_transformers_restores_itself_do_not_disturb(tmp_path: Path) -> None:
    options: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 5, "save_strategy": "steps", "save_steps": 5}
    stopping = {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
    trainer(tmp_path, bert(), evolution(), EarlyStoppingCallback(3), **options, **stopping).train()
    callback = evolution()
    options |= {"max_steps": 7, "restore_callback_states_from_checkpoint": True, **stopping}
    run = trainer(tmp_path, bert(), callback, EarlyStoppingCallback(3), **options)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert callback in run.callback_handler.callbacks
    assert [event.step for event in events(callback).events] == [4]


def test_the_best_checkpoint_at_the_end_has_its_own_widths_and_numbers(tmp_path: Path) -> None:
    scores = iter([3.0, 2.0, 1.0])
    model, callback = bert(), evolution({HEADS: 5, INNER: 20})
    steps = {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 3, "max_steps": 9}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "score", "greater_is_better": True}
    run = trainer(tmp_path, model, callback, **steps, **best)
    run.compute_metrics = lambda prediction: {"score": next(scores)}
    run.train()
    assert events(callback).events[-1].sizes[HEADS] == 5
    attention = model.bert.encoder.layer[0].attention.self
    assert (attention.query.out_features, attention.attention_head_size, attention.all_head_size) == (32, 8, 32)


def test_a_second_run_of_the_same_trainer_starts_afresh(tmp_path: Path) -> None:
    callback = evolution({INNER: 20})
    run = trainer(tmp_path, model := bert(), callback)
    run.train()
    run.train()
    assert events(callback).initial.sizes[INNER] == 20
    assert model.classifier.in_features == 32


def test_the_default_is_every_epoch(tmp_path: Path) -> None:
    callback = WidthEvolutionCallback(Fixed({}), stop=1.0)
    trainer(tmp_path, bert(), callback, max_steps=-1, num_train_epochs=3, per_device_train_batch_size=48).train()
    assert [event.step for event in events(callback).events] == [2, 4]


def test_example_inputs_are_traced_before_the_first_batch(tmp_path: Path) -> None:
    callback = evolution(example_inputs={name: row[None] for name, row in sentences(1)[0].items()}, every_n_steps=1)
    trainer(tmp_path, bert(), callback, max_steps=2).train()
    assert [event.sizes[INNER] for event in events(callback).events] == [20]


def test_calls_in_eval_mode_within_a_step_are_not_heard(tmp_path: Path) -> None:
    class Distils(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *unused: Any, **options: Any) -> Any:
            with torch.no_grad():
                model.eval()(inputs["input_ids"] * 0)
            return super().compute_loss(model.train(), inputs)

    callback = evolution({})
    run = trainer(tmp_path, bert(), callback, max_steps=3)
    run.__class__ = Distils
    run.train()
    assert callback.evolver is not None
    assert callback.evolver.state_dict()["observed"] == 3
    assert set(callback.evolver.example_inputs) >= {"input_ids", "attention_mask", "labels"}


def test_a_failing_event_leaves_the_run_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Breaks(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **unused: Any) -> None:
            if state.global_step == 4:
                model.bert.encoder.layer[0].output.dense.weight.data[0, 0] = float("nan")

    callback = evolution()
    with caplog.at_level(logging.WARNING, logger="evolvenet"):
        run = trainer(tmp_path, bert(), Breaks(), callback)
        run.train()
    assert run.state.global_step == 6
    assert "NaN" in str(events(callback).events[0].skipped)


@pytest.mark.parametrize(("name", "value"), [("n_gpu", 2), ("fsdp", True)])
def test_several_devices_are_refused_before_training(
    name: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    callback = evolution()
    run = trainer(tmp_path, bert(), callback)
    monkeypatch.setattr(TrainingArguments, name, value)
    run.args.__dict__.pop(name, None)
    with pytest.raises(UnsupportedStrategyError, match="CUDA_VISIBLE_DEVICES=0"):
        callback.on_train_begin(run.args, run.state, run.control, model=run.model)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"every_n_epochs": 1}, "got both"),
        ({"every_n_steps": 0}, "every_n_steps of 1 or more"),
        ({"stop": 1.5}, "0 … 1"),
        ({"calibration_batches": 0}, "calibration_batches"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(PolicyError, match=text):
        evolution(**options)


def test_the_error_of_a_missing_package_is_an_import_error() -> None:
    assert issubclass(MissingPackageError, ImportError)


def test_growth_is_asked_of_the_gradients_of_the_run_itself(tmp_path: Path) -> None:
    """The answer holds the loss beside the logits; where labels are noise next to nothing grows, else the spectrum decides."""

    def grown(certain: float) -> int:
        policy = Threshold(prune=0.0, grow=1e-4, cooldown=0, certain=certain)
        callback = WidthEvolutionCallback(policy, every_n_steps=2, stop=1.0)
        run = trainer(tmp_path, bert(), callback, max_steps=16, per_device_train_batch_size=8)
        noise = torch.Generator().manual_seed(0)
        for row in run.train_dataset:  # type: ignore[union-attr]
            row["labels"] = torch.randint(0, 3, (8,), generator=noise)
        run.train()
        assert not any(event.skipped for event in events(callback).events)
        return sum(change.after - change.before for event in events(callback).events for change in event.changes)

    assert grown(4.0) < grown(0.0) / 3


def test_a_metric_that_is_not_evaluated_is_named(tmp_path: Path) -> None:
    callback = WidthEvolutionCallback(Tolerance(metric="accuracy", drop=0.1), every_n_steps=2)
    run = trainer(tmp_path, bert(), callback, eval_strategy="steps", eval_steps=1)
    with pytest.raises(PolicyError, match=r"evaluate 'accuracy', by which cuts are judged, got .*eval_loss"):
        run.train()


def test_a_checkpoint_of_a_newer_format_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    trainer(tmp_path, bert(), evolution(), max_steps=5, save_strategy="steps", save_steps=5).train()
    path = tmp_path / "checkpoint-5" / "trainer_state.json"
    state = json.loads(path.read_text())
    state["stateful_callbacks"]["evolvenet"][FORMAT_KEY] = FORMAT + 1
    path.write_text(json.dumps(state))
    model, untouched = bert(seed=1), bert(seed=1)
    run = trainer(tmp_path, model, evolution())
    with pytest.raises(RecordError, match="WidthEvolutionCallback in the checkpoint is of format"):
        run.train(resume_from_checkpoint=True)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), untouched.parameters(), strict=True))

"""Checkpoints: the model takes their widths by itself, and a resumed run is the uninterrupted one to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, OnExceptionCheckpoint
from torch import Tensor, nn

import evolvenet
from evolvenet import IndexMap, resize
from evolvenet.errors import RecordError
from evolvenet.surgery.checkpoint import RECORD_KEY, WidthRecord, register_reshape_before_load
from tests.helpers.cases import CASES, Case, distance, graph_of, outputs
from tests.helpers.resuming import Randomness, assert_same, evolution
from tests.helpers.runs import Batches, Classifier, fresh, trainer
from tests.helpers.states import State


def everything(run: Any, model: nn.Module) -> dict[str, Any]:
    """What two runs must agree on."""
    optimizer = run.trainer.optimizers[0]
    return {
        "model": dict(model.state_dict()),
        "optimizer": optimizer.state_dict(),
        "schedule": run.trainer.lr_scheduler_configs[0].scheduler.state_dict(),
        "random": torch.random.get_rng_state(),
        "events": [(event.step, event.changes, event.sizes) for event in run.history.events],
        "graph": run.evolver.graph,
    }


class Run:
    """A fit, kept for looking at."""

    def __init__(self, folder: Path, callbacks: Any = (), ckpt: Path | None = None, **options: Any) -> None:
        self.model, self.evolution = fresh(), evolution()
        torch.manual_seed(11)
        self.trainer = trainer(folder, [Randomness(), self.evolution, *callbacks], **options)
        self.trainer.fit(self.model, Batches(), ckpt_path=ckpt, weights_only=True)
        self.history = self.evolution.history
        self.evolver = self.evolution.evolver

    @property
    def all(self) -> dict[str, Any]:
        return everything(self, self.model)


def test_a_resumed_run_is_the_uninterrupted_one_from_any_step(tmp_path: Path) -> None:
    """A checkpoint after every step: before events, in the batches they measure on, at them and after."""
    keeper = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    whole = Run(tmp_path, [keeper])
    assert [event.step for event in whole.evolution.history.events] == [8, 13, 18, 23]  # type: ignore[union-attr]
    assert all(event.changes for event in whole.evolution.history.events)  # type: ignore[union-attr]
    for step in range(1, 24):
        resumed = Run(tmp_path, ckpt=tmp_path / f"step={step}.ckpt")
        assert_same(resumed.all, whole.all)


def test_the_event_is_measured_on_the_batches_after_it_is_due_and_nothing_is_kept_between(tmp_path: Path) -> None:
    keeper = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    Run(tmp_path, [keeper])
    kept = {}
    for step in range(1, 25):
        state = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)["callbacks"].get("WidthEvolution")
        kept[step] = len(state["evolver"]["batches"]) if state else 0
    # Due at 5: batches 6, 7 and 8 (the event is before batch 9, when 8 steps are done).
    assert [kept[step] for step in (4, 5, 6, 7, 8, 9)] == [0, 0, 1, 2, 3, 0]


class Twice(Classifier):
    """Two optimizers step on every batch, which counts as two steps."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizers: Any = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self) -> Any:
        layers = self.net[:4], self.net[4:]
        return [torch.optim.AdamW(each.parameters(), lr=1e-2) for each in layers]


def test_no_event_is_lost_between_the_steps_of_several_optimizers(tmp_path: Path) -> None:
    def run(folder: Path, **options: Any) -> tuple[list[int], Tensor]:
        torch.manual_seed(5)
        model, callback = Twice(), evolution()
        keeper = ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=-1, filename="{step}")
        trainer(folder, [Randomness(), callback, keeper]).fit(model, Batches(), weights_only=True, **options)
        assert callback.history is not None
        return [event.step for event in callback.history.events], model.net[0].weight  # type: ignore[return-value]

    steps, weight = run(tmp_path)
    assert steps == [12, 22, 32, 42]
    for step in range(2, 48, 2):
        again, resumed = run(tmp_path / str(step), ckpt_path=tmp_path / f"step={step}.ckpt")
        assert again == steps
        assert torch.equal(resumed, weight)


class Breaks(lightning.Callback):
    """The first batch fails."""

    def on_before_backward(self, *args: Any, **_: Any) -> None:
        raise MemoryError


def test_a_checkpoint_in_the_first_batch_after_a_resume_knows_what_shapes_do_not_say(tmp_path: Path) -> None:
    Run(tmp_path).trainer.save_checkpoint(tmp_path / "end.ckpt")
    keeper = OnExceptionCheckpoint(tmp_path, "broken")
    with pytest.raises(MemoryError):
        Run(tmp_path, [Breaks(), keeper], ckpt=tmp_path / "end.ckpt", max_epochs=4, enable_checkpointing=True)
    states = [torch.load(tmp_path / name, weights_only=True) for name in ("end.ckpt", "broken.ckpt")]
    records = [state["state_dict"]._metadata[""][RECORD_KEY] for state in states]
    assert_same(*records)


def test_every_way_of_loading_takes_the_widths(tmp_path: Path) -> None:
    keeper = ModelCheckpoint(tmp_path, monitor="val/loss", mode="max", save_top_k=-1, save_last=True)
    light = ModelCheckpoint(tmp_path, save_weights_only=True, filename="light-{step}", every_n_train_steps=10)
    model, callback = fresh(), evolution()
    fitting = trainer(tmp_path, [callback, keeper, light])
    fitting.fit(model, Batches(), Batches(2))
    last = [layer.out_features for layer in (model.net[0], model.net[4])]  # type: ignore[union-attr]
    assert last == [6, 11]
    best = torch.load(keeper.best_model_path, weights_only=True)["state_dict"]["net.0.weight"].shape[0]
    for entry in ("test", "validate"):
        getattr(fitting, entry)(model, Batches(2), ckpt_path="best", verbose=False, weights_only=True)
        assert model.net[0].out_features == best  # type: ignore[union-attr]
    loaded = Classifier.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert type(loaded) is Classifier
    assert [loaded.net[0].out_features, loaded.net[4].out_features] == last  # type: ignore[union-attr]
    assert "load_state_dict" not in vars(type(loaded))
    weights = next(tmp_path.glob("light-*.ckpt"))
    loaded = Classifier.load_from_checkpoint(weights, weights_only=True)
    state = torch.load(weights, weights_only=True)["state_dict"]
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    plain = evolvenet.load(Classifier(), weights)
    assert all(torch.equal(tensor, state[name]) for name, tensor in plain.state_dict().items())
    trainer(tmp_path, [evolution()]).test(Classifier(), Batches(2), ckpt_path=weights, verbose=False, weights_only=True)


def test_checkpoints_of_others_load_as_ever(tmp_path: Path) -> None:
    """Without evolution, a checkpoint of other widths is the error that it always was."""
    other = trainer(tmp_path, max_epochs=1)
    other.fit(Classifier(width=8), Batches(2))
    other.save_checkpoint(tmp_path / "plain.ckpt")
    assert Classifier.load_from_checkpoint(tmp_path / "plain.ckpt", weights_only=True).hparams["width"] == 8
    with pytest.raises(RuntimeError, match="size mismatch"):
        Classifier.load_from_checkpoint(tmp_path / "plain.ckpt", width=9, weights_only=True)


class Deeper(Classifier):
    """One layer more."""

    def __init__(self) -> None:
        super().__init__()
        self.net.append(nn.Linear(3, 3))


class Imaging(Classifier):
    """Kernels where dense weights were."""

    def __init__(self) -> None:
        super().__init__()
        self.net[0] = nn.Conv1d(6, 16, 1)


@pytest.mark.parametrize(
    ("other", "message"), [(Deeper, r"net\.7\.weight"), (Imaging, r"net\.0\.weight with 3 axes.*got \(\d+, 6\)")]
)
def test_a_checkpoint_of_another_model_names_what_differs_and_changes_nothing(
    other: type[Classifier], message: str, tmp_path: Path
) -> None:
    run = Run(tmp_path)
    run.trainer.save_checkpoint(tmp_path / "run.ckpt")
    model = other()
    before = State.of(model)
    with pytest.raises((RecordError, RuntimeError), match=message):
        trainer(tmp_path, [evolution()]).fit(model, Batches(), ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    model._load_state_dict_pre_hooks.clear()
    shapes = {name: tuple(tensor.shape) for name, tensor in other().state_dict().items()}
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == shapes
    if other is Imaging:
        # The trainer that the module now belongs to, and the random numbers of making another module above.
        assert set(before.differences(model)) <= {"._trainer.0", "generators"}


def test_averages_resume_with_the_run(tmp_path: Path) -> None:
    keeper = ModelCheckpoint(tmp_path, every_n_train_steps=10, save_top_k=-1, filename="{step}")
    whole = Run(tmp_path, [EMAWeightAveraging(decay=0.9), keeper])
    for step in (10, 20):
        resumed = Run(tmp_path, [EMAWeightAveraging(decay=0.9)], ckpt=tmp_path / f"step={step}.ckpt")
        assert_same(resumed.all, whole.all)


def test_a_second_fit_goes_on(tmp_path: Path) -> None:
    run = Run(tmp_path, max_epochs=2)
    count = len(run.evolution.history.events)  # type: ignore[union-attr]
    again = trainer(tmp_path, [run.evolution], max_epochs=2)
    again.fit(run.model, Batches())
    events = run.evolution.history.events  # type: ignore[union-attr]
    assert len(events) > count
    assert run.evolution.evolver is not None
    assert run.evolution.evolver.optimizers == again.optimizers
    other = fresh()
    trainer(tmp_path, [run.evolution], max_epochs=2).fit(other, Batches())
    assert run.evolution.evolver.model is other
    assert len(run.evolution.history.events) == count  # type: ignore[union-attr]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_state_dict_with_a_width_record_restores_what_shapes_do_not_show(case: Case, tmp_path: Path) -> None:
    """Numbers of the model's own code and buffers that are not persistent."""
    model, graph = case.model(seed=3), graph_of(case)
    maps = {name: IndexMap.keep(range(1, size), size) for name, size in graph.sizes.items()
            if size - 1 >= graph.widths[name].smallest}  # fmt: skip
    graph = resize(model, graph, maps)
    outer, other = nn.ModuleDict({"inner": model}), nn.ModuleDict({"inner": case.model()})
    handle = WidthRecord.of(model, graph, "inner").register(outer)
    torch.save(outer.state_dict(), tmp_path / "file.pt")
    handle.remove()
    state = torch.load(tmp_path / "file.pt", weights_only=True)
    register_reshape_before_load(other)
    other.load_state_dict(state)
    assert distance(outputs(other["inner"], case.inputs()), outputs(model, case.inputs())) == 0
    alone = evolvenet.load(case.model(), tmp_path / "file.pt")
    assert distance(outputs(alone, case.inputs()), outputs(model, case.inputs())) == 0

"""A Lightning run of a factorized network prunes its ranks, with averages of the weights, and resumes to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn

import evolvenet
from evolvenet import Threshold, WidthEvolution
from evolvenet.engine.history import History
from evolvenet.report import draw, summary_rows, write_report
from tests.helpers.resuming import Randomness, assert_same
from tests.helpers.runs import Batches, Classifier, trainer


def factorized() -> Classifier:
    torch.manual_seed(5)
    model = Classifier(width=24)
    evolvenet.factorize(model, {"net.0": 4, "net.4": 10})
    return model


def run(folder: Path, callbacks: Any = (), ckpt: Path | None = None) -> tuple[Classifier, WidthEvolution]:
    model = factorized()
    evolution = WidthEvolution(
        Threshold(prune=0.5), every_n_steps=5, calibration_batches=3, fixed=["net.0.1", "net.4.1"]
    )
    torch.manual_seed(11)
    fitting = trainer(folder, [Randomness(), evolution, *callbacks])
    fitting.fit(model, Batches(), ckpt_path=ckpt, weights_only=True)
    return model, evolution


def state_of(model: Classifier) -> dict[str, Any]:
    optimizer = model.trainer.optimizers[0]
    return {"weights": dict(model.state_dict()), "optimizer": optimizer.state_dict()["state"]}


def test_ranks_are_pruned_with_averages_and_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    keeper = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    whole, evolution = run(tmp_path, [keeper, EMAWeightAveraging(decay=0.9)])
    assert evolution.history is not None
    events = [event for event in evolution.history.events if event.changes]
    assert events
    assert all(event.skipped is None for event in evolution.history.events)
    assert {change.width for event in events for change in event.changes} <= {"net.0.0", "net.4.0"}
    chain = whole.net[4]
    assert chain.ranks[0] == evolution.history.events[-1].sizes["net.4.0"] < 10  # pyright: ignore
    assert isinstance(chain[0], nn.Linear)  # pyright: ignore
    first = events[0].step
    for step in (first - 4, first - 1, first, first + 1):
        resumed, _ = run(tmp_path, [EMAWeightAveraging(decay=0.9)], ckpt=tmp_path / f"step={step}.ckpt")
        assert_same(state_of(resumed), state_of(whole))


def test_the_history_of_a_run_shows_ranks_apart_from_widths(tmp_path: Path) -> None:
    _, evolution = run(tmp_path)
    history = evolution.history
    assert history is not None
    assert {"net.0.0": "net.0", "net.4.0": "net.4"}.items() <= history.ranks.items()
    assert not {"net.0.1", "net.4.1"} & set(history.ranks)
    names = [row[0] for row in summary_rows(history)]
    assert [name for name in names if name.startswith("rank of ")] == ["rank of net.0", "rank of net.4"] == names[-2:]
    assert "rank of net.4" in str(history)
    assert History.from_dict(history.to_dict()) == history
    older = {key: value for key, value in history.to_dict().items() if key != "ranks"}
    assert History.from_dict(older).ranks == {}
    panels = [panel.get_ylabel() for panel in draw(history).axes]
    assert panels[-1] == "ranks"
    write_report(history, tmp_path / "report", "ranks")

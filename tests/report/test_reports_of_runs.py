"""`report` after a run of Lightning, of transformers' Trainer and of a plain loop: what each knows is on the page."""

import copy

import pytest
import torch
from torch import nn

import evolvenet
from evolvenet.engine.run_curves import RunCurves
from evolvenet.errors import EvolveNetError
from evolvenet.report.facts import recorded_command, run_facts
from tests.helpers.runs import Batches, fresh, trainer


def evolution(**options):
    policy = evolvenet.Threshold(prune=0.5, start=0.0)
    return evolvenet.WidthEvolution(policy, every_n_steps=4, calibration_batches=2, **options)


def test_a_run_of_lightning_reports_its_own_curves_policy_and_time(tmp_path):
    callback = evolution(seed=3, start_step=9)
    with pytest.raises(EvolveNetError, match="got none so far"):
        callback.report(tmp_path)
    run = trainer(tmp_path, [callback], max_epochs=3)
    run.fit(fresh(), Batches(), Batches(count=2))
    curves = callback.curves.read()
    assert [step for step, _ in curves["val/loss"]] == [8, 16, 24]
    assert {"train/loss", "val/loss"} == set(curves)
    page = callback.report(tmp_path / "report", "Mine", facts={"test accuracy": "97 %"}).read_text("utf-8")
    for text in ("Mine", "val/loss", "97 %", "Threshold(prune=0.5", "every_n_steps", "before the first change", "Wall clock",
                 "training and all else", "evolvenet 0", "Spectra", "Dotted", "outputs moved by"):  # fmt: skip
        assert text in page, text
    page = callback.report(tmp_path / "again", baselines={"val/loss": 0.125}).read_text("utf-8")
    assert "start network 0.125" in page
    assert callback.history is not None
    assert callback.curves.seconds >= sum(event.seconds for event in callback.history.events)


def test_a_resumed_run_reports_the_curves_of_all_its_parts(tmp_path):
    whole = evolution()
    trainer(tmp_path, [whole], max_epochs=3).fit(fresh(), Batches(), Batches(count=2))
    first, second = evolution(), evolution()
    run = trainer(tmp_path, [first], max_epochs=2)
    run.fit(fresh(), Batches(), Batches(count=2))
    run.save_checkpoint(tmp_path / "last.ckpt")
    half = trainer(tmp_path, [second], max_epochs=3)
    half.fit(fresh(), Batches(), Batches(count=2), ckpt_path=tmp_path / "last.ckpt")
    steps = {name: [step for step, _ in curve] for name, curve in whole.curves.read().items()}
    assert {name: [step for step, _ in curve] for name, curve in second.curves.read().items()} == steps
    assert second.curves.seconds > first.curves.seconds


def test_a_plain_loop_reports_at_any_time(tmp_path):
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2))
    evolver = evolvenet.Evolver(model, None, evolvenet.Budget(params=80), torch.zeros(1, 6), fixed=["head*"] * 0)
    before = copy.deepcopy(evolver.history)
    page = evolver.report(tmp_path).read_text("utf-8")
    assert "no width changed" in page
    assert "Budget(params=80" in page
    evolver.observe(torch.randn(64, 6))
    evolver.step()
    assert evolver.history.initial == before.initial
    page = evolver.report(tmp_path, metrics={"accuracy": [(0, 0.5), (1, float("nan"))]}, seconds=9.0).read_text("utf-8")
    assert "<details>" in page
    assert "9.0 s" in page


def test_curves_take_numbers_alone_and_the_last_of_a_step():
    curves = RunCurves()
    curves.add(1, {"a": torch.tensor(0.25), "b": torch.zeros(2), "c": "text", "d": True, "evolve/x": 1.0})
    curves.add(1, {"a": 0.5})
    curves.add(2, {"a": torch.tensor([2.0]), "e": float("inf")})
    assert curves.read() == {"a": [(1, 0.5), (2, 2.0)]}
    again = RunCurves()
    again.load_state_dict(curves.state_dict())
    again.add(3, {"a": 1})
    assert again.read() == {"a": [(1, 0.5), (2, 2.0), (3, 1.0)]}


def test_facts_name_no_secret_and_no_folder_of_the_machine(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["/somewhere/else/train.py", "--api-key", "s3cret", "logger.token=s3cret", "lr=1"])
    facts = run_facts()
    assert facts["command"] == "train.py --api-key '***' 'logger.token=***' lr=1"
    assert "commit" not in facts, "of a folder that is no repository"
    assert f"torch {torch.__version__.partition('+')[0]}" in facts["versions"]
    assert "cores" in facts["machine"]
    assert recorded_command(["a.py", "--token=x"]) == "a.py '--token=***'"


def test_commands_name_no_user(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/alice")
    monkeypatch.setenv("USERPROFILE", "/home/alice")
    monkeypatch.chdir(tmp_path)
    words = [
        "data.root=/home/alice/x",
        f"{tmp_path}/a,{tmp_path}",
        "url=https://alice:pw@host/x",
        "/home/alicex",
        "/mnt/home/alice",
    ]
    shown = recorded_command(words)
    assert shown == "'data.root=~/x' ./a,. 'url=https://***@host/x' /home/alicex /mnt/home/alice"

"""`Tolerance`: cuts that cost too much are taken back, exactly; those that do not, stay."""

from __future__ import annotations

import copy
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

import evolvenet
from evolvenet import Evolver, PolicyError, Tolerance, WidthEvolution
from evolvenet.engine import evolver_cuts
from evolvenet.engine.distributed import SingleProcess
from evolvenet.engine.snapshot import Snapshot
from evolvenet.measurement.cost import parameters
from evolvenet.policies.base import PolicyContext
from tests.helpers.resuming import Randomness
from tests.helpers.runs import Batches, Classifier, trainer


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 16, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 3),
    )  # fmt: skip


class Loop:
    """A training loop on random pictures, with an average of the weights that goes along."""

    def __init__(self, policy: Any, make: Any = torch.optim.AdamW, **options: Any) -> None:
        self.model = network()
        self.average = copy.deepcopy(self.model)
        self.optimizer = make(self.model.parameters(), lr=1e-2, **options)
        self.x, self.y = torch.randn(64, 1, 8, 8), torch.randint(0, 3, (64,))
        self.evolver = Evolver(self.model, self.optimizer, policy, self.x[:1], copies=[self.average])

    def train(self, steps: int = 3) -> None:
        for _ in range(steps):
            self.evolver.observe(self.x)
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.model(self.x), self.y).backward()
            self.optimizer.step()
        self.average(self.x)

    def everything(self) -> dict[str, Any]:
        state = self.optimizer.state_dict()["state"]
        return copy.deepcopy(
            {
                **{f"model.{name}": tensor for name, tensor in self.model.state_dict().items()},
                **{f"average.{name}": tensor for name, tensor in self.average.state_dict().items()},
                **{f"{place}.{name}": value for place, entry in state.items() for name, value in entry.items()},
            }
        )


def assert_equal(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]) if isinstance(value, Tensor) else value == two[name], name


OPTIMIZERS = [
    (torch.optim.AdamW, {}),
    (torch.optim.SGD, {"momentum": 0.9}),
    (torch.optim.Adafactor, {}),
]


@pytest.mark.parametrize(("make", "options"), OPTIMIZERS)
def test_a_cut_that_costs_too_much_is_taken_back_bit_for_bit(make: Any, options: dict[str, Any]) -> None:
    loop = Loop(Tolerance(metric="acc", drop=0.01, share=0.4, validations=1), make, **options)
    loop.train()
    assert loop.evolver.step().changes == (), "nothing is cut before the first validation"
    assert loop.evolver.judge(0.9) is None
    before, sizes, identity = loop.everything(), loop.evolver.graph.sizes, list(loop.model.parameters())
    cut = loop.evolver.step()
    assert cut.parameters < 0.75 * cut.parameters_before
    loop.train()
    loop.optimizer.param_groups[0]["lr"] = 3e-3  # A schedule has gone on.
    back = loop.evolver.judge(0.85)
    assert back is not None
    assert [(c.width, c.after, c.before) for c in back.changes] == [(c.width, c.before, c.after) for c in cut.changes]
    assert "taken back: 0.85 after the cut, 0.9 before" in back.changes[0].reason
    assert_equal(before, loop.everything())
    assert loop.evolver.graph.sizes == sizes
    assert all(one is two for one, two in zip(identity, loop.model.parameters(), strict=True))
    assert loop.optimizer.param_groups[0]["lr"] == 3e-3
    assert loop.evolver.history.events[-1] is back
    loop.train()  # And it can be trained on.


def test_where_macs_cannot_be_counted_after_a_rollback_all_ranks_go_on_and_warn(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*given: Any) -> int:
        raise ValueError("no count here")

    loop = Loop(Tolerance(metric="acc", drop=0.01, share=0.4, validations=1))
    loop.train()
    loop.evolver.judge(0.9)
    sizes, cut = loop.evolver.graph.sizes, loop.evolver.step()
    monkeypatch.setattr(evolver_cuts, "macs", fails)
    agreed: list[str | None] = []
    gather = SingleProcess.all_gather
    monkeypatch.setattr(SingleProcess, "all_gather", lambda group, value: agreed.append(value) or gather(group, value))
    back = loop.evolver.judge(0.85)
    assert back is not None
    assert loop.evolver.graph.sizes == sizes
    assert back.skipped is None
    assert back.macs == cut.macs
    assert "ValueError: no count here" in agreed, "what failed on one rank is known to the others"
    assert "multiply-accumulates are recorded as last counted: no count here" in caplog.text
    assert loop.evolver.off is None


def test_a_cut_within_the_tolerance_stays_and_the_best_is_that_of_kept_networks() -> None:
    loop = Loop(Tolerance(metric="acc", drop=0.01, validations=1))
    loop.train()
    assert loop.evolver.judge(0.9) is None
    first = loop.evolver.step()
    assert first.changes
    assert loop.evolver.step().changes == (), "a cut is pending"
    assert loop.evolver.judge(0.895) is None
    assert loop.evolver.step().parameters < first.parameters
    assert loop.evolver.judge(0.889) is not None, "0.9 is still the best"


def test_widths_that_failed_are_left_alone_for_longer_each_time_and_cuts_get_smaller() -> None:
    """Whatever is cut costs too much: attempts become rare, the network stays what it was, and nothing flaps."""
    loop = Loop(Tolerance(metric="acc", drop=0.0, patience=2, validations=1))
    loop.train()
    loop.evolver.judge(0.9)
    size, tried, saved = parameters(loop.model), [], []
    for event in range(40):
        loop.train(1)
        done = loop.evolver.step()
        if done.changes:
            tried.append((event, {change.width for change in done.changes}))
            saved.append(done.parameters_before - done.parameters)
            assert loop.evolver.judge(0.5) is not None
    assert parameters(loop.model) == size
    for (one, widths), (two, others) in pairwise(tried):
        assert two - one > 1 or not widths & others
    assert len([event for event, _ in tried if event >= 20]) < len([event for event, _ in tried if event < 20])
    assert saved[-1] < saved[0] / 4


@pytest.mark.parametrize("mode", ["max", "min"])
def test_the_direction_of_the_metric(mode: Any) -> None:
    policy = Tolerance(metric="loss", drop=0.1, mode=mode, validations=1)
    pending = policy.record(policy.judge(None, 1.0).state, ["a"])
    worse = 0.85 if mode == "max" else 1.15
    assert policy.judge(pending, worse).verdict == "undo"
    assert policy.judge(pending, 2 - worse).verdict == "keep"
    assert policy.judge(pending, math.nan).verdict == "undo"
    assert policy.judge(None, math.nan).state["best"] is None


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.floats(0, 0.2), st.integers(1, 3))
def test_a_kept_network_is_never_worse_than_the_best_by_more_than_the_tolerance(
    values: list[float], drop: float, validations: int
) -> None:
    policy = Tolerance(metric="acc", drop=drop, validations=validations)
    state, best = None, -math.inf
    for value in values:
        was_pending, before = bool(state and state["pending"]), copy.deepcopy(state)
        judgement = policy.judge(state, value)
        assert state == before, "a state is never changed in place"
        state = judgement.state
        if judgement.verdict == "keep":
            assert not was_pending or value >= best - drop - 1e-12
            best = max(best, value)
            state = policy.record(state, ["a", "b"])
        elif judgement.verdict == "undo":
            assert value < best - drop
            assert state["share"] < policy.share
        assert state["best"] is None or state["best"] == best
        assert json.loads(json.dumps(state)) == state, "plain data"


def test_a_cut_is_undone_only_after_the_last_of_its_validations() -> None:
    policy = Tolerance(metric="acc", drop=0.0, validations=3)
    begun = policy.record(policy.judge(None, 0.9).state, ["a"])
    for values in ([(0.1, "wait"), (0.2, "wait"), (0.8, "undo")], [(0.1, "wait"), (0.9, "keep")], [(0.95, "keep")]):
        state = begun
        for value, verdict in values:
            judgement = policy.judge(state, value)
            assert judgement.verdict == verdict
            state = judgement.state


@pytest.mark.parametrize(
    "wrong",
    [
        {"drop": -1},
        {"share": 2},
        {"mode": "up"},
        {"cost": "joules"},
        {"metric": ""},
        {"validations": 0},
        {"patience": -1},
    ],
)
def test_arguments_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(PolicyError, match="Tolerance: expected"):
        Tolerance(**{"metric": "val/acc", "drop": 0.002, **wrong})


def test_what_cannot_be_taken_back_stays_and_the_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(Tolerance(metric="acc", drop=0.0, share=0.4, validations=1))
    loop.train()
    loop.evolver.judge(0.9)
    loop.evolver.step()
    loop.train()
    now, sizes = loop.everything(), loop.evolver.graph.sizes

    def fails(*args: Any, **rest: Any) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr("evolvenet.engine.snapshot.validate", fails)
    done = loop.evolver.judge(0.5)
    assert done is not None
    assert done.skipped == "rollback failed: boom"
    assert done.changes == ()
    assert_equal(now, loop.everything())
    assert loop.evolver.graph.sizes == sizes


def test_a_snapshot_holds_what_no_state_dict_has() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()
            self.register_buffer("seen", torch.zeros(1, dtype=torch.int64), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    model = Counting()
    past = Snapshot.of(model, evolvenet.trace(model, torch.zeros(1, 1, 8, 8)), [])
    model.get_buffer("seen").add_(5)
    past.restore(model, [])
    assert int(model.get_buffer("seen")) == 0


class Judged(Classifier):
    """Its validation metric is what the test says."""

    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.values = values

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/acc", self.values[min(self.current_epoch, len(self.values) - 1)])

    def train_dataloader(self) -> Batches:
        return Batches()

    def val_dataloader(self) -> Batches:
        return Batches(1)


def evolution() -> WidthEvolution:
    policy = Tolerance(metric="val/acc", drop=0.01, share=0.3, validations=1)
    return WidthEvolution(policy, every_n_epochs=1, calibration_batches=2, stop=1.0)


def test_in_a_lightning_run_the_cut_of_a_bad_epoch_is_taken_back(tmp_path: Path) -> None:
    callback = evolution()
    fitting = trainer(tmp_path, [callback], max_epochs=5)
    model = Judged([0.9, 0.9, 0.5, 0.9, 0.9])
    fitting.fit(model)
    assert callback.history is not None
    kinds = ["cut" if e.parameters < e.parameters_before else "back" for e in callback.history.events if e.changes]
    assert kinds[:3] == ["cut", "cut", "back"]
    assert parameters(model.net) == callback.history.events[-1].parameters


def test_the_last_cut_is_judged_at_the_end_of_the_run(tmp_path: Path) -> None:
    callback = evolution()
    fitting = trainer(tmp_path, [callback], max_epochs=2)
    model = Judged([0.9, 0.5])
    size = parameters(model.net)
    fitting.fit(model)
    assert callback.history is not None
    assert "taken back" in callback.history.events[-1].changes[0].reason
    assert parameters(model.net) == size


def test_a_metric_that_is_not_logged_is_named(tmp_path: Path) -> None:
    callback = WidthEvolution(Tolerance(metric="accuracy", drop=0.01), every_n_epochs=1)
    with pytest.raises(PolicyError, match=r"to log 'accuracy'.*got .*val/acc"):
        trainer(tmp_path, [callback], max_epochs=1).fit(Judged([0.9]))


def test_a_resumed_run_judges_and_takes_back_as_the_uninterrupted_one(tmp_path: Path) -> None:
    """From a checkpoint at every step: before cuts, while they wait for their judgement, and after.

    At an epoch's last step one is saved before the validation, which Lightning does not run again after a resume: there
    the one is taken that is saved after the validation.
    """
    within = ModelCheckpoint(tmp_path / "within", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    after = ModelCheckpoint(tmp_path / "after", save_on_train_epoch_end=False, save_top_k=-1, filename="{step}")

    def fit(path: Path | None, *callbacks: Any) -> tuple[Judged, WidthEvolution]:
        torch.manual_seed(3)
        model, callback = Judged([0.9, 0.9, 0.5, 0.9, 0.5]), evolution()
        trainer(tmp_path, [Randomness(), callback, *callbacks], max_epochs=5).fit(model, Batches(), ckpt_path=path)
        return model, callback

    whole, callback = fit(None, within, after)
    assert callback.history is not None
    for step in range(1, 40):
        resumed, other = fit(tmp_path / ("within" if step % 8 else "after") / f"step={step}.ckpt")
        assert other.history is not None
        assert [e.changes for e in callback.history.events] == [e.changes for e in other.history.events], step
        for (name, one), two in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
            assert torch.equal(one, two), (step, name)


def test_a_block_may_lose_a_twentieth_of_the_share_while_nothing_is_judged_and_it_is_free() -> None:
    policy = Tolerance(metric="acc", drop=0.0, share=0.4, validations=1, patience=2, depth=True)

    def allowed(state: Any, path: str) -> float:
        context = PolicyContext(None, 0.5, {}, state=state)  # type: ignore[arg-type]
        return policy.block_loss(context, path, lambda _: 1.0, lambda _: 0.0)

    assert allowed(None, "one") == -math.inf, "no validation yet"
    state = policy.judge(None, 0.9).state
    assert allowed(state, "one") == pytest.approx(0.02)
    state = policy.record(state, ["one"])
    assert allowed(state, "two") == -math.inf, "a cut is judged"
    state = policy.judge(state, 0.5).state
    assert (allowed(state, "one"), allowed(state, "two")) == (-math.inf, pytest.approx(0.01))
    for _ in range(2):
        assert allowed(state, "one") == -math.inf
        state = policy.record(state, [])
    assert allowed(state, "one") == pytest.approx(0.01)

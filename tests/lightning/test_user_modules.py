"""Things that users do in their own modules while widths change, none of which may crash or come out otherwise."""

from __future__ import annotations

import gc
import random
from collections import defaultdict
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
import torchmetrics
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from evolvenet import Evolver, TraceError, WidthEvolution
from tests.helpers.policies import ShrinkThenGrow
from tests.helpers.runs import Batches, User, trainer


def fit(tmp_path: Path, model: lightning.LightningModule, data: Any = None, **options: Any) -> WidthEvolution:
    """Through three events or more, each of which changes something."""
    settings = {"every_n_steps": 5, "calibration_batches": 2, "stop": 1.0, **options.pop("evolution", {})}
    evolution = WidthEvolution(ShrinkThenGrow(), **settings)
    validation = options.pop("validation", None)
    run = trainer(tmp_path, [*options.pop("callbacks", []), evolution], **options)
    run.fit(model, data or Batches(size=48), validation)
    assert evolution.history is not None
    assert [event.skipped for event in evolution.history.events if event.skipped] == []
    assert sum(bool(event.changes) for event in evolution.history.events) >= 3
    return evolution


class Logs(User):
    """Logs what its network answers where it answers."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)
        self.log("activity", out.abs().mean(), prog_bar=True)
        self.log_dict({"one": 1.0})
        return out


def test_what_forward_logs_is_of_training_alone(tmp_path: Path) -> None:
    logger, model = CSVLogger(tmp_path), Logs()
    run = fit(tmp_path, model, logger=logger, enable_progress_bar=True)
    assert run.history is not None
    assert "log" not in vars(model)
    lines = Path(logger.log_dir, "metrics.csv").read_text("utf-8").splitlines()
    place = lines[0].split(",").index("activity")
    assert sum(bool(line.split(",")[place]) for line in lines[1:]) == 24


class Counts(User):
    """Writes to everything that a forward pass can reach."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.sizes, self.groups = 0, [0][:0], defaultdict(list)
        self.total, self.metric = torch.zeros(()), torchmetrics.MeanMetric()
        self.register_buffer("hidden", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.sizes.append(len(x))
        self.groups["x"].append(len(x))
        self.total += 1
        self.hidden += 1
        self.metric.update(torch.ones(()))
        return self.net(x) * (1.0 + 0.0 * random.random() + 0.0 * np.random.rand())


def test_what_forward_counts_is_of_training_alone(tmp_path: Path) -> None:
    model = Counts()
    random.seed(0)
    np.random.seed(0)
    fit(tmp_path, model)
    drawn = random.random(), np.random.rand()
    random.seed(0)
    np.random.seed(0)
    for _ in range(24):
        _ = random.random(), np.random.rand()
    assert drawn == (random.random(), np.random.rand())
    assert (model.count, len(model.sizes), len(model.groups["x"])) == (24, 24, 24)
    assert [float(each) for each in (model.total, model.hidden, model.metric.weight)] == [24.0, 24.0, 24.0]


class Recorder:
    """Keeps what went by."""

    def __init__(self) -> None:
        self.calls, self.kept = 0, [torch.zeros(0)][:0]

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.calls += 1
        self.kept.append(output)

    def bound(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self(module, args, output)


EVERYWHERE: list[Tensor] = []


def into_a_global(module: nn.Module, args: Any, output: Tensor) -> None:
    EVERYWHERE.append(output)


class Records(User):
    """A loss over what hooks have recorded, emptied after each step."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        closed: list[Tensor] = []
        count = 0
        recorder, self.own = Recorder(), [torch.zeros(0)][:0]

        def into_a_cell(module: nn.Module, args: Any, output: Tensor) -> None:
            nonlocal count
            count += 1
            closed.append(output)

        hook: Any = {
            "closure": into_a_cell,
            "object": recorder,
            "method": recorder.bound,
            "module": lambda module, args, output: self.own.append(output),
            "global": into_a_global,
        }[kind]
        EVERYWHERE.clear()
        kept = {"closure": closed, "module": self.own, "global": EVERYWHERE}.get(kind, recorder.kept)
        self.kept: Callable[[], list[Tensor]] = lambda: kept
        self.calls = lambda: {"closure": count}.get(kind, recorder.calls)
        self.net[2].register_forward_hook(hook)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        assert len(self.kept()) == 1
        loss = loss + self.kept()[0].abs().mean()
        self.kept().clear()
        return loss


@pytest.mark.parametrize("kind", ["closure", "object", "method", "module", "global"])
def test_what_hooks_record_is_of_training_alone(kind: str, tmp_path: Path) -> None:
    model = Records(kind)
    fit(tmp_path, model)
    assert model.calls() in {24, 0}


class MakesItsOptimizerAnew(User):
    """In the second epoch, as after thawing a backbone."""

    def on_train_epoch_start(self) -> None:
        if self.trainer.current_epoch == 1:
            self.trainer.optimizers = [torch.optim.Adam(self.parameters(), lr=1e-3)]


class KeepsAnOptimizer(User):
    """Steps a part of its network with an optimizer that the trainer does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.own = torch.optim.Adam(self.net[4:].parameters(), lr=1e-2)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.own.step()

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.own.zero_grad()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.net[:4].parameters(), lr=1e-2)


def test_an_optimizer_made_anew_goes_along(tmp_path: Path) -> None:
    model = MakesItsOptimizerAnew()
    evolution = fit(tmp_path, model)
    assert evolution.evolver is not None
    assert evolution.evolver.optimizers == model.trainer.optimizers
    assert len(model.trainer.optimizers[0].state) == len(list(model.parameters()))


def test_an_optimizer_of_the_module_goes_along(tmp_path: Path) -> None:
    model = KeepsAnOptimizer()
    fit(tmp_path, model)
    assert len(model.own.state) == 4


def test_a_step_may_skip_batches(tmp_path: Path) -> None:
    class Skips(User):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx % 3 == 0 else super().training_step(batch, batch_idx)

    fit(tmp_path, Skips())


class Perceptual(User):
    """A frozen network in eval mode judges the trained one's answers, gradients running through it."""

    def __init__(self) -> None:
        super().__init__()
        self.judge = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 5)).eval().requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        out = self.net(batch[0])
        return nn.functional.cross_entropy(out, batch[1]) + 0.01 * self.judge(out).square().mean()


def test_a_frozen_network_beside_the_trained_one_is_passed_over(tmp_path: Path) -> None:
    evolution = fit(tmp_path, model := Perceptual())
    assert evolution.history is not None
    assert list(evolution.history.initial.sizes) == ["0", "4"]
    assert model.judge[0].weight.shape == (5, 3)


def test_a_part_of_the_network_may_have_another_name(tmp_path: Path) -> None:
    model = User()
    model.head = model.net[6]
    model.training_step = lambda batch, batch_idx: model.net(batch[0]).square().mean()  # type: ignore[method-assign]
    fit(tmp_path, model)
    assert model.head.in_features == model.net[4].out_features


def test_two_trained_networks_or_a_shared_weight_evolve_with_the_whole_step(tmp_path: Path) -> None:
    both, shared = Perceptual(), User()
    both.judge.requires_grad_(True)
    shared.tied = nn.Linear(16, 3)
    shared.tied.weight = shared.net[6].weight  # type: ignore[assignment]
    shared.training_step = lambda batch, batch_idx: shared.net(batch[0]).square().mean()  # type: ignore[method-assign]
    for model in (both, shared):
        evolution = fit(tmp_path, model)
        assert evolution.history is not None
        assert "net.0" in evolution.history.initial.sizes


class InEval(User):
    """Trains a network that it keeps in eval mode: norms stay as they were."""

    def on_train_epoch_start(self) -> None:
        self.net.eval()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        assert not self.net[1].training
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        with torch.enable_grad():
            self.net(torch.full((4, 6), 1e6))


def test_a_network_kept_in_eval_mode_evolves_on_training_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    observe = Evolver.observe

    def watched(self: Evolver, x: torch.Tensor, *more: Any, **options: Any) -> None:
        seen.append(float(x.abs().max()))
        observe(self, x, *more, **options)

    monkeypatch.setattr(Evolver, "observe", watched)
    fit(tmp_path, model := InEval(), validation=Batches(2), val_check_interval=1, inference_mode=False)
    assert len(seen) >= 6
    assert max(seen) < 100
    assert not model.net._forward_pre_hooks


def test_what_is_copied_or_pickled_while_listening_is_deaf(tmp_path: Path) -> None:
    copies: list[Any] = []

    class Copies(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any, **_: Any) -> None:
            hooks = list(pl_module._forward_pre_hooks.values())
            if hooks:
                copies.append(deepcopy(hooks[-1]))
                torch.save(pl_module.net, tmp_path / "net.pt")
                torch.save(hooks, tmp_path / "hooks.pt")

    fit(tmp_path, User(), callbacks=[Copies()])
    assert len(copies) > 3
    assert all(copied.calls is None for copied in copies)
    assert all(ear.calls is None for ear in torch.load(tmp_path / "hooks.pt", weights_only=False))


def test_no_batch_stays_in_memory() -> None:
    """Not even its storage: a view of two samples would keep all of it."""
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    evolver = Evolver(model, None, ShrinkThenGrow(), torch.randn(500, 6))
    evolver.observe(torch.randn(500, 6))
    evolver.step()
    evolver.forget()
    gc.collect()
    assert evolver.example_inputs.untyped_storage().nbytes() == 2 * 6 * 4


def test_packed_sequences_are_refused_with_the_remedy() -> None:
    model = nn.LSTM(6, 8, batch_first=True)
    packed = nn.utils.rnn.pack_sequence([torch.randn(3, 6), torch.randn(2, 6)])
    with pytest.raises(TraceError, match="got a PackedSequence"):
        Evolver(model, None, ShrinkThenGrow(), packed)

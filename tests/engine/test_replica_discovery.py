"""Copies of the network inside of the user's own module go through its changes, or say why nothing changes."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import evolvenet
from evolvenet import TraceError, WidthEvolution
from evolvenet.policies.base import PolicyContext, Proposal
from tests.helpers.policies import ShrinkThenGrow
from tests.helpers.runs import Batches, User, batch, trainer
from tests.helpers.stages import failing


def fit(
    tmp_path: Path,
    model: lightning.LightningModule,
    others: Any = (),
    copies: dict[str, str] | None = None,
    ckpt: Path | None = None,
    policy: Any = None,
    **options: Any,
) -> WidthEvolution:
    evolution = WidthEvolution(
        policy or ShrinkThenGrow(), every_n_steps=5, calibration_batches=2, stop=1.0, copies=copies
    )
    run = trainer(tmp_path, [*others, evolution], **options)
    run.fit(model, Batches(size=48), ckpt_path=ckpt, weights_only=True)
    return evolution


def changed(evolution: WidthEvolution, at_least: int = 3) -> None:
    assert evolution.history is not None
    assert [event.skipped for event in evolution.history.events if event.skipped] == []
    assert sum(bool(event.changes) for event in evolution.history.events) >= at_least


def reasons(evolution: WidthEvolution) -> set[str | None]:
    assert evolution.history is not None
    return {event.skipped for event in evolution.history.events}


def follows(copy: nn.Module, source: nn.Module) -> None:
    """The same shapes and numbers, and not far from what the source answers."""
    shapes = [tuple(tensor.shape) for tensor in source.state_dict().values()]
    assert [tuple(tensor.shape) for tensor in copy.state_dict().values()] == shapes
    assert [part.extra_repr() for part in copy.modules()] == [part.extra_repr() for part in source.modules()]
    x = batch(999)[0]
    with torch.no_grad():
        assert torch.corrcoef(torch.stack([copy.eval()(x).flatten(), source.eval()(x).flatten()]))[0, 1] > 0.9


class Teacher(User):
    """Learns from a moving average of itself; the average is made before the network in one kind, after it in the other."""

    def __init__(self, call: str = "self", first: bool = False) -> None:
        super().__init__()
        self.call = call
        net = self.net
        if first:
            del self.net
        self.teacher = deepcopy(net).requires_grad_(False)
        self.net = net

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.no_grad():
            goal = self.teacher(batch[0])
        out = self(batch[0]) if self.call == "self" else self.net(batch[0])
        return nn.functional.cross_entropy(out, batch[1]) + 0.1 * nn.functional.mse_loss(out, goal)

    def on_train_batch_end(self, *args: Any, **_: Any) -> None:
        with torch.no_grad():
            for kept, new in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                kept.lerp_(new, 0.3)


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("call", ["self", "network"])
def test_a_momentum_teacher_goes_along(call: str, first: bool, tmp_path: Path) -> None:
    model = Teacher(call, first)
    changed(fit(tmp_path, model))
    follows(model.teacher, model.net)


class Average(User):
    """Torch's own average, in the optimizer too, as `self.parameters()` puts it there."""

    def __init__(self) -> None:
        super().__init__()
        self.ema = AveragedModel(self.net)

    def on_train_batch_end(self, *args: Any, **_: Any) -> None:
        self.ema.update_parameters(self.net)


def test_an_averaged_model_goes_along(tmp_path: Path) -> None:
    model = Average()
    changed(fit(tmp_path, model))
    shapes = [parameter.shape for parameter in model.net.parameters()]
    assert [parameter.shape for parameter in model.ema.module.parameters()] == shapes


class Critics(User):
    """Two critics of one shape, each with a target that takes its weights now and then."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (nn.Sequential(nn.Linear(6, 14), nn.ReLU(), nn.Linear(14, 3)) for _ in range(2))
        self.targets = nn.ModuleList([deepcopy(self.one), deepcopy(self.two)])
        del self.net

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + self.two(x)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % 3 == 1:
            self.targets[0].load_state_dict(self.one.state_dict())
            self.targets[1].load_state_dict(self.two.state_dict())


def test_each_target_follows_its_own_critic(tmp_path: Path) -> None:
    model = Critics()
    evolution = fit(tmp_path, model)
    changed(evolution)
    assert evolution._replicas is not None
    assert evolution._replicas.moved == {"targets.0": "one", "targets.1": "two"}


def test_one_of_which_the_source_is_not_known_leaves_all_as_it_is(tmp_path: Path) -> None:
    class Lost(Critics):
        def __init__(self) -> None:
            super().__init__()
            for parameter in self.targets.parameters():
                nn.init.normal_(parameter)

    model = Lost()
    assert any(
        "expected one module that it follows, got one, two" in str(each) for each in reasons(fit(tmp_path, model))
    )
    assert model.one[0].out_features == 14
    model = Lost()
    changed(fit(tmp_path, model, copies={"targets.0": "one", "targets.1": "two"}))


class Pair(User):
    """Encoder and projector, each with a momentum copy: a width lies between the two."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12))
        self.projector = nn.Sequential(nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3))
        self.net = nn.Sequential(self.encoder, self.projector)
        self.slow_encoder, self.slow_projector = deepcopy(self.encoder), deepcopy(self.projector)

    def on_train_batch_end(self, *args: Any, **_: Any) -> None:
        for slow, fast in ((self.slow_encoder, self.encoder), (self.slow_projector, self.projector)):
            for kept, new in zip(slow.parameters(), fast.parameters(), strict=True):
                kept.data.lerp_(new.data, 0.3)


def test_copies_of_neighbours_go_along_together(tmp_path: Path) -> None:
    model = Pair()
    evolution = fit(tmp_path, model)
    changed(evolution)
    assert evolution.evolver is not None
    assert len(evolution._models_to_update()) == 1
    assert model.encoder[2].out_features != 12
    follows(nn.Sequential(model.slow_encoder, model.slow_projector), nn.Sequential(model.encoder, model.projector))


class Reference(User):
    """Stays near what it was."""

    def __init__(self) -> None:
        super().__init__()
        self.reference = deepcopy(self.net).requires_grad_(False).eval()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss + 0.01 * nn.functional.mse_loss(self(batch[0]), self.reference(batch[0]))


def test_a_copy_that_has_not_moved_skips_events_until_it_is_settled(tmp_path: Path) -> None:
    model = Reference()
    said = reasons(fit(tmp_path, model))
    assert len(said) == 1
    assert "WidthEvolution(copies={'reference': 'net'}) if it follows, copies={} if not" in str(said.pop())
    assert model.net[0].out_features == 16

    model = Reference()
    before = deepcopy(model.reference.state_dict())
    changed(fit(tmp_path, model, copies={}))
    torch.testing.assert_close(model.reference.state_dict(), before, rtol=0, atol=0)

    model = Reference()
    evolution = fit(tmp_path, model, copies={"reference": "net"})
    changed(evolution)
    assert [p.shape for p in model.reference.parameters()] == [p.shape for p in model.net.parameters()]


def test_a_reference_of_another_start_or_an_unused_layer_is_no_copy(tmp_path: Path) -> None:
    model = User()
    model.unused = nn.Linear(16, 16)
    model.norm = nn.BatchNorm1d(5)
    changed(fit(tmp_path, model))
    assert model.unused.weight.shape == (16, 16)


class Both(Teacher):
    """The average is a part of the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + self.extra(x) + 0.1 * self.teacher(x)


@pytest.mark.parametrize("copies", [None, {"teacher": "net"}], ids=["found", "declared"])
def test_a_copy_that_runs_in_forward_has_the_widths_of_its_source(
    copies: dict[str, str] | None, tmp_path: Path
) -> None:
    model = Both()
    evolution = fit(tmp_path, model, copies=copies)
    changed(evolution)
    assert evolution.evolver is not None
    assert set(evolution.evolver.graph.sizes) == {"net.0", "net.4", "extra.0"}
    follows(model.teacher, model.net)


def test_a_reference_in_forward_keeps_its_widths(tmp_path: Path) -> None:
    class Stays(Both):
        def on_train_batch_end(self, *args: Any, **_: Any) -> None:
            pass

    model = Stays()
    evolution = fit(tmp_path, model, copies={})
    changed(evolution)
    assert evolution.evolver is not None
    assert set(evolution.evolver.graph.sizes) == {"net.0", "net.4", "extra.0"}
    assert "is not trained (requires_grad is False)" in str(evolution.evolver.graph.widths["teacher.0"].frozen)
    assert model.teacher[0].out_features == 16


class Keeps(lightning.Callback):
    """A moving average in a callback, of the network alone."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.ema = deepcopy(pl_module.net)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any, **_: Any) -> None:
        for kept, new in zip(self.ema.parameters(), pl_module.net.parameters(), strict=True):
            kept.data.lerp_(new.data, 0.3)


class Hides(User):
    """A moving average that is no submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = [deepcopy(self.net)]

    def on_train_batch_end(self, *args: Any, **_: Any) -> None:
        for kept, new in zip(self.hidden[0].parameters(), self.net.parameters(), strict=True):
            kept.data.lerp_(new.data, 0.3)


def test_averages_in_callbacks_and_lists_go_along(tmp_path: Path) -> None:
    keeper, model = Keeps(), User()
    changed(fit(tmp_path, model, [keeper]))
    follows(keeper.ema, model.net)
    hides = Hides()
    changed(fit(tmp_path, hides))
    follows(hides.hidden[0], hides.net)


def test_a_failed_event_reverts_the_replica_too(tmp_path: Path) -> None:
    model = Teacher()
    with failing("cost count", at=None):
        assert "cost count failed: boom" in reasons(fit(tmp_path, model))
    assert model.teacher[0].weight.shape == model.net[0].weight.shape == (16, 6)
    assert model.teacher[0].out_features == 16


class Draws(lightning.Callback):
    """Dropout's random numbers, which Lightning does not keep, by the step."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *rest: Any, **_: Any) -> None:
        torch.manual_seed(trainer.global_step)


@pytest.mark.parametrize("kind", [Teacher, Average, Critics, Pair])
def test_a_resumed_run_is_the_uninterrupted_one(kind: type[User], tmp_path: Path) -> None:
    class Early(kind):  # type: ignore[misc,valid-type]
        """Callbacks write checkpoints before the module's own hook at the end of a batch, so it moves its copies before."""

        def on_before_zero_grad(self, optimizer: Any) -> None:
            kind.on_train_batch_end(self, None, None, self.trainer.global_step)

        def on_train_batch_end(self, *args: Any, **_: Any) -> None:
            pass

    keeper = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    torch.manual_seed(5)
    whole = Early()
    changed(fit(tmp_path, whole, [Draws(), keeper]))
    for step in (4, 6, 7, 13):
        torch.manual_seed(5)
        resumed = Early()
        changed(fit(tmp_path, resumed, [Draws()], ckpt=tmp_path / f"step={step}.ckpt"), at_least=2)
        torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)


class Heads(nn.Module):
    """Attention that keeps a number about its width."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.places = 6, 2
        self.qkv, self.out = nn.Linear(6, 36), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x[:, None]).view(len(x), 1, 3, self.heads, self.places).permute(2, 0, 3, 1, 4)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).flatten(1))


class Attends(Teacher):
    def __init__(self) -> None:
        super().__init__()
        self.net = Heads()  # type: ignore[assignment]
        self.teacher = deepcopy(self.net).requires_grad_(False)  # type: ignore[assignment]


class Shrinks:
    """Every width by a step, as long as three are left."""

    def propose(self, context: PolicyContext) -> dict[str, Proposal]:
        return {name: Proposal(each.size - 1, "") for name, each in context.statistics.items() if each.size > 2}


def test_a_checkpoint_keeps_the_numbers_of_copies_too(tmp_path: Path) -> None:
    keeper, model = ModelCheckpoint(tmp_path, save_last=True), Attends()
    changed(fit(tmp_path, model, [keeper], policy=Shrinks()), at_least=2)
    heads = model.net.heads
    assert model.teacher.heads == heads < 6
    loaded = Attends.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert (loaded.net.heads, loaded.teacher.heads) == (heads, heads)
    again = evolvenet.load(Attends(), tmp_path / "last.ckpt")
    assert again.get_submodule("teacher").heads == heads


def test_names_of_copies_that_are_of_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"expected names of modules, got 'tutor'"):
        fit(tmp_path, User(), copies={"tutor": "net"})

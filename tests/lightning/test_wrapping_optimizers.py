"""Lightning runs with optimizers around others: resumed to the last bit, or it is said what the checkpoint does not hold."""

# Optimizers are written here as people write them.
# pyright: reportIncompatibleMethodOverride=false
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import Optimizer

from evolvenet.surgery.optimizer_tensors import with_inner
from evolvenet.surgery.optimizer_values import optimizer_values
from tests.helpers.resuming import Randomness, assert_same, evolution
from tests.helpers.runs import Batches, Classifier, trainer
from tests.helpers.wrapping_optimizers import WRAPPING, Lookahead, Sam


class WholeSam(Sam):
    """With the inner optimizer in its state dict."""

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "base": self.base_optimizer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.base_optimizer.load_state_dict(state_dict["base"])
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})


class WholeLookahead(Lookahead):
    """With the inner optimizer, the slow weights and the count in its state dict."""

    def state_dict(self) -> dict[str, Any]:
        slow = [self.state[p].get("slow") for group in self.param_groups for p in group["params"]]
        return {"inner": self.optimizer.state_dict(), "slow": slow, "count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict["inner"])
        self.param_groups, self.count = self.optimizer.param_groups, state_dict["count"]
        own = [p for group in self.param_groups for p in group["params"]]
        self.state.update({p: {"slow": slow.clone()} for p, slow in zip(own, state_dict["slow"], strict=True)})


MADE: dict[str, Any] = {**WRAPPING, "whole sam": WholeSam, "whole lookahead": WholeLookahead}


class Wrapped(Classifier):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def configure_optimizers(self) -> Any:
        return MADE[self.name](self.parameters())

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        if "sam" in self.name:
            optimizer.step(closure=optimizer_closure)
        else:
            optimizer_closure()
            optimizer.step()


def run(folder: Path, name: str, callbacks: Any = (), ckpt: Path | None = None) -> Wrapped:
    torch.manual_seed(5)
    model = Wrapped(name)
    torch.manual_seed(11)
    trainer(folder, [Randomness(), evolution(), *callbacks]).fit(model, Batches(), ckpt_path=ckpt, weights_only=False)
    return model


def state_of(model: Wrapped) -> dict[str, Any]:
    (optimizer,) = model.trainer.optimizers
    assert isinstance(optimizer, Optimizer)
    kept = [optimizer_values(each) for each in with_inner([optimizer])]
    return {"weights": dict(model.state_dict()), "optimizer": kept}


@pytest.mark.parametrize("name", ["whole sam", "whole lookahead"])
def test_a_resumed_run_is_the_uninterrupted_one(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keeper = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    whole = run(tmp_path, name, [keeper])
    assert whole.net[0].out_features != 16
    for step in (9, 13):
        resumed = run(tmp_path, name, ckpt=tmp_path / f"step={step}.ckpt")
        assert_same(state_of(resumed), state_of(whole))
    assert "uninterrupted" not in caplog.text


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("sam", "SGD.state"),
        ("outer masters", "Adam.state"),
        ("adahessian", "Adahessian.0.hess"),
        ("flat", "Flat.momentum"),
        ("by parameter", "ByParameter.fast"),
    ],
)
def test_what_a_state_dict_does_not_hold_is_named_when_a_run_is_resumed(
    name: str, missing: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keeper = ModelCheckpoint(tmp_path, every_n_train_steps=9, save_top_k=-1, filename="{step}")
    run(tmp_path, name, [keeper])
    assert "uninterrupted" not in caplog.text
    resumed = run(tmp_path, name, ckpt=tmp_path / "step=9.ckpt")
    (warning,) = [record.message for record in caplog.records if "uninterrupted" in record.message]
    assert missing in warning
    assert all(bool(parameter.isfinite().all()) for parameter in resumed.parameters())

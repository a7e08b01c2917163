"""Growth in a run by a method of choice, and the updates of weights that go with it."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from evolvenet import Evolver, PolicyError, WidthEvolution
from tests.helpers.policies import Fixed
from tests.helpers.runs import User, trainer
from tests.helpers.small_models import mlp


def batches(count: int = 4) -> list[tuple[Tensor, Tensor]]:
    x = torch.randn(count, 64, 6, dtype=torch.float64)
    return [(part, part[:, :3].tanh() - part[:, 3:].square()) for part in x]


def grown(model: Any, pairs: list[tuple[Tensor, Tensor]], **options: Any) -> Evolver:
    """An evolver after one event, which gives the first layer three units more."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step(batch: Any) -> Tensor:
        return functional.mse_loss(model(batch[0]), batch[1])

    evolver = Evolver(model, optimizer, Fixed({"0": 7}), pairs[0], step=step, **options)
    for pair in pairs:
        evolver.observe(pair)
    assert evolver.step().sizes == {"0": 7}
    return evolver


def mean_loss(model: nn.Module, pairs: list[tuple[Tensor, Tensor]]) -> float:
    with torch.no_grad():
        return sum(float(functional.mse_loss(model(x), y)) for x, y in pairs) / len(pairs)


@pytest.mark.parametrize("new_units", ["orthogonal", "tiny"])
def test_an_event_with_updates_lowers_the_loss_and_copies_keep_their_function(new_units: str) -> None:
    torch.manual_seed(0)
    model, pairs = mlp(6, 4, 3), batches()
    average = copy.deepcopy(model)
    before, answers = mean_loss(model, pairs), average(pairs[0][0])
    grown(model, pairs, new_units=new_units, update=True, copies=[average])
    assert mean_loss(model, pairs) < 0.9 * before
    assert average[0].out_features == 7
    torch.testing.assert_close(average(pairs[0][0]), answers)


@pytest.mark.parametrize("new_units", ["orthogonal", "paired", "gradmax"])
def test_without_updates_the_function_stays(new_units: str) -> None:
    torch.manual_seed(0)
    model, pairs = mlp(6, 4, 3), batches()
    answers = model(pairs[0][0])
    grown(model, pairs, new_units=new_units)
    torch.testing.assert_close(model(pairs[0][0]), answers)
    # A pair has equal rows.
    assert torch.equal(model[0].weight[4], model[0].weight[5]) == (new_units == "paired")


def test_without_a_loss_growth_is_orthogonal_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model, (x, _) = mlp(6, 4, 3), batches(1)[0]
    answers = model(x)
    with caplog.at_level(logging.WARNING, logger="evolvenet"):
        evolver = Evolver(model, None, Fixed({"0": 7}), x, new_units="tiny", update=True)
        assert "new_units='tiny', update=True needs the loss: new units start as 'orthogonal'" in caplog.text
        evolver.observe(x)
        assert evolver.step().sizes == {"0": 7}
    assert "New units start as 'orthogonal'" in caplog.text
    torch.testing.assert_close(model(x), answers)


def test_a_method_that_needs_no_loss_stays_where_updates_lack_one(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model, (x, _) = mlp(6, 4, 3), batches(1)[0]
    answers = model(x)
    with caplog.at_level(logging.WARNING, logger="evolvenet"):
        evolver = Evolver(model, None, Fixed({"0": 8}), x, new_units="paired", update=True)
    assert "new_units='paired', update=True needs the loss: new units start as 'paired'" in caplog.text
    evolver.observe(x)
    assert evolver.step().sizes == {"0": 8}
    assert torch.equal(model[0].weight[4], model[0].weight[5])
    torch.testing.assert_close(model(x), answers)


class Unrunnable(User):
    """Its step runs in training alone, so that there is no loss beside it."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if not self.training:
            raise RuntimeError("in training alone")
        return super().training_step(batch, batch_idx)


def test_in_lightning_too_a_missing_loss_is_said_at_the_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    x = torch.randn(32, 6)
    data = DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=16)
    evolution = WidthEvolution(Fixed({"net.0": 20}), every_n_epochs=1, new_units="paired", update=True)
    with caplog.at_level(logging.WARNING, logger="evolvenet"):
        trainer(tmp_path, [evolution], max_steps=1).fit(Unrunnable(), data)
    assert "update=True needs the loss: new units start as 'paired'" in caplog.text
    assert "Return it, or give" in caplog.text


def test_only_weights_that_the_optimizer_holds_move(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    pairs = batches()
    model = mlp(6, 4, 3)
    weight, bias, before = model[2].weight.detach().clone(), model[2].bias.detach().clone(), mean_loss(model, pairs)

    def step(batch: Any) -> Tensor:
        return functional.mse_loss(model(batch[0]), batch[1])

    optimizer = torch.optim.AdamW(model[0].parameters(), lr=1e-3)
    evolver = Evolver(model, optimizer, Fixed({"0": 7}), pairs[0], step=step, update=True)
    for pair in pairs:
        evolver.observe(pair)
    assert evolver.step().sizes == {"0": 7}
    assert mean_loss(model, pairs) < before
    assert torch.equal(model[2].weight[:, :4], weight)
    assert torch.equal(model[2].bias, bias)


def test_an_unknown_start_is_refused() -> None:
    with pytest.raises(PolicyError, match="new_units"):
        Evolver(mlp(6, 4, 3), None, Fixed({}), torch.zeros(2, 6).double(), new_units="magic")
    with pytest.raises(PolicyError, match="new_units"):
        WidthEvolution(Fixed({}), new_units="magic")


def test_in_lightning_the_training_step_gives_the_loss(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    x = torch.randn(160, 6)
    data = DataLoader(TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()), batch_size=16)
    evolution = WidthEvolution(Fixed({"net.0": 20}), every_n_epochs=1, new_units="tiny", update=True)
    with caplog.at_level(logging.INFO, logger="evolvenet"):
        trainer(tmp_path, [evolution], max_epochs=2).fit(model := User(), data)
    assert model.net[0].out_features == 20
    assert "New units start" not in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]

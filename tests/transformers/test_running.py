"""What a run of the transformers library's trainer loads, and what it only exchanges."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest
from torch import Tensor, nn
from transformers import Trainer, TrainerState

import evolvenet
from evolvenet.surgery.module_replacement import replacements
from evolvenet.transformers.callback import _KEY, _callback_states, _register_before_load


class Loading(Trainer):
    """The methods in which a trainer loads a checkpoint, and one around a whole run."""

    def __init__(self, model: nn.Module, best: Path, loaded: Mapping[str, Tensor]) -> None:
        self.network, self.loaded, self.state = model, loaded, TrainerState(best_model_checkpoint=str(best))

    def run(self, resume_from_checkpoint: str) -> None:
        """As a callback that exchanges the weights for their moving average does in a resumed run."""
        self.network.load_state_dict(self.loaded)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.network.load_state_dict(self.loaded)

    def _load_best_model(self) -> None:
        self.network.load_state_dict(self.loaded)


@pytest.fixture
def factorized(tmp_path: Path) -> nn.Module:
    """A model with factors, of which the checkpoint in a folder says so."""
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10))
    evolvenet.factorize(model, {"0": 4})
    state = TrainerState(stateful_callbacks=cast(Any, {}))
    replaced = {path: dict(module.record()) for path, module in replacements(model).items()}
    _callback_states(state)[_KEY] = {"replaced": replaced}
    state.save_to_json(str(tmp_path / "trainer_state.json"))
    return model


def test_weights_that_are_exchanged_during_a_resumed_run_do_not_undo_what_changed_since(
    factorized: nn.Module, tmp_path: Path
) -> None:
    evolvenet.merge(factorized)
    _register_before_load(factorized)
    weight = factorized.get_parameter("0.weight")
    average = {name: value + 1 for name, value in factorized.state_dict().items()}
    Loading(factorized, tmp_path, average).run(str(tmp_path))
    assert factorized.get_parameter("0.weight") is weight, "the optimizer holds this one"
    assert weight.equal(average["0.weight"])


@pytest.mark.parametrize("best", [False, True])
def test_a_checkpoint_that_is_loaded_brings_its_factors(factorized: nn.Module, tmp_path: Path, best: bool) -> None:
    state = copy.deepcopy(factorized.state_dict())
    evolvenet.merge(factorized)
    _register_before_load(factorized)
    trainer = Loading(factorized, tmp_path if best else tmp_path / "other", state)
    trainer._load_best_model() if best else trainer._load_from_checkpoint(str(tmp_path))
    assert list(replacements(factorized)) == ["0"]

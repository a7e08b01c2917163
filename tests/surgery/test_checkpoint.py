"""Histories as plain data, and models that are reshaped to the widths of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import evolvenet
from evolvenet.engine.history import Event, History, WidthChange
from evolvenet.errors import EvolveNetError, RecordError
from evolvenet.surgery.checkpoint import fit_shapes, reshape_before_load
from evolvenet.tracing.trace import trace
from tests.helpers import networks
from tests.helpers.cases import CASES, Case, changed, distance, outputs
from tests.helpers.states import State, same_bits

BY_NAME = {case.name: case for case in CASES}
names = st.text(min_size=1, max_size=5)
numbers = st.integers(0, 10**9)
changes = st.builds(WidthChange, width=names, before=numbers, after=numbers, reason=names)
events = st.builds(
    Event,
    step=numbers,
    changes=st.lists(changes, max_size=3).map(tuple),
    sizes=st.dictionaries(names, numbers, max_size=3),
    parameters_before=numbers,
    parameters=numbers,
    macs=numbers,
    seconds=st.floats(0, 1e6),
    skipped=st.none() | names,
)


@given(st.builds(History, initial=events, events=st.lists(events, max_size=3)))
def test_a_history_survives_json(history: History) -> None:
    plain = json.loads(json.dumps(history.to_dict()))
    again = History.from_dict(plain)
    assert again == history
    assert isinstance(again.initial.changes, tuple)
    assert again.to_dict() == history.to_dict()


def test_a_history_survives_a_checkpoint_that_holds_weights_only(tmp_path: Path) -> None:
    event = Event(3, (WidthChange("0", 8, 5, "why"),), {"0": 5}, 100, 60, 55, 0.1)
    history = History(event, [event])
    torch.save({"history": history.to_dict()}, tmp_path / "file")
    assert History.from_dict(torch.load(tmp_path / "file", weights_only=True)["history"]) == history


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_fresh_model_takes_the_widths_of_a_file(case: Case, tmp_path: Path) -> None:
    model, inputs = changed(case), case.inputs()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    fresh = case.model()
    identities = [id(parameter) for parameter in fresh.parameters()]
    assert evolvenet.load(fresh, tmp_path / "weights.pt") is fresh
    assert [id(parameter) for parameter in fresh.parameters()] == identities
    assert fresh.state_dict().keys() == model.state_dict().keys()
    assert all(same_bits(tensor, model.state_dict()[name]) for name, tensor in fresh.state_dict().items())
    assert distance(outputs(fresh, inputs), outputs(model, inputs)) == 0
    assert trace(fresh, inputs).sizes == trace(model, inputs).sizes
    for parameter in fresh.parameters():
        assert parameter.grad is None
        assert parameter.is_leaf


def test_a_lightning_checkpoint_fits_the_network_inside(tmp_path: Path) -> None:
    case = BY_NAME["resnet"]
    model, x = changed(case), case.inputs()
    state = {f"net.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "last.ckpt")
    fresh = evolvenet.load(case.model(), str(tmp_path / "last.ckpt"))
    assert distance(outputs(fresh, case.inputs()), outputs(model, case.inputs())) == 0
    whole = nn.ModuleDict({"net": case.model()})
    evolvenet.load(whole, tmp_path / "last.ckpt")
    deep = {f"outer._orig_mod.{name}": tensor for name, tensor in state.items()} | {"loss.weight": torch.ones(4)}
    torch.save(deep, tmp_path / "deep.pt")
    assert distance(outputs(evolvenet.load(case.model(), tmp_path / "deep.pt"), x), outputs(model, x)) == 0
    assert distance(outputs(whole["net"], case.inputs()), outputs(model, case.inputs())) == 0


def test_two_networks_of_one_kind_are_not_mixed_up(tmp_path: Path) -> None:
    """An averaged copy beside the network itself: either may be the one to load."""
    model = BY_NAME["mlp"].model()
    state = {f"{place}.{name}": tensor for place in ("net", "average") for name, tensor in model.state_dict().items()}
    torch.save(state, tmp_path / "both.pt")
    with pytest.raises(RecordError, match=r"holds 2 networks like this one: expected one, got net\., average\."):
        evolvenet.load(BY_NAME["mlp"].model(), tmp_path / "both.pt")


def test_a_hook_lets_any_load_fit() -> None:
    case = BY_NAME["mobilenet"]
    model, fresh = changed(case), nn.Sequential(case.model(), nn.Identity())
    fresh[0].register_load_state_dict_pre_hook(reshape_before_load)
    fresh.load_state_dict({f"0.{name}": tensor for name, tensor in model.state_dict().items()})
    assert distance(outputs(fresh, case.inputs()), outputs(model, case.inputs())) == 0


@pytest.mark.parametrize("wrap", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_a_layer_whose_weight_is_computed_from_others_takes_the_widths_too(wrap: Any) -> None:
    def build() -> nn.Sequential:
        return (
            nn.Sequential(nn.Linear(4, 8), nn.ReLU(), wrap(nn.Linear(8, 6)), nn.ReLU(), nn.Linear(6, 2)).double().eval()
        )

    x, model, fresh = torch.randn(3, 4, dtype=torch.float64), build(), build()
    evolvenet.prune(model, trace(model, x), {"0": 5})
    state = model.state_dict()
    fit_shapes(fresh, state)
    fresh.load_state_dict(state)
    assert fresh[2].in_features == 5
    assert distance(fresh(x), model(x)) < 1e-12


def test_shapes_that_fit_are_left_alone() -> None:
    model = BY_NAME["resnet"].model()
    before = State.of(model)
    fit_shapes(model, model.state_dict())
    fit_shapes(model, {})
    assert before.differences(model) == []


def _deeper() -> nn.Module:
    return nn.Sequential(*networks.Mlp(), nn.Linear(3, 3))


def _images() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(5, 12, 1), nn.ReLU(), nn.ReLU(), nn.Conv2d(12, 9, 1), nn.ReLU(), nn.ReLU(), nn.Linear(9, 3)
    )


OTHERS = {
    "deeper": (_deeper, "it has entries unknown here .*7.weight"),
    "shallower": (lambda: nn.Sequential(*list(networks.Mlp())[:4]), "expected entries that it lacks .*6.bias"),
    "other layers": (_images, "expected 0.weight with 2 axes, like .12, 5., got .12, 5, 1, 1."),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_file_of_another_model_is_refused(name: str, tmp_path: Path) -> None:
    build, message = OTHERS[name]
    torch.save(build().state_dict(), tmp_path / "other.pt")
    model = BY_NAME["mlp"].model()
    before = State.of(model)
    with pytest.raises(RecordError, match=message):
        evolvenet.load(model, tmp_path / "other.pt")
    assert before.differences(model) == []


KINDRED = {
    "another kernel": (lambda: nn.Conv2d(3, 6, 5), lambda: nn.Conv2d(3, 6, 3)),
    "more channels in a group": (lambda: nn.Conv2d(8, 8, 3, groups=2), lambda: nn.Conv2d(8, 8, 3, groups=4)),
    "a recurrent layer of another kind": (lambda: nn.LSTM(4, 6), lambda: nn.GRU(4, 6)),
    "groups that cannot be": (lambda: nn.GroupNorm(1, 7), lambda: nn.GroupNorm(4, 8)),
    "tied weights that differ": (lambda: nn.Sequential(nn.Linear(4, 3), nn.Linear(4, 5)), lambda: tied()),
    "a bias of another length": (
        lambda: {"weight": torch.zeros(3, 4), "bias": torch.zeros(2)},
        lambda: nn.Linear(4, 3),
    ),
}


def tied() -> nn.Module:
    """Two layers with one weight."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(4, 3))
    model[1].weight = model[0].weight
    return model


@pytest.mark.parametrize("name", KINDRED)
def test_models_with_equal_names_and_axes_but_other_shapes_are_refused(name: str, tmp_path: Path) -> None:
    """Names and axes agree, and yet no change of widths leads from one to the other."""
    build, other = KINDRED[name]
    source = build()
    torch.save(source.state_dict() if isinstance(source, nn.Module) else source, tmp_path / "other.pt")
    model = other()
    before = State.of(model)
    with pytest.raises(EvolveNetError):
        evolvenet.load(model, tmp_path / "other.pt")
    assert before.differences(model) == []


def test_a_missing_file_raises_file_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        evolvenet.load(networks.Mlp(), tmp_path / "nothing.pt")

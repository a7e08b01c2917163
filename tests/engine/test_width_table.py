"""`widths`: sizes as data, and arguments that build layers of exactly these shapes; what cannot be told is left out by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

import evolvenet
from evolvenet import IndexMap
from evolvenet.errors import RecordError
from tests.helpers.cases import CASES, Case, changed, graph_of
from tests.helpers.policies import Fixed
from tests.helpers.runs import Batches, Classifier, fresh, trainer


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_layers_built_from_the_arguments_have_the_shapes_of_the_model(case: Case) -> None:
    model, first = changed(case), graph_of(case)
    table = evolvenet.widths(model)
    assert table.sizes == {name: size + 2 if k % 2 else size - 1 for k, (name, size) in enumerate(first.sizes.items())}
    assert {name: width.original for name, width in table.items()} == {w.name: w.size for w in first.widths.values()}
    for path, arguments in table.layers.items():
        built = getattr(nn, arguments.type.rpartition(".")[2])(**arguments.values)
        own = model.get_submodule(path)
        assert shapes(built) == shapes(own), path
        assert repr(built) == repr(own), path
        assert str(arguments) == f"{type(own).__name__}({', '.join(f'{k}={v!r}' for k, v in arguments.values.items())})"
    assert yaml.safe_load(table.to_yaml()) == table.to_dict()
    assert all(width.name in str(table) for width in table.values())


EXTRA = [
    nn.Conv2d(4, 6, (3, 1), stride=2, padding=1, dilation=2, groups=2, padding_mode="reflect"),
    nn.ConvTranspose2d(4, 6, 3, output_padding=1, stride=2, bias=False),
    nn.BatchNorm2d(5, affine=False),
    nn.BatchNorm2d(5, eps=1e-3, momentum=None, track_running_stats=False),
    nn.GroupNorm(2, 6, affine=False),
    nn.LayerNorm([3, 4], eps=1e-6, bias=False),
    nn.RMSNorm(4),
    nn.Embedding(7, 3, padding_idx=2, sparse=True),
    nn.Bilinear(2, 3, 4, bias=False),
    nn.PReLU(3),
    nn.RNN(3, 4, nonlinearity="relu"),
    nn.LSTM(3, 6, num_layers=2, bidirectional=True, proj_size=2, dropout=0.5, bias=False, batch_first=True),
    nn.GRUCell(3, 4),
    nn.MultiheadAttention(8, 2, dropout=0.1, bias=False, kdim=6, batch_first=True),
    nn.MultiheadAttention(8, 4, add_bias_kv=True, add_zero_attn=True),
    nn.TransformerEncoderLayer(8, 2, 12, activation="gelu", batch_first=True, norm_first=True),
    nn.TransformerDecoderLayer(8, 4, 6, dropout=0.2, layer_norm_eps=1e-4, bias=False),
]


@pytest.mark.parametrize("layer", EXTRA, ids=lambda layer: type(layer).__name__)
def test_every_setting_of_a_layer_is_among_its_arguments(layer: nn.Module) -> None:
    from evolvenet.engine.constructor_arguments import layer_arguments

    built = type(layer)(**layer_arguments(layer))
    assert shapes(built) == shapes(layer)
    assert repr(built) == repr(layer)
    plain = {name: value for name, value in vars(layer).items() if isinstance(value, int | float | str | tuple)}
    assert {name: getattr(built, name) for name in plain} == plain


class Net(nn.Module):
    """Its arguments are kept in attributes of their names, but for two."""

    def __init__(
        self, inputs: int, hidden: int, channels: list[int], depth: int = 2, twin: int = 0, lost: int = 9
    ) -> None:
        super().__init__()
        self.inputs, self.hidden, self.channels, self.depth, self.twin = inputs, hidden, channels, depth, twin
        self.first = nn.Linear(inputs, hidden)
        self.second = nn.Linear(hidden, channels[0])
        self.third = nn.Linear(channels[0], channels[1])
        self.fourth = nn.Linear(channels[1], lost)
        self.last = nn.Linear(lost, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second, self.third, self.fourth):
            x = layer(x).relu()
        return self.last(x)


def cut(model: nn.Module, **sizes: int) -> nn.Module:
    graph = evolvenet.trace(model, torch.zeros(1, 6))
    maps = {name: IndexMap.keep(range(size), graph.sizes[name]) for name, size in sizes.items()}
    evolvenet.resize(model, graph, maps)
    return model


def test_arguments_of_a_class_are_told_by_the_first_size_of_one_width() -> None:
    table = evolvenet.widths(cut(Net(6, 16, [12, 10]), first=5, second=7, fourth=3))
    told = table.classes[""]
    assert dict(told.values) == {"hidden": 5, "channels": [7, 10]}
    assert told.reasons["hidden"] == "16 was the size of width 'first', now 5"
    assert dict(told.ambiguous) == {}
    assert "Net(hidden=5, channels=[7, 10])" in str(table)


def test_an_argument_that_may_be_another_width_or_that_another_one_may_be_is_left_out() -> None:
    told = evolvenet.widths(cut(Net(6, 16, [16, 10]), first=5, second=7)).classes[""]
    assert dict(told.values) == {}
    assert told.ambiguous["hidden"] == "16 was the size of first (5 now), second (7 now)"
    assert set(told.ambiguous) == {"hidden", "channels"}
    told = evolvenet.widths(cut(Net(6, 16, [12, 10], depth=16), first=5)).classes[""]
    assert dict(told.values) == {}
    assert told.ambiguous["hidden"] == "16 was the size of first (5 now), and that of depth too"
    told = evolvenet.widths(cut(Net(6, 16, [12, 10], depth=2), second=11)).classes[""]
    assert dict(told.values) == {"channels": [11, 10]}


class Narrow(Classifier):
    """Its second layer is of another width than its first."""

    def __init__(self, width: int = 16, inner: int = 12, lr: float = 1e-2) -> None:
        super().__init__(width, lr)
        self.save_hyperparameters()
        self.net[4], self.net[6] = nn.Linear(width, inner), nn.Linear(inner, 3)


def test_hyperparameters_after_a_run_and_after_a_load(tmp_path: Path) -> None:
    model = Narrow(width=20)
    run = trainer(tmp_path, [evolvenet.WidthEvolution(Fixed({"net.0": 5, "net.4": 7}), every_n_epochs=1, stop=1.0)])
    run.fit(model, Batches())
    evolvenet.save(model, tmp_path / "run.ckpt")
    for each in (model, evolvenet.load(Narrow(), tmp_path / "run.ckpt")):
        table = evolvenet.widths(each)
        assert table["net.0"].size == 5
        assert table["net.0"].original == 20
    assert dict(evolvenet.widths(model).classes[""].values) == {"width": 5, "inner": 7}
    built = Narrow(**evolvenet.widths(model).classes[""].values)
    built.load_state_dict(torch.load(tmp_path / "run.ckpt", weights_only=True)["state_dict"], strict=True)


def test_a_part_of_a_model_and_one_that_holds_it() -> None:
    model = nn.ModuleDict({"net": cut(Net(6, 16, [12, 10]), first=5)})
    assert evolvenet.widths(model)["net.first"].size == 5
    assert dict(evolvenet.widths(model).classes["net"].values) == {"hidden": 5}
    assert evolvenet.widths(model["net"])["first"].axes == ["first.weight[0]", "first.bias[0]", "second.weight[1]"]


def test_a_model_without_a_record_is_traced_or_refused() -> None:
    with pytest.raises(RecordError, match=r"widths of this Classifier are not known.*example_inputs="):
        evolvenet.widths(fresh())
    table = evolvenet.widths(fresh(), example_inputs=torch.zeros(2, 6))
    assert [(w.size, w.original) for w in table.values() if not w.frozen] == [(16, 16), (16, 16)]
    model: Any = cut(Net(6, 16, [12, 10]), first=5)
    model.first = nn.Linear(6, 4)
    model.second = nn.Linear(4, 3)
    with pytest.raises(RecordError, match="other code has changed since"):
        evolvenet.widths(model)

"""Attributes of module types after a change of shapes, against a module built with those shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from evolvenet.errors import ResizeError
from evolvenet.surgery.module_handlers import attributes, new_unit_value, refresh

# (the module, one of its type built for the new shapes)
PAIRS: dict[str, tuple[nn.Module, nn.Module]] = {
    "linear": (nn.Linear(4, 6), nn.Linear(3, 5)),
    "linear without bias": (nn.Linear(4, 6, bias=False), nn.Linear(3, 6, bias=False)),
    "bilinear": (nn.Bilinear(4, 5, 6), nn.Bilinear(3, 4, 5)),
    "conv1d": (nn.Conv1d(4, 6, 3, padding=2), nn.Conv1d(3, 5, 3, padding=2)),
    "conv2d": (nn.Conv2d(4, 6, 3, stride=2), nn.Conv2d(3, 5, 3, stride=2)),
    "conv3d": (nn.Conv3d(4, 6, 1, bias=False), nn.Conv3d(3, 5, 1, bias=False)),
    "depthwise": (nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(4, 4, 3, groups=4)),
    "depthwise with two outputs each": (nn.Conv2d(6, 12, 3, groups=6), nn.Conv2d(4, 8, 3, groups=4)),
    "groups": (nn.Conv2d(8, 12, 3, groups=4), nn.Conv2d(6, 9, 3, groups=3)),
    "transposed": (nn.ConvTranspose2d(4, 6, 2), nn.ConvTranspose2d(3, 5, 2)),
    "transposed groups": (nn.ConvTranspose2d(8, 12, 2, groups=4), nn.ConvTranspose2d(4, 6, 2, groups=2)),
    "batch norm": (nn.BatchNorm2d(6), nn.BatchNorm2d(5)),
    "batch norm without weights": (nn.BatchNorm1d(6, affine=False), nn.BatchNorm1d(5, affine=False)),
    "instance norm": (nn.InstanceNorm2d(6, affine=True), nn.InstanceNorm2d(5, affine=True)),
    "group norm": (nn.GroupNorm(4, 8), nn.GroupNorm(3, 6)),
    "group norm of all": (nn.GroupNorm(1, 8), nn.GroupNorm(1, 7)),
    "layer norm": (nn.LayerNorm(8), nn.LayerNorm(7)),
    "layer norm of two axes": (nn.LayerNorm([3, 8]), nn.LayerNorm([3, 7])),
    "rms norm": (nn.RMSNorm(8), nn.RMSNorm(7)),
    "embedding": (nn.Embedding(20, 6), nn.Embedding(20, 5)),
    "prelu": (nn.PReLU(6), nn.PReLU(5)),
    "rnn": (nn.RNN(4, 6), nn.RNN(3, 5)),
    "lstm": (nn.LSTM(4, 6, 2, bidirectional=True), nn.LSTM(3, 5, 2, bidirectional=True)),
    "lstm projected": (nn.LSTM(4, 6, proj_size=3), nn.LSTM(3, 5, proj_size=2)),
    "gru": (nn.GRU(4, 6, 2), nn.GRU(4, 5, 2)),
    "attention": (nn.MultiheadAttention(8, 2), nn.MultiheadAttention(6, 2)),
    "attention of three": (nn.MultiheadAttention(8, 2, kdim=5, vdim=6), nn.MultiheadAttention(6, 2, kdim=4, vdim=5)),
    "lstm cell": (nn.LSTMCell(4, 6), nn.LSTMCell(3, 5)),
    "gru cell": (nn.GRUCell(4, 6), nn.GRUCell(3, 5)),
}


def numbers(module: nn.Module) -> dict[str, Any]:
    """The plain attributes of a module; attention's `head_dim`, which torch does not use, is left out."""
    plain = {k: v for k, v in vars(module).items() if isinstance(v, (int, str, tuple)) and not isinstance(v, bool)}
    return {k: v for k, v in plain.items() if k != "head_dim"}


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of its own tensors, those of no axis left out as in a graph."""
    entries = (*module.named_parameters(), *module.named_buffers())
    return {name: tuple(tensor.shape) for name, tensor in entries if tensor.is_floating_point()}


@pytest.mark.parametrize("name", PAIRS)
def test_numbers_become_those_of_a_module_built_so(name: str) -> None:
    module, target = PAIRS[name]
    found = attributes(module, shapes(target))
    assert {**numbers(module), **found} == numbers(target)
    assert attributes(module, shapes(module)).items() <= vars(module).items()


def test_nothing_is_changed_yet() -> None:
    module = nn.Linear(4, 6)
    attributes(module, {"weight": (2, 3), "bias": (2,)})
    assert (module.in_features, module.out_features) == (4, 6)


def test_subclasses_are_known_and_others_keep_no_numbers() -> None:
    class Mine(nn.Linear):
        pass

    assert attributes(Mine(4, 6), {"weight": (2, 3)}) == {"in_features": 3, "out_features": 2}
    assert attributes(nn.ReLU(), {}) == {}
    assert new_unit_value(nn.ReLU(), "weight", 0) == 0.0


@pytest.mark.parametrize(
    ("module", "target", "message"),
    [
        (nn.Conv2d(8, 8, 3, groups=4), {"weight": (7, 2, 3, 3)}, "Conv2d with 4 groups of 2 channels: .* got 7"),
        (nn.Conv2d(8, 8, 3, groups=4), {"weight": (2, 2, 3, 3)}, "at least two whole groups, got 2"),
        (nn.GroupNorm(4, 8), {"weight": (5,)}, "Take a multiple of 2, 4 or more"),
        (nn.Conv2d(8, 8, 3, groups=4), {"weight": (8, 4, 3, 3)}, "expected weight of shape .8, 2, 3, 3. beside"),
        (nn.Conv2d(8, 8, 3), {"weight": (8, 4, 5, 5)}, "expected weight of shape .8, 4, 3, 3."),
        (nn.Linear(4, 3), {"weight": (2, 4), "bias": (3,)}, "expected bias of shape .2,. beside"),
        (nn.BatchNorm1d(4), {"weight": (2,), "bias": (3,)}, "BatchNorm1d: expected bias of shape .2,."),
        (nn.GRU(4, 6), shapes(nn.LSTM(4, 6)), "expected weight_ih_l0 of shape .18, 4. beside .* got .24, 4."),
        (
            nn.LSTM(4, 6, proj_size=3),
            shapes(nn.LSTM(4, 3)) | {"weight_hr_l0": (3, 3)},
            "projects 3 hidden units onto 3",
        ),
    ],
)
def test_impossible_shapes_are_refused(module: nn.Module, target: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(ResizeError, match=message):
        attributes(module, target)


@pytest.mark.parametrize("module", [nn.BatchNorm2d(3), nn.GroupNorm(1, 3), nn.LayerNorm(3), nn.RMSNorm(3)])
def test_new_units_start_as_norms_do(module: nn.Module) -> None:
    """Weight and running variance 1, everything else 0: as the module's own first values."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.dim():
            assert new_unit_value(module, name, 0) == float(tensor.detach()[0])


def test_new_units_elsewhere_are_zero() -> None:
    assert new_unit_value(nn.Linear(2, 2), "weight", 0) == 0.0
    assert new_unit_value(nn.PReLU(2), "weight", 0) == 0.0


def test_a_recurrent_module_runs_on_its_new_weights() -> None:
    """Its list of flat weights would still hold the old ones, without an error."""
    module, x = nn.LSTM(4, 6), torch.randn(3, 2, 4)
    before: Tensor = module(x)[0]
    module.register_parameter("weight_ih_l0", nn.Parameter(torch.zeros(24, 4)))
    module._flat_weights = [torch.ones_like(weight) for weight in module.parameters()]
    refresh(module)
    assert all(a is b for a, b in zip(module._flat_weights, module.parameters(), strict=True))
    assert not torch.equal(module(x)[0], before)
    refresh(nn.ReLU())

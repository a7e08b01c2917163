"""The inputs of a layer at some places, against what comes out there."""

from __future__ import annotations

import pytest
import torch
from cases import FLOAT
from torch import nn

from evolvenet.places import Places, outputs_first, reads

READERS = {
    "dense": (nn.Linear(4, 3), (5, 4)),
    "dense over tokens": (nn.Linear(4, 3), (5, 7, 4)),
    "dense over a grid": (nn.Linear(4, 3, bias=False), (5, 2, 3, 4)),
    "conv1d": (nn.Conv1d(4, 3, 3, stride=2, padding=1), (5, 4, 9)),
    "conv2d": (nn.Conv2d(4, 3, (3, 2), stride=(1, 2), padding=(2, 0), dilation=(2, 1)), (5, 4, 8, 9)),
    "conv2d of one place": (nn.Conv2d(4, 3, 1, bias=False), (5, 4, 6, 6)),
    "conv3d": (nn.Conv3d(4, 3, 2, padding=1), (5, 4, 3, 4, 5)),
}


@pytest.mark.parametrize("name", READERS)
def test_what_a_reader_multiplies_gives_its_output(name: str) -> None:
    made, shape = READERS[name]
    module = made.double()
    x = torch.randn(shape, dtype=FLOAT)
    y = outputs_first(module, module(x))
    places = Places(torch.tensor([0, 4, 2]), torch.tensor([0, y.shape[1] - 1, y.shape[1] // 2]))
    rows = reads(module, x, places)
    assert rows is not None
    weight = module.get_parameter("weight").flatten(1)
    bias = 0 if module.bias is None else module.bias
    torch.testing.assert_close(rows @ weight.T + bias, y[places.sample, places.position])


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        nn.ConvTranspose2d(4, 4, 3),
        nn.Bilinear(4, 4, 2),
    ],
    ids=str,
)
def test_what_is_not_understood_is_left_alone(module: nn.Module) -> None:
    assert reads(module, torch.zeros(2, 4, 8, 8), Places(torch.tensor([0]), torch.tensor([0]))) is None

"""Label layers: what stands in for the obvious, slow way gives the same."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from evolvenet.labels import Ledger, reshaped
from evolvenet.sandbox import sandbox
from evolvenet.trace import read_labels, read_shapes


@st.composite
def factorised(draw: st.DrawFn, number: int) -> list[int]:
    """Dimensions whose product is `number`, with ones between."""
    sizes = []
    while number > 1:
        sizes.append(draw(st.sampled_from([k for k in range(2, number + 1) if number % k == 0])))
        number //= sizes[-1]
    for _ in range(draw(st.integers(0, 2))):
        sizes.insert(draw(st.integers(0, len(sizes))), 1)
    return sizes


@given(st.data(), st.sampled_from([1, 2, 6, 12, 24, 36]))
def test_a_view_of_a_compressed_layer_is_that_of_the_whole_one(data: st.DataObject, number: int) -> None:
    old, new = data.draw(factorised(number)), data.draw(factorised(number))
    shape = [size if data.draw(st.booleans()) else 1 for size in old]
    layer = torch.arange(math.prod(shape)).reshape(shape)
    got = reshaped(layer, old, new)
    assert torch.equal(got.expand(new), layer.expand(old).reshape(new))
    assert got.numel() <= math.prod(new)


def test_a_view_does_not_spread_a_layer_over_a_picture() -> None:
    channels = torch.arange(8).view(1, 8, 1, 1)
    assert reshaped(channels, (2, 8, 224, 224), (2, 2, 4, 224 * 224)).shape == (1, 2, 4, 1)


def test_rows_stay_apart_until_something_is_tied_to_them() -> None:
    """A norm over each head's places leaves the places free; a parameter for each head does not."""
    ledger = Ledger()
    (grid,) = ledger.enroll("a", (6,))
    (other,) = ledger.enroll("b", (3,))
    stand_in = ledger.row_units(grid.view(3, 2), {1})
    assert stand_in.shape == (3, 1)
    assert len(set(ledger.components()[:6])) == 6
    ledger.union(stand_in.view(3), other)
    component = ledger.components()
    assert [len(set(component[k : k + 2])) for k in (0, 2, 4)] == [1, 1, 1]
    assert len(set(component[:6])) == 3
    assert component[6:9].tolist() == component[[0, 2, 4]].tolist()


def test_a_run_for_shapes_alone_finds_the_same_ones() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    x = torch.randn(2, 3, 8, 8)
    for device in ("meta", None):
        with sandbox(model, device):
            shapes = read_shapes(model, x, device)
            assert shapes == read_labels(model, x, device).outputs == [tuple(model(x.to(device)).shape)]

"""Random networks: whatever their structure, every width that the trace calls resizable resizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import event, example, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from evolvenet.engine.functional import grow, resize
from evolvenet.graph.index_map import IndexMap
from evolvenet.graph.width_graph import WidthGraph
from evolvenet.tracing.trace import trace
from tests.helpers.cases import FLOAT, distance, outputs, shuffled, without_reasons
from tests.helpers.states import zero_units

EXACT = 1e-9
Instruction = tuple[str, int, int, int]
"""(kind, one earlier activation, another one, a number of channels), the activations counted modulo those there are."""


class Random(nn.Module):
    """A network that carries out instructions; every one adds an activation `[batch, channels, 4, 4]`."""

    def __init__(self, instructions: Sequence[Instruction], flatten: bool) -> None:
        super().__init__()
        self.instructions, self.flatten = instructions, flatten
        self.layers = nn.ModuleList([nn.Conv2d(3, 6, 3, padding=1)])
        channels = [6]
        for kind, one, two, wish in instructions:
            here, there = channels[one % len(channels)], channels[two % len(channels)]
            layer, made = BUILD[kind](here, there, wish)
            self.layers.append(layer)
            channels.append(made)
        self.head = nn.Linear(channels[-1] * (16 if flatten else 1), 3)

    def forward(self, x: Tensor) -> Tensor:
        """Carry out the instructions and read the last activation."""
        found = [torch.tanh(self.layers[0](x))]
        for (kind, one, two, wish), layer in zip(self.instructions, list(self.layers)[1:], strict=True):
            found.append(RUN[kind](layer, found[one % len(found)], found[two % len(found)], wish))
        last = found[-1]
        return self.head(last.flatten(1) if self.flatten else last.mean((2, 3)))


def _conv(inputs: int, outputs: int, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, groups=groups)


def _in_groups(here: int, there: int, wish: int) -> tuple[nn.Module, int]:
    groups = 2 if here % 2 == 0 else 1
    return _conv(here, groups * wish, groups), groups * wish


def _group_norm(here: int, there: int, wish: int) -> tuple[nn.Module, int]:
    return nn.GroupNorm(2 if here % 2 == 0 and here > 2 else 1, here), here


def _gate(here: int, there: int, wish: int) -> tuple[nn.Module, int]:
    return nn.Sequential(nn.Conv2d(here, wish, 1), nn.SiLU(), nn.Conv2d(wish, here, 1), nn.Sigmoid()), here


def _pair(here: int, there: int, wish: int) -> tuple[nn.Module, int]:
    return nn.ModuleList([_conv(here, wish), _conv(there, wish)]), wish


BUILD: dict[str, Callable[[int, int, int], tuple[nn.Module, int]]] = {
    "conv": lambda here, there, wish: (_conv(here, wish), wish),
    "depthwise": lambda here, there, wish: (_conv(here, here, here), here),
    "grouped": _in_groups,
    "batch norm": lambda here, there, wish: (nn.BatchNorm2d(here), here),
    "group norm": _group_norm,
    "residual": lambda here, there, wish: (_conv(there, here), here),
    "concatenation": lambda here, there, wish: (nn.Identity(), here + there),
    "twice": lambda here, there, wish: (_conv(here, here), here),
    "gate": _gate,
    "halves": lambda here, there, wish: (_conv(here, 2 * wish), wish),
    "parts": _pair,
    "first units": lambda here, there, wish: (nn.Identity(), here),
    "product": _pair,
    "pixels": lambda here, there, wish: (_conv(here, 4 * wish), wish),
    "half of them": lambda here, there, wish: (nn.Identity(), here),
    "one of them": lambda here, there, wish: (nn.Identity(), here),
    "scaled by a number of units": lambda here, there, wish: (_conv(here, wish), wish),
    "a constant in parts": lambda here, there, wish: (nn.Identity(), here),
    "gathered": lambda here, there, wish: (nn.Identity(), here),
    "scattered": lambda here, there, wish: (nn.Identity(), here),
    "from a state of zeros": lambda here, there, wish: (_conv(here + wish, wish), wish),
}


def _parts(layer: nn.Module, one: Tensor, two: Tensor, wish: int) -> Tensor:
    left, right = layer.get_submodule("0"), layer.get_submodule("1")
    joined = torch.cat([left(one), right(two)], 1)
    a, b = joined.split([left.out_channels, right.out_channels], 1)  # type: ignore[list-item]
    return torch.tanh(a) * torch.sigmoid(b)


def _halves(layer: nn.Module, one: Tensor, two: Tensor, wish: int) -> Tensor:
    a, b = layer(one).chunk(2, 1)
    return torch.tanh(a) * torch.sigmoid(b)


def _first_units(layer: nn.Module, one: Tensor, two: Tensor, wish: int) -> Tensor:
    """A number in the code: two channels are treated in another way."""
    return torch.cat([one[:, :2] * 2, one[:, 2:]], 1)


HALF: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda u: u.roll(1, 2),
    lambda u: u.mT,
    lambda u: u.mean((2, 3), keepdim=True).expand_as(u),
    lambda u: u.flatten(2).softmax(-1).view_as(u),
)
"""Ops on the half of the channels: the boundary between the halves moves with the width."""
SINGLE: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda h: h * h[:, -1:].sigmoid(),
    lambda h: h - h[:, :1],
    lambda h: h * h[:, 1].mean((1, 2)).sigmoid()[:, None, None, None],
    lambda h: torch.cat([h[:, :1], h[:, 1:]], 1).sub(h.select(1, 2)[:, None]),
)
"""One channel that changes all others."""


def _half(layer: nn.Module, one: Tensor, two: Tensor, wish: int) -> Tensor:
    half = one.shape[1] // 2
    return torch.cat([HALF[wish % 4](one[:, :half]), one[:, half:]], 1)


def _scaled(layer: nn.Module, one: Tensor, two: Tensor, wish: int) -> Tensor:
    """Equalised learning rates, or a layer in the neural tangent parametrisation."""
    weight, bias = layer.get_parameter("weight"), layer.get_parameter("bias")
    if wish % 2:
        return nn.functional.conv2d(one, weight * (2 / weight.shape[1]) ** 0.5, bias, padding=1)
    return nn.functional.conv2d(one, weight, padding=1) / one.shape[1] ** 0.5 + bias[:, None, None]


def _constant_in_parts(layer: nn.Module, one: Tensor, two: Tensor, wish: int) -> Tensor:
    channels = one.shape[1]
    if wish % 2:
        mask = torch.cat([torch.ones(channels // 2), torch.full((channels - channels // 2,), 2.0)]).to(one)
    else:
        mask = torch.zeros(channels, dtype=one.dtype, device=one.device)
        mask[: channels // 2] = 1.0
    return one * mask[:, None, None]


def _gathered(layer: nn.Module, one: Tensor, two: Tensor, wish: int) -> Tensor:
    """Places, in another order."""
    order = torch.arange(16, device=one.device).flip(0).roll(wish)
    return one.flatten(2).gather(2, order.expand(*one.shape[:2], -1)).view_as(one)


def _scattered(layer: nn.Module, one: Tensor, two: Tensor, wish: int) -> Tensor:
    """Sums of places, at a few of them."""
    flat, places = one.flatten(2), torch.arange(16, device=one.device) % wish
    if wish % 2:
        return torch.zeros_like(flat).index_add(2, places, flat).view_as(one)
    return torch.zeros_like(flat).scatter_add(2, places.expand_as(flat), flat).view_as(one)


def _from_zeros(layer: nn.Module, one: Tensor, two: Tensor, wish: int) -> Tensor:
    state = one.new_zeros(len(one), layer.get_parameter("weight").shape[0], 4, 4)
    for _ in range(2):
        state = torch.tanh(layer(torch.cat([one, state], 1)))
    return state


RUN: dict[str, Callable[[nn.Module, Tensor, Tensor, int], Tensor]] = {
    "conv": lambda layer, one, two, wish: nn.functional.silu(layer(one)),
    "depthwise": lambda layer, one, two, wish: torch.tanh(layer(one)),
    "grouped": lambda layer, one, two, wish: layer(one).tanh_(),
    "batch norm": lambda layer, one, two, wish: layer(one),
    "group norm": lambda layer, one, two, wish: layer(one),
    "residual": lambda layer, one, two, wish: one + layer(two),
    "concatenation": lambda layer, one, two, wish: torch.cat([one, two], 1),
    "twice": lambda layer, one, two, wish: torch.tanh(layer(torch.tanh(layer(one)))),
    "gate": lambda layer, one, two, wish: one * layer(one.mean((2, 3), keepdim=True)),
    "halves": _halves,
    "parts": _parts,
    "first units": _first_units,
    "product": lambda layer, one, two, wish: layer.get_submodule("0")(one) * layer.get_submodule("1")(two),
    "pixels": lambda layer, one, two, wish: nn.functional.avg_pool2d(nn.functional.pixel_shuffle(layer(one), 2), 2),
    "half of them": _half,
    "one of them": lambda layer, one, two, wish: SINGLE[wish % 4](one),
    "scaled by a number of units": _scaled,
    "a constant in parts": _constant_in_parts,
    "gathered": _gathered,
    "scattered": _scattered,
    "from a state of zeros": _from_zeros,
}
FREEZING = {"first units", "half of them", "one of them", "scaled by a number of units", "a constant in parts"}
"""Kinds that keep the number of channels that they are given."""

instructions = st.tuples(st.sampled_from(sorted(BUILD)), st.integers(0, 5), st.integers(0, 5), st.integers(3, 6))
programs = st.lists(instructions, min_size=1, max_size=6)


def build(program: Sequence[Instruction], flatten: bool) -> nn.Module:
    """The same network every time."""
    torch.manual_seed(1)
    return Random(program, flatten).double().eval()


def shrunk(graph: WidthGraph) -> dict[str, IndexMap]:
    """Each width that has enough, without its second unit and its last."""
    return {
        width.name: IndexMap.keep([0, *range(2, width.size - 1)], width.size)
        for width in graph.resizable
        if width.size >= 4
    }


@settings(max_examples=20)
@given(programs, st.booleans())
@example([("group norm", 0, 0, 3), ("one of them", 0, 0, 3)], False)
def test_every_resizable_width_resizes(program: list[Instruction], flatten: bool) -> None:
    check_resizing(program, flatten)


@pytest.mark.long
@pytest.mark.parametrize("part", range(20))
def test_every_resizable_width_of_two_thousand_networks_resizes(part: int) -> None:
    """A hundred networks at a time, others in every part."""
    test = given(programs, st.booleans())(check_resizing)
    seed(part)(settings(max_examples=100, derandomize=False, database=None)(test))()


def check_resizing(program: Sequence[Instruction], flatten: bool) -> None:
    """Every resizable width permuted, grown by zeros, grown and shrunk: the outputs, and the graph, are as they should be."""
    model = build(program, flatten)
    x = torch.randn(2, 3, 4, 4, dtype=FLOAT)
    expected = outputs(model, x)
    graph = trace(model, x)
    event(f"{len(graph.sizes)} widths")
    unmixed = {width.name: width.size for width in graph.resizable if width.mixed is None}

    resize(model, graph, {name: shuffled(size) for name, size in graph.sizes.items() if size > 1})
    assert distance(outputs(model, x), expected) < EXACT

    model = build(program, flatten)
    after = resize(model, graph, {name: IndexMap.grow(size, 2) for name, size in unmixed.items()})
    assert distance(outputs(model, x), expected) < EXACT
    assert without_reasons(after) == without_reasons(trace(model, x))

    model = build(program, flatten)
    grow(model, graph, {name: size + 1 for name, size in unmixed.items()})
    assert distance(outputs(model, x), expected) < EXACT

    model = build(program, flatten)
    after = resize(model, graph, shrunk(graph))
    assert outputs(model, x)[0].shape == (2, 3)
    assert without_reasons(after) == without_reasons(trace(model, x))


@settings(max_examples=12)
@given(programs)
def test_removing_units_equals_masking_them(program: list[Instruction]) -> None:
    model, masked = build(program, False), build(program, False)
    x = torch.randn(2, 3, 4, 4, dtype=FLOAT)
    graph = trace(model, x)
    maps = {name: m for name, m in shrunk(graph).items() if graph.widths[name].mixed is None}
    resize(model, graph, maps)
    zero_units(masked, graph, maps)
    assert distance(outputs(model, x), outputs(masked, x)) < EXACT


def test_random_networks_have_resizable_widths() -> None:
    """Otherwise the properties above would hold for want of widths."""
    for kind in sorted(BUILD.keys() - FREEZING):
        program = [("conv", 0, 0, 5), (kind, 1, 0, 4), ("conv", 2, 0, 4)]
        sizes = trace(build(program, True), torch.randn(2, 3, 4, 4, dtype=FLOAT)).sizes
        assert len(sizes) >= 2, kind
        assert sizes["layers.3"] == 4, kind


@pytest.mark.parametrize("kind", sorted(FREEZING))
@pytest.mark.parametrize("wish", [3, 4, 5, 6])
def test_channels_that_an_op_treats_unequally_keep_their_number(kind: str, wish: int) -> None:
    graph = trace(build([(kind, 0, 0, wish)], True), torch.randn(2, 3, 4, 4, dtype=FLOAT))
    assert graph.widths["layers.0"].frozen, str(graph)

"""Random networks: whatever their structure, every width that the trace calls resizable resizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from hypothesis import event, given, settings
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
}

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


@settings(max_examples=15)
@given(programs, st.booleans())
def test_every_resizable_width_resizes(program: list[Instruction], flatten: bool) -> None:
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
    for kind in sorted(BUILD.keys() - {"first units"}):
        program = [("conv", 0, 0, 5), (kind, 1, 0, 4), ("conv", 2, 0, 4)]
        sizes = trace(build(program, True), torch.randn(2, 3, 4, 4, dtype=FLOAT)).sizes
        assert len(sizes) >= 2, kind
        assert sizes["layers.3"] == 4, kind
    fixed = trace(build([("first units", 0, 0, 3)], True), torch.randn(2, 3, 4, 4, dtype=FLOAT))
    assert fixed.sizes == {}

"""How the parameters are divided between widths, against a count over every entry of every axis."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor, nn

from evolvenet.graph.coverage import OTHER_ORDER, OUTPUT, is_given
from evolvenet.graph.width_graph import CONSUMES, PRODUCES, Segment, Width, WidthGraph, Widths, assemble
from evolvenet.tracing.trace import trace
from tests.helpers.cases import CASES, Case, graph_of


def counted_by_hand(graph: WidthGraph) -> dict[str, float]:
    """Entries that fall to each width: every entry is looked at by itself."""
    found = dict.fromkeys(graph.widths, 0.0)
    for name in graph.trainable:
        at: list[list[str | None]] = [[None] * length for length in graph.shapes[name]]
        for width in graph.widths.values():
            for tie in width.ties:
                if tie.tensor == name and not is_given(width):
                    places = width.size * tie.repeat
                    at[tie.dim][tie.start : tie.start + places] = [width.name] * places
        for entry in itertools.product(*at):
            inside = [width for width in entry if width is not None]
            for width in inside:
                found[width] += 1 / len(inside)
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_shares_are_those_of_every_entry_counted_by_hand(case: Case) -> None:
    graph = graph_of(case)
    expected = {name: count / graph.parameters for name, count in counted_by_hand(graph).items()}
    assert graph.shares == pytest.approx(expected)
    assert graph.coverage == pytest.approx(sum(expected[width.name] for width in graph.resizable))


class FrozenStream(nn.Module):
    """A residual stream of 8 channels that the model returns, between blocks of 16 hidden units."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 8, bias=False)
        self.up = nn.ModuleList(nn.Linear(8, 16) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(16, 8, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """The stream after both blocks."""
        x = self.stem(x)
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(up(x).relu())
        return x


def test_of_the_weights_between_hidden_units_and_a_frozen_stream_half_is_covered() -> None:
    graph = trace(FrozenStream(), torch.zeros(2, 4))
    assert graph.widths["stem"].frozen == OUTPUT
    # Of 2 blocks of 2·16·8 weights and 16 biases, and 4·8 weights of the stem.
    assert graph.parameters == 2 * 272 + 32
    assert graph.shares["stem"] == pytest.approx((2 * 128 + 32) / 576)
    assert graph.shares["up.0"] == graph.shares["up.1"] == pytest.approx((128 + 16) / 576)
    assert graph.coverage == pytest.approx(2 * 144 / 576)
    frozen = {n: dataclasses.replace(w, frozen="by hand" if n == "up.0" else w.frozen) for n, w in graph.widths.items()}
    less = dataclasses.replace(graph, widths=Widths(frozen))
    assert (less.coverage, less.shares) == (pytest.approx(144 / 576), graph.shares)
    assert str(graph).splitlines()[1].split()[:4] == ["stem", "8", "544", "50.0%"]


def test_inputs_outputs_and_kernels_take_no_part() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.ReLU(), nn.Conv2d(6, 4, 3, bias=False))
    graph = trace(model, torch.zeros(1, 3, 8, 8))
    assert graph.coverage == graph.shares["0"] == 1.0


def test_units_in_another_order_count_as_frozen_on_either_axis() -> None:
    hidden = (Segment("hidden", 6),)
    layouts = {
        "make.weight": {0: (Segment("mixed", 4),), 1: hidden},
        "use.weight": {0: hidden, 1: tuple(Segment(None, 1) for _ in range(4))},
    }
    graph = assemble(
        {"mixed": Width("mixed", 4, frozen=f"{OTHER_ORDER} on axis 1 of use.weight"), "hidden": Width("hidden", 6)},
        layouts,
        {"make.weight": (4, 6), "use.weight": (6, 4)},
        frozenset(layouts),
        {},
        {("make.weight", 0): PRODUCES, ("make.weight", 1): CONSUMES, ("use.weight", 0): PRODUCES},
        differentiates=False,
    )
    assert graph.coverage == graph.shares["hidden"] == 0.5
    assert graph.shares["mixed"] == 0.25, "the axis on which its units are in order"
    other = {name: dataclasses.replace(width, frozen=None) for name, width in graph.widths.items()}
    assert not any(is_given(width) for width in other.values())

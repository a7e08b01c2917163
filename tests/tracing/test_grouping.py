"""How an axis is divided into runs of widths."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from evolvenet.tracing.grouping import Group, _segments
from evolvenet.tracing.labels import AxisIds
from evolvenet.tracing.trace import trace

SIZES = (1, 2, 3, 5)
GROUPS = [Group(tuple(range(size)), 0, None, None, 1) for size in SIZES]
whole = st.builds(
    lambda group, repeat: [(group, unit) for unit in range(SIZES[group]) for _ in range(repeat)],
    st.integers(0, len(SIZES) - 1),
    st.integers(1, 3),
)
single = st.sampled_from([[(group, unit)] for group, size in enumerate(SIZES) for unit in range(size)])


@given(st.lists(st.one_of(whole, single), min_size=1, max_size=8))
def test_runs_are_those_of_a_comparison_place_by_place(parts: list[list[tuple[int, int]]]) -> None:
    places = [place for part in parts for place in part]
    found: dict[int, str] = {}
    runs = _segments(np.array(places), GROUPS, AxisIds("t", 0, 0, len(places)), found)
    expected, disordered = place_by_place(places)
    assert [(group, length, repeat) for group, length, repeat in runs if group is not None] == expected
    assert set(found) == disordered
    assert sum(length for _, length, _ in runs) == len(places)


def place_by_place(places: list[tuple[int, int]]) -> tuple[list[tuple[int, int, int]], set[int]]:
    """(group, length, repeat) of the whole runs on an axis, and the groups with places outside of them."""
    runs, disordered, start = [], set[int](), 0
    while start < len(places):
        group = places[start][0]
        repeat = next((k for k, place in enumerate(places[start:]) if place != places[start]), len(places) - start)
        length = SIZES[group] * repeat
        if places[start : start + length] == [(group, unit) for unit in range(SIZES[group]) for _ in range(repeat)]:
            runs.append((group, length, repeat))
            start += length
        else:
            disordered.add(group)
            start += repeat
    return runs, disordered


class Positions(nn.Module):
    """A dense layer over the middle of a table of positions, as relative positions are looked up."""

    table: Tensor

    def __init__(self, most: int, width: int = 6) -> None:
        super().__init__()
        self.most = most
        self.a, self.p, self.b = nn.Linear(4, width), nn.Linear(width, width), nn.Linear(width, 2)
        self.register_buffer("table", torch.zeros(2 * most - 1, width))

    def forward(self, x: Tensor) -> Tensor:
        steps = x.shape[1]
        used = self.p(self.table[self.most - steps : self.most + steps - 1])
        return self.b(self.a(x) @ used.T @ used)


def test_a_long_table_of_which_the_middle_is_used_is_traced() -> None:
    """Comparing the rest of the axis at each of its places would take minutes here."""
    graphs = [trace(Positions(most), torch.zeros(1, 3, 4)) for most in (10, 20_000)]
    assert graphs[0].sizes == graphs[1].sizes == {"table:in": 6, "p": 6}
    assert graphs[0].reasons == graphs[1].reasons

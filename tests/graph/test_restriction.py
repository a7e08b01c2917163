"""Which widths a user excludes from change, and the sizes that the others may take."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from evolvenet import PolicyError, trace
from evolvenet.graph.restriction import Restriction, freeze, with_multiple
from evolvenet.graph.serialization import from_state_dict, to_state_dict
from evolvenet.graph.width_graph import Width
from tests.helpers.cases import CASES, Case, graph_of


class Parts(nn.Module):
    """A stem, a backbone with a residual stream that the stem joins, and a head of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 8)
        self.stem2 = nn.Linear(8, 8)
        self.backbone = nn.Sequential(OrderedDict(first=nn.Linear(8, 6), second=nn.Linear(6, 8)))
        self.head = nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem2(self.stem(x).relu()).relu()
        return self.head(x + self.backbone(x))


GRAPH = trace(Parts(), torch.zeros(1, 4))


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({}, ["backbone.first", "head.0", "stem", "stem2"]),
        ({"network": "backbone"}, ["backbone.first"]),
        ({"network": ["backbone", "stem2"]}, ["backbone.first", "stem2"]),
        ({"network": "backbone.f*"}, ["backbone.first"]),
        ({"fixed": ["stem*", "head"]}, ["backbone.first"]),
        ({"fixed": "stem"}, ["backbone.first", "head.0", "stem2"]),
        # One of the two modules that produce the residual stream.
        ({"fixed": ["backbone.second"]}, ["backbone.first", "head.0", "stem"]),
        ({"network": ["head", "stem*"], "fixed": "*.0"}, ["stem"]),
    ],
    ids=str,
)
def test_names_choose_widths_by_the_modules_that_produce_them(options: dict[str, Any], left: list[str]) -> None:
    assert sorted(freeze(GRAPH, **options).sizes) == left


def test_the_reason_names_the_pattern() -> None:
    graph = freeze(GRAPH, network="backbone", fixed=["stem*"])
    assert graph.widths["stem"].frozen == "fixed by the user: matches 'stem*'"
    assert graph.widths["head.0"].frozen == "fixed by the user: lies outside of network 'backbone'"
    before = GRAPH.reasons
    assert {name: reason for name, reason in graph.reasons.items() if name in before} == before


def test_names_may_begin_in_the_module_around_the_network() -> None:
    for name in ("net.stem", "stem"):
        assert set(freeze(GRAPH, fixed=name, path="net").sizes) == {"stem2", "backbone.first", "head.0"}
    assert freeze(GRAPH, fixed="other.stem", path="net").sizes == GRAPH.sizes


MODULES = [name for name, _ in Parts().named_modules()]


@pytest.mark.parametrize("known", [None, GRAPH], ids=["before the trace", "after it"])
def test_a_name_that_matches_nothing_is_refused_with_names_like_it(known: Any) -> None:
    Restriction(network="backbone", fixed=["head.0", "stem?"]).check(MODULES, known)
    with pytest.raises(PolicyError, match=r"'backbon', which matches none. Like it are 'backbone'"):
        Restriction(network="backbon").check(MODULES, known)
    with pytest.raises(PolicyError, match=r"'steem\*'"):
        Restriction(fixed=["head", "steem*"]).check(MODULES, known)


def test_before_the_trace_a_name_may_go_from_the_network_that_is_not_known_yet() -> None:
    modules = ["", "net", *(f"net.{name}" for name in MODULES if name)]
    Restriction(fixed=["stem", "net.head", "stem#2"]).check(modules)
    Restriction(fixed=["stem", "net.head"]).check(modules, GRAPH, path="net")
    with pytest.raises(PolicyError, match="'stem#2'"):
        Restriction(fixed=["stem#2"]).check(modules, GRAPH, path="net")


@pytest.mark.parametrize("wrong", [{"multiple": 0}, {"multiple": 2.0}, {"fixed": [3]}, {"network": ""}], ids=str)
def test_what_is_no_name_or_no_multiple_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(PolicyError, match=next(iter(wrong))):
        Restriction(**wrong)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("multiple", [1, 8])
def test_a_step_of_units_is_a_multiple_of_channels_in_every_weight_that_produces_them(
    case: Case, multiple: int
) -> None:
    graph = with_multiple(graph_of(case), multiple)
    assert from_state_dict(to_state_dict(graph)) == graph
    for width in graph.widths.values():
        places = {(tie.tensor, tie.dim) for tie in width.producers}
        for place in places:
            channels = sum(tie.repeat for tie in width.producers if (tie.tensor, tie.dim) == place)
            assert width.step * channels % multiple == 0
        assert multiple % width.step == 0


@given(st.integers(1, 80), st.integers(1, 16), st.integers(1, 4), st.integers(0, 200))
def test_a_rounded_size_is_a_multiple_or_the_present_one_and_in_the_same_direction(
    now: int, step: int, smallest: int, size: int
) -> None:
    width = Width("0", now, smallest=min(smallest, now), step=step)
    found = width.rounded(size)
    assert found == now or found % step == 0
    assert width.smallest <= found
    assert found <= now if size <= now else found > now
    assert width.rounded(found) == found
    if size % step == 0 and size >= width.smallest:
        assert found == size

"""Counts of a graph against counting every entry, and the maps that it refuses."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from evolvenet.engine.evolver import Evolver
from evolvenet.engine.functional import grow, prune, resize
from evolvenet.errors import ResizeError
from evolvenet.graph.index_map import IndexMap
from evolvenet.graph.sizes import sizes_from_shapes
from evolvenet.graph.width_graph import PRODUCES, WidthGraph
from evolvenet.policies.base import Policy
from evolvenet.policies.budget import Budget
from evolvenet.policies.front import Front
from evolvenet.policies.price import Price
from evolvenet.policies.threshold import Threshold
from evolvenet.tracing.trace import trace
from tests.helpers.cases import CASES, Case, graph_of

BY_NAME = {case.name: case for case in CASES}


def marked(graph: WidthGraph, name: str) -> dict[str, Tensor]:
    """For every tensor, which entries lie in a width: computed slowly, from the ties alone."""
    masks = {tensor: torch.zeros(shape, dtype=torch.bool) for tensor, shape in graph.shapes.items()}
    width = graph.widths[name]
    for tie in width.ties:
        masks[tie.tensor].narrow(tie.dim, tie.start, width.size * tie.repeat).fill_(True)
    return masks


def half(graph: WidthGraph) -> dict[str, IndexMap]:
    """Every resizable width two units down and one new unit up, where it has enough."""
    return {
        width.name: IndexMap.of([*range(1, width.size - 1), -1], width.size)
        for width in graph.resizable
        if width.size >= width.smallest + 2
    }


@pytest.mark.parametrize("case", CASES, ids=str)
def test_counts_are_those_of_the_entries(case: Case) -> None:
    graph, model = graph_of(case), case.model()
    assert graph.parameters == sum(parameter.numel() for parameter in model.parameters())
    for name, width in graph.widths.items():
        masks = marked(graph, name)
        assert width.parameters == sum(int(masks[tensor].sum()) for tensor in graph.trainable)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_axis_is_laid_out_to_its_end(case: Case) -> None:
    graph = graph_of(case)
    tensors = {**dict(case.model().named_parameters()), **dict(case.model().named_buffers())}
    for name, shape in graph.shapes.items():
        assert shape == tuple(tensors[name].shape)
        for dim, parts in graph.layouts[name].items():
            assert sum(part.length for part in parts) == shape[dim]
            for part in parts:
                if part.width is not None:
                    assert part.length == graph.widths[part.width].size * part.repeat
    assert all(tie.role == PRODUCES for width in graph.widths.values() for tie in width.producers)
    assert all(graph.aliases[alias] in graph.shapes for alias in graph.aliases)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_proposed_parameters_are_those_of_the_resized_model(case: Case) -> None:
    model, graph = case.model(), graph_of(case)
    maps = half(graph)
    sizes = {name: index_map.new_size for name, index_map in maps.items()}
    proposed = graph.proposed_parameters(sizes)
    after = resize(model, graph, maps)
    assert proposed == after.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert graph.proposed_parameters({}) == graph.parameters


def test_proposed_parameters_accept_every_name_of_a_width() -> None:
    graph = graph_of(BY_NAME["resnet"])
    assert graph.proposed_parameters({"blocks.0.conv2": 3}) == graph.proposed_parameters({"stem": 3}) < graph.parameters
    with pytest.raises(ResizeError, match="No width is called 'steam'"):
        graph.proposed_parameters({"steam": 3})


def test_axis_maps_offset_and_repeat() -> None:
    """A concatenation offsets, a flattened map of 2 × 2 repeats."""
    dense = graph_of(BY_NAME["densenet"])
    found = dense.axis_maps({"convs.0": IndexMap.of([3, -1], 4)})
    assert found["head.weight"] == {1: IndexMap.of([0, 1, 2, 3, 4, 5, 9, -1, 10, 11, 12, 13, 14], 15)}
    assert found["convs.0.weight"] == {0: IndexMap.of([3, -1], 4)}
    assert "stem.weight" not in found
    flat = graph_of(BY_NAME["conv"])
    assert flat.axis_maps({"4": IndexMap.keep([2], 5)})["7.weight"] == {1: IndexMap.keep([8, 9, 10, 11], 20)}
    lstm = graph_of(BY_NAME["lstm"]).axis_maps({"cell": IndexMap.keep([0, 4], 5)})
    assert lstm["cell.weight_hh_l0"][0].indices == (0, 4, 5, 9, 10, 14, 15, 19)


def test_names_of_all_producers_lead_to_the_width() -> None:
    graph = graph_of(BY_NAME["resnet"])
    assert graph.widths["blocks.0.conv2"] is graph.widths["stem"]
    assert graph.widths["blocks.1.shortcut.0"] is graph.widths["blocks.1.conv2"]
    assert "blocks.0.conv2" in graph.widths
    assert "blocks.0.norm2" not in graph.widths
    assert "blocks.0.conv2" not in list(graph.widths)
    assert len(graph.widths) == len(list(graph.widths))
    shrink = IndexMap.keep(range(4), 6)
    assert graph.axis_maps({"blocks.0.conv2": shrink}) == graph.axis_maps({"stem": shrink})


def test_a_graph_is_immutable() -> None:
    graph = graph_of(BY_NAME["mlp"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        graph.shapes = {}  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        graph.widths["0"].size = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("case", "maps", "message"),
    [
        ("mlp", {"1": IndexMap.identity(12)}, "No width is called '1'. Resizable here: 0, 3."),
        ("mlp", {"6": IndexMap.keep([0], 3)}, "'6' is frozen and keeps its 3 units: is the model's output"),
        ("mlp", {"0": IndexMap.keep([0], 8)}, "'0' has 12 units, but its map starts from 8"),
        ("resnet", {"stem": IndexMap.identity(6), "blocks.0.conv2": IndexMap.identity(6)}, "'stem' was named twice"),
        ("mobilenet", {"expand": IndexMap.keep([0], 8)}, "'expand' needs 2 units or more, got a new size of 1"),
    ],
)
def test_what_cannot_be_done_is_refused(case: str, maps: dict[str, IndexMap], message: str) -> None:
    graph = graph_of(BY_NAME[case])
    for method in (graph.check, graph.axis_maps, graph.resized):
        with pytest.raises(ResizeError) as caught:
            method(maps)
        assert message in str(caught.value)


def test_no_maps_change_nothing() -> None:
    graph = graph_of(BY_NAME["resnet"])
    assert graph.axis_maps({}) == {}
    assert dict(graph.resized({}).widths) == dict(graph.widths)


def test_resized_is_a_function_of_composed_maps() -> None:
    graph = graph_of(BY_NAME["unet"])
    one, two = IndexMap.keep([0, 2, 3], 5), IndexMap.of([2, -1, 0, -1], 3)
    twice, once = graph.resized({"down1": one}).resized({"down1": two}), graph.resized({"down1": one.then(two)})
    assert dict(twice.widths) == dict(once.widths)
    assert twice.shapes == once.shapes
    assert twice.layouts == once.layouts


def test_str_and_explain_list_widths_and_ties() -> None:
    graph = graph_of(BY_NAME["densenet"])
    table = str(graph).splitlines()
    assert table[0].split() == ["name", "size", "parameters", "share", "ties", "frozen"]
    assert table[1].split()[:4] == ["stem", "6", "696", f"{graph.shares['stem']:.1%}"]
    assert table[-1] == f"coverage {graph.coverage:.1%} of {graph.parameters:,} parameters"
    lines = graph.explain("convs.0").splitlines()
    assert lines[0].startswith("convs.0: 4 units, ")
    assert "  produces convs.0.weight axis 0 [0:4]" in lines
    assert "  consumes head.weight axis 1 [6:10]" in lines
    assert "  follows  norms.1.bias axis 0 [6:10]" in lines
    assert "frozen: is the model's output" in graph.explain("head")
    assert "4 places a unit" in graph_of(BY_NAME["conv"]).explain("4")


def test_a_model_all_frozen_has_no_coverage() -> None:
    graph = trace(torch.nn.Linear(4, 3), torch.zeros(1, 4))
    assert (graph.coverage, graph.sizes, graph.resizable) == (0.0, {}, ())


class TwoStreams(nn.Module):
    """Channels of two convolutions side by side under one group norm, of which each group has as many as the first has."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 12, 1)
        self.norm, self.out = nn.GroupNorm(4, 16), nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(torch.cat([self.a(x), self.b(x)], 1)).relu())


def test_a_width_of_one_group_may_stay_as_it_is() -> None:
    model, x = TwoStreams(), torch.randn(8, 3, 4, 4)
    graph, before = trace(model, x[:2]), model(x)
    assert graph.sizes == {"a": 1, "b": 3}
    resize(model, graph, {"a": IndexMap.identity(1)})
    prune(model, graph, graph.sizes, [x])
    assert torch.equal(model(x), before)
    assert sizes_from_shapes(graph, graph.shapes) == ({name: width.size for name, width in graph.widths.items()}, [])
    graph = grow(model, prune(model, graph, {"a": 1, "b": 2}, [x]), {"a": 3})
    assert prune(model, graph, {"a": 1}).sizes == {"a": 1, "b": 2}
    assert model(x).shape == before.shape


@pytest.mark.parametrize(
    "policy",
    [Threshold(prune=0.99), Budget(params=1), Price(1e9), Front([Budget(params=1)]), Budget(params=1, trials=True)],
    ids=str,
)
def test_policies_take_a_width_of_one_group(policy: Policy) -> None:
    model, x = TwoStreams(), torch.randn(8, 3, 4, 4)
    evolver = Evolver(model, None, policy, x[:2])
    evolver.observe(x)
    event = evolver.step(progress=0.5)
    assert event.skipped is None
    assert event.sizes["b"] in {2, 3}

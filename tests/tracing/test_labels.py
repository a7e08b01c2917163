"""Label layers and the label graph against their plain, slow definitions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from evolvenet.execution.isolation import isolated
from evolvenet.graph.width_graph import CONSUMES
from evolvenet.tracing.labels import LabelGraph
from evolvenet.tracing.merging import merge
from evolvenet.tracing.rearranged import reshaped
from evolvenet.tracing.trace import run_for_labels, run_for_shapes


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
def test_reshaping_a_compressed_layer_equals_reshaping_the_expanded_one(data: st.DataObject, number: int) -> None:
    old, new = data.draw(factorised(number)), data.draw(factorised(number))
    shape = [size if data.draw(st.booleans()) else 1 for size in old]
    layer = torch.arange(math.prod(shape)).reshape(shape)
    got = reshaped(layer, old, new)
    assert torch.equal(got.expand(new), layer.expand(old).reshape(new))
    assert got.numel() <= math.prod(new)


def test_a_view_keeps_constant_dimensions_of_a_layer_at_size_one() -> None:
    channels = torch.arange(8).view(1, 8, 1, 1)
    assert reshaped(channels, (2, 8, 224, 224), (2, 2, 4, 224 * 224)).shape == (1, 2, 4, 1)


def test_units_of_a_row_are_tied_only_if_their_placeholder_is_tied_to_a_tensor() -> None:
    """A norm over each head's places leaves the places free; a parameter for each head does not."""
    label_graph = LabelGraph()
    (grid,) = label_graph.add_tensor("a", (6,))
    (other,) = label_graph.add_tensor("b", (3,))
    placeholders = label_graph.add_placeholders(grid.view(3, 2), {1})
    assert placeholders.shape == (3, 1)
    assert len(set(label_graph.components()[:6])) == 6
    label_graph.union(placeholders.view(3), other)
    component = label_graph.components()
    assert [len(set(component[k : k + 2])) for k in (0, 2, 4)] == [1, 1, 1]
    assert len(set(component[:6])) == 3
    assert component[6:9].tolist() == component[[0, 2, 4]].tolist()


def test_placeholders_tied_through_other_placeholders_tie_their_rows() -> None:
    """A mean of norms: the number that is left is tied to a parameter, through it the norms, through them their rows."""
    label_graph = LabelGraph()
    (grid,) = label_graph.add_tensor("a", (6,))
    (single,) = label_graph.add_tensor("b", (2,))
    norms = label_graph.add_placeholders(grid.view(3, 2), {1})
    total = label_graph.add_placeholders(norms, {0})
    (other,) = label_graph.add_tensor("c", (4,))
    far = label_graph.add_placeholders(other.view(2, 2), {1})
    label_graph.union(total.view(1), single[:1])
    component = label_graph.components()
    assert len(set(component[grid])) == 1
    assert len(set(component[other])) == 4  # nothing is tied to the rows of the other grid
    label_graph.freeze(far, "a reason")
    component = label_graph.components()
    assert component[other].tolist() == component[other[::2]].repeat(2).tolist()
    assert len(set(component[other])) == 2


def test_rows_with_padding_are_not_tied_by_placeholders() -> None:
    label_graph = LabelGraph()
    (grid,) = label_graph.add_tensor("a", (4,))
    padded = torch.cat([grid, torch.tensor([-1, -1])]).view(3, 2)
    label_graph.freeze(label_graph.add_placeholders(padded, {1}), "a reason")
    assert len(set(label_graph.components()[:4])) == 4


@pytest.mark.parametrize("first", ["rows", "grid"])
def test_merge_keeps_the_finer_layer_of_placeholders_and_their_units_in_any_order(first: str) -> None:
    """`h / h.norm()`: the norm of every row may stay apart from the places that it scales."""
    label_graph = LabelGraph()
    (grid,) = label_graph.add_tensor("a", (6,))
    layer = grid.view(3, 2)
    rows = label_graph.add_placeholders(layer, {1})
    groups = [[rows], [layer]] if first == "rows" else [[layer], [rows]]
    assert merge(label_graph, groups) == (layer,)
    assert label_graph.edges == []
    assert len(set(label_graph.components()[:6])) == 6


def test_merge_keeps_the_smaller_of_two_layers_and_ties_both() -> None:
    label_graph = LabelGraph()
    (wide,), (narrow,) = label_graph.add_tensor("a", (6,)), label_graph.add_tensor("b", (3,))
    (merged,) = merge(label_graph, [[wide.view(3, 2)], [narrow.view(3, 1)]])
    assert torch.equal(merged, narrow.view(3, 1))
    component = label_graph.components()
    assert component[:6].tolist() == component[6:9].repeat(2).tolist()


def test_merge_keeps_layers_along_different_dimensions() -> None:
    label_graph = LabelGraph()
    (rows,), (columns,) = label_graph.add_tensor("a", (3,)), label_graph.add_tensor("b", (2,))
    merged = merge(label_graph, [[rows.view(3, 1)], [columns.view(1, 2)]])
    assert [tuple(layer.shape) for layer in merged] == [(3, 1), (1, 2)]
    assert label_graph.edges == []


def test_axes_with_the_same_role_get_it_from_the_one_that_is_used() -> None:
    label_graph = LabelGraph()
    (one,), (two,), (three,) = (label_graph.add_tensor(name, (4,)) for name in "abc")
    placeholders = label_graph.add_placeholders(one.view(2, 2), {1})
    label_graph.share_role([one, placeholders, two])
    label_graph.share_role([two, three])
    assert label_graph.same_roles == [
        (("a", 0), ("b", 0)),
        (("b", 0), ("a", 0)),
        (("b", 0), ("c", 0)),
        (("c", 0), ("b", 0)),
    ]
    label_graph.set_role("c", three, consumed=True)
    label_graph.propagate_roles()
    assert label_graph.roles == dict.fromkeys([("a", 0), ("b", 0), ("c", 0)], CONSUMES)
    assert label_graph.inherited_roles == {("a", 0), ("b", 0)}


def test_run_for_shapes_gives_the_output_shapes_of_run_for_labels() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    x = torch.randn(2, 3, 8, 8)
    for device in ("meta", None):
        with isolated(model, shadows=True, device=device):
            shapes = run_for_shapes(model, x, device)
            assert shapes == run_for_labels(model, x, device).output_shapes == [tuple(model(x.to(device)).shape)]

"""`IndexMap` against plain Python lists, one unit at a time."""

from __future__ import annotations

import dataclasses
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from evolvenet.errors import EvolveNetError, IndexMapError
from evolvenet.graph.index_map import IndexMap


def maps_from(size: int) -> st.SearchStrategy[IndexMap]:
    """Any map from `size` units: subsets, new units, splits and shuffles at once."""
    return st.lists(st.integers(-1, size - 1), min_size=1, max_size=9).map(lambda found: IndexMap.of(found, size))


MAPS = st.integers(1, 7).flatmap(maps_from)
CHAINS = MAPS.flatmap(lambda first: maps_from(first.new_size).map(lambda second: (first, second)))
TRIPLES = CHAINS.flatmap(lambda two: maps_from(two[1].new_size).map(lambda third: (*two, third)))


def slow(index_map: IndexMap, tensor: Tensor, dim: int, new_unit: float = 0.0) -> Tensor:
    """The new tensor, computed one unit at a time."""
    empty = torch.full_like(tensor.select(dim, 0), new_unit)
    return torch.stack([tensor.select(dim, i) if i >= 0 else empty for i in index_map.indices], dim)


@given(pair=CHAINS)
def test_two_changes_are_one(pair: tuple[IndexMap, IndexMap]) -> None:
    first, second = pair
    both = first.then(second)
    assert (both.size, both.new_size) == (first.size, second.new_size)
    units = torch.arange(1.0, first.size + 1)
    assert torch.equal(both.apply(units, 0), second.apply(first.apply(units, 0), 0))


@given(three=TRIPLES)
def test_composition_is_associative_with_the_identity_as_unit(three: tuple[IndexMap, IndexMap, IndexMap]) -> None:
    first, second, third = three
    assert first.then(second).then(third) == first.then(second.then(third))
    assert IndexMap.identity(first.size).then(first) == first == first.then(IndexMap.identity(first.new_size))


@given(parts=st.lists(MAPS, min_size=1, max_size=4))
def test_concat_changes_each_part_by_itself(parts: list[IndexMap]) -> None:
    whole = IndexMap.concat(parts)
    pieces = [torch.randn(part.size) for part in parts]
    expected = torch.cat([part.apply(piece, 0) for part, piece in zip(parts, pieces, strict=True)])
    assert whole.size == sum(part.size for part in parts)
    assert torch.equal(whole.apply(torch.cat(pieces), 0), expected)


@given(index_map=MAPS, inner=st.integers(1, 4))
def test_repeat_is_the_flattened_form(index_map: IndexMap, inner: int) -> None:
    block = torch.randn(index_map.size, inner)
    many = index_map.repeat(inner)
    assert (many.size, many.new_size) == (index_map.size * inner, index_map.new_size * inner)
    assert torch.equal(many.apply(block.flatten(), 0), index_map.apply(block, 0).flatten())


@given(pair=CHAINS, inner=st.integers(1, 3))
def test_repeat_and_composition_can_be_exchanged(pair: tuple[IndexMap, IndexMap], inner: int) -> None:
    first, second = pair
    assert first.then(second).repeat(inner) == first.repeat(inner).then(second.repeat(inner))


@given(index_map=MAPS, dim=st.integers(-4, 3), new_unit=st.sampled_from([0.0, 1.0, -2.5]))
def test_apply_is_the_slow_answer_on_every_axis(index_map: IndexMap, dim: int, new_unit: float) -> None:
    shape = [2, 3, 4, 5]
    shape[dim] = index_map.size
    tensor = torch.randn(shape, dtype=torch.float64)
    before = tensor.clone()
    made = index_map.apply(tensor, dim, new_unit)
    assert torch.equal(made, slow(index_map, tensor, dim, new_unit))
    made.fill_(7)
    assert torch.equal(tensor, before), "the result shares no memory with what it was made from"


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((6, 4, 3, 3), torch.channels_last),
        ((6, 4, 3, 3, 3), torch.channels_last_3d),
        ((6, 4, 3, 3), torch.contiguous_format),
    ],
)
@pytest.mark.parametrize("indices", [[3, 0], [0, 1, 2, 3, -1], [1, 1, -1, 2, 3, 0, -1]])
def test_apply_keeps_the_memory_format(shape: tuple[int, ...], layout: torch.memory_format, indices: list[int]) -> None:
    tensor = torch.randn(shape).to(memory_format=layout)
    for dim, size in ((0, 6), (1, 4)):
        index_map = IndexMap.of(indices, size)
        made = index_map.apply(tensor, dim)
        assert made.is_contiguous(memory_format=layout)
        assert torch.equal(made, slow(index_map, tensor, dim))


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("shape", [(6, 1, 3, 3), (6, 4, 1, 1), (1, 4, 3, 3), (1, 1, 1, 1), (6, 1, 1, 1), (6, 4, 3, 3)])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_the_format_is_kept_where_only_strides_tell(
    layout: torch.memory_format, shape: tuple[int, ...], size: int
) -> None:
    tensor = torch.randn(shape).to(memory_format=layout)
    for dim in (0, 1):
        indices = [place if place < shape[dim] else -1 for place in range(size)]
        made = IndexMap.of(indices, shape[dim]).apply(tensor, dim)
        expected = torch.empty(made.shape).to(memory_format=layout)
        if tensor.stride() != torch.empty(shape).stride() or layout is torch.contiguous_format:
            assert made.stride() == expected.stride()
        meta = IndexMap.of(indices, shape[dim]).apply(tensor.to("meta"), dim)
        assert meta.stride() == made.stride(), "what is tried without data is what happens"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_apply_keeps_the_type(dtype: torch.dtype) -> None:
    tensor = torch.tensor([1, 0, 1]).to(dtype)
    made = IndexMap.of([2, -1, 0, 1], 3).apply(tensor, 0)
    assert made.dtype == dtype
    assert made.tolist() == [1, 0, 1, 0]


@given(index_map=MAPS)
def test_apply_on_meta_gives_the_shape(index_map: IndexMap) -> None:
    made = index_map.apply(torch.empty(index_map.size, 3, device="meta"), 0)
    assert made.device.type == "meta"
    assert made.shape == (index_map.new_size, 3)


@given(index_map=MAPS)
def test_properties_of_a_map_follow_from_its_indices(index_map: IndexMap) -> None:
    assert index_map.new_size == len(index_map.indices)
    assert [index_map.indices[place] for place in index_map.new_units] == [-1] * index_map.indices.count(-1)
    assert set(index_map.removed) | {index for index in index_map.indices if index >= 0} == set(range(index_map.size))
    assert not set(index_map.removed) & set(index_map.indices)
    assert index_map.is_identity == (index_map == IndexMap.identity(index_map.size))
    assert index_map.tensor().dtype == torch.int64
    assert tuple(index_map.tensor().tolist()) == index_map.indices
    assert IndexMap.of(index_map.tensor(), index_map.size) == index_map


@given(data=st.data(), size=st.integers(1, 9))
def test_keep_takes_distinct_units_in_the_given_order(data: st.DataObject, size: int) -> None:
    chosen = data.draw(st.lists(st.integers(0, size - 1), min_size=1, unique=True))
    made = IndexMap.keep(chosen, size)
    assert made.indices == tuple(chosen)
    assert not made.new_units
    assert len(made.removed) == size - len(chosen)


@given(size=st.integers(1, 9), count=st.integers(0, 5))
def test_grow_keeps_all_units_and_puts_new_ones_last(size: int, count: int) -> None:
    made = IndexMap.grow(size, count)
    assert made.indices == (*range(size), *[-1] * count)
    assert made.is_identity == (count == 0)
    assert made.then(IndexMap.keep(range(size), size + count)).is_identity


def test_maps_are_values() -> None:
    made = IndexMap.keep(torch.tensor([2, 0]), 3)
    assert made == IndexMap((2, 0), 3)
    assert len({made, IndexMap.of([2, 0], 3), IndexMap.of([2, 0], 4)}) == 2
    assert pickle.loads(pickle.dumps(made)) == made
    assert all(type(index) is int for index in made.indices), "a checkpoint holds plain numbers"
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.size = 4  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: IndexMap.of([], 3), "at least one unit.*of 3.*empty"),
        (lambda: IndexMap.of([0], 0), "old size of 1 or more, got 0"),
        (lambda: IndexMap.of([0, 3], 3), "0 … 2.*got 3"),
        (lambda: IndexMap.of([0, -2], 3), "−1 for a new unit, got -2"),
        (lambda: IndexMap.keep([0, 0], 3), r"distinct.*\[0, 0\].*IndexMap\.of"),
        (lambda: IndexMap.keep([0, -1], 3), r"distinct.*\[0, -1\]"),
        (lambda: IndexMap.keep([5], 3), "got 5"),
        (lambda: IndexMap.grow(3, -1), r"0 or more, got -1.*IndexMap\.keep"),
        (lambda: IndexMap.grow(3, 1).then(IndexMap.identity(3)), "from 4 units, got one from 3"),
        (lambda: IndexMap.concat([]), "old size of 1 or more"),
        (lambda: IndexMap.identity(3).apply(torch.zeros(2, 4), 1), r"axis 1 to have 3.*\(2, 4\)"),
    ],
)
def test_mistakes_are_named(call, text: str) -> None:
    with pytest.raises(IndexMapError, match=text) as caught:
        call()
    assert isinstance(caught.value, EvolveNetError)
    assert isinstance(caught.value, ValueError)

"""Shortcuts on meta tensors give what the ops give, and leave to the ops what they do not know."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from evolvenet._compat.torch import tree_leaves, tree_map_only
from evolvenet.tracing.meta_ops import META_CHECKS, META_SHORTCUTS

aten = torch.ops.aten
OTHERS = ("Tensor", "norm", "mm", "softmax", "Scalar", "mean")
SINGLE = [op for op in META_SHORTCUTS if not any(part in str(op) for part in OTHERS)]
PAIRS = [aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64]
sizes = st.lists(st.integers(1, 3), max_size=3)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    tensor = torch.ones(draw(sizes), dtype=draw(st.sampled_from(DTYPES)))
    if tensor.dim() > 1 and draw(st.booleans()):
        tensor = tensor.transpose(0, 1)
    return tensor.unsqueeze(0).expand(2, *tensor.shape) if draw(st.booleans()) else tensor


def described(result: Any) -> list[tuple[Any, ...]]:
    """Shape, strides where they count, and type of each tensor."""
    return [
        (
            tuple(leaf.shape),
            [step for size, step in zip(leaf.shape, leaf.stride(), strict=True) if size > 1],
            leaf.dtype,
        )
        for leaf in tree_leaves(result)
        if isinstance(leaf, Tensor)
    ]


def without_data(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def is_that_of_the_op(op: Any, arguments: tuple[Any, ...]) -> bool:
    """Whether the shortcut gives a result, which then has to be that of the op on data."""
    meta = tree_map_only(Tensor, without_data, arguments)
    found = META_SHORTCUTS[op](*meta)
    assert META_SHORTCUTS[op](*arguments) is None, "tensors with data are left to the op"
    if found is None:
        return False
    assert described(found) == described(op(*arguments))
    return True


@given(st.sampled_from(SINGLE), tensors())
def test_an_op_on_one_tensor(op: Any, tensor: Tensor) -> None:
    is_that_of_the_op(op, (tensor,))


@given(st.sampled_from(PAIRS), tensors(), st.one_of(tensors(), st.sampled_from([2, 0.5])))
def test_an_op_on_two(op: Any, one: Tensor, two: Tensor | float) -> None:
    is_that_of_the_op(op, (one, two))


@given(st.sampled_from([aten.pow.Tensor_Scalar, aten.mul.Scalar]), tensors(), st.sampled_from([2, 0.5]))
def test_an_op_on_a_number(op: Any, tensor: Tensor, number: float) -> None:
    is_that_of_the_op(op, (tensor, number))


@given(tensors(), st.integers(-3, 2), st.booleans())
def test_a_mean_and_a_softmax_along_a_dimension(tensor: Tensor, dim: int, keeps: bool) -> None:
    if tensor.is_floating_point() and -tensor.dim() <= dim < tensor.dim():
        is_that_of_the_op(aten.mean.dim, (tensor, [dim], keeps))
        is_that_of_the_op(aten._safe_softmax.default, (tensor, dim))


@given(tensors(), tensors())
def test_a_product_of_two_matrices(one: Tensor, two: Tensor) -> None:
    is_that_of_the_op(aten.mm.default, (one, two))


@given(tensors(), tensors(), tensors())
def test_a_product_of_matrices(bias: Tensor, one: Tensor, two: Tensor) -> None:
    is_that_of_the_op(aten.addmm.default, (bias, one, two))


@given(tensors(), sizes, tensors(), st.booleans())
def test_a_layer_norm(source: Tensor, over: list[int], weight: Tensor, affine: bool) -> None:
    is_that_of_the_op(aten.native_layer_norm.default, (source, over, weight if affine else None, None, 1e-5))


@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        (aten.gelu.default, (torch.ones(2, 3),)),
        (aten.sigmoid_.default, (torch.ones(2, 3),)),
        (aten.add.Tensor, (torch.ones(2, 3), torch.ones(3))),
        (aten.mul.Tensor, (torch.ones(2, 3), 0.5)),
        (aten.addmm.default, (torch.ones(4), torch.ones(2, 3), torch.ones(4, 3).t())),
        (aten.mm.default, (torch.ones(2, 3), torch.ones(4, 3).t())),
        (aten._safe_softmax.default, (torch.ones(2, 3), -1)),
        (aten.pow.Tensor_Scalar, (torch.ones(2, 3), 2)),
        (aten.mean.dim, (torch.ones(2, 3), [-1], True)),
        (aten.tril.default, (torch.ones(2, 3, dtype=torch.bool),)),
        (aten.native_layer_norm.default, (torch.ones(2, 3), [3], torch.ones(3), torch.ones(3), 1e-5)),
    ],
)
def test_what_most_models_do_takes_the_shortcut(op: Any, arguments: tuple[Any, ...]) -> None:
    assert is_that_of_the_op(op, arguments)


@pytest.mark.parametrize(
    ("op", "shapes"),
    [
        (aten.add.Tensor, [(2, 3), (2,)]),
        (aten.addmm.default, [(4,), (2, 3), (5, 4)]),
        (aten.mm.default, [(2, 3), (5, 4)]),
        (aten.native_batch_norm.default, [(2, 3, 4), (4,)]),
    ],
)
def test_what_does_not_fit_is_no_result(op: Any, shapes: list[tuple[int, ...]]) -> None:
    arguments = [torch.empty(shape, device="meta") for shape in shapes]
    if op is aten.native_batch_norm.default:
        with pytest.raises(RuntimeError, match="batch norm of 3 channels"):
            META_SHORTCUTS[op](*arguments)
    else:
        assert META_SHORTCUTS[op](*arguments) is None


@pytest.mark.parametrize("turned", [False, True])
def test_a_product_by_groups(turned: bool) -> None:
    """On meta tensors and in double precision, in neither of which the op runs."""
    rows, weight = torch.randn(5, 8), torch.randn(3, 4, 8).mT if turned else torch.randn(3, 8, 4)
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    shortcut, expected = META_SHORTCUTS[aten._grouped_mm.default], aten._grouped_mm(rows, weight, ends)
    assert described(shortcut(*map(without_data, (rows, weight, ends)))) == described(expected)
    assert torch.allclose(shortcut(rows.double(), weight.double(), ends), expected.double(), atol=1e-6)
    assert shortcut(rows, weight, ends) is None, "the op itself runs"
    with pytest.raises(RuntimeError, match="16 bytes"):
        shortcut(*map(without_data, (torch.randn(5, 7), torch.randn(3, 7, 4), ends)))


@pytest.mark.parametrize("values", [(), (3,), (1,), (4,), (2, 3), (1, 3), (2, 4), (1, 2, 3)], ids=str)
@pytest.mark.parametrize("mask", [(5,), (4,)], ids=str)
def test_a_mask_on_meta_takes_the_values_that_it_takes_on_data(values: tuple[int, ...], mask: tuple[int, ...]) -> None:
    target, mask_of_two = torch.zeros(5, 3), torch.arange(mask[0]) < 2
    try:
        torch.zeros(5, 3).index_put_((mask_of_two,), torch.ones(values))
        fits = True
    except (RuntimeError, IndexError):
        fits = False
    check = META_CHECKS[aten.index_put_.default]
    meta = (target.to("meta"), [mask_of_two.to("meta")], torch.ones(values, device="meta"))
    if fits:
        check(*meta)
    else:
        with pytest.raises(RuntimeError):
            check(*meta)

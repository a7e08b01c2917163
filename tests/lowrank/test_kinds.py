"""Every kind, on layers of every geometry, computes what the layer with its merged weight computes."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from evolvenet.lowrank.base import LayerShape, partial_moment
from evolvenet.lowrank.kinds import KINDS
from evolvenet.lowrank.layers import FactoredLayer, canonical, factored, groups_of, layer_shape
from tests.helpers.layers import LAYERS, layer_and_inputs

SEEDS = st.integers(0, 2**16)


def pairs() -> Iterator[tuple[str, str]]:
    for name in LAYERS:
        shape = layer_shape(layer_and_inputs(name)[0])
        yield from ((name, kind) for kind in KINDS if KINDS[kind].refusal(shape) is None)


def factorized(layer: nn.Module, kind: str, rank: int | None, moments: list[Tensor] | None = None) -> FactoredLayer:
    """The layer's chain at a rank, at the full one for None."""
    shape = layer_shape(layer)
    ranks = KINDS[kind].checked_ranks(shape, KINDS[kind].full_rank(shape) if rank is None else rank)
    weights = canonical(layer, layer.get_parameter("weight").detach(), groups_of(layer))
    each = moments or [None] * len(weights)
    return factored(
        layer, kind, ranks, [KINDS[kind].decompose(w, ranks, m) for w, m in zip(weights, each, strict=True)]
    )


@pytest.mark.parametrize(("name", "kind"), list(pairs()))
def test_at_full_rank_the_factors_are_the_layer(name: str, kind: str) -> None:
    layer, x = layer_and_inputs(name)
    chain = factorized(layer, kind, None)
    torch.testing.assert_close(chain(x), layer(x), rtol=0, atol=1e-10)
    torch.testing.assert_close(chain.merged_weight, layer.get_parameter("weight"), rtol=0, atol=1e-10)
    assert chain.bias is layer.bias


@pytest.mark.parametrize(("name", "kind"), list(pairs()))
def test_at_any_rank_the_chain_is_the_layer_with_the_merged_weight(name: str, kind: str) -> None:
    layer, x = layer_and_inputs(name)
    chain = factorized(layer, kind, 2 if kind != "slicewise" else 1)
    with torch.no_grad():
        plain = copy.deepcopy(layer)
        plain.get_parameter("weight").copy_(chain.merged_weight)
    torch.testing.assert_close(chain(x), plain(x), rtol=0, atol=1e-10)
    whole = chain.whole()
    assert repr(whole) == repr(layer)
    torch.testing.assert_close(whole(x), plain(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("name", "kind"), list(pairs()))
def test_ranks_and_cost_are_those_of_the_built_chain(name: str, kind: str) -> None:
    layer, _ = layer_and_inputs(name)
    shape = layer_shape(layer)
    ranks = KINDS[kind].checked_ranks(shape, 2)
    chain = factorized(layer, kind, 2)
    assert (chain.kind, chain.ranks) == (kind, ranks)
    assert KINDS[kind].parameters(shape, ranks) == sum(
        factor.get_parameter("weight").numel() for factor in chain.factors
    )


@pytest.mark.parametrize("kind", ["svd", "spatial", "tucker", "cp", "tensor_train", "slicewise"])
def test_float32_is_exact_to_five_digits_at_full_rank(kind: str) -> None:
    layer = nn.Conv2d(6, 8, 3, padding=1)
    x = torch.randn(2, 6, 7, 7)
    shape, weights = layer_shape(layer), layer.weight.detach().double()[None]
    ranks = KINDS[kind].full_rank(shape)
    chain = factored(layer, kind, ranks, [KINDS[kind].decompose(weights[0], ranks)])
    torch.testing.assert_close(chain(x), layer(x), rtol=0, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(outputs=st.integers(1, 8), inputs=st.integers(1, 8), rank=st.integers(1, 8), seed=SEEDS)
def test_the_error_of_svd_is_the_tail_of_the_spectrum(outputs: int, inputs: int, rank: int, seed: int) -> None:
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ranks = KINDS["svd"].checked_ranks(LayerShape(outputs, inputs), rank)
    merged = KINDS["svd"].merged(KINDS["svd"].decompose(weight, ranks), inputs)
    tail = torch.linalg.svdvals(weight)[ranks[0] :].square().sum()
    torch.testing.assert_close((merged - weight).square().sum(), tail, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["svd", "spatial", "slicewise", "tucker", "tensor_train"])
@pytest.mark.parametrize("whitened", [False, True])
@settings(max_examples=8, deadline=None)
@given(seed=SEEDS)
def test_the_error_falls_with_the_rank(kind: str, whitened: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, 4, 3, 3, generator=generator, dtype=torch.float64)
    shape = LayerShape(5, 4, (3, 3))
    # Whitened, the sum that falls is that of the moment in which the kind is optimal.
    channels = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    moment = torch.kron(channels @ channels.T, torch.eye(9, dtype=torch.float64)) if whitened else None
    metric = torch.eye(36, dtype=torch.float64) if moment is None or kind == "slicewise" else moment
    errors: list[float] = []
    most = max(KINDS[kind].full_rank(shape))
    for rank in range(1, most + 1):
        ranks = KINDS[kind].checked_ranks(shape, rank)
        apart = (KINDS[kind].merged(KINDS[kind].decompose(weight, ranks, moment), 4) - weight).flatten(1)
        errors.append(float((apart @ metric * apart).sum()))
    assert all(later <= earlier * (1 + 1e-3) + 1e-9 for earlier, later in pairwise(errors))
    assert errors[-1] < 1e-9


def test_cp_of_a_sum_of_outer_products_finds_it() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(size, 3, generator=generator, dtype=torch.float64) for size in (6, 5, 3, 3)]
    weight = torch.einsum("or,ir,pr,qr->oipq", *parts)
    merged = KINDS["cp"].merged(KINDS["cp"].decompose(weight, (3,)), 5)
    assert (merged - weight).norm() / weight.norm() < 1e-3


def moment_of(columns: int, dead: int = 0) -> Tensor:
    """A correlated second moment, the last inputs dead."""
    mixed = torch.randn(columns, columns, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mixed[columns - dead :] = 0
    return mixed @ mixed.T


@pytest.mark.parametrize("dead", [0, 5])
def test_svd_of_outputs_is_the_optimum_of_reduced_rank_regression(dead: int) -> None:
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moment = moment_of(8, dead)
    for rank in range(1, 7):
        merged = KINDS["svd"].merged(KINDS["svd"].decompose(weight, (rank,), moment), 8)
        apart = merged - weight
        # The obvious way: singular values of W·S^½, S^½ by eigenvalues.
        values, vectors = torch.linalg.eigh(moment)
        tail = torch.linalg.svdvals(weight @ vectors @ values.clamp_min(0).sqrt().diag())[rank:].square().sum()
        torch.testing.assert_close((apart @ moment * apart).sum(), tail, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", ["svd", "spatial", "tucker", "cp", "tensor_train"])
def test_dead_inputs_break_no_kind_and_the_full_rank_stays_exact(kind: str) -> None:
    weight = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moment = moment_of(27, dead=20)
    ranks = KINDS[kind].full_rank(LayerShape(4, 3, (3, 3)))
    merged = KINDS[kind].merged(KINDS[kind].decompose(weight, ranks, moment), 3)
    torch.testing.assert_close(merged, weight, rtol=0, atol=1e-8)
    ranks = KINDS[kind].checked_ranks(LayerShape(4, 3, (3, 3)), 2)
    assert all(factor.isfinite().all() for factor in KINDS[kind].decompose(weight, ranks, torch.zeros(27, 27).double()))


def test_a_partial_moment_is_that_of_the_inputs_at_every_place() -> None:
    patches = torch.randn(500, 2, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = patches.flatten(1).T @ patches.flatten(1) / 500
    shape = LayerShape(1, 2, (3, 2))
    apart = patches.permute(0, 3, 1, 2).reshape(1000, 6)
    torch.testing.assert_close(partial_moment(whole, shape, (0,)), apart.T @ apart / 1000)
    single = patches.permute(0, 2, 3, 1).reshape(3000, 2)
    torch.testing.assert_close(partial_moment(whole, shape), single.T @ single / 3000)


@pytest.mark.parametrize("kind", ["tucker", "svd", "spatial", "cp", "tensor_train"])
def test_stride_of_both_axes_and_the_padding_mode_survive(kind: str) -> None:
    """tltorch's `from_conv` keeps `stride[0]` alone and drops `padding_mode`."""
    layer = nn.Conv2d(4, 6, 3, stride=(1, 2), padding=1, padding_mode="circular", dtype=torch.float64)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    chain = factorized(layer, kind, None)
    assert chain(x).shape == (2, 6, 6, 3)
    torch.testing.assert_close(chain(x), layer(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["spatial", "cp", "slicewise"])
def test_input_channels_with_different_kernels_are_not_averaged(kind: str) -> None:
    """fasterai's spatial SVD and CP average the kernel over the input channels: here that average is 0."""
    layer = nn.Conv2d(2, 3, 3, bias=False, dtype=torch.float64)
    with torch.no_grad():
        # Each slice has rank 1.
        slices = torch.einsum("op,oq->opq", torch.randn(3, 3).double(), torch.randn(3, 3).double())
        layer.weight.copy_(torch.stack([slices, -slices], dim=1))
    x = torch.randn(1, 2, 5, 5, dtype=torch.float64)
    chain = factorized(layer, kind, 1 if kind == "slicewise" else 3)
    torch.testing.assert_close(chain(x), layer(x), rtol=0, atol=1e-4 if kind == "cp" else 1e-10)


@pytest.mark.parametrize(("name", "kind"), [("stride per axis", kind) for kind in KINDS] + [("transposed", "tucker")])
def test_macs_are_those_that_torch_counts(name: str, kind: str) -> None:
    layer, x = layer_and_inputs(name, samples=1)
    chain = factorized(layer, kind, 2)
    with FlopCounterMode(display=False) as counter:
        out = chain(x)
    macs = KINDS[kind].macs(
        layer_shape(layer), chain.ranks, x.shape[2:], out.shape[2:], transposed=name.startswith("transposed")
    )
    assert macs == counter.get_total_flops() // 2
    assert math.prod(out.shape[2:]) > 1

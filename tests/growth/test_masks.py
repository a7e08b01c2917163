"""Weights multiplied with masks that are buffers (MADE, PixelCNN): new units get the masks of units that are there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import evolvenet
from evolvenet.graph.index_map import IndexMap
from evolvenet.graph.width_graph import MASKS
from evolvenet.growth.initializers import METHODS
from evolvenet.tracing.trace import trace
from tests.helpers.cases import distance, outputs

INPUTS = 5


class MaskedLinear(nn.Linear):
    """A dense layer of which the weights from higher to lower degrees are masked."""

    def __init__(self, inputs: Tensor, units: Tensor, combine: Callable[[Tensor, Tensor], Tensor], last: bool) -> None:
        super().__init__(len(inputs), len(units))
        self.combine = combine
        mask = units[:, None] > inputs if last else units[:, None] >= inputs
        self.register_buffer("mask", mask.double())

    def forward(self, input: Tensor) -> Tensor:
        """The layer with its weight masked."""
        return F.linear(input, self.combine(self.weight, self.get_buffer("mask")), self.bias)


class MADE(nn.Module):
    """A masked autoencoder: output i depends on inputs before i alone (Germain and others, ICML 2015)."""

    def __init__(self, combine: Callable[[Tensor, Tensor], Tensor], degrees: Tensor) -> None:
        super().__init__()
        places = torch.arange(INPUTS)
        self.a = MaskedLinear(places, degrees, combine, last=False)
        self.b = MaskedLinear(degrees, degrees.flip(0), combine, last=False)
        self.c = MaskedLinear(degrees.flip(0), places, combine, last=True)

    def forward(self, x: Tensor) -> Tensor:
        """One output for each input."""
        return self.c(self.b(self.a(x).tanh()).tanh())


def in_place(weight: Tensor, mask: Tensor) -> Tensor:
    """The way of PixelCNN: the weight's own entries are masked before each pass."""
    weight.data *= mask
    return weight


COMBINE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "weight first": lambda weight, mask: weight * mask,
    "mask first": lambda weight, mask: mask * weight,
    "in place": in_place,
}
DEGREES = {"in turn": torch.arange(16) % (INPUTS - 1), "sorted": torch.arange(16) // 4}
X = torch.randn(64, INPUTS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def made(combine: str = "weight first", degrees: str = "in turn") -> MADE:
    torch.manual_seed(0)
    return MADE(COMBINE[combine], DEGREES[degrees]).double()


def is_autoregressive(model: nn.Module) -> bool:
    jacobian = torch.autograd.functional.jacobian(lambda x: model(x).sum(0), X).sum(1)
    return bool((jacobian.triu() == 0).all()) and bool((jacobian.tril(-1) != 0).any())


@pytest.mark.parametrize("combine", COMBINE)
def test_masks_are_known_from_the_op_that_multiplies_them(combine: str) -> None:
    graph = trace(made(combine), X[:2])
    assert graph.sizes == {"a": 16, "b": 16}
    assert graph.masks == {"a.mask", "b.mask", "c.mask"}
    (producer,), (consumer,) = graph.widths["a"].producers, graph.widths["a"].consumers
    assert (producer.tensor, consumer.tensor) == ("a.weight", "b.weight")
    assert sum(tie.role == MASKS for tie in graph.widths["a"].ties) == 2


@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize("degrees", DEGREES)
def test_a_grown_made_is_autoregressive_computes_the_same_and_trains_its_new_units(combine: str, degrees: str) -> None:
    model = made(combine, degrees)
    assert is_autoregressive(model)
    graph, expected = trace(model, X[:2]), outputs(model, X)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    evolvenet.grow(model, graph, {"a": 24, "b": 21}, optimizers=[optimizer])
    assert distance(outputs(model, X), expected) < 1e-12
    assert all(set(buffer.unique().tolist()) <= {0.0, 1.0} for buffer in model.buffers())
    assert torch.equal(model.b.get_buffer("mask")[:16, :16], before["b.mask"])
    for _ in range(30):
        optimizer.zero_grad()
        (model(X) - X.roll(1, 1)).square().mean().backward()
        optimizer.step()
    assert is_autoregressive(model)
    used = (model.c.weight * model.c.get_buffer("mask"))[:, 16:].abs().sum(0)
    able = model.c.get_buffer("mask")[:, 16:].sum(0) > 0
    assert able.sum() >= 3
    assert bool((used[able] > 1e-3).all())
    degree = model.a.get_buffer("mask")[16:].sum(1)
    assert len(set(degree.tolist())) == INPUTS - 1, "the new units have all degrees"


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"random"}))
def test_every_method_keeps_the_function_of_masked_weights(method: str) -> None:
    model = made()
    graph, expected = trace(model, X[:2]), outputs(model, X)
    batches = [(X, X)] if method in ("gradmax", "tiny") else None
    evolvenet.grow(model, graph, {"a": 21, "b": 19}, method=method, batches=batches, loss=F.mse_loss)
    assert distance(outputs(model, X), expected) < 1e-12
    assert is_autoregressive(model)


def test_a_map_with_new_units_between_kept_ones_copies_both_masks_of_the_same_unit() -> None:
    model = made()
    graph = trace(model, X[:2])
    rows, columns = model.a.get_buffer("mask").clone(), model.b.get_buffer("mask").clone()
    index_map = IndexMap.of([5, -1, 2, -1, -1], 16)
    evolvenet.resize(model, graph, {"a": index_map})
    at = list(index_map.copying().indices)
    assert (at[0], at[2]) == (5, 2)
    assert set(at) == {2, 5}
    assert torch.equal(model.a.get_buffer("mask"), rows[at])
    assert torch.equal(model.b.get_buffer("mask"), columns[:, at])
    assert not model.a.weight[[1, 3, 4]].any()


def test_a_buffer_that_is_added_to_a_weight_is_no_mask() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(INPUTS, 8), nn.Linear(8, 2)
            self.register_buffer("base", torch.randn(2, 8))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.a(x).relu(), self.b.weight + self.get_buffer("base"))

    model = Shifted().double()
    graph, expected = trace(model, X[:2]), outputs(model, X)
    assert graph.masks == frozenset()
    evolvenet.grow(model, graph, {"a": 11})
    assert distance(outputs(model, X), expected) < 1e-12

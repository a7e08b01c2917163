"""Rounds of joint cuts: what single cuts do not show is found, and no round makes it worse."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

import pytest
import torch
from torch import Tensor, nn

import evolvenet
from evolvenet.errors import PolicyError
from evolvenet.pruning.joint_rounds import joint_loss, refined
from evolvenet.tracing.trace import trace
from tests.helpers.cases import distance, outputs
from tests.helpers.small_models import mlp


class Twice(nn.Module):
    """Two layers that hold the same, and one that holds something else; input `[b, 6]`."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.other = nn.Linear(6, 12), nn.Linear(6, 12), nn.Linear(6, 24)
        self.head = nn.Linear(48, 4)
        self.double()
        self.two.load_state_dict(self.one.state_dict())
        # What single cuts would miss of it is little; with both gone it is most of the outputs.
        self.head.weight.data[:, 24:] *= 0.4

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([layer(x).relu() for layer in (self.one, self.two, self.other)], dim=1))


def test_two_widths_that_hold_the_same_are_not_both_cut() -> None:
    torch.manual_seed(0)
    model, x = Twice(), torch.randn(256, 6, dtype=torch.float64)
    graph = trace(model, x[:2])
    limit = graph.parameters // 2
    lost = joint_loss(model, graph, [x[:128], x[128:]], 256, "outputs")
    found = [evolvenet.allocate(model, graph, limit, [x[:128], x[128:]], rounds=rounds) for rounds in (0, 3)]
    assert all(graph.proposed_parameters(sizes) <= limit for sizes in found)
    errors = [lost(sizes) for sizes in found]
    assert errors[1] < 0.8 * errors[0]
    before = outputs(model, x)
    evolvenet.prune(model, graph, found[1], batches=[x])
    assert distance(outputs(model, x), before) ** 2 < 2 * errors[1]


@pytest.mark.parametrize("rounds", [0, 1, 4])
def test_no_round_raises_the_loss_or_leaves_the_limit(rounds: int) -> None:
    options = {"a": range(1, 13), "b": (2, 4, 8, 12), "c": (5,)}

    def loss(sizes: Mapping[str, int]) -> float:
        return 9 / max(sizes["a"], sizes["b"]) + 3 / sizes["a"] + abs(sizes["a"] - sizes["b"]) % 3

    def cost(sizes: Mapping[str, int]) -> float:
        return sizes["a"] * sizes["b"] + sizes["c"]

    for start in product(*options.values()):
        sizes = dict(zip(options, start, strict=True))
        found = refined(sizes, options, loss, cost, cost(sizes), rounds)
        assert cost(found) <= cost(sizes)
        assert loss(found) <= loss(sizes)
        assert all(size in options[name] for name, size in found.items())
        assert rounds or found == sizes


def test_equal_layers_and_multiples_stay_so_and_rounds_need_batches() -> None:
    torch.manual_seed(0)
    blocks = nn.Sequential(*[nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 8)) for _ in range(2)]).double()
    x = torch.randn(64, 8, dtype=torch.float64)
    graph = trace(blocks, x[:2])
    sizes = evolvenet.allocate(blocks, graph, graph.parameters // 2, [x], uniform="layers", multiple=4, rounds=2)
    assert sizes["0.0"] == sizes["1.0"]
    assert all(size % 4 == 0 for size in sizes.values())
    assert graph.proposed_parameters(sizes) <= graph.parameters // 2
    with pytest.raises(PolicyError, match="expected batches for 2 rounds, got none"):
        evolvenet.allocate(mlp(6, 8, 3), trace(mlp(6, 8, 3), torch.zeros(1, 6).double()), 50, rounds=2)

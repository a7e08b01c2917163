"""That Torch-Pruning's choice, cut by `evolvenet.resize`, is Torch-Pruning's own cut.

Torch-Pruning is in the environment of the comparison only, so this file is not collected by default: `make compare` runs
it first (`.venv-compare/bin/python -m pytest tests/compare_torch_pruning.py`).
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import evolvenet
from experiments import compare_peers as peers
from experiments.models import ResNet

EXAMPLE = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def network(widths: tuple[int, int] = (6, 10), hidden: int = 9) -> nn.Module:
    """Two stages with a residual stream each; norms that differ from unit to unit."""
    model = ResNet(1, 4, widths, (2, 1), (1, 2), hidden=hidden)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.1, 2.0)
            nn.init.uniform_(module.bias, -1.0, 1.0)
    return model.eval()


def compare(theirs: nn.Module, ours: nn.Module) -> None:
    want, got = theirs.state_dict(), ours.state_dict()
    assert {name: tensor.shape for name, tensor in got.items()} == {name: tensor.shape for name, tensor in want.items()}
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert torch.equal(ours(EXAMPLE), theirs(EXAMPLE))


@pytest.mark.parametrize("kind", ["l2", "bn"])
@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.7])
def test_its_global_choice_cut_by_us_is_its_own_cut(kind: str, ratio: float) -> None:
    ours = network()
    theirs, graph = copy.deepcopy(ours), evolvenet.trace(ours, EXAMPLE)
    kept = peers.torch_pruning_kept(ours, graph, EXAMPLE, kind, ratio)
    assert any(not index_map.is_identity for index_map in kept.values())
    evolvenet.resize(ours, graph, kept)
    peers.pruner(theirs, EXAMPLE, kind, ratio).step()
    compare(theirs, ours)


@pytest.mark.parametrize("kind", ["l2", "bn"])
def test_its_scores_at_given_sizes_cut_by_us_are_its_own_cut(kind: str) -> None:
    ours = network()
    theirs, graph = copy.deepcopy(ours), evolvenet.trace(ours, EXAMPLE)
    sizes = {name: max(2, size - 1 - place) for place, (name, size) in enumerate(graph.sizes.items())}
    if kind == "bn":
        sizes["hidden"] = graph.sizes["hidden"]  # without a BatchNorm it is not touched
    evolvenet.resize(ours, graph, peers.best(graph, peers.torch_pruning_scores(ours, graph, EXAMPLE, kind), sizes))
    # Half a unit, so that its rounding down cannot go wrong.
    ratios = {theirs.get_submodule(n): 1 - (size + 0.5) / graph.sizes[n] for n, size in sizes.items()}
    peers.pruner(theirs, EXAMPLE, kind, ratios).step()
    compare(theirs, ours)


def test_its_groups_are_our_widths() -> None:
    model = network()
    graph = evolvenet.trace(model, EXAMPLE)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for kind in ("l2", "bn"):
        scores = peers.torch_pruning_scores(model, graph, EXAMPLE, kind)
        assert {name: len(score) for name, score in scores.items()} == graph.sizes
        peers.torch_pruning_kept(model, graph, EXAMPLE, kind, 0.5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_l2_is_the_mean_square_norm_over_all_that_a_unit_touches() -> None:
    model = network()
    graph = evolvenet.trace(model, EXAMPLE)
    made, scale, read = (
        model.get_parameter(f"blocks.0.{name}.weight").square() for name in ("conv1", "norm1", "conv2")
    )
    want = torch.stack([made.sum((1, 2, 3)), scale, read.sum((0, 2, 3))]).mean(0).detach()
    got = peers.torch_pruning_scores(model, graph, EXAMPLE, "l2")["blocks.0.conv1"]
    torch.testing.assert_close(got, want / want.mean())


@pytest.mark.parametrize(("kind", "removed"), [("l2", 0.3), ("l2", 0.7), ("bn", 0.5)])
def test_its_ratio_is_chosen_so_that_the_count_fits(kind: str, removed: float) -> None:
    model = network((16, 40), 24)
    graph = evolvenet.trace(model, EXAMPLE)
    target = round((1 - removed) * graph.parameters)
    kept = peers.torch_pruning_global(model, graph, EXAMPLE, kind, target)
    assert abs(evolvenet.resize(model, graph, kept).parameters - target) <= 0.01 * graph.parameters


def test_a_layer_that_it_would_empty_it_leaves_alone() -> None:
    """Its own rule; what we cut follows it, whatever it does to the count."""
    ours = network()
    nn.init.constant_(ours.get_parameter("blocks.0.norm1.weight"), 1e-3)
    nn.init.constant_(ours.get_parameter("blocks.1.norm1.weight"), 1e-3)
    theirs, graph = copy.deepcopy(ours), evolvenet.trace(ours, EXAMPLE)
    measure = peers.importance("bn")
    measure.normalizer = None
    kept = peers.torch_pruning_kept(ours, graph, EXAMPLE, measure, 0.5)
    assert kept["blocks.0.conv1"].is_identity
    evolvenet.resize(ours, graph, kept)
    peers.pruner(theirs, EXAMPLE, measure, 0.5).step()
    compare(theirs, ours)

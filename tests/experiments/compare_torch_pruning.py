"""That Torch-Pruning's choice, cut by `evolvenet.resize`, is Torch-Pruning's own cut.

Torch-Pruning is in the environment of the comparison only, so this file is not collected by default: `make compare` runs
it first (`.venv-compare/bin/python -m pytest tests/experiments/compare_torch_pruning.py`).
"""

from __future__ import annotations

import copy
import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from torch import nn

import evolvenet
from experiments.compare import peers
from experiments.compare.language_networks import TINY, build
from experiments.compare.language_peers import torch_pruning_scores
from experiments.models.resnet import ResNet, UnpaddedResNet
from experiments.training import torch_pruning
from experiments.training.classifier import Cycles
from experiments.training.controls import ControlError
from tests.helpers.experiments import configuration, train, write_random

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


# The front by Torch-Pruning

BUDGETS = (900, 700, 600, 500, 300)


def short(folder: Path, experiment: str) -> list[str]:
    """Overrides for a short run: an epoch of 12 steps for each budget, events at every third step."""
    write_random(folder, 140)
    small = [f"evolve.policy.points.{place}.params={count}" for place, count in enumerate(BUDGETS)]
    return [
        f"+experiment={experiment}", f"data.root={folder}", "data.batch_size=10",
        "data.val_size=20", "model.width=10", "model.inside=[12,14]", "spans=[1,1,1,1,1]", "trainer.max_epochs=5",
        "trainer.accelerator=cpu", "evolve.every_n_steps=3", "evolve.start_step=2", "evolve.calibration_batches=1",
        "evolve.policy.points.0.by=0.5", *small,
    ]  # fmt: skip


def test_its_front_is_cut_when_ours_is_and_to_the_same_budgets(tmp_path: Path) -> None:
    ours, theirs = (train(tmp_path / name, short(tmp_path, name)) for name in ("mnist_resnet", "mnist_torch_pruning"))
    events = theirs["history"]["events"]
    assert [event["step"] for event in events] == [event["step"] for event in ours["history"]["events"]]
    assert [point["epoch"] for point in theirs["front"]] == [1, 2, 3, 4, 5]
    for point, budget in zip(theirs["front"], BUDGETS, strict=True):
        # One unit of the stream has at most 61 parameters here.
        assert budget - 61 < point["parameters"] <= budget
        saved = evolvenet.load(instantiate(theirs["config"]["model"]), point["path"])
        assert sum(parameter.numel() for parameter in saved.parameters()) == point["parameters"]
        assert 0 <= point["test_acc"] <= 1
    assert theirs["end"]["parameters"] == events[-1]["parameters"] == theirs["front"][-1]["parameters"]
    assert theirs["sizes"]["start"] == {"stem": 10, "blocks.0.pointwise1": 12, "blocks.1.pointwise1": 14}
    assert all(size >= 2 for size in theirs["sizes"]["end"].values())


def test_what_is_cut_trains_on_with_a_new_optimizer_and_the_old_schedule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configuration(*short(tmp_path, "mnist_torch_pruning"), output=tmp_path)
    honest, cuts = torch_pruning.prune, []

    def seen(model: nn.Module, *given: Any) -> None:
        honest(model, *given)
        cuts.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})

    monkeypatch.setattr(torch_pruning, "prune", seen)
    data, classifier, pruning = (instantiate(config[name]) for name in ("data", "classifier", "evolve"))
    fitting = instantiate(config.trainer)(callbacks=[pruning])
    fitting.fit(classifier, datamodule=data)
    [optimizer] = fitting.optimizers
    [group] = optimizer.param_groups
    assert [*map(id, group["params"])] == [*map(id, classifier.parameters())]
    assert all(not torch.equal(parameter, cuts[-1][name]) for name, parameter in classifier.model.named_parameters())
    last = max(event.step for event in pruning.history.events if event.changes)
    assert {int(state["step"]) for state in optimizer.state.values()} == {60 - last}
    shape = Cycles(60, config.classifier.cycles, classifier.warmup, config.classifier.heights)
    assert group["lr"] == pytest.approx(config.optimizer.lr * shape(60))
    assert all(module.training for module in classifier.modules())


def test_units_go_one_by_one_in_its_own_order() -> None:
    """Of all widths the unit with the least score, each score over the mean of its width, asked anew for every unit."""
    ours = network().train()
    theirs, sizes = copy.deepcopy(ours), evolvenet.trace(ours, EXAMPLE).sizes
    torch_pruning.prune(ours, EXAMPLE, 1000, sum(sizes.values()))
    assert all(module.training for module in ours.modules())
    theirs.eval()
    while sum(parameter.numel() for parameter in theirs.parameters()) > 1000:
        graph = evolvenet.trace(theirs, EXAMPLE)
        scores = peers.torch_pruning_scores(theirs, graph, EXAMPLE, "l2")
        name = min((name for name in scores if graph.sizes[name] > 2), key=lambda name: float(scores[name].min()))
        evolvenet.resize(theirs, graph, peers.best(graph, scores, {name: graph.sizes[name] - 1}))
    compare(theirs, ours.eval())


def test_what_it_cannot_reach_is_an_error() -> None:
    with pytest.raises(ControlError, match=r"expected at most 20 parameters, got 156"):
        torch_pruning.prune(UnpaddedResNet(width=4, inside=(4, 4)), torch.zeros(1, 1, 28, 28), 20, units=12)


def test_scores_of_language_models_are_those_of_torch_pruning() -> None:
    torch.manual_seed(0)
    model = build("llama", replace(TINY, layers=1)).eval()
    ids = {"input_ids": torch.randint(0, 97, (1, 8))}
    graph = evolvenet.trace(model, ids, "logits")
    pruning: Any = importlib.import_module("torch_pruning")
    found = pruning.DependencyGraph().build_dependency(model, ids, output_transform=lambda output: output.logits)
    layer: Any = model.get_submodule("model.layers.0.mlp.gate_proj")
    group = found.get_pruning_group(layer, pruning.prune_linear_out_channels, list(range(layer.out_features)))
    theirs = pruning.importance.GroupMagnitudeImportance(p=2, group_reduction="mean")(group)
    ours = torch_pruning_scores(model, graph)["model.layers.0.mlp.gate_proj"]
    torch.testing.assert_close(ours / ours.mean(), theirs / theirs.mean())

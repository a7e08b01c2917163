"""Numbers in a model's own code that follow a width: trials decide, whatever they are called, and none follows without need."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import evolvenet
from evolvenet.engine.snapshot import Snapshot
from evolvenet.graph.index_map import IndexMap
from evolvenet.surgery.resize_model import compile_surgery, install
from evolvenet.tracing.numbers_of_widths import fewest_passing
from evolvenet.tracing.numeric_proof import NOT_FINITE
from evolvenet.tracing.trace import trace
from tests.helpers.cases import distance, outputs
from tests.helpers.tracing import Between, shuffle_and_widen

X = torch.randn(2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@dataclasses.dataclass(frozen=True)
class Config:
    """A config of a model whose width is 8, by chance also its number of steps."""

    any_name: int = 8
    steps: int = 8
    heads: int = 4


def steps(model: Any, x: Tensor, h: Tensor) -> Tensor:
    """A view by a number of a config, then as many steps as another one says."""
    h = h.view(len(x), model.cfg.any_name)
    for _ in range(model.cfg.steps):
        h = h + h.tanh() / 8
    return h


def gate(model: Any, x: Tensor, h: Tensor) -> Tensor:
    """One half of the units times the other, split by numbers."""
    one, two = h.split(model.halves, 1)
    return torch.cat([one * two, one * two], 1)


CASES: dict[str, tuple[Callable[..., Tensor], dict[str, Any], set[str]]] = {
    "name": (lambda m, x, h: h.view(-1, m.q), {"q": 8, "classes": 8}, {"q"}),
    "private": (lambda m, x, h: h.view(-1, m._q), {"_q": 8, "classes": 8}, {"_q"}),
    "tuple": (lambda m, x, h: h.view(-1, *m.shape_of), {"shape_of": (8,)}, {"shape_of[0]"}),
    "list": (lambda m, x, h: h.view(-1, m.sizes[1]), {"sizes": [8, 8]}, {"sizes[1]"}),
    "dict": (lambda m, x, h: h.view(-1, m.sizes["b"]), {"sizes": {"a": 8, "b": 8}}, {"sizes['b']"}),
    "frozen config": (steps, {"cfg": Config()}, {"cfg.any_name"}),
    "namespace": (steps, {"cfg": types.SimpleNamespace(any_name=8, steps=8)}, {"cfg.any_name"}),
    "two numbers": (lambda m, x, h: h.view(-1, m.one).view(-1, m.two), {"one": 8, "two": 8}, {"one", "two"}),
    "both pieces": (gate, {"halves": (4, 4)}, {"halves[0]", "halves[1]"}),
    "no number": (lambda m, x, h: h.view(len(x), -1), {"hidden_dim": 8, "q": 8}, set()),
}


def built(name: str) -> Between:
    code, attributes, _ = CASES[name]
    torch.manual_seed(0)
    model = Between(code).double()
    for attribute, value in attributes.items():
        setattr(model, attribute, value)
    return model


@pytest.mark.parametrize("name", CASES)
def test_the_numbers_that_a_width_needs_follow_it_and_no_others(name: str) -> None:
    model = built(name)
    graph = trace(model, X)
    assert graph.resizable
    assert {number for width in graph.resizable for _, number in width.patches} == CASES[name][2]
    shuffle_and_widen(model, graph, X)


def test_a_name_of_a_size_follows_only_where_it_is_one() -> None:
    model: Any = Between(lambda m, x, h: h.view(-1, m.hidden_dim), norm=nn.LayerNorm(5)).double()
    model.hidden_dim = model.embed_dim = 8
    (width,) = trace(model, X).resizable
    assert [name for path, name in width.patches if path == ""] == ["hidden_dim"]


class CrossStage(nn.Module):
    """A block as in YOLOv8: half of the units go through one more layer, and all are read together with what it gives."""

    def __init__(self, split: Callable[[Tensor, int], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.split, self.c = split, 4
        self.a, self.m, self.b, self.out = nn.Linear(5, 8), nn.Linear(4, 4), nn.Linear(12, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Both halves and what the second one becomes."""
        one, two = self.split(self.a(x).relu(), self.c)
        return self.out(self.b(torch.cat([one, two, self.m(two).relu()], 1)).relu())


SPLITS: dict[str, tuple[Callable[[Tensor, int], Any], dict[str, int]]] = {
    "chunk": (lambda h, c: h.chunk(2, 1), {"a": 4, "m": 4, "b": 6}),
    "one size": (lambda h, c: h.split(c, 1), {"a": 4, "m": 4, "b": 6}),
    "a size for each": (lambda h, c: h.split((c, c), 1), {"a": 4, "m": 4, "b": 6}),
    "parts": (lambda h, c: (h[:, :c], h[:, c:]), {"a": 4, "a#2": 4, "m": 4, "b": 6}),
}


@pytest.mark.parametrize("how", SPLITS)
def test_pieces_follow_the_number_by_which_they_are_split(how: str) -> None:
    split, sizes = SPLITS[how]
    model = CrossStage(split).double()
    graph = trace(model, X)
    assert graph.sizes == sizes
    shuffle_and_widen(model, graph, X)


class Blocks(nn.Module):
    """Three blocks that share a config, each with a hidden width of its own."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList(Between(lambda m, x, h: h.view(-1, m.cfg.any_name).tanh()) for _ in range(3))
        for block in self.blocks:
            block.a, block.b, block.cfg = nn.Linear(8, 8), nn.Linear(8, 8), config

    def forward(self, x: Tensor) -> Tensor:
        """The stream after all blocks."""
        x = self.first(x).relu()
        for block in self.blocks:
            x = x + block(x)
        return self.last(x)


class Heads(nn.Module):
    """A dense layer whose outputs are normalized by heads, each by its own largest entry; heads go as a whole."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.linear, self.count_of = nn.Linear(inputs, 12), 4

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, inputs]` → `[batch, 12]`."""
        heads = self.linear(x).view(len(x), self.count_of, 3)
        return (heads / heads.square().sum(-1, keepdim=True)).flatten(1)


def test_the_same_number_of_a_layer_that_only_consumes_the_width_stays() -> None:
    model = nn.Sequential(Heads(5), Heads(12), nn.Linear(12, 3)).double()
    graph = trace(model, X)
    assert {width.name: width.patches for width in graph.resizable} == {
        "0.linear": (("0", "count_of"),),
        "1.linear": (("1", "count_of"),),
    }
    # The entries of a new head are divided by their largest one, which is 0.
    assert {width.mixed for width in graph.resizable} == {NOT_FINITE}
    shuffle_and_widen(model, graph, X)


def test_modules_that_share_a_config_get_sizes_of_their_own() -> None:
    config = Config()
    model = Blocks(config).double()
    graph = trace(model, X)
    assert {w.name: w.patches for w in graph.resizable} == {
        "first": (),
        **{f"blocks.{k}.a": ((f"blocks.{k}", "cfg.any_name"),) for k in range(3)},
    }
    expected = outputs(model, X)
    graph = evolvenet.grow(model, graph, {"blocks.0.a": 11, "blocks.2.a": 9})
    assert distance(outputs(model, X), expected) < 1e-12
    assert [block.cfg.any_name for block in model.blocks] == [11, 8, 9]  # type: ignore[union-attr]
    assert config == Config(), "the config of others stays"
    assert model.blocks[1].cfg is config


def test_numbers_in_configs_are_saved_loaded_and_put_back(tmp_path: Path) -> None:
    config = Config()
    model = Blocks(config).double()
    graph = trace(model, X)
    undo = install(model, compile_surgery(model, graph, {"blocks.0.a": IndexMap.keep([1, 2], 8)}))
    assert model.blocks[0].cfg == Config(any_name=2)  # type: ignore[union-attr]
    undo()
    assert all(block.cfg is config for block in model.blocks)  # type: ignore[union-attr]
    snapshot = Snapshot.of(model, graph, [])
    evolvenet.prune(model, graph, {"blocks.0.a": 3, "first": 5})
    expected = outputs(model, X)
    evolvenet.save(model, tmp_path / "model.safetensors")
    other = Blocks(config).double()
    evolvenet.load(other, tmp_path / "model.safetensors")
    assert other.blocks[0].cfg == Config(any_name=3)  # type: ignore[union-attr]
    assert distance(outputs(other, X), expected) == 0
    snapshot.restore(model, [])
    assert all(block.cfg == config for block in model.blocks)  # type: ignore[union-attr]


MODULES: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "LayerNorm": (nn.Sequential(nn.Linear(4, 16), nn.LayerNorm(16, elementwise_affine=False), nn.Linear(16, 2)), (2, 4)),
    "RMSNorm": (nn.Sequential(nn.Linear(4, 16), nn.RMSNorm(16, elementwise_affine=False), nn.Linear(16, 2)), (2, 4)),
    "GroupNorm": (
        nn.Sequential(nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16, affine=False), nn.Conv2d(16, 2, 3)),
        (2, 3, 8, 8),
    ),
    "Unflatten": (
        nn.Sequential(nn.Linear(4, 64), nn.Unflatten(1, (16, 2, 2)), nn.ReLU(), nn.ConvTranspose2d(16, 2, 4)),
        (2, 4),
    ),
    "ChannelShuffle": (
        nn.Sequential(nn.Conv2d(3, 16, 3), nn.ChannelShuffle(4), nn.ReLU(), nn.Conv2d(16, 2, 3)),
        (2, 3, 8, 8),
    ),
    "deeper": (
        nn.Sequential(nn.Linear(4, 16), nn.Sequential(nn.Sequential(nn.LayerNorm(16, elementwise_affine=False))),
                      nn.Linear(16, 2)),
        (2, 4),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_modules_without_tensors_follow_the_width_beside_them(name: str) -> None:
    model, shape = MODULES[name]
    model = model.double()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    graph = trace(model, x)
    assert [width.name for width in graph.resizable] == ["0"]
    shuffle_and_widen(model, graph, x)


@pytest.mark.parametrize(
    ("needed", "most"),
    [(set(), 9), ({"3"}, 6), ({"1", "4"}, 30), ({"never"}, 10)],
    ids=["all pass", "one", "two", "none that matters"],
)
def test_numbers_that_leave_the_failure_as_it_is_cost_few_trials(needed: set[str], most: int) -> None:
    tried: list[frozenset[str]] = []

    def failure(keys: frozenset[str]) -> str | None:
        tried.append(keys)
        left = needed - keys
        harm = "5" in keys and needed
        return f"fails for want of {sorted(left)}" if left else "too many steps" if harm else None

    found = fewest_passing([str(number) for number in range(8)], failure)
    assert found == (None if "never" in needed else needed)
    assert len(tried) <= most + len(found or ())
    assert len(set(tried)) == len(tried)

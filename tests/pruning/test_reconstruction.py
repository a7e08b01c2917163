"""Consumers refitted one after the other, against least squares on the rows and against the network's own outputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import evolvenet
from evolvenet.execution import residual_sums as sums_module
from evolvenet.graph.index_map import IndexMap
from evolvenet.measurement.activation_moments import collect
from evolvenet.pruning.reconstruction import reconstruct
from evolvenet.pruning.reconstruction_batch import ONE_SHOT_LIMITS, ReconstructionLimits
from evolvenet.pruning.selection import choose
from evolvenet.surgery.resize_model import compile_surgery, install
from evolvenet.tracing.trace import trace
from tests.helpers.cases import CASES, FLOAT, Case, distance, graph_of, outputs
from tests.helpers.small_models import Residual
from tests.helpers.states import State


def convnet() -> nn.Sequential:
    """Convolutions with a norm between, flattened into dense layers."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(96, 10),
        nn.ReLU(),
        nn.Linear(10, 3),
    ).double()


def test_multiples_of_other_units_are_cut_without_error() -> None:
    model = convnet().eval()
    with torch.no_grad():
        for name in ("weight", "bias"):
            for layer, rows in ((0, 4), (6, 5)):
                whole = model[layer].get_parameter(name)
                whole[rows:] = 2 * whole[:rows]
        nn.init.zeros_(model[1].get_buffer("running_mean"))
    x = torch.randn(64, 2, 8, 8, dtype=FLOAT)
    graph, expected = trace(model, x[:1]), outputs(model, x)
    evolvenet.prune(model, graph, {"0": 4, "6": 5}, batches=[x[:40], x[40:]])
    assert distance(outputs(model, x), expected) < 1e-3


def error_after(cut: dict[str, int], batches: list[Tensor] | None, x: Tensor) -> float:
    model = convnet().eval()
    expected = outputs(model, x)
    evolvenet.prune(model, trace(model, x[:1]), cut, batches=batches)
    return distance(outputs(model, x), expected)


def test_fitted_outputs_are_nearer_on_images_not_seen() -> None:
    seen, unseen = torch.randn(2, 256, 2, 8, 8, dtype=FLOAT)
    cut = {"0": 5, "3": 4, "6": 6}
    assert error_after(cut, [seen], unseen) < 0.7 * error_after(cut, None, unseen)


def test_a_reconstruction_changes_nothing_yet() -> None:
    model = convnet().train()
    x = torch.randn(32, 2, 8, 8, dtype=FLOAT)
    graph = trace(model, x[:1])
    surgery = compile_surgery(model, graph, {"0": IndexMap.keep(range(5), size=8)})
    before, held = State.of(model), [change.value.clone() for change in surgery.changes]
    fitted = reconstruct(model, graph, surgery, [x])
    assert before.differences(model) == []
    assert all(torch.equal(change.value, value) for change, value in zip(surgery.changes, held, strict=True))
    moved = {change.name for change in fitted.changes} - {change.name for change in surgery.changes}
    assert moved == {"3.bias"}


class Twice(nn.Module):
    """A layer that runs twice has two different inputs: no one fit serves both."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 6), nn.Linear(6, 6, bias=bias), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.b(self.a(x)).relu()))


class Weighed(nn.Module):
    """A consumer whose weight enters the output in another way too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu()) + self.b.weight.square().mean()


class SharedBias(nn.Module):
    """Two consumers with one bias: no fit of one of them may move it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 6), nn.Linear(6, 2), nn.Linear(6, 2)
        self.c.bias = self.b.bias

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x).relu()
        return self.b(hidden) + self.c(hidden.square())


@pytest.mark.parametrize(
    ("model", "batches"),
    [
        (SharedBias(), [torch.randn(32, 3)]),
        (Twice(), [torch.randn(32, 3)]),
        (Twice(bias=False), [torch.randn(32, 3)]),
        (Weighed(), [torch.randn(32, 3)]),
        (nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2)), [torch.randn(1, 3)]),
        (nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2)), []),
        (nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2)), [torch.full((8, 3), float("nan"))]),
    ],
    ids=[
        "a shared bias",
        "runs twice",
        "runs twice without a bias",
        "used by another op",
        "one sample",
        "no batch",
        "NaN",
    ],
)
def test_a_consumer_that_cannot_be_fitted_keeps_the_cut(model: nn.Module, batches: list[Tensor]) -> None:
    graph = trace(model, torch.zeros(2, 3))
    (name,) = list(graph.sizes)[-1:]
    surgery = compile_surgery(model, graph, {name: IndexMap.keep([0, 2], size=6)})
    bare = {change.name: change.value.clone() for change in surgery.changes}
    fitted = {change.name: change.value for change in reconstruct(model, graph, surgery, batches).changes}
    skipped = {"c.weight"} if isinstance(model, Twice) else set()
    assert all(torch.equal(fitted[key], value) for key, value in bare.items() if key not in skipped)


def test_batches_of_other_shapes_are_not_concatenated() -> None:
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    graph = trace(model, torch.zeros(2, 3, dtype=FLOAT))
    x, other = torch.randn(40, 3, dtype=FLOAT), torch.randn(4, 2, 3, dtype=FLOAT)
    surgery = compile_surgery(model, graph, {"0": IndexMap.keep(range(5), size=6)})
    both, alone = (reconstruct(model, graph, surgery, batches) for batches in ([x, other], [x]))
    assert all(torch.equal(one.value, two.value) for one, two in zip(both.changes, alone.changes, strict=True))


@pytest.mark.parametrize("bias", [True, False])
def test_the_error_of_a_dense_consumer_is_the_least_possible(bias: bool) -> None:
    """Against `lstsq` of the original outputs on the kept units."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2, bias=bias)).double().eval()
    x = torch.randn(512, 3, dtype=FLOAT)
    surgery = compile_surgery(model, trace(model, x[:2]), {"0": IndexMap.keep([0, 1, 3, 5], size=6)})
    fitted = {change.name: change.value for change in reconstruct(model, trace(model, x[:2]), surgery, [x]).changes}
    with torch.no_grad():
        kept, expected = model[1](model[0](x))[:, [0, 1, 3, 5]], model(x)
    columns = torch.cat([kept, torch.ones(512, 1, dtype=FLOAT)], dim=1) if bias else kept
    least = (columns @ torch.linalg.lstsq(columns, expected).solution - expected).square().sum()
    answer = kept @ fitted["2.weight"].T + (fitted["2.bias"] if bias else 0)
    assert (1 - 1e-9) * least <= (answer - expected).square().sum() < 1.01 * least


@pytest.mark.parametrize(("entries", "samples"), [(60, 20), (3, 2), (10**9, 50)])
def test_fewer_samples_are_run_the_larger_they_are(entries: int, samples: int) -> None:
    """All of them run in one pass, so what they hold is bounded and not only their number."""
    seen: list[int] = []

    class Watched(nn.Sequential):
        # Not by a hook: what hooks write down in such a run is put back.
        def forward(self, input: Tensor) -> Tensor:
            type(self).seen.append(len(input))  # type: ignore[attr-defined]
            return super().forward(input)

    model = Watched(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2))
    Watched.seen = []  # type: ignore[attr-defined]
    graph = trace(model, torch.zeros(2, 3))
    Watched.seen = seen  # type: ignore[attr-defined]
    surgery = compile_surgery(model, graph, {"0": IndexMap.keep([0, 2], size=6)})
    limits = ReconstructionLimits(samples=1024, entries=entries, rows=1024, multiplications=1e9)
    reconstruct(model, graph, surgery, [torch.randn(25, 3), torch.randn(25, 3)], limits)
    assert seen == [samples] * 2


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_fit_does_not_raise_the_error_of_any_model(case: Case) -> None:
    model, graph = case.model(), graph_of(case)
    sizes = {width.name: max(width.smallest, width.size // 2) for width in graph.resizable}
    batches = [case.inputs(seed) for seed in range(20, 32)]
    kept = choose(model, graph, sizes, collect(model, graph, batches))
    bare = compile_surgery(model, graph, kept)
    fitted = reconstruct(model, graph, bare, batches)
    expected = [outputs(model, batch) for batch in batches]
    errors = []
    for surgery in (bare, fitted):
        undo = install(model, surgery)
        errors.append(
            sum(distance(outputs(model, batch), whole) for batch, whole in zip(batches, expected, strict=True))
        )
        undo()
    assert errors[1] <= errors[0] * 1.05


def test_the_bias_of_an_attention_layer_takes_the_mean() -> None:
    """Its bias is added in an op of its own."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.make = nn.Linear(4, 8)
            self.mix = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.make(x).sigmoid()
            return self.mix(hidden, hidden, hidden)[0]

    torch.manual_seed(0)
    model, x = Attention().double().eval(), torch.randn(64, 5, 4, dtype=FLOAT)
    graph = trace(model, x[:2])
    expected = outputs(model, x)
    width = graph.widths["make"]
    surgery = compile_surgery(model, graph, {"make": IndexMap.keep(range(width.size - 1), size=width.size)})
    fitted = reconstruct(model, graph, surgery, [x])
    errors = []
    for each in (surgery, fitted):
        undo = install(model, each)
        errors.append(distance(outputs(model, x), expected))
        undo()
    assert errors[1] < 0.5 * errors[0]
    bare, moved = (
        next(change.value for change in each.changes if change.name == "mix.in_proj_bias") for each in (surgery, fitted)
    )
    assert moved.shape == bare.shape
    assert not torch.equal(moved, bare)


def test_a_branch_is_fitted_to_the_sum_with_its_shortcut() -> None:
    """The shortcut has an error of its own: without the sum as the target the block's output keeps it."""
    torch.manual_seed(0)
    model: Any = Residual()
    model.stem = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 8, 3, padding=1))
    model = model.double().eval()
    x = torch.randn(256, 3, 6, 6, dtype=FLOAT)
    graph, expected = trace(model, x[:2]), outputs(model, x)
    surgery = compile_surgery(model, graph, choose(model, graph, {"stem.0": 4, "conv1": 4}))
    # With rounds, fits to what the ReLU passes on make up for some of it too.
    errors, without_rounds = list[float](), replace(ONE_SHOT_LIMITS, rounds=0)
    for sums in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            if not sums:
                patch.setattr(sums_module, "SUMS", frozenset())
            fitted = reconstruct(model, graph, surgery, [x], without_rounds)
        undo = install(model, fitted)
        errors.append(distance(outputs(model, x), expected))
        undo()
    assert errors[1] < 0.95 * errors[0]


def test_a_norm_takes_the_mean_where_there_is_no_bias() -> None:
    """A lost constant unit is a shift of what comes out, and nothing else."""
    torch.manual_seed(0)
    first, read, norm = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)
    with torch.no_grad():
        first.weight[3], first.bias[3] = 0, 2  # type: ignore[index]
    model = nn.Sequential(first, read, norm, nn.Conv2d(6, 2, 1)).double().eval()
    x = torch.randn(32, 2, 6, 6, dtype=FLOAT)
    graph, expected = trace(model, x[:2]), outputs(model, x)
    surgery = compile_surgery(model, graph, {"0": IndexMap.keep([0, 1, 2], size=4)})
    fitted = reconstruct(model, graph, surgery, [x])
    assert "2.running_mean" in {change.name for change in fitted.changes}
    assert norm.running_mean is not None
    assert not norm.running_mean.any()
    undo = install(model, fitted)
    assert distance(outputs(model, x), expected) < 1e-5
    undo()
    assert distance(outputs(model, x), expected) == 0

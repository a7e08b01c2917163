"""Plans made width by width while the model runs are those made from all moments at once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import evolvenet
from evolvenet.execution.sampling import held_out
from evolvenet.measurement.activation_moments import collect
from evolvenet.measurement.output_error import output_error, outputs_on
from evolvenet.pruning import fitted_prune, reconstruction, reconstruction_batch, streamed_plan
from evolvenet.pruning.reconstruction import fit_to_targets, reconstruct
from evolvenet.pruning.reconstruction_batch import ONE_SHOT_LIMITS
from evolvenet.pruning.recorded_outputs import recorded
from evolvenet.pruning.selection import plan_prune
from evolvenet.pruning.streamed_plan import fit_streamed, plan_streamed
from evolvenet.surgery.resize_model import Surgery, compile_surgery
from evolvenet.tracing.trace import trace
from tests.helpers.small_models import convnet, images, mlp
from tests.helpers.states import State
from tests.helpers.transformers_families import family, inputs_of


class LastState(nn.Module):
    """A dense layer on the last state of two recurrent ones, each of which loses units of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.steps, self.last = nn.Linear(4, 8), nn.LSTM(8, 8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.steps(self.first(x).relu())[1][0][-1])


def cases() -> dict[str, tuple[nn.Module, Any]]:
    torch.manual_seed(0)
    return {
        "mlp": (mlp(6, 24, 24, 3), torch.randn(80, 6, dtype=torch.float64)),
        "convnet": (convnet(), images(24)),
        "lstm": (LastState().double(), torch.randn(80, 6, 4, dtype=torch.float64)),
        "llama": (family("llama").double(), inputs_of("llama", 12)),
        "gpt2": (family("gpt2").double(), inputs_of("gpt2", 12)),
    }


@pytest.mark.parametrize("name", ["mlp", "convnet", "lstm", "llama", "gpt2"])
def test_the_plan_is_that_of_all_moments_at_once(name: str) -> None:
    model, batch = cases()[name]
    graph = trace(model, batch, outputs="logits" if isinstance(batch, dict) else None)
    sizes = {width.name: width.rounded(-(-3 * width.size // 4)) for width in graph.resizable}
    before = State.of(model)
    count = len(batch["input_ids"] if isinstance(batch, dict) else batch)
    streamed = plan_streamed(model, graph, sizes, batch, held_out([count]), ONE_SHOT_LIMITS)
    assert streamed is not None
    assert before.differences(model) == []
    whole = plan_prune(model, graph, sizes, collect(model, graph, [batch]))
    assert streamed.surgery.maps == whole.maps
    fitted = set(streamed.recording.targets)
    assert fitted
    expected = values_of(whole) | {name: value for name, value in values_of(streamed.bare).items() if name in fitted}
    biases = {name for name in expected if "bias" in name and name.replace("bias", "weight") in fitted}
    # What a layer keeps whose fit fails: its refit by the moments.
    for tensor, value in streamed.recording.fallbacks.items():
        torch.testing.assert_close(value, values_of(whole)[tensor], rtol=1e-5, atol=1e-7)
    assert_same(values_of(streamed.surgery), expected, biases)
    again = reconstruct(model, graph, streamed.surgery, [batch], ONE_SHOT_LIMITS)
    made = fit_to_targets(model, graph, streamed.surgery, replace(streamed.recording, fallbacks={}))
    assert_same(values_of(made), values_of(again), set())
    assert not any(streamed.recording.targets.values())


def values_of(surgery: Surgery) -> dict[str, Tensor]:
    return {change.name: change.value for change in surgery.changes}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], but: set[str]) -> None:
    assert set(found) | but == set(expected) | but
    for name in set(found) - but:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-7)


class Looping(nn.Module):
    """Runs its layer once for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 12).double(), nn.Linear(12, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.second(self.first(row).relu()) for row in x])


def test_where_a_layer_runs_more_often_on_more_samples_there_is_no_streamed_plan() -> None:
    model, x = Looping(), torch.randn(8, 4, dtype=torch.float64)
    graph = trace(model, x[:1])
    assert plan_streamed(model, graph, {"first": 6}, x, held_out([8]), ONE_SHOT_LIMITS) is None


def test_a_large_model_is_pruned_as_a_small_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices that no fit writes to are shared with the model, its logits are left out, and the run ends with the last fit."""
    batches = [inputs_of("llama", 8) for _ in range(2)]
    errors, graph = [], trace(family("llama").double(), batches[0], outputs="logits")
    for large in (10**9, 0):
        monkeypatch.setattr(reconstruction_batch, "LARGE", large)
        model = family("llama").double()
        whole, before = outputs_on(model, batches, graph), {n: p.clone() for n, p in model.named_parameters()}
        sizes = {width.name: width.size * 3 // 4 for width in graph.resizable if "mlp" in width.name}
        plan = fitted_prune.plan_fitted_prune(model, graph, sizes, batches)
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
        after = evolvenet.prune(model, graph, sizes, batches)
        assert after.parameters < graph.parameters
        assert plan.graph.sizes == after.sizes
        errors.append(output_error(whole, outputs_on(model, batches, after)))
    assert errors[1] == pytest.approx(errors[0], rel=1e-6)


def test_where_no_consumer_of_a_large_model_could_be_fitted_no_outputs_are_compared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reconstruction_batch, "LARGE", 0)
    model, x = cases()["mlp"]
    graph, runs = trace(model, x[:1]), list[Any]()
    monkeypatch.setattr(fitted_prune, "outputs_on", lambda *given: runs.append(given) or outputs_on(*given))
    sizes = {width.name: 18 for width in graph.resizable}
    for fails in (False, True):
        if fails:
            monkeypatch.setattr(reconstruction, "refit_or_keep", lambda *_: None)
            monkeypatch.setattr(streamed_plan, "refit_columns", lambda *_: ())
        surgery = fitted_prune.plan_fitted_prune(model, graph, sizes, x.split(20))
        bare = values_of(compile_surgery(model, graph, surgery.maps, surgery.bases))
        assert not fails or all(torch.equal(value, bare[name]) for name, value in values_of(surgery).items())
        assert (not runs) == fails
        runs.clear()


@pytest.mark.parametrize("failing", [{18}, {3}, {18, 3}], ids=str)
@pytest.mark.parametrize("count", [80, 30], ids=["rows_as_moments", "rows_kept"])
def test_a_consumer_whose_fit_fails_gets_the_refit_to_the_moments(
    failing: set[int], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others are fitted to what it puts out with that."""
    model, batch = cases()["mlp"]
    batch = batch[:count]
    graph, held = trace(model, batch[:1]), held_out([len(batch)])
    sizes = {width.name: 18 for width in graph.resizable}
    fit, runs = reconstruction.refit_or_keep, list[Any]()
    rows = {18: "2", 3: "4"}
    monkeypatch.setattr(
        reconstruction, "refit_or_keep", lambda x, y, weight, *rest: (
            None if weight.shape[-2] in failing else fit(x, y, weight, *rest)
        )
    )  # fmt: skip
    monkeypatch.setattr(streamed_plan, "recorded", lambda *given: runs.append(given[2]) or recorded(*given))
    found = fit_streamed(model, graph, sizes, batch, held, ONE_SHOT_LIMITS)
    assert found is not None
    assert len(runs) == 1
    bare, fitted = map(values_of, found)
    whole = plan_prune(model, graph, sizes, collect(model, graph, [batch]))
    for size, layer in rows.items():
        for name in (f"{layer}.weight", f"{layer}.bias"):
            same = torch.allclose(fitted[name], values_of(whole)[name], rtol=1e-5, atol=1e-7)
            assert same == (size in failing)
        assert not torch.equal(fitted[f"{layer}.weight"], bare[f"{layer}.weight"])
    kept = {f"{rows[size]}.{kind}" for size in failing for kind in ("weight", "bias")}
    changes = {change.name: change for change in found[0].changes}
    changes |= {change.name: change for change in whole.changes if change.name in kept}
    start = replace(found[0], changes=tuple(changes.values()))
    assert_same(fitted, values_of(reconstruct(model, graph, start, [batch], ONE_SHOT_LIMITS)), set())


class Added(nn.Module):
    """A consumer whose output is added to the input, and of whose weight only a part may be used."""

    def __init__(self, part: slice) -> None:
        super().__init__()
        self.first, self.second, self.part = nn.Linear(6, 24).double(), nn.Linear(24, 9).double(), part

    def forward(self, x: Tensor) -> Tensor:
        hidden, part = self.first(x).relu(), self.part
        return nn.functional.linear(hidden, self.second.weight[part], self.second.bias[part]) + x


@pytest.mark.parametrize("part", [slice(0, 6), slice(2, 8)], ids=str)
@pytest.mark.parametrize("kind", ["no outputs", "other inputs", "no fit"])
def test_a_consumer_that_cannot_be_fitted_gets_the_refit_too(
    part: slice, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, batch = Added(part), torch.randn(80, 6, dtype=torch.float64)
    graph = trace(model, batch[:1])
    cut = plan_streamed(model, graph, {"first": 18}, batch, held_out([80]), ONE_SHOT_LIMITS)
    assert cut is not None
    (target,) = cut.recording.targets["second.weight"]
    if kind == "no outputs":
        target = replace(target, outputs=target.outputs[:, :0])
        monkeypatch.setattr(reconstruction.ConsumerFitter, "_kept_outputs", lambda _, __, target, ___: target.outputs)
    elif kind == "other inputs":
        target = replace(target, inputs=target.inputs + 1)
    else:
        monkeypatch.setattr(reconstruction, "refit_residuals", lambda *_: None)
    cut.recording.targets["second.weight"] = [target]
    expected = values_of(cut.bare) | dict(cut.recording.fallbacks)
    found = values_of(fit_to_targets(model, graph, cut.surgery, cut.recording))
    assert cut.recording.fallbacks
    assert not torch.equal(found["second.weight"][part], values_of(cut.bare)["second.weight"][part])
    for name in cut.recording.fallbacks:
        torch.testing.assert_close(found[name][part], expected[name][part])


class Joined(nn.Module):
    """One consumer of two widths."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.last = nn.Linear(6, 24), nn.Linear(6, 24), nn.Linear(48, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([self.one(x).relu(), self.two(x).relu()], 1))


def test_inputs_of_a_width_that_stays_are_given_up_with_its_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, kept = Joined().double(), torch.randn(30, 6, dtype=torch.float64), list[int]()
    finish = streamed_plan._Plan.finish

    def finished(plan: Any, name: str) -> None:
        finish(plan, name)
        kept.append(len(plan._rows.keys() & set(graph.widths[name].consumers)))

    monkeypatch.setattr(streamed_plan._Plan, "finish", finished)
    graph = trace(model, x[:1])
    assert plan_streamed(model, graph, {"one": 18, "two": 24}, x, held_out([30]), ONE_SHOT_LIMITS) is not None
    assert kept == [0, 0]

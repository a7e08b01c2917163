"""Networks and batches of which little can be known: the right result or a clear error, never NaN or a raw one."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import evolvenet
from evolvenet.errors import ResizeError, SpectrumError, TraceError
from evolvenet.policies.base import Policy
from tests.helpers.cases import FLOAT, Case, distance, graph_of, outputs
from tests.helpers.degenerate import (
    MANY,
    MODELS,
    PAIRS,
    check_alive,
    check_values,
    degenerate,
    doubles,
    halves,
    rank,
    samples,
    weights,
)
from tests.helpers.policies import Fixed
from tests.helpers.states import State

MLP, CONV = MODELS[:2]
KEPT_BARE = {"zero weights": 1e-9, "zero channels": 1e-9, "weights near zero": 1e-9}
"""Half of the units of these can go by their weights alone and nothing changes, but for so much."""
KEPT = {**KEPT_BARE, "rank-one weights": 1e-4, "constant activations": 1e-9, "batch norms with zero scale": 1e-9}
"""The same with batches, on which the consumers are fitted again."""


@pytest.mark.parametrize(("case", "name"), PAIRS)
def test_spectra_are_finite_and_of_the_rank_that_is_left(case: Case, name: str) -> None:
    model, graph = degenerate(case, name), graph_of(case)
    for batches in (None, [samples(case)], [samples(case, 1)]):
        found = evolvenet.spectra(model, graph, batches)
        assert set(found) == set(graph.sizes)
        for width, values in found.items():
            check_values(values, graph.widths[width].size)
            if name == "zero weights":
                assert not values.any()
            if name == "rank-one weights" and batches is None:
                producers = graph.widths[width].producers
                assert 1 <= rank(values) <= sum(tie.repeat for tie in producers)
            if name == "zero channels" and case.name != "attention":
                assert rank(values) <= -(-graph.widths[width].size // 2)


@pytest.mark.parametrize("with_batches", [False, True], ids=["weights alone", "batches"])
@pytest.mark.parametrize(("case", "name"), PAIRS)
def test_pruning_units_without_effect_keeps_the_function(case: Case, name: str, with_batches: bool) -> None:
    model, graph, inputs = degenerate(case, name), graph_of(case), samples(case)
    expected, sizes = outputs(model, inputs), halves(graph)
    optimizer = torch.optim.AdamW(model.parameters())
    after = evolvenet.prune(model, graph, sizes, [inputs] if with_batches else None, optimizer)
    assert after.sizes == sizes
    kept = (KEPT if with_batches else KEPT_BARE).get(name)
    # Half of the rows of an attention's projection are all queries and half of the keys: nothing of it is dead.
    if kept is not None and (case.name, name) != ("attention", "zero channels"):
        assert distance(outputs(model, inputs), expected) < kept
    check_alive(model, optimizer, inputs)


@pytest.mark.parametrize(("case", "name"), PAIRS)
def test_growing_keeps_the_function(case: Case, name: str) -> None:
    model, graph, inputs = degenerate(case, name), graph_of(case), samples(case)
    expected, sizes = outputs(model, inputs), doubles(graph)
    optimizer = torch.optim.AdamW(model.parameters())
    after = evolvenet.grow(model, graph, sizes, optimizers=optimizer)
    assert {width: after.sizes[width] for width in sizes} == sizes
    assert distance(outputs(model, inputs), expected) < 1e-9
    check_alive(model, optimizer, inputs)


def evolver_of(case: Case, model: nn.Module, policy: Policy, monkeypatch: pytest.MonkeyPatch) -> evolvenet.Evolver:
    """An evolver that need not trace: the graph is the same whatever the values are."""
    monkeypatch.setattr("evolvenet.engine.evolver.trace_for_training", lambda model, inputs, outputs: graph_of(case))
    inputs = case.inputs().to(next(model.parameters()).dtype)
    return evolvenet.Evolver(model, torch.optim.AdamW(model.parameters()), policy, inputs)


@pytest.mark.parametrize(("case", "name"), PAIRS)
def test_events_prune_and_grow_and_training_goes_on(case: Case, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One in which the spectra decide, and one in which all that is left doubles."""
    model, inputs = degenerate(case, name), samples(case)
    evolver = evolver_of(case, model, evolvenet.Threshold(prune=0.01, grow=0.9), monkeypatch)
    evolver.observe(inputs)
    event = evolver.step()
    assert event.skipped is None
    if name == "zero weights":
        graph = graph_of(case)
        assert {change.width: change.after for change in event.changes} == halves(graph)
    check_alive(model, evolver.optimizers[0], inputs)
    expected, asked = outputs(model, inputs), doubles(evolver.graph)
    evolver.policy = Fixed(asked)
    event = evolver.step()
    assert event.skipped is None
    assert {change.width: change.after for change in event.changes} == asked
    assert distance(outputs(model, inputs), expected) < 1e-9
    check_alive(model, evolver.optimizers[0], inputs)


BROKEN: Mapping[str, Callable[[nn.Module], Tensor]] = {
    "the first weight": lambda model: weights(model)[0],
    "the last weight": lambda model: weights(model)[-1],
    "a bias or norm": lambda model: next(p.data for p in model.parameters() if p.dim() == 1),
}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", BROKEN)
@pytest.mark.parametrize("case", MODELS, ids=str)
def test_broken_weights_are_refused_and_left_alone(
    case: Case, where: str, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, graph, inputs = case.model(), graph_of(case), samples(case)
    BROKEN[where](model).view(-1)[0] = bad
    evolver = evolver_of(case, model, Fixed(halves(graph)), monkeypatch)
    evolver.observe(inputs)
    before = State.of(model, evolver.optimizers)
    calls: list[Callable[[], Any]] = [
        lambda: evolvenet.prune(model, graph, halves(graph), optimizers=evolver.optimizers),
        lambda: evolvenet.prune(model, graph, halves(graph), [inputs], evolver.optimizers),
    ]
    if where == "the first weight":
        calls.append(lambda: evolvenet.spectra(model, graph))
    for call in calls:
        with pytest.raises(SpectrumError, match="NaN or infinite"):
            call()
    event = evolver.step()
    assert "Expected finite weights, got NaN or infinite values" in (event.skipped or "")
    assert before.differences(model, evolver.optimizers) == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", BROKEN)
@pytest.mark.parametrize("case", [case for case in MODELS if case.name != "attention"], ids=str)
def test_growing_refuses_broken_weights_wherever_they_are(case: Case, where: str, bad: float) -> None:
    """The first norm weight that is NaN would make every new unit's NaN."""
    model, graph = case.model(), graph_of(case)
    BROKEN[where](model).view(-1)[0] = bad
    before = State.of(model)
    with pytest.raises(SpectrumError, match="NaN or infinite"):
        evolvenet.grow(model, graph, doubles(graph))
    assert before.differences(model) == []


FEW: Mapping[str, Callable[[Case], list[Any]]] = {
    "one sample": lambda case: [samples(case, 1)],
    "two samples": lambda case: [samples(case, 2)],
    "fewer samples than units": lambda case: [samples(case, 3), samples(case, 1)],
    "the same input": lambda case: [samples(case, 1).repeat_interleave(MANY, 0)],
    "inputs of zero": lambda case: [torch.zeros_like(samples(case))],
    "an empty batch beside others": lambda case: [samples(case)[:0], samples(case), samples(case)[:0]],
}


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("case", MODELS, ids=str)
def test_few_or_constant_samples_are_enough_to_prune(case: Case, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, batches, inputs = graph_of(case), FEW[name](case), samples(case)
    sizes = halves(graph)
    model = case.model()
    for width, values in evolvenet.spectra(model, graph, batches).items():
        check_values(values, graph.widths[width].size)
    expected = [outputs(model, batch) for batch in batches if len(batch)]
    optimizer = torch.optim.AdamW(model.parameters())
    assert evolvenet.prune(model, graph, sizes, batches, optimizer).sizes == sizes
    if name in ("the same input", "inputs of zero") and case.name == "mlp":
        # What never changes is taken by the next bias.
        assert distance(outputs(model, next(b for b in batches if len(b))), expected[0]) < 1e-9
    check_alive(model, optimizer, inputs)
    model = case.model()
    evolver = evolver_of(case, model, evolvenet.Threshold(prune=0.01, grow=0.9), monkeypatch)
    for batch in batches:
        evolver.observe(batch)
    before = evolver.graph.sizes
    event = evolver.step()
    if event.skipped is not None:
        assert "places (samples × positions) to measure on" in event.skipped
        assert evolver.graph.sizes == before
    check_alive(model, evolver.optimizers[0], inputs)


SCARCE: Mapping[str, tuple[str, ...]] = {
    "mlp": ("0", "3"),
    "conv": ("4", "7"),
    "resnet": ("blocks.1.conv1", "blocks.1.conv2", "blocks.2.conv1"),
    "resnext": ("mix",),
    "attention": ("hidden",),
}
"""Widths of which one sample holds a few positions."""


@pytest.mark.parametrize("case", MODELS, ids=str)
def test_widths_with_too_few_samples_are_left_as_they_are(
    case: Case, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A covariance of n samples has at most n − 1 directions: the others are unknown, not empty."""
    evolver = evolver_of(case, case.model(), evolvenet.Threshold(prune=0.01, grow=1.0), monkeypatch)
    evolver.observe(samples(case, 1))
    event = evolver.step()
    for name in SCARCE[case.name]:
        assert event.sizes[name] == graph_of(case).sizes[name]
        assert f" for the {event.sizes[name]} of {name}" in caplog.text


@pytest.mark.parametrize("case", MODELS, ids=str)
def test_batches_without_a_finite_sample_are_refused(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, model = graph_of(case), case.model()
    before = State.of(model)
    broken = samples(case)
    broken.view(-1)[7] = float("nan")
    for batches, error, text in (
        ([], TraceError, "got none"),
        ([samples(case)[:0]], TraceError, "without a sample"),
        ([broken], SpectrumError, "finite inputs"),
    ):
        for call in (
            lambda batches=batches: evolvenet.spectra(model, graph, batches),
            lambda batches=batches: evolvenet.prune(model, graph, halves(graph), batches),
        ):
            with pytest.raises(error, match=text):
                call()
        evolver = evolver_of(case, model, Fixed(halves(graph)), monkeypatch)
        for batch in batches:
            evolver.observe(batch)
        assert re.search(f"{text}|at least one observed batch", evolver.step().skipped or "")
    assert before.differences(model) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", MODELS, ids=str)
def test_every_tensor_keeps_its_narrow_type(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every value has the type that it had, and growing changes outputs by no more than its rounding."""
    graph, inputs = graph_of(case), samples(case).to(dtype)
    rounding = 4 * torch.finfo(dtype).eps
    exact = evolvenet.spectra(case.model().to(dtype).double(), graph)
    for batches in (None, [inputs]):
        for width, values in evolvenet.spectra(case.model().to(dtype), graph, batches).items():
            check_values(values, graph.widths[width].size)
            if batches is None:
                torch.testing.assert_close(values, exact[width], rtol=1e-5, atol=1e-6)
    model = case.model().to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    for batches in (None, [inputs]):
        graph = evolvenet.prune(model, graph, halves(graph), batches, optimizer)
    expected = outputs(model, inputs)
    graph = evolvenet.grow(model, graph, doubles(graph), optimizers=optimizer)
    assert distance(outputs(model, inputs), expected) < rounding
    assert {tensor.dtype for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()} == {dtype}
    check_alive(model, optimizer, inputs)
    evolver = evolver_of(case, case.model().to(dtype), Fixed(halves(graph_of(case))), monkeypatch)
    evolver.observe(inputs)
    assert evolver.step().skipped is None


@pytest.mark.parametrize("case", MODELS, ids=str)
def test_down_to_a_single_unit_and_up_again(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, model, graph = samples(case), case.model(), graph_of(case)
    least = {width.name: max(width.smallest, 1) for width in graph.resizable}
    optimizer = torch.optim.AdamW(model.parameters())
    graph = evolvenet.prune(model, graph, least, [inputs], optimizer)
    assert graph.sizes == least
    assert set(least.values()) == {2 if case.name == "resnext" else 1}  # one group would be a layer without groups
    check_alive(model, optimizer, inputs)
    for batches in (None, [inputs]):
        for width, values in evolvenet.spectra(model, graph, batches).items():
            check_values(values, least[width])
    assert evolvenet.prune(model, graph, least, [inputs]).sizes == least
    with pytest.raises(ResizeError):
        evolvenet.prune(model, graph, dict.fromkeys(graph.sizes, 0))
    expected = outputs(model, inputs)
    graph = evolvenet.grow(model, graph, doubles(graph), optimizers=optimizer)
    assert distance(outputs(model, inputs), expected) < 1e-9
    assert {name: graph.sizes[name] for name in doubles(graph)} == {name: 2 * least[name] for name in doubles(graph)}
    check_alive(model, optimizer, inputs)


def test_widths_of_one_unit_are_not_offered() -> None:
    """An axis of size 1 may as well be there to be broadcast: nothing tells it from a width."""
    x = torch.randn(4, 3, dtype=FLOAT)
    model = nn.Sequential(nn.Linear(3, 1), nn.Tanh(), nn.Linear(1, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    graph = evolvenet.trace(model, x)
    assert graph.sizes == {"2": 6}
    with pytest.raises(ResizeError, match="No width is called '0'"):
        evolvenet.grow(model, graph, {"0": 2})
    for batches in (None, [x]):
        check_values(evolvenet.spectra(model, graph, batches)["2"], 6)
    with pytest.raises(TraceError, match="at least one resizable width"):
        evolvenet.Evolver(model[:3], None, Fixed({}), x)


@pytest.mark.parametrize("case", [MLP, CONV], ids=str)
def test_one_of_many_equal_units_is_enough(case: Case) -> None:
    """Copies of one unit stand in for each other exactly; one of them is enough."""
    model, graph, inputs = case.model(), graph_of(case), samples(case)
    name = next(iter(graph.sizes))
    with torch.no_grad():
        for tie in graph.widths[name].ties:
            if tie.role != "consumes":
                tensor: Any = dict([*model.named_parameters(), *model.named_buffers()])[tie.tensor]
                tensor.copy_(tensor[:1].expand_as(tensor).clone())
    expected = outputs(model, inputs)
    assert rank(evolvenet.spectra(model, graph, [inputs])[name]) == 1
    evolvenet.prune(model, graph, {name: 1}, [inputs])
    assert distance(outputs(model, inputs), expected) < 1e-6

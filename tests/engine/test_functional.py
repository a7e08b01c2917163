"""Changing widths: what is computed, what is kept, how training goes on, and that a failure leaves no trace."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from importlib import import_module

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

import evolvenet
from evolvenet.engine.functional import grow, resize
from evolvenet.errors import EvolveNetError, IndexMapError, OptimizerStateError, ResizeError
from evolvenet.graph.index_map import IndexMap
from evolvenet.graph.width_graph import WidthGraph
from evolvenet.surgery.optimizer_state import validate_state
from evolvenet.tracing.trace import trace
from tests.helpers.cases import CASES, Case, distance, graph_of, outputs, run, shuffled, without_reasons
from tests.helpers.states import State, same_bits, zero_units

BY_NAME = {case.name: case for case in CASES}
EXACT = 1e-9
STEPS = {
    "exchange": "evolvenet.surgery.resize_model",
    "refresh": "evolvenet.surgery.resize_model",
    "apply_state": "evolvenet.engine.functional",
    "validate_state": "evolvenet.engine.functional",
}
"""What a resize does, by the module that calls it."""
OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "adamw": lambda model: AdamW(model.parameters(), lr=1e-3, amsgrad=True),
    "sgd": lambda model: SGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True),
}


def unmixed(graph: WidthGraph) -> dict[str, int]:
    """The widths that can grow without changing the function."""
    return {width.name: width.size for width in graph.resizable if width.mixed is None}


def some(width: evolvenet.Width) -> IndexMap:
    """About two thirds of the units, in order."""
    gone = range(1, width.size, 3) if width.size > 3 else range(0)
    return IndexMap.keep([unit for unit in range(width.size) if unit not in gone], width.size)


def train_step(model: nn.Module, optimizer: Optimizer, inputs: object) -> None:
    """One step on the squares of everything that the model answers with."""
    model.train()
    optimizer.zero_grad()
    torch.stack([answer.square().mean() for answer in run(model, inputs)]).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_zeros_are_not_noticed(case: Case) -> None:
    model, inputs, graph = case.model(), case.inputs(), graph_of(case)
    expected = outputs(model, inputs)
    after = resize(model, graph, {name: IndexMap.grow(size, 3) for name, size in unmixed(graph).items()})
    assert distance(outputs(model, inputs), expected) < EXACT
    assert after.sizes == {name: size + 3 * (name in unmixed(graph)) for name, size in graph.sizes.items()}
    model = case.model()
    resize(model, graph, {name: IndexMap.grow(size, 2) for name, size in graph.sizes.items()})
    assert [t.shape for t in outputs(model, inputs)] == [t.shape for t in expected]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_grown_units_are_not_noticed(case: Case) -> None:
    model, inputs, graph = case.model(), case.inputs(), graph_of(case)
    expected = outputs(model, inputs)
    after = grow(model, graph, {name: size + 2 for name, size in unmixed(graph).items()})
    assert distance(outputs(model, inputs), expected) < EXACT
    assert {name: after.sizes[name] - size for name, size in unmixed(graph).items()} == dict.fromkeys(unmixed(graph), 2)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_removing_units_is_masking_them(case: Case) -> None:
    """Cut out or zeroed wherever they are made, carried and read: the same function."""
    inputs, graph = case.inputs(), graph_of(case)
    cut, masked = case.model(), case.model()
    maps = {width.name: some(width) for width in graph.resizable if width.mixed is None}
    resize(cut, graph, maps)
    zero_units(masked, graph, maps)
    assert distance(outputs(cut, inputs), outputs(masked, inputs)) < EXACT


@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_changes_are_one(case: Case) -> None:
    graph = graph_of(case)
    twice, once = case.model(), case.model()
    first = {width.name: some(width) for width in graph.resizable}
    then = {name: IndexMap.of([-1, *range(m.new_size), -1], m.new_size) for name, m in first.items()}
    after = resize(twice, resize(twice, graph, first), then)
    assert dict(after.widths) == dict(resize(once, graph, {n: first[n].then(then[n]) for n in first}).widths)
    for name, tensor in twice.state_dict().items():
        assert same_bits(tensor, once.state_dict()[name]), name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_graph_that_comes_back_is_that_of_a_new_trace(case: Case) -> None:
    model, graph = case.model(), graph_of(case)
    maps = {
        width.name: some(width) if k % 2 else IndexMap.grow(width.size, 2) for k, width in enumerate(graph.resizable)
    }
    after = resize(model, graph, maps)
    assert without_reasons(after) == without_reasons(trace(model, case.inputs()))


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_goes_on(case: Case, kind: str) -> None:
    model, inputs, graph = case.model(), case.inputs(), graph_of(case)
    optimizer = OPTIMIZERS[kind](model)
    train_step(model, optimizer, inputs)
    parameters = list(model.parameters())
    for change in (some, lambda width: IndexMap.grow(width.size, 2), lambda width: shuffled(width.size)):
        graph = resize(model, graph, {width.name: change(width) for width in graph.resizable}, [optimizer])
        assert all(one is two for one, two in zip(parameters, model.parameters(), strict=True))
        assert [p for group in optimizer.param_groups for p in group["params"]] == parameters
        validate_state(optimizer)
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        train_step(model, optimizer, inputs)
        validate_state(optimizer)
        assert all(bool(parameter.isfinite().all()) for parameter in parameters)
        changed = [name for name, p in model.named_parameters() if not torch.equal(p.detach(), before[name])]
        assert len(changed) > len(parameters) // 2


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_reordered_network_trains_as_the_one_it_was(kind: str) -> None:
    """Values, gradients and optimizer state all move together: step by step the same function as without the change."""
    for name in ("resnet", "lstm", "densenet"):
        case = BY_NAME[name]
        inputs, graph = case.inputs(), graph_of(case)
        models = case.model(), case.model()
        optimizers = [OPTIMIZERS[kind](model) for model in models]
        for step in range(4):
            if step == 2:
                order = {name: shuffled(size) for name, size in graph.sizes.items()}
                resize(models[1], graph, order, [optimizers[1]])
            for model, optimizer in zip(models, optimizers, strict=True):
                train_step(model, optimizer, inputs)
        assert distance(outputs(models[0], inputs), outputs(models[1], inputs)) < EXACT, name


def test_a_gradient_in_hand_is_carried() -> None:
    """Between two halves of an accumulated batch: the sum is that of the reordered gradient."""
    case = BY_NAME["resnet"]
    model, inputs, graph = case.model(), case.inputs(), graph_of(case)
    reference = case.model()
    for each in (model, reference):
        outputs_of = run(each, inputs)
        outputs_of[0].sum().backward()
    order = {name: shuffled(size) for name, size in graph.sizes.items()}
    resize(model, graph, order)
    resize(reference, graph, {})
    for each in (model, reference):
        run(each, inputs)[0].square().sum().backward()
    axes = graph.axis_maps(order)
    for name, parameter in reference.named_parameters():
        expected = parameter.grad
        assert expected is not None
        for dim, index_map in axes.get(name, {}).items():
            expected = index_map.apply(expected, dim)
        carried = model.get_parameter(name).grad
        assert carried is not None
        assert torch.allclose(carried, expected, rtol=1e-9, atol=1e-12), name


def test_a_loss_from_before_does_not_spoil_the_next_step() -> None:
    """The gradient accumulators of an old graph know the old shapes."""
    case = BY_NAME["resnet"]
    model, inputs, graph = case.model(), case.inputs(), graph_of(case)
    optimizer = AdamW(model.parameters())
    kept = run(model.train(), inputs)[0].sum()
    kept.backward(retain_graph=True)
    resize(model, graph, {width.name: some(width) for width in graph.resizable}, [optimizer])
    train_step(model, optimizer, inputs)
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
    before = State.of(model, [optimizer])
    with pytest.raises(RuntimeError):
        kept.backward()
    assert before.differences(model, [optimizer]) == []


def _trained(case: Case) -> tuple[nn.Module, list[Optimizer]]:
    """A model with two optimizers that share out its parameters, after a step: gradients and states in hand."""
    model = case.model()
    parameters = list(model.parameters())
    optimizers: list[Optimizer] = [AdamW(parameters[::2], lr=1e-3), SGD(parameters[1::2], lr=1e-3, momentum=0.9)]
    for _ in range(2):
        model.train()
        torch.stack([answer.square().mean() for answer in run(model, case.inputs())]).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
    return model, optimizers


FAILURES = ("resnet", "mobilenet", "lstm_deep", "tied_weights", "channels_last", "locked")


@pytest.mark.parametrize("where", STEPS)
@pytest.mark.parametrize("name", FAILURES)
def test_an_error_on_the_way_leaves_all_as_it_was(name: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = BY_NAME[name]
    graph, (model, optimizers) = graph_of(case), _trained(case)
    maps = {width.name: some(width) for width in graph.resizable}
    owner = import_module(STEPS[where])
    before, real, calls = State.of(model, optimizers), getattr(owner, where), itertools.count()

    def fail(*args: object) -> object:
        if next(calls) == 1:
            if STEPS[where] == "evolvenet.surgery.resize_model":
                real(*args)  # the worst moment: it has changed something already
            raise MemoryError("no more")
        return real(*args)

    monkeypatch.setattr(owner, where, fail)
    with pytest.raises(MemoryError):
        resize(model, graph, maps, optimizers)
    monkeypatch.undo()
    assert before.differences(model, optimizers) == []
    resize(model, graph, maps, optimizers)
    for optimizer in optimizers:
        validate_state(optimizer)


def _misfit(optimizer: Optimizer) -> None:
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]
    state["exp_avg"] = torch.zeros(7, 7)


REFUSED: dict[str, tuple[dict[str, IndexMap], type[EvolveNetError], str]] = {
    "unknown": ({"9": IndexMap.identity(3)}, ResizeError, "No width is called '9'. Resizable here: 0, 3."),
    "frozen": ({"0": IndexMap.keep([0], 12), "6": IndexMap.keep([0], 3)}, ResizeError, "'6' is frozen"),
    "another size": ({"0": IndexMap.keep([0], 12), "3": IndexMap.keep([0], 8)}, ResizeError, "has 9 units, but"),
    "state that does not fit": ({"0": IndexMap.keep([0], 12)}, OptimizerStateError, "AdamW: expected 'exp_avg' to fit"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_leaves_all_as_it_was(name: str) -> None:
    maps, error, message = REFUSED[name]
    case = BY_NAME["mlp"]
    model, optimizers = _trained(case)
    if error is OptimizerStateError:
        _misfit(optimizers[0])
    before = State.of(model, optimizers)
    with pytest.raises(error) as caught:
        resize(model, graph_of(case), maps, optimizers)
    assert message in str(caught.value)
    assert before.differences(model, optimizers) == []


def test_an_old_graph_is_refused() -> None:
    case = BY_NAME["mlp"]
    model, graph = case.model(), graph_of(case)
    after = resize(model, graph, {"0": IndexMap.keep(range(4), 12)})
    before = State.of(model)
    with pytest.raises(ResizeError, match="use the graph that prune returned"):
        resize(model, graph, {"3": IndexMap.keep(range(4), 9), "0": IndexMap.grow(12, 1)})
    assert before.differences(model) == []
    assert resize(model, after, {"0": IndexMap.grow(4, 1)}).sizes == {"0": 5, "3": 9}


def test_a_width_cannot_vanish() -> None:
    with pytest.raises(IndexMapError, match="expected at least one unit to remain of 12"):
        IndexMap.keep([], 12)


def test_down_to_one_unit_and_up_again() -> None:
    case = BY_NAME["conv"]
    model, inputs, graph = case.model(), case.inputs(), graph_of(case)
    graph = resize(model, graph, {name: IndexMap.keep([size - 1], size) for name, size in graph.sizes.items()})
    expected = outputs(model, inputs)
    graph = grow(model, graph, dict.fromkeys(graph.sizes, 5))
    assert distance(outputs(model, inputs), expected) < EXACT
    assert graph.sizes == dict.fromkeys(graph.sizes, 5)
    assert without_reasons(graph) == without_reasons(trace(model, inputs))


def test_no_maps_change_nothing() -> None:
    case = BY_NAME["resnet"]
    model, optimizers = _trained(case)
    before = State.of(model, optimizers)
    assert dict(resize(model, graph_of(case), {}, optimizers).widths) == dict(graph_of(case).widths)
    assert before.differences(model, optimizers) == []


def test_weights_that_are_not_trained_are_resized_too() -> None:
    case = BY_NAME["resnet"]
    model, inputs, graph = case.model(), case.inputs(), graph_of(case)
    model.get_submodule("blocks").requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    expected = outputs(model, inputs)
    resize(model, graph, {name: shuffled(size) for name, size in graph.sizes.items()})
    assert distance(outputs(model, inputs), expected) < EXACT
    assert [parameter.requires_grad for parameter in model.parameters()] == flags


def test_under_inference_mode_the_state_can_be_trained_afterwards() -> None:
    case = BY_NAME["resnet"]
    model, optimizers = _trained(case)
    with torch.inference_mode():
        resize(
            model, graph_of(case), {name: IndexMap.grow(n, 1) for name, n in graph_of(case).sizes.items()}, optimizers
        )
    for optimizer in optimizers:
        train_step(model, optimizer, case.inputs())
        assert not any(isinstance(e, Tensor) and e.is_inference() for s in optimizer.state.values() for e in s.values())

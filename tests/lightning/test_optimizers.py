"""Every optimizer of torch in a plain loop: widths shrink, grow and shrink, and training goes on."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from evolvenet import Evolver, IndexMap, resize, trace
from tests.helpers.optimizer_checks import check_fits
from tests.helpers.policies import InTurn

SIZES = ({"0": 7, "2": 6}, {"0": 11, "2": 9}, {"0": 5, "2": 8})
"""Shrink, grow, and at last one of each."""

SETTINGS: dict[str, tuple[dict[str, Any], ...]] = {
    "ASGD": ({"t0": 2},),
    "Adadelta": ({},),
    "Adafactor": ({},),
    "Adagrad": ({}, {"initial_accumulator_value": 0.1}),
    "Adam": ({}, {"amsgrad": True}),
    "AdamW": ({}, {"amsgrad": True}),
    "Adamax": ({},),
    "LBFGS": ({"lr": 0.1, "max_iter": 3}, {"lr": 0.1, "max_iter": 3, "line_search_fn": "strong_wolfe"}),
    "Muon": ({},),
    "NAdam": ({}, {"decoupled_weight_decay": True, "weight_decay": 0.01}),
    "RAdam": ({}, {"decoupled_weight_decay": True, "weight_decay": 0.01}),
    "RMSprop": ({}, {"momentum": 0.9, "centered": True}),
    "Rprop": ({},),
    "SGD": ({"lr": 0.05}, {"lr": 0.02, "momentum": 0.9, "nesterov": True}),
    "SparseAdam": ({},),
}
"""What each class is tried with, beside its defaults; a class without an entry fails the first test."""


def classes() -> dict[str, type[Any]]:
    """Every optimizer that a module of torch.optim defines; `_multi_tensor` only has old names of foreach ones."""
    found: dict[str, type[Any]] = {}
    modules = [module.name for module in pkgutil.walk_packages(torch.optim.__path__, "torch.optim.")]
    for name in modules:
        for each in vars(import_module(name)).values() if "_multi_tensor" not in name else ():
            if inspect.isclass(each) and issubclass(each, Optimizer) and each is not Optimizer:
                found[each.__name__] = each
    return found


def implementations(cls: type[Any]) -> list[dict[str, Any]]:
    """The arguments that choose one, as far as the class has several."""
    known = inspect.signature(cls).parameters
    flags: list[dict[str, Any]] = [{"foreach": False}, {"foreach": True}] if "foreach" in known else [{}]
    return [*flags, *([{"fused": True}] if "fused" in known else [])]


def network(sparse: bool = False) -> nn.Sequential:
    first = nn.Embedding(20, 9, sparse=True) if sparse else nn.Linear(6, 9)
    return nn.Sequential(first, nn.Tanh(), nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def batch(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Inputs and labels that can be learned; always the same, or LBFGS alone would go astray."""
    generator = torch.Generator().manual_seed(7)
    if isinstance(model.get_submodule("0"), nn.Embedding):
        ids = torch.randint(20, (48,), generator=generator)
        return ids, ids % 3
    images = torch.randn(48, 6, dtype=torch.float64, generator=generator)
    return images, images[:, :3].argmax(1)


def optimizers_of(name: str, model: nn.Module, settings: Mapping[str, Any]) -> list[Optimizer]:
    """The class on what it can train, AdamW on the rest."""
    takes = {"Muon": lambda p: p.dim() == 2, "SparseAdam": lambda p: p.shape[0] == 20}.get(name, lambda p: True)
    own = [parameter for parameter in model.parameters() if takes(parameter)]
    rest = [parameter for parameter in model.parameters() if not takes(parameter)]
    return [classes()[name](own, **settings), *([torch.optim.AdamW(rest)] if rest else [])]


def train(model: nn.Module, optimizers: Sequence[Optimizer], evolver: Evolver, steps: int) -> list[float]:
    """The loss of each step."""
    losses = []
    for _ in range(steps):
        inputs, labels = batch(model)
        evolver.observe(inputs)

        def closure(inputs: Tensor = inputs, labels: Tensor = labels) -> Tensor:
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs), labels)
            loss.backward()
            return loss.detach()

        losses += [float(optimizer.step(closure)) for optimizer in optimizers]  # type: ignore[arg-type]
    return losses


def evolve(evolver: Evolver, sizes: Mapping[str, int]) -> None:
    """An event that reaches the sizes, and keeps every parameter the object that it was."""
    before = [id(parameter) for parameter in evolver.model.parameters()]
    event = evolver.step()
    assert event.skipped is None
    assert event.sizes == sizes
    assert [id(parameter) for parameter in evolver.model.parameters()] == before
    check_fits(evolver.optimizers)


def walk(
    model: nn.Module, optimizers: Sequence[Optimizer], advance: Callable[..., list[float]] = train, steps: int = 3
) -> list[float]:
    """Shrink, grow and shrink with some steps before, between and after."""
    evolver = Evolver(model, optimizers, InTurn(*SIZES), batch(model)[0])
    losses = advance(model, optimizers, evolver, steps)
    for sizes in SIZES:
        evolve(evolver, sizes)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        losses += advance(model, optimizers, evolver, steps)
        check_fits(optimizers)
        moved = [bool((now != old).any()) for now, old in zip(model.parameters(), before, strict=True)]
        assert moved == [parameter.requires_grad for parameter in model.parameters()]
    assert torch.tensor(losses).isfinite().all()
    return losses


def test_every_optimizer_of_torch_is_tried() -> None:
    assert set(classes()) <= set(SETTINGS)
    assert len(classes()) >= len(SETTINGS) - 1, "torch 2.8 has no Muon yet"


@pytest.mark.parametrize(
    ("name", "settings"), [(name, each) for name in sorted(classes()) for each in SETTINGS.get(name, ({},))], ids=str
)
def test_every_optimizer_goes_through_shrink_grow_and_shrink(name: str, settings: dict[str, Any]) -> None:
    first: list[float] = []
    for flags in implementations(classes()[name]):
        torch.manual_seed(1)
        model = network(sparse=name == "SparseAdam")
        losses = walk(model, optimizers_of(name, model, {**settings, **flags}), steps=4)
        assert losses[-1] < losses[0]
        assert losses == pytest.approx(first or losses, rel=1e-5), f"{flags} does as the plain loop does"
        first = losses


def test_a_gradient_that_an_event_finds_goes_on_being_added_to() -> None:
    for sparse in (False, True):
        torch.manual_seed(0)
        models = [network(sparse), network(sparse)]
        models[1].load_state_dict(models[0].state_dict())
        optimizer = torch.optim.SGD(models[1].parameters(), lr=0.1)
        evolver = Evolver(models[1], optimizer, InTurn({"0": 12, "2": 10}), batch(models[1])[0])
        for half in range(2):
            inputs, labels = batch(models[0])
            evolver.observe(inputs)
            for model in models:
                nn.functional.cross_entropy(model(inputs), labels).backward()
            if not half:
                # Nothing that a growth adds is read by anybody, so the old units' gradients are those of the old model.
                evolve(evolver, {"0": 12, "2": 10})
        for narrow, wide in zip(models[0].parameters(), models[1].parameters(), strict=True):
            assert narrow.grad is not None
            assert wide.grad is not None
            assert wide.grad.is_sparse == (sparse and wide.shape[0] == 20)
            part = wide.grad.to_dense()[tuple(slice(size) for size in narrow.shape)]
            torch.testing.assert_close(part, narrow.grad.to_dense(), rtol=1e-9, atol=1e-12)
        optimizer.step()


@pytest.mark.parametrize("keep", [[0, 2, 5], [5, 0]])
@pytest.mark.parametrize("coalesced", [False, True])
def test_a_sparse_gradient_is_what_the_dense_one_would_be(keep: list[int], coalesced: bool) -> None:
    model = nn.Sequential(nn.Embedding(9, 6, sparse=True), nn.Linear(6, 2)).double()
    model(torch.tensor([1, 1, 7])).square().sum().backward()
    weight = model.get_parameter("0.weight")
    assert weight.grad is not None
    weight.grad = weight.grad.coalesce() if coalesced else weight.grad
    index_map = IndexMap.of([-1, *keep, -1], 6)
    want = index_map.apply(weight.grad.to_dense(), 1)
    resize(model, trace(model, torch.tensor([1, 2])), {"0": index_map})
    assert weight.grad.is_sparse
    assert torch.equal(weight.grad.to_dense(), want)


def groups_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The groups with identities for parameters, to be compared."""
    return [{**group, "params": [id(parameter) for parameter in group["params"]]} for group in optimizer.param_groups]


@pytest.mark.parametrize("named", [False, True])
def test_weight_decay_groups_stay_apart(named: bool) -> None:
    model = network()
    decayed = [each for each in model.named_parameters() if each[0].endswith("weight")]
    plain = [each for each in model.named_parameters() if each[0].endswith("bias")]
    groups = [{"params": decayed, "weight_decay": 0.1, "lr": 0.01}, {"params": plain, "weight_decay": 0.0, "lr": 0.02}]
    if not named:
        groups = [{**group, "params": [parameter for _, parameter in group["params"]]} for group in groups]
    optimizer = torch.optim.AdamW(groups)
    before = groups_of(optimizer)
    assert ("param_names" in before[0]) == named
    walk(model, [optimizer])
    assert groups_of(optimizer) == before


@pytest.mark.parametrize(("frozen", "free"), [("0", "2"), ("4", "0")])
def test_frozen_layers_stay_as_they_are_and_the_others_change(frozen: str, free: str) -> None:
    model = network()
    held = [*model.get_submodule(frozen).requires_grad_(False).parameters()]
    before = [parameter.detach().clone() for parameter in held]
    rest = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW([{"params": held, "weight_decay": 0.5}, {"params": rest}])
    sizes = [{free: each[free]} for each in SIZES]
    evolver = Evolver(model, optimizer, InTurn(*sizes), batch(model)[0])
    for each in sizes:
        train(model, [optimizer], evolver, 2)
        evolve(evolver, each)
    assert all(torch.equal(parameter, old) for parameter, old in zip(held, before, strict=True))
    assert not any(parameter.requires_grad for parameter in held)
    assert not any(parameter in optimizer.state or parameter.grad is not None for parameter in held)
    assert [id(parameter) for parameter in optimizer.param_groups[0]["params"]] == [id(parameter) for parameter in held]


def test_several_optimizers_of_several_kinds() -> None:
    model = network()
    parts = [list(model[place].parameters()) for place in (0, 2, 4)]
    walk(model, [torch.optim.Adam(parts[0], fused=True), torch.optim.RMSprop(parts[1]), torch.optim.LBFGS(parts[2])])


@pytest.mark.parametrize("name", ["AdamW", "LBFGS"])
def test_parameters_outside_the_model_and_outside_the_optimizer(name: str) -> None:
    model, other = network(), nn.Linear(3, 3).double()
    held = [parameter for path, parameter in model.named_parameters() if path != "2.weight"]
    optimizer = classes()[name]([*other.parameters(), *held])
    evolver = Evolver(model, optimizer, InTurn(*SIZES), batch(model)[0])
    for sizes in ({}, *SIZES):
        if sizes:
            strangers = [parameter.detach().clone() for parameter in other.parameters()]
            evolve(evolver, sizes)
            assert all(torch.equal(now, old) for now, old in zip(other.parameters(), strangers, strict=True))
            assert model.get_parameter("2.weight") not in optimizer.state
        for _ in range(3):
            inputs, labels = batch(model)
            evolver.observe(inputs)

            def closure(inputs: Tensor = inputs, labels: Tensor = labels) -> Tensor:
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(other(model(inputs)), labels)
                loss.backward()
                return loss.detach()

            assert optimizer.step(closure).isfinite()  # type: ignore[arg-type]
    # Nobody has emptied the gradient of the one that no optimizer knows: it has been added to through all events.
    grad = model.get_parameter("2.weight").grad
    assert grad is not None
    assert grad.shape == (8, 5)


class Loop:
    """A training loop with one of the usual things between backward and step."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        # A loop that keeps its losses keeps their graphs, which know the parameters of the shapes before.
        self.kept: list[Tensor] = []
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3, enabled=kind == "scaler")

    def __call__(self, model: nn.Module, optimizers: Sequence[Optimizer], evolver: Evolver, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            inputs, labels = batch(model)
            evolver.observe(inputs)
            with torch.autograd.set_detect_anomaly(self.kind == "anomaly"):
                loss = nn.functional.cross_entropy(model(inputs), labels)
                for optimizer in optimizers:
                    optimizer.zero_grad(set_to_none=self.kind != "zeros")
                self.scaler.scale(loss).backward()
            self.clip(model)
            for optimizer in optimizers:
                self.scaler.step(optimizer)
            self.scaler.update()
            self.kept.append(loss)
            losses.append(float(loss.detach()))
        return losses

    def clip(self, model: nn.Module) -> None:
        if self.kind == "norm":
            nn.utils.clip_grad_norm_(model.parameters(), 0.1, error_if_nonfinite=True)
        if self.kind == "value":
            nn.utils.clip_grad_value_(model.parameters(), 0.01)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", ["scaler", "zeros", "norm", "value", "anomaly"])
def test_what_loops_do_between_backward_and_step(kind: str, fused: bool) -> None:
    loop, model = Loop(kind), network()
    losses = walk(model, [torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)], loop, steps=4)
    assert losses[-1] < losses[0]
    if kind == "scaler":
        assert loop.scaler.get_scale() > 1024


def test_an_overflow_at_an_event_is_still_skipped_by_the_scaler() -> None:
    model = network()
    optimizer, scaler = torch.optim.AdamW(model.parameters(), fused=True), torch.amp.GradScaler("cpu", init_scale=8.0)
    evolver = Evolver(model, optimizer, InTurn(*SIZES), batch(model)[0])
    for sizes in SIZES:
        inputs, labels = batch(model)
        evolver.observe(inputs)
        optimizer.zero_grad()
        scaler.scale(nn.functional.cross_entropy(model(inputs), labels)).backward()
        bias = model.get_parameter("4.bias")
        assert bias.grad is not None
        bias.grad.fill_(float("inf"))
        evolve(evolver, sizes)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        assert all(torch.equal(now, old) for now, old in zip(model.parameters(), before, strict=True))
    assert scaler.get_scale() == 1.0


@pytest.mark.parametrize("name", ["Adam", "Rprop", "SGD"])
def test_a_learning_rate_that_is_a_tensor(name: str) -> None:
    model = network()
    rate = torch.tensor(0.01)
    optimizer = classes()[name](model.parameters(), lr=rate)
    walk(model, [optimizer])
    assert optimizer.param_groups[0]["lr"] is rate


@pytest.mark.parametrize("amsgrad", [False, True])
def test_events_under_autocast_do_as_those_outside(amsgrad: bool) -> None:
    results = []
    for kind in (False, True):
        torch.manual_seed(0)
        model = network().float()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01, amsgrad=amsgrad)
        evolver = Evolver(model, optimizer, InTurn(*SIZES), batch(model)[0].float())
        for sizes in SIZES:
            inputs, labels = batch(model)
            evolver.observe(inputs.float())
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                nn.functional.cross_entropy(model(inputs.float()), labels).backward()
            optimizer.step()
            with torch.autocast("cpu", torch.bfloat16, enabled=kind):
                evolve(evolver, sizes)
        results.append([parameter.detach() for parameter in model.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))

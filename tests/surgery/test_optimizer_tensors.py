"""Optimizers with copies of the weights, other optimizers or tensors of their own, against fresh ones set by hand."""

# nn.Module types its children and attributes loosely, and optimizers are written here as people write them.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false
from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import evolvenet
from evolvenet.engine.functional import commit
from evolvenet.engine.snapshot import Snapshot
from evolvenet.errors import OptimizerStateError
from evolvenet.graph.index_map import IndexMap
from evolvenet.measurement.activation_moments import collect
from evolvenet.pruning.selection import plan_prune
from evolvenet.surgery.optimizer_state import check_optimizers
from evolvenet.surgery.optimizer_state_rules import is_weights
from evolvenet.surgery.optimizer_tensors import with_inner
from evolvenet.surgery.resize_model import compile_surgery
from tests.helpers.policies import InTurn
from tests.helpers.stages import failing
from tests.helpers.wrapping_optimizers import WRAPPING, Curvatures, Flat, Master, Unordered

WEIGHTS = {"copy", "z", "weight_average", "old_p", "slow", "slow_weights", "masters"}
"""Keys and attributes whose tensors are other versions of the weights, in the optimizers above."""
X = torch.randn(64, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def network(hidden: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, hidden), nn.Tanh(), nn.Linear(hidden, 6), nn.Tanh(), nn.Linear(6, 2)).double()


def train(model: nn.Module, optimizer: Optimizer, steps: int, factor: float = 1.0) -> None:
    def closure() -> Tensor:
        model.zero_grad()
        with torch.enable_grad():
            loss = (model(X) - X[:, :2].sin()).square().mean() * factor
            loss.backward()
        return loss.detach()

    for _ in range(steps):
        closure()
        optimizer.step(closure)


def kept_tensors(optimizer: Optimizer, index: int, parameter: Tensor) -> Iterator[tuple[str, Any, Any, Any]]:
    """(key, container, place in it, tensor) of all that an optimizer keeps of its parameter at this index."""
    for each in with_inner([optimizer]):
        own = [p for group in each.param_groups for p in group["params"]]
        for key, entry in list(each.state.get(own[index], {}).items()):
            yield key, each.state[own[index]], key, entry
    held = vars(optimizer)
    for table in [held.get("slow_weights", [None])[0], held.get("masters")]:
        if table is not None:
            yield "slow_weights" if "slow_weights" in held else "masters", table, index, table[index]
    if "hess" in vars(parameter):
        yield "hess", vars(parameter), "hess", vars(parameter)["hess"]
        yield "hess_step", vars(parameter), "hess_step", vars(parameter)["hess_step"]
    if "fast" in held:
        yield "fast", held["fast"], id(parameter), held["fast"][id(parameter)]
        yield "m", held["slow"][index], "m", held["slow"][index]["m"]
        yield "steps", held["slow"][index], "steps", held["slow"][index]["steps"]


def by_hand(key: str, entry: Tensor, old: Tensor, new: Tensor, dims: list[int], index_map: IndexMap) -> Tensor:
    """The entry after a change, unit by unit: weights keep their distance, new ones have none; means and zeros else."""
    if entry.dim() == 0:
        return entry.clone()
    weights = key in WEIGHTS
    values = entry - old if weights else entry
    for dim in dims:
        kept = [values.select(dim, unit) for unit in index_map.indices if unit >= 0]
        second = not weights and not bool((values < 0).any())
        start = torch.stack(kept).mean(0) if second else torch.zeros_like(kept[0])
        values = torch.stack([values.select(dim, unit) if unit >= 0 else start for unit in index_map.indices], dim)
    return new.to(entry.dtype) + values if weights else values


def fill(optimizer: Optimizer, other: Optimizer, changed: dict[int, list[int]], index_map: IndexMap) -> None:
    """Give a fresh optimizer what the other one keeps, mapped by hand."""
    old, new = ([p for group in each.param_groups for p in group["params"]] for each in (other, optimizer))
    for index, (before, after) in enumerate(zip(old, new, strict=True)):
        theirs, ours = (list(kept_tensors(o, index, p)) for o, p in ((other, before), (optimizer, after)))
        for (key, _, _, entry), (same, container, place, fresh) in zip(theirs, ours, strict=True):
            assert key == same
            made = entry
            if isinstance(entry, Tensor):
                dims = changed.get(index, [])
                made = by_hand(key, entry.detach(), before.detach(), after.detach(), dims, index_map)
            if isinstance(fresh, Tensor) and fresh.requires_grad:
                fresh.data = made.clone()
            else:
                container[place] = made


@pytest.mark.parametrize("name", [name for name in WRAPPING if name != "flat"])
@pytest.mark.parametrize("indices", [[0, 2, 3, 6, 7], [0, 1, 2, 3, 4, 5, 6, 7, -1, -1, -1], [5, -1, 3, 3, 0]])
def test_training_goes_on_as_with_a_fresh_network_and_state_set_by_hand(name: str, indices: list[int]) -> None:
    index_map = IndexMap.of(indices, size=8)
    model, old_model, fresh = network(), network(), network(len(indices))
    optimizer, old, other = (WRAPPING[name](each.parameters()) for each in (model, old_model, fresh))
    # The fresh optimizer has state after its first step alone; then all of it is replaced.
    for pair in ((model, optimizer), (old_model, old), (fresh, other)):
        train(*pair, 3)
    surgery = compile_surgery(model, evolvenet.trace(model, X[:2]), {"0": index_map})
    for change in surgery.changes:
        for dim in change.axes:
            for unit in index_map.new_units:
                change.value.select(dim, unit).normal_()
    commit(model, surgery, optimizer)
    with torch.no_grad():
        for p, value in zip(fresh.parameters(), model.parameters(), strict=True):
            p.copy_(value)
    fill(other, old, {0: [0], 1: [0], 2: [1]}, index_map)
    train(model, optimizer, 4)
    train(fresh, other, 4)
    for (label, one), two in zip(model.named_parameters(), fresh.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-12, msg=lambda text, label=label: f"{label}: {text}")


def test_a_flat_tensor_is_that_of_the_parameters_one_by_one() -> None:
    model, same = network(), network()
    flat, apart = Flat(model.parameters()), torch.optim.SGD(same.parameters(), lr=0.05, momentum=0.9)
    for steps, indices in ((3, [0, 2, 3, 6, 7]), (2, [0, 1, -1, 2, 3, 4, -1]), (2, [1, 1, 5])):
        train(model, flat, steps)
        train(same, apart, steps)
        for net, optimizer in ((model, flat), (same, apart)):
            index_map = {"0": IndexMap.of(indices, size=net[0].out_features)}
            evolvenet.resize(net, evolvenet.trace(net, X[:2]), index_map, optimizer)
    train(model, flat, 2)
    train(same, apart, 2)
    for one, two in zip(model.parameters(), same.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["master", "outer masters", "lookahead", "averaging"])
def test_a_reconstruction_reaches_the_copies(name: str) -> None:
    model = network(32)
    optimizer = WRAPPING[name](model.parameters())
    train(model, optimizer, 2)
    distance = copies_of(optimizer)[2] - model[2].weight.detach()
    graph = evolvenet.trace(model, X[:2])
    kept = plan_prune(model, graph, {"0": 4}, collect(model, graph, [X])).maps["0"].indices
    before = model[2].weight.detach().clone()
    evolvenet.prune(model, graph, {"0": 4}, batches=[X], optimizers=optimizer)
    assert not torch.allclose(model[2].weight.detach(), before[:, list(kept)])
    after = copies_of(optimizer)[2] - model[2].weight.detach()
    torch.testing.assert_close(after, distance[:, list(kept)], rtol=0, atol=1e-12)
    if name != "averaging":
        outputs = model(X).detach()
        for group in (group for each in with_inner([optimizer]) for group in each.param_groups):
            group["lr"] = 0.0
        train(model, optimizer, 1)
        torch.testing.assert_close(model(X).detach(), outputs, rtol=0, atol=1e-12)


def copies_of(optimizer: Optimizer) -> list[Tensor]:
    """Of each parameter, the copy of it that the optimizer keeps."""
    every = [p for group in optimizer.param_groups for p in group["params"]]
    found = [{k: e for k, _, _, e in kept_tensors(optimizer, i, p)} for i, p in enumerate(every)]
    return [next(entry for key, entry in each.items() if key in WEIGHTS).detach().clone() for each in found]


@pytest.mark.parametrize("name", WRAPPING)
def test_an_event_that_fails_leaves_all_as_it_was(name: str) -> None:
    def run(fails: bool) -> list[Tensor]:
        model = network()
        optimizer = WRAPPING[name](model.parameters())
        train(model, optimizer, 3)
        graph = evolvenet.trace(model, X[:2])
        if fails:
            with failing("optimizer state check", at=2), pytest.raises(ZeroDivisionError):
                evolvenet.prune(model, graph, {"0": 4}, [X], optimizer)
        train(model, optimizer, 3)
        return [p.detach() for p in model.parameters()]

    for one, two in zip(run(False), run(True), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("name", WRAPPING)
def test_a_cut_that_is_taken_back_takes_back_all_that_optimizers_keep(name: str) -> None:
    """From the snapshot itself, and from what a checkpoint keeps of it."""

    def run(cut: bool, resume: bool = False) -> list[Tensor]:
        model = network()
        optimizer = WRAPPING[name](model.parameters())
        train(model, optimizer, 3)
        graph = evolvenet.trace(model, X[:2])
        if cut:
            past = Snapshot.of(model, graph, [optimizer])
            evolvenet.prune(model, graph, {"0": 4}, [X], optimizer)
            train(model, optimizer, 2)
            if resume:
                past = Snapshot.from_state_dict(deepcopy(past.state_dict()))
            past.restore(model, [optimizer])
        for each in (optimizer,):
            vars(each).update({"count": 3} if "count" in vars(each) else {})
        steps_on_parameters(model, 3)
        for group in optimizer.param_groups:
            group.update({"k": 3} if "k" in group else {})
        train(model, optimizer, 3)
        return [p.detach() for p in model.parameters()]

    expected = run(cut=False)
    for resume in (False, True):
        for one, two in zip(run(True, resume), expected, strict=True):
            assert torch.equal(one, two)


def steps_on_parameters(model: nn.Module, steps: int) -> None:
    for parameter in model.parameters():
        if "hess_step" in vars(parameter):
            vars(parameter)["hess_step"] = steps


@pytest.mark.parametrize("name", WRAPPING)
def test_events_of_a_run_succeed_and_training_goes_on(name: str) -> None:
    model = network(24)
    optimizer = WRAPPING[name](model.parameters())
    evolver = evolvenet.Evolver(model, optimizer, InTurn({"0": 9}, {"0": 14, "2": 8}, {"2": 3}), X[:2])
    assert evolver.off is None
    for _ in range(3):
        evolver.observe(X)
        train(model, optimizer, 2)
        assert evolver.step().skipped is None
    train(model, optimizer, 2)
    assert evolver.graph.sizes == {"0": 14, "2": 3}
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (Curvatures, r"Curvatures\.factors\[Sequential\]: expected .* got tensors by module"),
        (
            lambda model: Unordered(model.parameters()),
            r"Unordered\.buffers\[0\]: expected .* got a tensor of shape \(2,\)",
        ),
        (
            lambda model: torch.optim.Adam([p.detach().clone().requires_grad_() for p in model.parameters()]),
            "Adam: expected the model's parameters, got copies of them",
        ),
    ],
)
def test_what_cannot_follow_is_named_before_training_and_all_widths_stay(
    make: Callable[[nn.Module], Optimizer], named: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = network()
    optimizer = make(model)
    with pytest.raises(OptimizerStateError, match=named):
        check_optimizers([optimizer], dict(model.named_parameters()))
    with caplog.at_level("WARNING", logger="evolvenet"):
        evolver = evolvenet.Evolver(model, optimizer, InTurn({"0": 3}), X[:2])
    assert any(re.search(named, record.message) for record in caplog.records)
    assert evolver.off is not None
    evolver.observe(X)
    assert evolver.step().skipped == evolver.off
    assert evolver.graph.sizes["0"] == 8


def test_a_momentum_is_no_copy_of_the_weights_and_zeros_tell_nothing() -> None:
    torch.manual_seed(0)
    weights = [torch.randn(20, 10), torch.zeros(20)]
    noise = [torch.randn(20, 10), torch.randn(20)]
    for scale in (1e-3, 0.1, 1.0, 10.0):
        assert not is_weights("anything", [(scale * n, w) for n, w in zip(noise, weights, strict=True)])
    assert not is_weights("anything", [(torch.zeros_like(w), w) for w in weights])
    assert not is_weights("anything", [(torch.zeros(3), torch.zeros(3))])
    near = [(w + 0.1 * n, w) for n, w in zip(noise, weights, strict=True)]
    assert is_weights("anything", near)
    far = [(w + 0.6 * n, w) for n, w in zip(noise[:1], weights[:1], strict=True)]
    assert is_weights("z", far)
    assert not is_weights("anything", far)
    assert is_weights("p0", [(noise[0], weights[0])])
    assert not is_weights("momentum_buffer", near), "torch's own keys have rules of their own"


def test_optimizers_in_lists_and_dicts_of_others_are_found_once() -> None:
    model = network()
    outer, inner, innermost = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(3))
    outer.parts = {"a": [inner, inner]}
    inner.base = innermost
    innermost.parent = outer
    assert with_inner([outer, inner]) == [outer, inner, innermost]


def test_a_copy_in_float32_takes_what_bfloat16_weights_get() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 3)).bfloat16()
    x = torch.randn(512, 8).bfloat16()
    optimizer = Master(model.parameters(), lr=1e-3, dtype=torch.float32)

    def step() -> None:
        model.zero_grad()
        model(x).float().square().mean().backward()
        optimizer.step()

    step()
    graph = evolvenet.prune(model, evolvenet.trace(model, x[:2]), {"0": 16}, [x], optimizer)
    evolvenet.grow(model, graph, {"0": 24}, optimizers=optimizer)
    assert {state["copy"].dtype for state in optimizer.state.values()} == {torch.float32}
    optimizer.param_groups[0]["lr"] = 0.0
    before = [p.detach().float() for p in model.parameters()]
    step()
    for p, old in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach().float(), old, rtol=0, atol=2**-8 * float(old.abs().max()))
    assert torch.equal(optimizer.state[model[0].weight]["copy"][16:].bfloat16(), model[0].weight[16:])

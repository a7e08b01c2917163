"""Training after a change of widths: the optimizer state is that of a network which had these widths from the start."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

import evolvenet
from evolvenet import IndexMap
from evolvenet.surgery.optimizer_state import apply_state, compile_state, validate_state
from tests.helpers.optimizer_cases import LR, OPTIMIZERS, Swap
from tests.helpers.states import zero_units

BOUND = 1.5
STEADY = [name for name in OPTIMIZERS if name != "sparse adam" and not name.startswith("rprop")]
"""Without Rprop, whose step sizes adapt: a learning rate of 0 does not keep a weight constant, and those of new units, the
learning rate, may be far from those of the kept units by then."""


def sgd(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)]


def adamw(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)]


def muon(model: nn.Module) -> list[Optimizer]:
    """Muon for the matrices, AdamW for the rest."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    rest = [parameter for parameter in model.parameters() if parameter.dim() != 2]
    return [torch.optim.Muon(matrices, lr=3e-3, weight_decay=0.0), torch.optim.AdamW(rest, lr=3e-3, weight_decay=0.0)]


OPTIMIZER_SETS = {"sgd": sgd, "adamw": adamw, **({"muon": muon} if hasattr(torch.optim, "Muon") else {})}


def batch(seed: int, *shape: int) -> tuple[Tensor, Tensor]:
    """Random inputs, and labels that a linear map of them gives."""
    images = torch.randn(32, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    teacher = torch.randn(images[0].numel(), 5, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    return images, (images.flatten(1) @ teacher).argmax(1)


def train(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    steps: range,
    shape: Sequence[int],
    after: Callable[[dict[str, Tensor]], None] | None = None,
) -> list[float]:
    """The loss of each step; `after` gets what the step added to each parameter."""
    losses = []
    for seed in steps:
        images, labels = batch(seed, *shape)
        loss = F.cross_entropy(model(images), labels)
        model.zero_grad()
        loss.backward()
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        for optimizer in optimizers:
            optimizer.step()
        if after:
            after({name: parameter.detach() - before[name] for name, parameter in model.named_parameters()})
        losses.append(float(loss.detach()))
    return losses


def convolutional() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(2, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 6, 3, stride=2, bias=False), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(6 * 4, 12), nn.ReLU(), nn.Linear(12, 5)),
    ).double()


def dense() -> nn.Module:
    # No matrix is taller than wide, before or after: Muon's learning rate depends on that.
    return nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 9), nn.Tanh(), nn.Linear(9, 5)).double()


@pytest.mark.parametrize("how", ["resize", "prune", "prune with batches"])
@pytest.mark.parametrize("name", OPTIMIZER_SETS)
def test_after_a_cut_of_dead_units_training_goes_on_as_if_uncut(name: str, how: str) -> None:
    model, shape = (dense(), (20,)) if name == "muon" else (convolutional(), (2, 6, 6))
    graph = evolvenet.trace(model, batch(0, *shape)[0][:1])
    maps = {width.name: IndexMap.keep(range(1, width.size - 1), width.size) for width in graph.resizable}
    zero_units(model, graph, maps)
    optimizers = OPTIMIZER_SETS[name](model)
    train(model, optimizers, range(8), shape)
    cut, carried = deepcopy((model, optimizers))
    if how == "resize":
        evolvenet.resize(cut, graph, maps, optimizers=carried)
    else:
        inputs = [batch(seed, *shape)[0] for seed in range(3)] if "batches" in how else None
        sizes = {width: index_map.new_size for width, index_map in maps.items()}
        evolvenet.prune(cut, graph, sizes, batches=inputs, optimizers=carried)
    assert sum(p.numel() for p in cut.parameters()) < sum(p.numel() for p in model.parameters())
    whole, rest = (train(*run, range(8, 20), shape) for run in ((model, optimizers), (cut, carried)))
    # Muon itself rounds to bfloat16.
    assert rest == pytest.approx(whole, rel=1e-3 if name == "muon" else 1e-10, abs=0)
    reset = train(*fresh(cut, name), range(20, 24), shape)
    assert reset[1:] != pytest.approx(train(cut, carried, range(20, 24), shape)[1:], rel=1e-3), "the state matters here"


def fresh(model: nn.Module, name: str) -> tuple[nn.Module, list[Optimizer]]:
    again = deepcopy(model)
    return again, OPTIMIZER_SETS[name](again)


class Dependent:
    """Two dense layers, wide and cut, where a removed unit is a multiple of a kept one; the cut network has been refitted.

    Both compute the same at every step: the narrow consumer is W' = W_kept + W_removed·M along the wide one's whole path.
    The producers have a learning rate of 0, since the units would not stay dependent otherwise.
    """

    matrix = torch.tensor([[2.0, 0, 0, 0], [0, 0.5, 0, 0]], dtype=torch.float64)
    keep = IndexMap.keep(range(4), 6)

    def __init__(self, make: Callable[..., Optimizer], biases: bool) -> None:
        rows = torch.randn(4, 5, dtype=torch.float64)
        self.wide = [nn.Parameter(torch.cat([rows, self.matrix @ rows])), nn.Parameter(torch.randn(3, 6).double())]
        self.narrow = [nn.Parameter(rows.clone()), nn.Parameter(self.refitted())]
        if biases:
            values = torch.randn(4, dtype=torch.float64)
            self.wide.append(nn.Parameter(torch.cat([values, self.matrix @ values])))
            self.narrow.append(nn.Parameter(values.clone()))
        self.optimizers = [
            make([{"params": [each[0], *each[2:]], "lr": 0.0}, {"params": [each[1]]}], lr=LR)
            for each in (self.wide, self.narrow)
        ]

    def refitted(self) -> Tensor:
        consumer = self.wide[1].detach()
        return consumer[:, :4] + consumer[:, 4:] @ self.matrix

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.narrow[1].data = self.refitted()
            images, expected = torch.randn(16, 5, dtype=torch.float64), torch.randn(16, 3, dtype=torch.float64)
            losses = [
                (F.linear(F.linear(images, each[0], *each[2:]).relu(), each[1]) - expected).square().mean()
                for each in (self.wide, self.narrow)
            ]
            torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
            for loss, optimizer in zip(losses, self.optimizers, strict=True):
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()


@pytest.mark.parametrize("name", STEADY)
def test_state_of_a_refitted_consumer_is_the_slice_and_no_linear_map_of_it(name: str) -> None:
    both = Dependent(OPTIMIZERS[name], biases=name != "muon")
    both.train(6)
    wide, narrow = both.optimizers
    change = Swap(both.wide[1], "consumer", {1: both.keep}, both.refitted())
    carried, expected = compile_state(wide, [change]).states.get(both.wide[1], {}), narrow.state[both.narrow[1]]
    assert list(carried) == list(expected)
    for key, entry in expected.items():
        # Adafactor's mean is over the removed columns too; ASGD's average is one of weights, not of gradients.
        if key not in ("row_var", "ax"):
            torch.testing.assert_close(carried[key], entry, rtol=1e-9, atol=0)
    for key in {"exp_avg", "momentum_buffer"} & carried.keys():
        old = wide.state[both.wide[1]][key]
        twice = old[:, :4] + old[:, 4:] @ both.matrix
        assert (twice - expected[key]).norm() > 0.1 * expected[key].norm(), (
            "mapped as the weights are, it would be counted twice"
        )


@pytest.mark.parametrize("name", ["sgd momentum", "adamw"])
def test_state_of_a_producer_is_sliced_though_its_gradient_then_includes_the_removed_units(name: str) -> None:
    both = Dependent(OPTIMIZERS[name], biases=True)
    both.train(6)
    key = "exp_avg" if name == "adamw" else "momentum_buffer"
    for wide, narrow in zip(both.wide, both.narrow, strict=True):
        if wide is both.wide[1]:
            continue
        old, expected = both.optimizers[0].state[wide][key], both.optimizers[1].state[narrow][key]
        torch.testing.assert_close(old[:4] + both.matrix.T @ old[4:], expected, rtol=1e-9, atol=1e-12)
        change = Swap(wide, "producer", {0: both.keep}, narrow.detach())
        assert torch.equal(compile_state(both.optimizers[0], [change]).states[wide][key], old[:4])


ADAMS = ["adam", "adam amsgrad foreach", "adam amsgrad fused", "adamw", "adamw fused"]
CUTS = {
    "refitted": (Dependent.keep, 0.1, 10),
    "bias refitted": (None, 0.1, 10),
    "cut and grown, refitted": (IndexMap.of([0, 1, -1, 3], 6), 0.1, 10),
    "bare": (Dependent.keep, 0.0, 25),
    "grown": (IndexMap.grow(6, 2), 0.0, 25),
    "unit split": (IndexMap.of([*range(6), 0], 6), 0.1, 25),
}
"""Map of the consumer's columns (None: they stay, another tensor is cut), shift of the kept ones, Adam's step count then."""


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", ADAMS)
def test_adam_keeps_its_estimates_and_reduces_its_step_count_after_a_refitted_cut(name: str, cut: str) -> None:
    index_map, shift, steps = CUTS[cut]
    consumer, producer, apart = (nn.Parameter(torch.randn(*shape)) for shape in ((3, 6), (6, 4), (2, 2)))
    optimizer = OPTIMIZERS[name]([consumer, producer, apart], lr=LR)
    advance(optimizer, [consumer, producer, apart], 25)
    axes = {} if index_map is None else {1: index_map}
    rows = {0: index_map or Dependent.keep}
    value = shift + (consumer.detach() if index_map is None else index_map.apply(consumer.detach(), 1))
    changes = [
        Swap(consumer, "consumer", axes, value),
        Swap(producer, "producer", rows, rows[0].apply(producer.detach(), 0)),
    ]
    plan = compile_state(optimizer, changes)
    assert apart not in plan.states
    for change, dim in zip(changes, (1, 0), strict=True):
        after, before = plan.states[change.tensor], optimizer.state[change.tensor]
        assert (float(after["step"]), float(before["step"])) == (steps, 25)
        for key, beta in (("exp_avg", 0.9), ("exp_avg_sq", 0.999), ("max_exp_avg_sq", 0.999)):
            if key in before:
                old = before[key]
                for each in change.axes.values():
                    old = each.apply(old, dim)
                found, expected = (entry / (1 - beta**count) for entry, count in ((after[key], steps), (old, 25)))
                torch.testing.assert_close(found[expected != 0], expected[expected != 0], rtol=1e-5, atol=0)


def advance(optimizer: Optimizer, parameters: Sequence[nn.Parameter], steps: int, scale: float = 1.0) -> Tensor:
    """Steps on random gradients of a scale; mean |update| of the first parameter in the last of them."""
    before = parameters[0].detach()
    for _ in range(steps):
        before = parameters[0].detach().clone()
        for parameter in parameters:
            parameter.grad = scale * torch.randn_like(parameter)
        optimizer.step()
    return (parameters[0].detach() - before).abs().mean()


def test_a_step_count_below_the_memory_of_adam_stays() -> None:
    weight = nn.Parameter(torch.randn(3, 6))
    optimizer = torch.optim.Adam([weight], lr=LR)
    advance(optimizer, [weight], 8)
    value = Dependent.keep.apply(weight.detach(), 1) + 0.1
    after = compile_state(optimizer, [Swap(weight, "consumer", {1: Dependent.keep}, value)]).states[weight]
    assert float(after["step"]) == 8
    assert torch.equal(after["exp_avg_sq"], optimizer.state[weight]["exp_avg_sq"][:, :4])


@pytest.mark.parametrize(("shift", "low", "high"), [(0.1, 0.8, 1.25), (0.0, 1.5, 5.0)])
def test_after_a_refitted_cut_adam_soon_adapts_to_larger_gradients(shift: float, low: float, high: float) -> None:
    weight = nn.Parameter(torch.randn(20, 60))
    optimizer = torch.optim.Adam([weight], lr=LR)
    usual = advance(optimizer, [weight], 300)
    keep = IndexMap.keep(range(40), 60)
    plan = compile_state(optimizer, [Swap(weight, "w", {1: keep}, value := keep.apply(weight.detach(), 1) + shift)])
    weight.grad, weight.data = None, value
    apply_state(plan)
    validate_state(optimizer)
    assert low < advance(optimizer, [weight], 40, scale=3.0) / usual < high


@pytest.mark.parametrize(("batches", "steps"), [(True, 10), (False, 30)])
def test_pruning_a_trained_network_with_batches_is_a_refitted_cut(batches: bool, steps: int) -> None:
    model = dense()
    optimizers = adamw(model)
    train(model, optimizers, range(30), (20,))
    inputs = [batch(seed, 20)[0] for seed in range(3)] if batches else None
    evolvenet.prune(model, evolvenet.trace(model, batch(0, 20)[0]), {"0": 12}, batches=inputs, optimizers=optimizers)
    assert float(optimizers[0].state[model.get_parameter("2.weight")]["step"]) == steps
    train(model, optimizers, range(30, 33), (20,))


def test_an_average_of_weights_moves_with_its_refitted_weight() -> None:
    weight = nn.Parameter(torch.randn(3, 6, dtype=torch.float64))
    optimizer = torch.optim.ASGD([weight], lr=LR, t0=2)
    for _ in range(5):
        weight.grad = torch.randn_like(weight)
        optimizer.step()
    keep, shift = IndexMap.of([0, 1, -1, 3], 6), torch.randn(3, 4, dtype=torch.float64)
    old = optimizer.state[weight]["ax"]
    assert not torch.equal(old, weight.detach())
    value = keep.apply(weight.detach(), 1) + shift
    carried = compile_state(optimizer, [Swap(weight, "consumer", {1: keep}, value)]).states[weight]["ax"]
    kept = [0, 1, 3]
    torch.testing.assert_close(carried[:, kept], old[:, kept] + shift[:, kept])
    assert torch.equal(carried[:, 2], value[:, 2])


@pytest.mark.parametrize("drift", [0.0, 0.5])
@pytest.mark.parametrize("name", STEADY)
def test_new_units_with_gradients_like_the_kept_units_never_move_much_further(name: str, drift: float) -> None:
    always = drift * torch.randn(32, 60, dtype=torch.float64)
    weight = nn.Parameter(torch.randn(24, 60, dtype=torch.float64))
    optimizer = OPTIMIZERS[name]([weight], lr=LR)

    def step() -> Tensor:
        before = weight.detach().clone()
        weight.grad = torch.randn_like(weight) + always[: len(weight)]
        optimizer.step()
        return (weight.detach() - before).abs()

    for _ in range(60):
        step()
    grow = IndexMap.grow(24, 8)
    plan = compile_state(optimizer, [Swap(weight, "w", {0: grow}, value := grow.apply(weight.detach(), 0))])
    weight.grad, weight.data = None, value
    apply_state(plan)
    validate_state(optimizer)
    for _ in range(20):
        size = step()
        assert size[24:].mean() <= BOUND * size[:24].mean()


@pytest.mark.parametrize("name", OPTIMIZER_SETS)
def test_new_units_of_a_growing_network_never_move_much_further_than_kept_units(name: str) -> None:
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 5)).double()
    optimizers = OPTIMIZER_SETS[name](model)
    train(model, optimizers, range(60), (20,))
    shapes = {key: parameter.shape for key, parameter in model.named_parameters()}
    graph = evolvenet.trace(model, batch(0, 20)[0])
    evolvenet.grow(model, graph, {width: size * 3 // 2 for width, size in graph.sizes.items()}, optimizers=optimizers)
    ratios: dict[tuple[str, int], list[float]] = {}

    def record_ratios(updates: dict[str, Tensor]) -> None:
        for key, old in shapes.items():
            size = updates[key].abs()
            level = size[tuple(slice(count) for count in old)].mean()
            for dim, count in enumerate(old):
                if size.shape[dim] > count:
                    new_units = size.narrow(dim, count, size.shape[dim] - count)
                    ratios.setdefault((key, dim), []).append(float(new_units.mean() / level))

    train(model, optimizers, range(60, 90), (20,), record_ratios)
    assert {key for key, _ in ratios} == set(shapes) - {"4.bias"}
    assert max(max(found) for found in ratios.values()) <= BOUND
    assert all(max(found) > 0.01 for found in ratios.values()), "and they are trained"

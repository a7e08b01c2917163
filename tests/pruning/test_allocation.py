"""Sizes for a number of parameters, against every combination there is and against cuts that were made."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import evolvenet
from evolvenet.errors import PolicyError, ResizeError, TraceError
from evolvenet.graph.restriction import freeze
from evolvenet.pruning.allocation import allocate, allocate_by, energy_curve
from evolvenet.pruning.marginal_analysis import convex, fit_to_cost, loss_at
from evolvenet.pruning.trials import Curve, smallest, trial_curves
from evolvenet.tracing.trace import trace
from tests.helpers.cases import CASES, FLOAT, Case, distance, graph_of, outputs
from tests.helpers.factorized import mixed_chain, seeded
from tests.helpers.small_models import mlp
from tests.helpers.states import State


def net(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).double()


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("share", [0.9, 0.6])
def test_the_sizes_fit_and_can_be_pruned_to(case: Case, share: float) -> None:
    model, graph = case.model(), graph_of(case)
    least = graph.proposed_parameters({width.name: smallest(width) for width in graph.resizable})
    wanted = max(least, int(share * graph.parameters))
    sizes = evolvenet.allocate(model, graph, wanted)
    after = evolvenet.prune(model, graph, sizes)
    assert after.parameters == graph.proposed_parameters(sizes) <= wanted
    assert set(sizes) == set(graph.sizes)


@given(st.lists(st.floats(0, 5), min_size=4, max_size=4), st.integers(20, 60), st.integers(0, 99))
def test_no_combination_of_convex_curves_does_much_better(rates: list[float], wanted: int, seed: int) -> None:
    """Greedy is the best there is but for what the last units make: a bound, not equality."""
    graph = trace(net(3, 5, 4, 2), torch.zeros(1, 3, dtype=FLOAT))
    curves = {
        name: [(size, (1 + rate) * (graph.sizes[name] - size) ** 2) for size in range(graph.sizes[name] + 1)]
        for name, rate in zip(graph.sizes, rates, strict=False)
    }

    def loss(sizes: dict[str, int]) -> float:
        return sum(loss_at(curves[name], size) for name, size in sizes.items())

    every = [
        dict(zip(graph.sizes, each, strict=True)) for each in product(*(range(1, n + 1) for n in graph.sizes.values()))
    ]
    fitting = [sizes for sizes in every if graph.proposed_parameters(sizes) <= wanted]
    found = allocate_by(graph, curves, wanted)
    assert graph.proposed_parameters(found) <= wanted
    # One unit more of any width is what the greedy way may be off by.
    slack = (
        max(loss({**found, name: size - 1}) - loss(found) for name, size in found.items() if size > 1)
        if any(size > 1 for size in found.values())
        else 0.0
    )
    assert loss(found) <= min(map(loss, fitting)) + slack + 1e-9


def units(sizes: Mapping[str, int]) -> float:
    return sum(sizes.values())


def weighted(sizes: Mapping[str, int]) -> float:
    return sum(count * size for count, size in zip((5, 2, 1), sizes.values(), strict=False))


def chain(sizes: Mapping[str, int]) -> float:
    """Weights of linear layers one after the other, with 3 inputs and 2 outputs."""
    each = [3, *sizes.values(), 2]
    return sum(before * after for before, after in pairwise(each))


LINEAR = [(0, 6.0), (6, 0.0)]
GENTLE = [(0, 1.0), (2, 0.5), (6, 0.0)]
STEEP = [(0, 9.0), (1, 4.0), (2, 2.0), (4, 0.5), (6, 0.0)]
SPARE = [(0, 7.0), (3, 0.0), (6, 0.0)]
GROWS = [(0, 8.0), (2, 2.0), (4, 0.0), (6, -0.5)]
ALL, EVEN, FEW = range(1, 7), (2, 4, 6), (4, 5, 6)


@pytest.mark.parametrize("cost", [units, weighted, chain])
@pytest.mark.parametrize("share", [0.95, 0.75, 0.5, 0.3])
@pytest.mark.parametrize(
    ("curves", "options", "start"),
    [
        ((LINEAR, STEEP), (ALL, ALL), (6, 6)),
        ((SPARE, STEEP), (ALL, ALL), (6, 6)),
        ((STEEP, LINEAR), (EVEN, ALL), (6, 6)),
        ((GROWS, LINEAR), (ALL, ALL), (4, 6)),
        ((GROWS, GROWS), (EVEN, ALL), (4, 4)),
        ((GROWS, STEEP), (ALL, FEW), (5, 5)),
        ((LINEAR, GENTLE), (ALL, ALL), (1, 1)),
        ((GENTLE, LINEAR, GENTLE), (ALL, ALL, EVEN), (1, 1, 2)),
        ((LINEAR, STEEP, SPARE), (ALL, ALL, ALL), (6, 6, 6)),
        ((SPARE, GROWS, LINEAR), (EVEN, ALL, FEW), (6, 4, 6)),
        ((STEEP, STEEP, STEEP), (ALL, EVEN, ALL), (6, 6, 6)),
        ((LINEAR, LINEAR, LINEAR), (ALL, ALL, ALL), (6, 6, 6)),
    ],
)
def test_the_greedy_sizes_lose_at_most_one_unit_more_than_the_best_of_all_sizes(
    curves: Sequence[Curve],
    options: Sequence[Sequence[int]],
    start: Sequence[int],
    share: float,
    cost: Callable[[Mapping[str, int]], float],
) -> None:
    names = "abc"[: len(curves)]
    of, may = dict(zip(names, curves, strict=True)), dict(zip(names, options, strict=True))

    def loss(sizes: Mapping[str, int]) -> float:
        return sum(loss_at(of[name], size) for name, size in sizes.items())

    every = [dict(zip(names, each, strict=True)) for each in product(*options)]
    least, most = cost(every[0]), cost(every[-1])
    limit = least + share * (most - least)
    found = fit_to_cost(of, may, dict(zip(names, start, strict=True)), cost, limit)
    assert found in every
    assert cost(found) <= limit
    above = {name: min((each for each in may[name] if each > size), default=None) for name, size in found.items()}
    assert all(cost({**found, name: size}) > limit for name, size in above.items() if size), "what fits is left free"
    below = {name: max((each for each in may[name] if each < size), default=size) for name, size in found.items()}
    one_unit = max(loss({**found, name: size}) - loss(found) for name, size in below.items())
    best = min(loss(sizes) for sizes in every if cost(sizes) <= limit)
    assert loss(found) <= best + one_unit + 1e-9


def test_where_nothing_fits_every_width_takes_its_smallest_option() -> None:
    curves = {"a": LINEAR, "b": STEEP}
    assert fit_to_cost(curves, {"a": ALL, "b": EVEN}, {"a": 6, "b": 6}, units, 2) == {"a": 1, "b": 2}


def test_what_saves_nothing_for_a_loss_is_kept_and_what_is_free_goes() -> None:
    graph = trace(net(8, 8, 8, 2), torch.zeros(1, 8, dtype=FLOAT))
    curves = {"0": [(0, 8.0), (8, 0.0)], "2": [(0, 1.0), (4, 0.0), (8, 0.0)]}
    assert allocate_by(graph, curves, 130) == {"0": 8, "2": 5}
    assert allocate_by(graph, curves, graph.parameters) == graph.sizes


def test_the_last_cut_takes_no_more_than_it_must() -> None:
    """A wide layer loses several units at once, but for the last ones."""
    graph = trace(net(4, 200, 2), torch.zeros(1, 4, dtype=FLOAT))
    curves = {"0": [(0, 1.0), (200, 0.0)]}
    for wanted in range(graph.parameters - 40, graph.parameters, 3):
        (size,) = allocate_by(graph, curves, wanted).values()
        assert graph.proposed_parameters({"0": size}) <= wanted < graph.proposed_parameters({"0": size + 1})


def test_fewer_parameters_than_possible_are_refused_with_the_fewest() -> None:
    model = net(8, 8, 2)
    graph = trace(model, torch.zeros(1, 8, dtype=FLOAT))
    with pytest.raises(ResizeError, match=r"expected 13 parameters or more, .* got 12"):
        evolvenet.allocate(model, graph, 12)


def test_trials_are_what_a_cut_does_and_leave_the_model_as_it_was() -> None:
    torch.manual_seed(0)
    model = net(6, 20, 10, 4).train()
    x = torch.randn(300, 6, dtype=FLOAT)
    graph, before = trace(model, x[:2]), State.of(model)
    curves = trial_curves(model, graph, [x[:200], x[200:]])
    assert before.differences(model) == []
    expected = outputs(model, x[:200])[0]
    scale = (expected - expected.mean(0)).norm()
    for name, size in (("0", 10), ("2", 5)):
        other = net(6, 20, 10, 4)
        other.load_state_dict(model.state_dict())
        evolvenet.prune(other, graph, {name: size}, batches=[x[:200], x[200:]])
        moved = (outputs(other, x[:200])[0] - expected).norm() / scale
        assert loss_at(curves[name], size) == pytest.approx(float(moved**2), rel=0.5)


def test_sizes_by_trials_answer_nearer_than_equal_ones() -> None:
    """One width holds copies only: all of the cut should fall there."""
    torch.manual_seed(0)
    model, x = net(6, 16, 16, 4), torch.randn(256, 6, dtype=FLOAT)
    with torch.no_grad():
        for tensor in model[0].parameters():
            tensor[4:] = tensor[:4].repeat(3, *[1] * (tensor.dim() - 1))
    graph, expected = trace(model, x[:2]), outputs(model, x)
    sizes = evolvenet.allocate(model, graph, graph.parameters // 2, batches=[x])
    assert sizes["0"] < 8
    assert sizes["2"] > 12
    evolvenet.prune(model, graph, sizes, batches=[x])
    assert distance(outputs(model, x), expected) < 0.05


def test_no_batch_is_refused() -> None:
    model = net(6, 8, 4)
    with pytest.raises(TraceError, match="at least one batch"):
        evolvenet.allocate(model, trace(model, torch.zeros(1, 6, dtype=FLOAT)), 50, batches=[])


@given(st.lists(st.floats(0, 9), min_size=2, max_size=8))
def test_a_hull_lies_below_and_bends_one_way(losses: list[float]) -> None:
    curve = list(enumerate(losses))
    hull = convex(curve)
    assert all(loss_at(hull, size) <= loss + 1e-9 for size, loss in curve)
    slopes = [(b - a) / (y - x) for (x, a), (y, b) in pairwise(hull)]
    assert all(one <= two + 1e-9 for one, two in pairwise(slopes))


def test_energy_curves_fall_to_nothing() -> None:
    """Their exponentials are the shares of energy kept, which multiply along the network."""
    model = net(6, 8, 4)
    losses = [loss for _, loss in energy_curve(torch.linalg.svdvals(model.get_parameter("0.weight").detach()))]
    assert losses[-1] == pytest.approx(0)
    assert losses == sorted(losses, reverse=True)
    values = torch.linalg.svdvals(model.get_parameter("0.weight").detach()).square()
    kept = [math.exp(-loss) for loss in losses]
    assert kept[1:] == pytest.approx((values.cumsum(0) / values.sum()).tolist())


def test_without_data_no_width_is_emptied_for_the_others() -> None:
    """A share of energy is at most 1, and wide layers save so much that one of them would be left with a few units."""
    torch.manual_seed(0)
    model = nn.Sequential(*(part for _ in range(6) for part in (nn.Linear(64, 64), nn.ReLU())), nn.Linear(64, 4))
    graph = trace(model, torch.zeros(1, 64))
    sizes = allocate(model, graph, parameters=graph.parameters // 10)
    assert min(sizes.values()) >= 8


def test_trials_run_on_as_many_samples_from_small_batches_as_from_a_large_one() -> None:
    """And no more; in which batches they come matters little: every second one is held out."""
    model = mlp(6, 8, 8, 3)
    graph = trace(model, torch.zeros(1, 6).double())
    x = torch.randn(400, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    one = trial_curves(model, graph, [x])
    many = trial_curves(model, graph, list(x.split(50)))
    few = trial_curves(model, graph, [x[:50], x[:50]])
    for name, curve in one.items():
        assert [size for size, _ in many[name]] == [size for size, _ in curve]
        assert [loss for _, loss in many[name]] == pytest.approx([loss for _, loss in curve], rel=0.05)
        assert [loss for _, loss in few[name]] != pytest.approx([loss for _, loss in curve], rel=0.05)


def test_trials_of_the_shares_that_are_asked_for() -> None:
    model = mlp(6, 20, 8, 3)
    graph = trace(model, torch.zeros(1, 6).double())
    curves = trial_curves(model, graph, [torch.randn(64, 6).double()], shares=(0.9, 0.5))
    assert {name: [size for size, _ in curve] for name, curve in curves.items()} == {
        "0": [0, 10, 18, 20],
        "2": [0, 4, 7, 8],
    }


def test_a_width_of_a_few_units_is_tried_too_where_shares_round_to_all_of_them() -> None:
    """Else the last unit would look as if the outputs depended on it alone."""
    model = mlp(6, 4, 3, 2)
    graph = trace(model, torch.zeros(1, 6).double())
    curves = trial_curves(model, graph, [torch.randn(64, 6).double()], shares=(0.97, 0.95))
    assert {name: [size for size, _ in curve] for name, curve in curves.items()} == {"0": [0, 3, 4], "2": [0, 2, 3]}


def test_with_batches_ranks_are_cut_where_the_outputs_need_them_least_whatever_their_basis() -> None:
    generator, sizes = seeded(), (9, 12, 12, 4)
    chains = []
    for needed, before, after in zip((3, 8, 4), sizes, sizes[1:], strict=False):
        layer = nn.Linear(before, after).double()
        parts = [torch.randn(*shape, generator=generator).double() for shape in ((after, needed), (needed, before))]
        layer.weight.data = parts[0] @ parts[1] / before
        chains += [mixed_chain(layer, "svd", (min(before, after),), generator), nn.ReLU()]
    model = nn.Sequential(*chains[:-1])
    x = torch.randn(128, 9, generator=generator).double()
    graph = trace(model, x[:2])
    only_ranks = freeze(graph, fixed=[width.name for width in graph.resizable if width.rank_of is None])
    assert only_ranks.sizes == {"0.0": 9, "2.0": 12, "4.0": 4}
    exact = {"0.0": 3, "2.0": 8, "4.0": 4}
    found = allocate(model, only_ranks, graph.proposed_parameters(exact), [x])
    assert found == exact
    before = outputs(model, x)
    evolvenet.prune(model, only_ranks, found, batches=[x])
    assert distance(outputs(model, x), before) < 1e-9
    assert allocate(model, only_ranks.with_sizes(exact), graph.proposed_parameters(exact)) == exact


def blocks(layers: int = 3) -> nn.Sequential:
    """Blocks of 24 inner units, each after the first with less to it."""
    made = nn.Sequential(
        *[nn.Sequential(OrderedDict(up=nn.Linear(8, 24), act=nn.ReLU(), down=nn.Linear(24, 8))) for _ in range(layers)],
        nn.Linear(8, 3),
    ).double()
    for number in range(layers):
        made[number].up.weight.data[: 8 * number] = 0  # type: ignore[union-attr, index, operator]
    return made


@pytest.mark.parametrize(("with_batches", "multiple"), [(False, 1), (False, 4), (True, 4)])
def test_uniform_layers_have_one_size_that_is_the_largest_multiple_that_fits(with_batches: bool, multiple: int) -> None:
    model = blocks()
    graph = trace(model, torch.zeros(1, 8, dtype=FLOAT))
    wanted = int(0.6 * graph.parameters)
    batches = [torch.randn(64, 8, dtype=FLOAT)] if with_batches else None
    sizes = evolvenet.allocate(model, graph, wanted, batches, uniform="layers", multiple=multiple)
    inner, between = {sizes[f"{n}.up"] for n in range(3)}, {sizes[f"{n}.down"] for n in range(3)}
    assert len(inner) == len(between) == 1
    assert all(size % multiple == 0 or size == graph.widths[name].size for name, size in sizes.items())
    assert graph.proposed_parameters(sizes) <= wanted
    for names in ("up", "down"):
        wider = {**sizes, **{f"{n}.{names}": sizes[f"{n}.{names}"] + multiple for n in range(3)}}
        assert wider["0.up"] > 24 or wider["0.down"] > 8 or graph.proposed_parameters(wider) > wanted
    alone = evolvenet.allocate(model, graph, wanted, batches)
    assert len({alone[f"{n}.up"] for n in range(3)}) == 3 or not with_batches
    evolvenet.prune(model, graph, sizes)


def test_what_may_be_equal_and_of_which_multiples_is_checked() -> None:
    model = blocks()
    graph = trace(model, torch.zeros(1, 8, dtype=FLOAT))
    with pytest.raises(PolicyError, match="uniform to be None or \"layers\", got 'heads'"):
        evolvenet.allocate(model, graph, 300, uniform="heads")
    with pytest.raises(PolicyError, match="multiple to be an integer of 1 or more"):
        evolvenet.allocate(model, graph, 300, multiple=0)

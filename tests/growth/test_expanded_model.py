"""Where new units lie, and that a trial leaves no trace."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from evolvenet.errors import SpectrumError
from evolvenet.execution.isolation import isolated
from evolvenet.graph.index_map import IndexMap
from evolvenet.graph.width_graph import CONSUMES, PRODUCES
from evolvenet.growth.expanded_model import Growth, expanded, fill_new_units, finite
from evolvenet.surgery.resize_model import compile_surgery, moved
from evolvenet.tracing.trace import trace
from tests.helpers.cases import CASES, Case, graph_of, outputs
from tests.helpers.small_models import convnet, images, mlp


def growth_of(case: Case, count: int = 2) -> Growth:
    """Every width of the case that can grow without mixing, by so many."""
    model, graph = case.model(), graph_of(case)
    maps = {w.name: IndexMap.grow(w.size, count) for w in graph.resizable if w.mixed is None}
    return Growth(model, graph, compile_surgery(model, graph, maps))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_is_put_is_taken_and_nothing_else_is_touched(case: Case) -> None:
    growth = growth_of(case)
    tensors = {change.name: torch.zeros(change.value.shape).double() for change in growth.surgery.changes}
    put = {}
    for width in growth.widths:
        for tie in width.ties:
            places = growth.changes[tie.tensor].tensor.numel() // growth.changes[tie.tensor].tensor.shape[tie.dim]
            put[tie] = torch.rand(2, places * tie.repeat, dtype=torch.float64) + 1
            growth.slot(tie, width).put(tensors[tie.tensor], put[tie])
    for width in growth.widths:
        for tie in width.ties:
            assert torch.equal(growth.slot(tie, width).take(tensors[tie.tensor]), put[tie])
    for change in growth.surgery.changes:
        assert not tensors[change.name][moved(change)].any()
    for width in growth.widths:
        for tie in width.ties:
            growth.slot(tie, width).put(tensors[tie.tensor], None)
    assert not any(tensor.any() for tensor in tensors.values())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_units_and_new_units_are_laid_out_alike(case: Case) -> None:
    """A new unit with the entries of unit 0 has, in the new tensor, what unit 0 has."""
    growth = growth_of(case)
    for width in growth.widths:
        for tie in (*growth.matrices(width, PRODUCES), *growth.matrices(width, CONSUMES)):
            tensor = growth.changes[tie.tensor].value.clone()
            units = growth.unit_entries(tie, width)
            growth.slot(tie, width).put(tensor, units[:1].expand(2, -1))
            index = growth.changes[tie.tensor].axes[tie.dim].indices
            old = index.index(tie.start)
            new = growth.slot(tie, width).first
            for place_ in range(tie.repeat):
                torch.testing.assert_close(
                    tensor.select(tie.dim, new + place_), tensor.select(tie.dim, old + place_), rtol=0, atol=0
                )


def test_a_trial_widens_the_model_and_leaves_no_trace() -> None:
    model, x = convnet(), images(4)
    graph = trace(model, x)
    surgery = compile_surgery(model, graph, {"0": IndexMap.grow(8, 3)})
    growth = Growth(model, graph, surgery)
    before, state = outputs(model, x), {name: t.clone() for name, t in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    with torch.inference_mode(), expanded(growth, {}) as shadows:
        assert model[0].out_channels == 11
        assert shadows["0.weight"] is model[0].weight
        assert shadows["0.weight"].shape == (11, 3, 3, 3)
        model.train()(x)
        model[3].bias = None
    assert model[0].out_channels == 8
    assert not model.training
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(outputs(model, x)[0], before[0])


def test_a_gradient_in_eval_mode_leaves_flags_and_buffers() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout())
    state = {name: t.clone() for name, t in model.state_dict().items()}
    with torch.no_grad(), isolated(model, gradients=True):
        assert not model.training
        assert model(torch.ones(2, 3)).requires_grad
    assert model.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_entries_get_the_norm_of_the_units() -> None:
    model = mlp(6, 4, 3)
    graph = trace(model, torch.zeros(1, 6).double())
    growth = Growth(model, graph, compile_surgery(model, graph, {"0": IndexMap.grow(4, 2)}))
    (width,) = growth.widths
    rows, columns = width.producers[0], width.consumers[0]
    one = {rows: torch.eye(2, 6).double(), columns: torch.eye(2, 3).double()}
    values = {change.name: change.value for change in fill_new_units(growth, one).changes}
    torch.testing.assert_close(values["0.weight"][4:], model[0].weight.detach().norm(dim=1).mean() * one[rows])
    torch.testing.assert_close(values["2.weight"][:, 4:].T, model[2].weight.detach().norm(dim=0).mean() * one[columns])
    assert not values["0.bias"][4:].any()


def test_nan_is_named() -> None:
    assert finite(torch.ones(2), "here").shape == (2,)
    bad: Tensor = torch.tensor([float("inf")])
    with pytest.raises(SpectrumError, match="here: expected finite"):
        finite(bad, "here")

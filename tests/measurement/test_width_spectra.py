"""Spectra of widths against singular values and eigenvalues computed by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import evolvenet
from evolvenet.errors import SpectrumError
from evolvenet.graph.width_graph import Tie
from evolvenet.measurement.activation_moments import collect
from evolvenet.measurement.rank_spectra import is_rotatable
from evolvenet.measurement.unit_rows import unit_rows
from evolvenet.measurement.width_spectra import consumer_weighted, measure, spectra
from evolvenet.tracing.trace import trace
from tests.helpers.cases import CASES, Case, graph_of
from tests.helpers.small_models import Recurrent, Residual, convnet, images, mlp, mobile, used

SMALL = trace(mlp(3, 5, 2), torch.zeros(1, 3).double())


def by_hand(rows: Tensor, norms: Tensor) -> Tensor:
    """Covariance of the weighted rows over its trace."""
    scaled = (rows - rows.mean(0)) * norms
    covariance = scaled.T @ scaled
    return covariance / covariance.trace()


def test_weights_alone_give_the_singular_values_of_the_producer() -> None:
    model = mlp(5, 4, 3)
    graph = trace(model, torch.zeros(1, 5).double())
    found = spectra(model, graph)
    assert set(found) == {"0"}
    torch.testing.assert_close(found["0"], torch.linalg.svdvals(model[0].weight.detach()))


def test_several_producers_stand_side_by_side() -> None:
    model = used(Residual())
    graph = trace(model, images(2))
    joint = torch.cat([model.stem.weight.detach().flatten(1), model.conv2.weight.detach().flatten(1)], dim=1)
    torch.testing.assert_close(spectra(model, graph)["stem"], torch.linalg.svdvals(joint))


def entries(model: nn.Module, size: int, tie: Tie) -> np.ndarray:
    """Everything that a weight holds for each unit, unit by unit and place by place."""
    tensor = model.get_parameter(tie.tensor).detach()
    rows = []
    for unit in range(size):
        places = [tie.start + unit * tie.repeat + place for place in range(tie.repeat)]
        rows.append(torch.cat([tensor.select(tie.dim, place).flatten() for place in places]).numpy())
    return np.stack(rows)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_weights_of_every_kind_of_layer_give_their_singular_values(case: Case) -> None:
    """Dense, convolutions of one to three dimensions, transposed, grouped, recurrent, attention, embeddings."""
    model, graph = case.model(), graph_of(case)
    found = spectra(model, graph)
    for width in graph.resizable:
        weights = [tie for tie in width.ties if tie.tensor in graph.trainable and len(graph.shapes[tie.tensor]) > 1]
        rows = {tie: entries(model, width.size, tie) for tie in weights}
        for tie, expected in rows.items():
            assert unit_rows(model, width, tie).numpy().tolist() == expected.tolist()
        if is_rotatable(graph, width):
            continue  # See test_rank_spectra.
        squares = np.zeros((width.parts, width.size))
        for part in range(width.parts):
            own = {tie: rows[tie] for tie in weights if tie.part == part}
            chosen = [rows[tie] for tie in own if tie.role == "produces"] or list(own.values())
            values = np.linalg.svd(np.concatenate(chosen, axis=1), compute_uv=False)
            squares[part, : len(values)] = values**2
        truth = np.sqrt(squares.mean(0))
        np.testing.assert_allclose(found[width.name].numpy(), truth, rtol=1e-9, atol=1e-12 * truth[0])


def test_fewer_columns_than_units_leave_zeros() -> None:
    model = mlp(3, 7, 2)
    values = spectra(model, trace(model, torch.zeros(1, 3).double()))["0"]
    assert values.shape == (7,)
    assert torch.equal(values[3:], torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(values[:3], torch.linalg.svdvals(model[0].weight.detach()))


def test_a_width_of_whole_groups_reads_a_row_for_each_group() -> None:
    model = mobile()
    graph = trace(model, images(2))
    values = spectra(model, graph)["4"]
    torch.testing.assert_close(values, torch.linalg.svdvals(model[4].weight.detach().reshape(3, -1)))


def test_batches_give_the_eigenvalues_of_what_is_read() -> None:
    model, x = convnet(), images(9)
    graph = trace(model, x)
    with torch.no_grad():
        hidden, flat = model[:3](x), model[:6](x)
    expected = {
        "0": by_hand(hidden.permute(0, 2, 3, 1).reshape(-1, 8), model[3].weight.detach().pow(2).sum((0, 2, 3)).sqrt()),
        "3": by_hand(
            flat.reshape(9, 6, 16).mT.reshape(-1, 6), model[6].weight.detach().reshape(5, 6, 16).norm(dim=(0, 2))
        ),
    }
    found = spectra(model, graph, [x[:4], x[4:]])
    assert set(found) == {"0", "3"}
    for name, covariance in expected.items():
        values = torch.linalg.eigvalsh(covariance).flip(0).clamp_min(0).sqrt()
        torch.testing.assert_close(found[name], values, atol=1e-7, rtol=1e-7)
        torch.testing.assert_close(found[name].square().sum(), torch.tensor(1.0).double())


def test_several_consumers_are_averaged() -> None:
    model, x = used(Residual()), images(9)
    graph = trace(model, x)
    with torch.no_grad():
        stem = model.stem_norm(model.stem(x)).relu()
        block = (stem + model.norm2(model.conv2(model.norm1(model.conv1(stem)).relu()))).relu().mean((2, 3))
    first = by_hand(stem.permute(0, 2, 3, 1).reshape(-1, 8), model.conv1.weight.detach().pow(2).sum((0, 2, 3)).sqrt())
    second = by_hand(block, model.head.weight.detach().norm(dim=0))
    values = torch.linalg.eigvalsh((first + second) / 2).flip(0).sqrt()
    torch.testing.assert_close(spectra(model, graph, [x])["stem"], values, atol=1e-7, rtol=1e-7)


def test_a_unit_with_zero_columns_has_no_weight() -> None:
    model, x = mlp(4, 6, 3), torch.randn(40, 4, dtype=torch.float64)
    graph = trace(model, x)
    before = spectra(model, graph, [x])["0"]
    with torch.no_grad():
        model[2].weight[:, 1] = 0
        model[0].weight[1] *= 1000
    after = spectra(model, graph, [x])["0"]
    assert before[-1] > 1e-3
    assert after[-1] < 1e-7
    assert after[0] < 1


@given(st.floats(1e-3, 1e3), st.integers(0, 100))
def test_the_scale_of_the_consumer_does_not_matter(scale: float, seed: int) -> None:
    torch.manual_seed(seed)
    model, x = mlp(3, 5, 2), torch.randn(20, 3, dtype=torch.float64)
    before = spectra(model, SMALL, [x])["0"]
    with torch.no_grad():
        model[2].weight.mul_(scale)
    torch.testing.assert_close(spectra(model, SMALL, [x])["0"], before, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize(("reads", "makes"), [(1e150, 1.0), (1e-200, 1.0), (1.0, 1e150), (1.0, 1e-150), (1e150, 1e150)])
def test_extreme_weights_neither_overflow_nor_vanish(reads: float, makes: float) -> None:
    model, x = mlp(3, 5, 2), torch.randn(20, 3, dtype=torch.float64)
    with torch.no_grad():
        model[0].bias.zero_()
    before = spectra(model, SMALL, [x])["0"]
    with torch.no_grad():
        model[2].weight.mul_(reads)
        model[0].weight.mul_(makes)
    torch.testing.assert_close(spectra(model, SMALL, [x])["0"], before, atol=1e-7, rtol=1e-6)


def test_unmeasured_consumers_fall_back_to_the_weights() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.make = nn.Conv2d(3, 6, 1)
            self.read = nn.Parameter(torch.randn(4, 6))

        def forward(self, x: Tensor) -> Tensor:
            return (2 * self.read) @ self.make(x).relu().flatten(2)

    model: Any = Last().double()
    graph = trace(model, images(2))
    expected = torch.linalg.svdvals(model.make.weight.detach().flatten(1))
    torch.testing.assert_close(spectra(model, graph, [images(4)])["make"][:3], expected)


def test_recurrent_gates_stand_side_by_side() -> None:
    model: Any = Recurrent().double()
    graph = trace(model, torch.zeros(2, 3, 4).double())
    gates = torch.cat([model.cell.weight_ih_l0.detach(), model.cell.weight_hh_l0.detach()], dim=1)
    expected = torch.linalg.svdvals(torch.cat(list(gates.reshape(4, 6, -1)), dim=1))
    torch.testing.assert_close(spectra(model, graph)["cell"], expected)


def test_constant_activations_have_no_energy_and_no_nan() -> None:
    model, x = mlp(4, 6, 3), torch.randn(40, 4, dtype=torch.float64)
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.fill_(2.0)
    graph = trace(model, x)
    assert torch.equal(spectra(model, graph, [x])["0"], torch.zeros(6, dtype=torch.float64))


def test_dead_channels_and_too_few_samples_have_a_short_spectrum() -> None:
    model, x = mlp(4, 16, 3), torch.randn(3, 4, dtype=torch.float64)
    with torch.no_grad():
        model[0].bias[:4] = -100
    values = spectra(model, trace(model, x), [x])["0"]
    assert values.isfinite().all()
    assert int((values > 1e-7).sum()) <= 2


def test_zero_weights_have_a_spectrum_of_zeros() -> None:
    model = mlp(4, 6, 3)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    x = torch.randn(5, 4, dtype=torch.float64)
    graph = trace(model, x)
    assert not spectra(model, graph)["0"].any()
    assert not spectra(model, graph, [x])["0"].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_types_are_measured_in_wider_ones(dtype: torch.dtype) -> None:
    model, x = mlp(4, 6, 3).to(dtype), torch.randn(50, 4).to(dtype)
    graph = trace(model, x)
    exact = torch.linalg.svdvals(model[0].weight.detach().double())
    torch.testing.assert_close(spectra(model, graph)["0"][:4], exact, rtol=1e-5, atol=1e-6)
    assert spectra(model, graph, [x])["0"].dtype == torch.float64


def test_nan_weights_are_refused_with_their_name() -> None:
    model = mlp(4, 6, 3)
    graph = trace(model, torch.zeros(1, 4).double())
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    with pytest.raises(SpectrumError, match=r"0\.weight"):
        spectra(model, graph)


def test_statistics_gathered_before_give_the_same() -> None:
    model, x = convnet(), images(8)
    graph = trace(model, x)
    first, second = evolvenet.spectra(model, graph, [x]), measure(model, graph, collect(model, graph, [x]))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_unit_rows_and_weighting_by_the_consumer() -> None:
    model = convnet()
    graph = trace(model, images(2))
    width = graph.widths["3"]
    (tie,) = width.consumers
    rows = unit_rows(model, width, tie)
    assert rows.shape == (6, 16 * 5)
    for unit in range(6):
        torch.testing.assert_close(
            rows[unit].sort().values, model[6].weight.detach()[:, unit * 16 : unit * 16 + 16].flatten().sort().values
        )
    weighted = consumer_weighted(model, width, {tie: torch.eye(6, dtype=torch.float64)})
    torch.testing.assert_close(weighted.diagonal(), rows.norm(dim=1) ** 2 / rows.norm() ** 2)

"""Spectra of outputs against the singular values of the outputs themselves, stacked in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from evolvenet.errors import SpectrumError, TraceError
from evolvenet.execution.inputs import arguments
from evolvenet.graph.width_graph import Width
from evolvenet.linalg.spectrum import matricize, output_values
from evolvenet.measurement import output_spectra as outputs
from evolvenet.measurement.output_spectra import output_spectra
from evolvenet.tracing.trace import trace
from tests.helpers.cases import CASES, FLOAT, Case, graph_of
from tests.helpers.small_models import Residual, images, mlp, used
from tests.helpers.states import State

HOOKED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@contextmanager
def listening(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """What every layer with a module of its own makes, without its bias, `[samples, channels]`."""
    heard: dict[str, list[Tensor]] = {}

    def hook_for(name: str, module: Any) -> Any:
        def hook(_: nn.Module, inputs: Any, out: Tensor) -> None:
            last = out if isinstance(module, nn.Linear) else out.movedim(1, -1)
            last = last - (0 if module.bias is None else module.bias)
            heard.setdefault(f"{name}.weight", []).append(last.flatten(0, -2).detach())

        return hook

    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, HOOKED)]
    handles = [module.register_forward_hook(hook_for(name, module)) for name, module in layers]
    yield heard
    for handle in handles:
        handle.remove()


def stacked(model: nn.Module, width: Width, heard: dict[str, list[Tensor]]) -> np.ndarray:
    """The outputs that belong to each unit of a width, over the square root of their number, unit by unit."""
    columns = []
    for tie in width.producers:
        rows = torch.cat(heard[tie.tensor])
        for place in range(tie.repeat):
            units = [tie.start + unit * tie.repeat + place for unit in range(width.size)]
            columns.append(rows[:, units].T.numpy() / math.sqrt(len(rows)))
    return np.concatenate(columns, axis=1)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_spectra_are_the_singular_values_of_the_stacked_outputs(case: Case) -> None:
    model, graph = case.model(), graph_of(case)
    batches = [case.inputs(seed) for seed in (3, 4, 5)]
    before = State.of(model.train(), [])
    found = output_spectra(model, graph, batches)
    if case.name != "locked":  # it counts its calls
        assert before.differences(model, []) == []
    with torch.no_grad(), listening(model.eval()) as heard:
        for batch in batches:
            args, kwargs = arguments(batch)
            model(*args, **kwargs)
    for width in graph.resizable:
        modules = {type(model.get_submodule(tie.module)) for tie in width.producers}
        tensors = {tie.tensor for tie in width.producers}
        if modules and modules <= set(HOOKED) and tensors <= heard.keys():
            truth = np.linalg.svd(stacked(model, width, heard), compute_uv=False)
            truth = np.concatenate([truth, np.zeros(width.size)])[: width.size]
            np.testing.assert_allclose(found[width.name].numpy(), truth, rtol=1e-6, atol=2e-8 * truth[0])
        elif width.name in found:
            assert found[width.name].shape == (width.size,)
            assert (found[width.name].diff() <= 0).all()


MEASURED = {
    "embedding": {"hidden"},  # an embedding looks up
    "own_parameters": {"embed", "matrix"},
    "attention": {"embed", "hidden"},
    "auxiliary": {"body"},  # the other one runs in train mode only
    "lstm_projected": {"embed", "cell", "cell#2"},
}


@pytest.mark.parametrize("case", [case for case in CASES if case.name in MEASURED], ids=str)
def test_what_is_measured(case: Case) -> None:
    assert set(output_spectra(case.model(), graph_of(case), [case.inputs()])) == MEASURED[case.name]


@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 1, 1), (2, 1, 1), (1, 2, 2), (1, 0, 1)])
def test_of_a_convolution_they_are_those_of_the_weight_on_the_patches_moment(
    stride: int, padding: int, dilation: int
) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, stride, padding, dilation), nn.ReLU(), nn.Conv2d(8, 2, 1)).double()
    x = torch.randn(6, 3, 7, 7, dtype=FLOAT)
    graph = trace(model, x)
    patches = functional.unfold(x, 3, dilation, padding, stride).movedim(1, -1).flatten(0, 1)
    expected = output_values(matricize(model.get_parameter("0.weight")), patches.T @ patches / len(patches))
    torch.testing.assert_close(output_spectra(model, graph, [x[:1], x[1:]])["0"], expected)


def test_of_a_recurrent_layer_both_products_stand_side_by_side() -> None:
    case = next(case for case in CASES if case.name == "rnn")
    model: Any = case.model()
    x = torch.randn(4, 6, 3, dtype=FLOAT)
    with torch.no_grad():
        steps = model.embed(x).relu()
        hidden = model.cell(steps)[0]
    cell = model.cell
    before = torch.cat([torch.zeros(4, 1, 5, dtype=FLOAT), hidden[:, :-1]], 1)
    read = (steps @ cell.weight_ih_l0.detach().T).flatten(0, 1), (before @ cell.weight_hh_l0.detach().T).flatten(0, 1)
    truth = torch.linalg.svdvals(torch.cat([part / math.sqrt(len(part)) for part in read]))
    torch.testing.assert_close(output_spectra(model, graph_of(case), [x])["cell"], truth)


def test_of_attention_all_projections_stand_side_by_side() -> None:
    case = next(case for case in CASES if case.name == "attention")
    model: Any = case.model()
    x, graph, attend = case.inputs(), graph_of(case), model.attend
    with torch.no_grad():
        embedded = model.embed(x)
        query, key, value = functional.linear(embedded, attend.in_proj_weight, attend.in_proj_bias).chunk(3, -1)
        heads = [part.unflatten(-1, (2, 4)).transpose(1, 2) for part in (query, key, value)]
        mixed = ((heads[0] @ heads[1].mT / 2).softmax(-1) @ heads[2]).transpose(1, 2).flatten(2)
        heard = {
            "embed.weight": [(embedded - model.embed.bias).flatten(0, 1)],
            "attend.in_proj_weight": [(embedded @ attend.in_proj_weight.T).flatten(0, 1)],
            "attend.out_proj.weight": [(mixed @ attend.out_proj.weight.T).flatten(0, 1)],
        }
    truth = np.linalg.svd(stacked(model, graph.widths["embed"], heard), compute_uv=False)
    np.testing.assert_allclose(output_spectra(model, graph, [x])["embed"].numpy(), truth, rtol=1e-6)


class Cross(nn.Module):
    """Queries from one layer, keys and values from another: two products with parts of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.ask, self.answer = nn.Linear(5, 8), nn.Linear(5, 8)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        asked, answers = self.ask(x), self.answer(x)
        return self.head(self.attend(asked, answers, answers, need_weights=False)[0])


def test_a_weight_of_which_parts_are_used_is_seen_part_by_part() -> None:
    model, x = Cross().double().eval(), torch.randn(3, 4, 5, dtype=FLOAT)
    graph = trace(model, x)
    with torch.no_grad(), listening(model) as heard:
        asked, answers = model.ask(x), model.answer(x)
        query, rest = model.attend.in_proj_weight[:8], model.attend.in_proj_weight[8:]
        heard["attend.in_proj_weight"] = [torch.cat([asked @ query.T, answers @ rest.T], -1).flatten(0, 1)]
        args = (
            functional.linear(asked, query, model.attend.in_proj_bias[:8]),
            functional.linear(answers, rest, model.attend.in_proj_bias[8:]),
        )
        heads = [part.unflatten(-1, (-1, 4)).transpose(1, 2) for part in args]
        weights = (heads[0] @ heads[1][:, :2].mT / 2).softmax(-1)
        mixed = (weights @ heads[1][:, 2:]).transpose(1, 2).flatten(2)
        heard["attend.out_proj.weight"] = [(mixed @ model.attend.out_proj.weight.T).flatten(0, 1)]
    found = output_spectra(model, graph, [x])
    for name in ("ask", "attend.out_proj"):
        truth = np.linalg.svd(stacked(model, graph.widths[name], heard), compute_uv=False)
        np.testing.assert_allclose(found[name].numpy(), truth[: len(found[name])], rtol=1e-6, atol=1e-8)


def test_directions_that_the_input_never_takes_do_not_count() -> None:
    model = mlp(4, 3, 2)
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(3, 4) * torch.tensor([[1.0], [1.0], [100.0]]))
    x = torch.randn(50, 4, dtype=FLOAT)
    x[:, 2] = 0
    values = output_spectra(model, trace(model, x), [x])["0"]
    assert values[0] < 2
    assert values[2] == 0


def test_samples_beyond_the_cap_are_taken_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = used(Residual()), images(8)
    graph = trace(model, x)
    whole = output_spectra(model, graph, [x])
    monkeypatch.setattr(outputs, "CAP", 200)
    some = output_spectra(model, graph, [x])
    assert all(not torch.equal(some[name], whole[name]) for name in whole)
    for name in whole:
        torch.testing.assert_close(some[name], whole[name], rtol=0.2, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_types_and_autocast(dtype: torch.dtype) -> None:
    model, x = used(Residual()), images(8)
    graph = trace(model, x)
    exact = output_spectra(model, graph, [x])
    narrow = output_spectra(model.to(dtype), graph, [x.to(dtype)])
    loose = {torch.float16: 1e-2, torch.bfloat16: 6e-2, torch.float32: 1e-5}[dtype]
    for name, values in narrow.items():
        torch.testing.assert_close(values, exact[name], rtol=loose, atol=loose * float(exact[name][0]))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = output_spectra(model.float(), graph, [x.float()])
    for name, values in mixed.items():
        torch.testing.assert_close(values, exact[name], rtol=6e-2, atol=1e-3)


def test_a_layer_that_goes_no_known_way_is_left_out() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.head = nn.Linear(3, 5), nn.Linear(5, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.addmm(self.one.bias, x, self.one.weight.t(), alpha=2)
            return self.head(self.two(x.relu()))

    model, x = Scaled().double(), torch.randn(6, 3, dtype=FLOAT)
    graph = trace(model, x)
    assert set(graph.sizes) == {"one", "two"}
    assert set(output_spectra(model, graph, [x])) == {"two"}


@pytest.mark.parametrize("batches", [[], [torch.zeros(0, 4, dtype=FLOAT)]], ids=["no batch", "no sample"])
def test_without_a_sample_nothing_is_said(batches: list[Tensor]) -> None:
    model = mlp(4, 3, 2)
    with pytest.raises(TraceError, match="at least one sample"):
        output_spectra(model, trace(model, torch.zeros(1, 4).double()), batches)


def test_broken_values_are_refused_by_name() -> None:
    model, x = mlp(4, 3, 2), torch.randn(5, 4, dtype=FLOAT)
    graph = trace(model, x)
    with pytest.raises(SpectrumError, match=r"0\.weight: expected finite outputs"):
        output_spectra(model, graph, [x, x / 0])
    with pytest.raises(SpectrumError, match=r"0\.weight: expected finite outputs"):
        output_spectra(model, graph, [x * 1e200])
    with pytest.raises(TraceError, match="Wrap it in a list"):
        output_spectra(model, graph, x)

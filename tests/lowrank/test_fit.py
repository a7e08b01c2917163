"""With batches the factors are fitted to the layers' outputs, one layer after the other."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import evolvenet
from evolvenet.lowrank.fit import fit, last_inputs, observe
from evolvenet.lowrank.kinds import KINDS
from evolvenet.lowrank.plan import choose, decomposed, requested
from tests.helpers.layers import layer_and_inputs
from tests.helpers.states import State


def correlated(samples: int, features: int, seed: int = 0, dead: int = 0) -> Tensor:
    """Inputs whose energy lies in few directions, with a mean, the last ones always 0."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(features, features, generator=generator, dtype=torch.float64)
    scales = torch.logspace(0, -2, features, dtype=torch.float64)
    x = torch.randn(samples, features, generator=generator, dtype=torch.float64) * scales @ mixed + 0.5
    x[:, features - dead :] = 0
    return x


def images(samples: int = 192, channels: int = 3) -> Tensor:
    coarse = torch.randn(samples, channels, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return nn.functional.interpolate(coarse, size=(8, 8), mode="bilinear") + 0.3


def relative(one: Tensor, two: Tensor) -> float:
    return float(((one - two).square().sum() / (two - two.mean(0)).square().sum()).detach())


@pytest.mark.parametrize("dead", [0, 6])
@pytest.mark.parametrize("bias", [True, False])
def test_a_dense_layer_gets_the_optimum_of_its_rank(bias: bool, dead: int) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(20, 16, bias=bias)).double(), correlated(400, 20, dead=dead)
    before = model(x).detach()
    line = evolvenet.factorize(model, {"0": 4}, batches=[x])["0"]
    level = before - before.mean(0) if bias else before
    tail = torch.linalg.svdvals(level)[4:].square().sum() / level.square().sum()
    # The bias makes up for the mean, so the error is that of the principal components of the outputs.
    apart = (model(x).detach() - before).square().sum() / level.square().sum()
    torch.testing.assert_close(apart, tail, rtol=1e-3, atol=1e-9)
    assert line.error == pytest.approx(float(tail), rel=1e-2)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return (
        nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, padding_mode="circular"),
            nn.ReLU(),
            nn.Conv2d(16, 24, 3, stride=2, bias=False),
            nn.BatchNorm2d(24),
            nn.ReLU(),
            nn.ConvTranspose2d(24, 16, 3, stride=2, output_padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, groups=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(576, 24),
            nn.ReLU(),
            nn.Linear(24, 10),
        )
        .double()
        .eval()
    )


@pytest.mark.parametrize("kind", ["auto", "svd", "spatial", "cp", "tensor_train", "tucker"])
def test_data_lowers_the_error_of_every_kind(kind: str) -> None:
    model, x = network(), images()
    before = model(x)
    plain, fitted = copy.deepcopy(model), copy.deepcopy(model)
    line = evolvenet.factorize(plain, 4, kind)
    report = evolvenet.factorize(fitted, 4, kind, batches=[x[:96], x[96:]])
    assert [(a.kind, a.ranks) for a in line] == [(b.kind, b.ranks) for b in report]
    assert relative(fitted(x), before) < 0.5 * relative(plain(x), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_types_are_fitted_in_float32_at_least_and_keep_their_type(dtype: torch.dtype) -> None:
    model, x = network().to(dtype), images().to(dtype)
    before = model(x).double()
    evolvenet.factorize(plain := copy.deepcopy(model), 4)
    evolvenet.factorize(model, 4, batches=[x])
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert relative(model(x).double(), before) < 0.6 * relative(plain(x).double(), before)


def test_each_layer_is_fitted_on_the_inputs_that_it_gets() -> None:
    model, x = network(), images()
    before = model(x)
    requests = requested(model, 4, "auto")
    seen = observe(model, [request.target for request in requests], [x])
    choices = [choose(request, seen.moments) for request in requests]
    chosen = [choice for choice in choices if choice.refusal is None]
    alone = copy.deepcopy(model)
    for choice in chosen:
        assert choice.kind is not None
        groups = decomposed(choice, seen.moments[choice.target.name])
        (merged,) = [choice.kind.merged(group, choice.target.shape.inputs) for group in groups[:1]]
        if len(groups) == 1:
            layer = alone.get_submodule(choice.target.name)
            weight = merged.transpose(0, 1) if isinstance(layer, nn.ConvTranspose2d) else merged
            layer.get_parameter("weight").data.copy_(weight)
    in_turn = copy.deepcopy(model)
    evolvenet.factorize(in_turn, 4, batches=[x])
    assert relative(in_turn(x), before) < 0.7 * relative(alone(x), before)


def test_the_mean_goes_into_the_running_mean_of_a_batch_norm() -> None:
    model, x = network(), images()
    means: list[Tensor] = []
    model[3].register_forward_hook(lambda _module, _args, out: means.append(out.mean((0, 2, 3)).detach()))
    model(x)
    running = model[3].get_buffer("running_mean").clone()
    evolvenet.factorize(model, {"2": 3}, batches=[x])
    model(x)
    assert [name for name, _ in model[2].named_parameters()] == ["0.weight", "1.weight", "2.weight"]
    assert (model[3].get_buffer("running_mean") - running).abs().max() > 1e-3
    torch.testing.assert_close(means[0], means[-1], rtol=0, atol=1e-6)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shortcut, self.first, self.second = nn.Linear(20, 20), nn.Linear(20, 32), nn.Linear(32, 20)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.second(self.first(x).relu())


def test_the_end_of_a_block_corrects_the_error_of_the_shortcut() -> None:
    torch.manual_seed(0)
    model, x = Residual().double(), correlated(600, 20)
    before = model(x)
    report = evolvenet.factorize(model, {"shortcut": 4, "second": 8}, batches=[x])
    assert [line.kind for line in report] == ["svd", "svd"]
    assert relative(model(x), before) < report["shortcut"].error


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.unused = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x).tanh())


def test_a_layer_too_wide_for_a_second_moment_is_fitted_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr("evolvenet.lowrank.fit.MOST_COLUMNS", 10)
    model, x = nn.Sequential(nn.Linear(20, 16)).double(), correlated(400, 20)
    before, plain = model(x), copy.deepcopy(model)
    evolvenet.factorize(plain, {"0": 4})
    evolvenet.factorize(model, {"0": 4}, batches=[x])
    assert relative(model(x), before) < 0.9 * relative(plain(x), before)


def test_layers_that_run_twice_or_never_get_factors_too() -> None:
    torch.manual_seed(0)
    model, x = Twice().double(), correlated(300, 12)
    before = model(x)
    plain = copy.deepcopy(model)
    evolvenet.factorize(plain, 3)
    report = evolvenet.factorize(model, 3, batches=[x])
    assert [line.kind for line in report] == ["svd", "svd"]
    assert relative(model(x), before) < relative(plain(x), before)


@pytest.mark.parametrize("kept", [0.9, 0.99])
def test_a_share_of_energy_is_the_share_of_the_outputs(kept: float) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(30, 30)).double(), correlated(500, 30)
    report = evolvenet.factorize(model, kept, batches=[x])
    (rank,) = report["0"].ranks
    assert report["0"].error <= 1 - kept
    torch.manual_seed(0)
    other = nn.Sequential(nn.Linear(30, 30)).double()
    # The second moment of few samples is shrunk, which may take one rank more than these samples need.
    assert evolvenet.factorize(other, {"0": rank - 2}, batches=[x])["0"].error > 1 - kept


def test_inputs_are_measured_on_the_model_as_it_was_and_nothing_else_changes() -> None:
    model, x = network().train(), images()
    before = State.of(model)
    requests = requested(model, 4, "auto")
    seen = observe(model, [request.target for request in requests], [x])
    fit(model, [choice for r in requests if (choice := choose(r, seen.moments)).refusal is None], seen)
    assert before.differences(model) == []


@pytest.mark.parametrize("name", ["kernel per axis", "transposed", "conv1d reflected", "grouped", "conv3d"])
@pytest.mark.parametrize("kind", ["svd", "spatial", "tucker", "cp", "tensor_train"])
def test_the_last_factor_is_multiplied_with_its_inputs(name: str, kind: str) -> None:
    layer, _ = layer_and_inputs(name)
    choice = requested(nn.Sequential(layer), 2, kind)[0]
    if KINDS[kind].refusal(choice.target.shape):
        return
    chosen = choose(choice, {})
    ranks = KINDS[kind].checked_ranks(choice.target.shape, 2)
    factors = decomposed(type(chosen)(chosen.target, KINDS[kind], ranks), None)[0]
    shape = choice.target.shape
    patches = torch.randn(9, shape.inputs, *shape.kernel, dtype=torch.float64)
    outputs = patches.flatten(1) @ KINDS[kind].merged(factors, shape.inputs).flatten(1).T
    found = last_inputs(KINDS[kind], patches, factors) @ factors[-1].flatten(1).T
    torch.testing.assert_close(found, outputs)


def test_batches_that_cannot_be_used_are_refused_and_nothing_changes() -> None:
    model, x = network(), images()
    before = State.of(model)
    with pytest.raises(evolvenet.TraceError, match="Wrap it in a list"):
        evolvenet.factorize(model, 4, batches=x)
    with pytest.raises(evolvenet.TraceError, match="at least one batch"):
        evolvenet.factorize(model, 4, batches=[])
    with pytest.raises(evolvenet.SpectrumError, match="finite inputs"):
        evolvenet.factorize(model, 4, batches=[x * torch.nan])
    assert before.differences(model) == []
    model[0].get_parameter("weight").data[0, 0, 0, 0] = torch.nan
    whole = repr(model)
    with pytest.raises(evolvenet.SpectrumError, match="finite weights"):
        evolvenet.factorize(model, 4)
    assert repr(model) == whole


def test_fits_are_tested_on_other_batches_than_those_they_are_made_on() -> None:
    """Crops of a few photos: samples of one batch are nearly the same, and every second one says nothing new."""

    def sources(count: int, seed: int) -> list[Tensor]:
        draw = torch.Generator().manual_seed(seed)
        photos = torch.randn(count, 1, 3, 24, generator=draw, dtype=torch.float64)
        near = 0.03 * torch.randn(count, 8, 3, 24, generator=draw, dtype=torch.float64)
        return list((photos + near).flatten(1, 2))

    errors: dict[str, float] = {"batch": 0.0, "sample": 0.0}
    for seed in range(3):
        torch.manual_seed(seed)
        whole = nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 8)).double()
        batches, new = sources(8, seed), torch.cat(sources(100, 10 + seed))
        for way in errors:
            model = copy.deepcopy(whole)
            with pytest.MonkeyPatch.context() as patch:
                if way == "sample":
                    odd = torch.arange(8 * 24) % 2 == 1
                    patch.setattr("evolvenet.lowrank.fit.held_out_of", lambda *_, odd=odd: odd)
                evolvenet.factorize(model, {"0": 6, "2": 8}, batches=batches)
            errors[way] += relative(model(new), whole(new))
    assert errors["batch"] < 0.9 * errors["sample"], errors

"""Networks with complex weights: measured by complex singular values, cut and grown like others, no imaginary part lost."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import evolvenet
from evolvenet.pruning.trials import trial_curves

pytestmark = pytest.mark.filterwarnings("error")  # torch warns where an imaginary part is dropped
Z = torch.randn(200, 4, dtype=torch.cdouble, generator=torch.Generator().manual_seed(0))


class Complex(nn.Module):
    """Two complex layers, read by their magnitudes, or put out as they are."""

    def __init__(self, magnitudes: bool = True) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.a = nn.Linear(4, 16, dtype=torch.cdouble)
            self.b = nn.Linear(16, 3, dtype=torch.cdouble)
            self.c = nn.Linear(3, 1, dtype=torch.double) if magnitudes else None

    def forward(self, z: Tensor) -> Tensor:
        h = self.a(z)
        h = self.b(h * h.abs().sigmoid())
        return h if self.c is None else self.c(h.abs())


def loss(outputs: Tensor, _: Tensor) -> Tensor:
    return (outputs.abs() - 1).square().mean()


def test_the_spectrum_is_that_of_the_complex_weight() -> None:
    model = Complex()
    found = evolvenet.spectra(model, evolvenet.trace(model, Z[:2]))["a"]
    expected = torch.linalg.svdvals(model.a.weight.detach())
    torch.testing.assert_close(found, torch.cat([expected, expected.new_zeros(12)]), atol=1e-7, rtol=1e-7)


def test_a_cut_equals_units_masked_out_and_keeps_the_strongest() -> None:
    model = Complex()
    strength = model.a.weight.norm(dim=1) * model.b.weight.norm(dim=0)
    kept = strength.argsort(descending=True)[:11].sort().values
    h = model.a(Z)
    assert model.c is not None
    expected = model.c(((h * h.abs().sigmoid())[:, kept] @ model.b.weight[:, kept].T + model.b.bias).abs())
    evolvenet.prune(model, evolvenet.trace(model, Z[:2]), {"a": 11}, batches=[Z])
    torch.testing.assert_close(model(Z), expected)


@pytest.mark.parametrize("magnitudes", [True, False])
@pytest.mark.parametrize("method", ["orthogonal", "paired", "gradmax", "tiny"])
def test_growth_keeps_the_function_and_new_units_train(method: str, magnitudes: bool) -> None:
    model = Complex(magnitudes)
    before = model(Z)
    data = {"batches": [(Z, Z)], "loss": loss} if method in ("gradmax", "tiny") else {}
    evolvenet.grow(model, evolvenet.trace(model, Z[:2]), {"a": 20}, method=method, **data)
    torch.testing.assert_close(model(Z), before)
    start = model.b.weight[:, 16:].detach().clone(), model.a.weight[16:].detach().clone()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        loss(model(Z), Z).backward()
        optimizer.step()
    for now, then in zip((model.b.weight[:, 16:], model.a.weight[16:]), start, strict=True):
        assert bool(((now - then).real.abs() > 0).all() and ((now - then).imag.abs() > 0).all())


def test_new_rows_are_orthogonal_to_the_others_in_complex_numbers() -> None:
    layer = nn.Linear(8, 3, dtype=torch.cdouble)
    model = nn.Sequential(layer, nn.Tanh(), nn.Linear(3, 2, dtype=torch.cdouble))
    x = torch.randn(2, 8, dtype=torch.cdouble)
    evolvenet.grow(model, evolvenet.trace(model, x), {"0": 7})
    weight = layer.weight.detach()
    across = weight[3:] @ weight.mH
    across[:, 3:] -= torch.diag(across[:, 3:].diagonal())
    assert float(across.abs().max()) < 1e-12


@pytest.mark.parametrize("magnitudes", [True, False])
@pytest.mark.parametrize(
    "policy",
    [
        evolvenet.Threshold(prune=0.05, grow=0.9),
        evolvenet.Price(price=1e-3),
        evolvenet.Budget(params=90, by=0.6),
        evolvenet.Budget(params=90, by=0.6, trials=True),
    ],
    ids=["Threshold", "Price", "Budget", "trials"],
)
def test_no_event_fails(policy: evolvenet.Policy, magnitudes: bool) -> None:
    model = Complex(magnitudes)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    evolver = evolvenet.Evolver(model, optimizer, policy, Z[:2])
    for event in range(2):
        optimizer.zero_grad()
        outputs = model(Z)
        outputs.retain_grad()
        loss(outputs, Z).backward()
        evolver.observe(Z, [outputs.grad])
        optimizer.step()
        assert evolver.step(progress=(event + 1) / 2).skipped is None
    assert evolver.graph.sizes["a"] != 16


def test_trials_see_changes_of_complex_outputs() -> None:
    model = Complex(magnitudes=False)
    curve = trial_curves(model, evolvenet.trace(model, Z[:2]), [Z], shares=(0.5, 0.25))["a"]
    outputs, errors = model(Z).detach(), {}
    for size in (8, 4):
        cut = Complex(magnitudes=False)
        evolvenet.prune(cut, evolvenet.trace(cut, Z[:2]), {"a": size}, batches=[Z])
        errors[size] = float(
            (cut(Z) - outputs).detach().abs().square().sum() / (outputs - outputs.mean(0)).abs().square().sum()
        )
    assert {size: dict(curve)[size] for size in errors} == pytest.approx(errors)

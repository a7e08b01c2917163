"""A step function stands in place of a model's inputs in everything that runs a model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import evolvenet
from evolvenet.execution.inputs import first_samples
from evolvenet.execution.isolation import model_outputs
from evolvenet.execution.step import Step, network_outputs, run_model
from evolvenet.measurement.activation_moments import collect
from evolvenet.pruning.trials import trial_curves


def autoencoder() -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "encoder": nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4)),
            "decoder": nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 6)),
        }
    ).double()


def reconstruction(model: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(model, nn.ModuleDict)
    return nn.functional.mse_loss(model["decoder"](model["encoder"](x)), x)


def test_a_step_is_run_with_the_model_and_its_batch() -> None:
    model, x = autoencoder(), torch.randn(5, 6).double()
    torch.testing.assert_close(run_model(model, Step(reconstruction, x)), reconstruction(model, x))


def test_functions_over_nested_tensors_reach_the_batch() -> None:
    step = Step(reconstruction, {"x": torch.ones(5, 6), "y": torch.ones(5)})
    assert [tuple(t.shape) for t in first_samples(step, 2).batch.values()] == [(2, 6), (2,)]
    doubled = tree_map_only(Tensor, lambda t: 2 * t, step)
    assert doubled.function is reconstruction
    assert float(doubled.batch["y"][0]) == 2


def test_what_is_compared_are_the_outputs_of_the_networks_that_the_step_calls() -> None:
    model, x = autoencoder(), torch.randn(5, 6).double()
    code = model["encoder"](x)
    for found in (network_outputs(model, Step(reconstruction, x)), model_outputs(model, Step(reconstruction, x))):
        torch.testing.assert_close(found, [code, model["decoder"](code)])


def test_a_step_that_calls_no_module_is_compared_by_what_it_returns() -> None:
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    found = network_outputs(model, Step(lambda m, batch: batch @ m.weight.T, x))
    torch.testing.assert_close(found, [x @ model.weight.T])


def test_every_width_between_the_networks_of_a_step_resizes() -> None:
    model, x = autoencoder(), torch.randn(64, 6).double()
    graph = evolvenet.trace(model, Step(reconstruction, x[:2]))
    assert {width.name: width.size for width in graph.resizable} == {"encoder.0": 12, "encoder.2": 4, "decoder.0": 10}
    assert "fixed size" in str(graph.widths["decoder.2"].frozen)
    before = reconstruction(model, x)
    grown = evolvenet.grow(model, graph, {"encoder.0": 15, "encoder.2": 6, "decoder.0": 11})
    torch.testing.assert_close(reconstruction(model, x), before, rtol=0, atol=1e-12)
    evolvenet.prune(model, grown, graph.sizes, batches=[Step(reconstruction, x)])
    torch.testing.assert_close(reconstruction(model, x), before, rtol=0, atol=1e-9)


def test_moments_of_a_step_are_those_of_its_networks_inputs() -> None:
    model, x = autoencoder(), torch.randn(64, 6).double()
    graph = evolvenet.trace(model, Step(reconstruction, x[:2]))
    statistics = collect(model, graph, [Step(reconstruction, x)])
    code = model["encoder"](x)
    (tie,) = graph.widths["encoder.2"].consumers
    torch.testing.assert_close(statistics[tie].mean, code.mean(0))


def test_trials_compare_the_outputs_that_keep_their_shape() -> None:
    model, x = autoencoder(), torch.randn(64, 6).double()
    graph = evolvenet.trace(model, Step(reconstruction, x[:2]))
    curves = trial_curves(model, graph, [Step(reconstruction, x)])
    for curve in curves.values():
        assert curve[-1][1] == 0
        assert all(0 < loss < float("inf") for _, loss in curve[:-1])


@pytest.mark.parametrize("loss", ["mse_loss", "smooth_l1_loss", "huber_loss", "l1_loss"])
def test_a_loss_between_two_networks_ties_their_units(loss: str) -> None:
    model = nn.ModuleDict({"one": nn.Linear(3, 8), "two": nn.Linear(3, 8)})
    compare = getattr(nn.functional, loss)

    def step(m: nn.Module, x: Tensor) -> Tensor:
        assert isinstance(m, nn.ModuleDict)
        return compare(m["one"](x), m["two"](x))

    graph = evolvenet.trace(model, Step(step, torch.randn(4, 3)))
    (width,) = [width for width in graph.widths.values() if width.size == 8]
    assert {tie.tensor for tie in width.producers} == {"one.weight", "two.weight"}
    assert width.mixed


@pytest.mark.parametrize(
    "step",
    [
        lambda m, batch: nn.functional.cross_entropy(m(batch[0]), batch[1]),
        lambda m, batch: nn.functional.nll_loss(m(batch[0]).log_softmax(1), batch[1]),
        lambda m, batch: nn.functional.multi_margin_loss(m(batch[0]), batch[1]),
        lambda m, batch: nn.functional.binary_cross_entropy_with_logits(m(batch[0]), batch[2]),
        lambda m, batch: nn.functional.binary_cross_entropy(m(batch[0]).sigmoid(), batch[2]),
    ],
)
def test_what_a_loss_compares_with_targets_keeps_its_size(step: object) -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 5))
    batch = (torch.randn(4, 3), torch.tensor([0, 1, 2, 4]), torch.rand(4, 5))
    graph = evolvenet.trace(model, Step(step, batch))  # type: ignore[arg-type]
    assert [width.name for width in graph.resizable] == ["0"]

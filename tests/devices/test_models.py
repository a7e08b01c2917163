"""Tracing, changes of widths and ranks, and files give on every device what they give on the CPU."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import evolvenet
from evolvenet import IndexMap, WidthGraph
from tests.helpers.cases import CASES, Case, distance, graph_of, outputs, shuffled, without_reasons
from tests.helpers.devices import Device, device_named

QUICK = {"mlp", "resnet", "lstm", "transformer", "two_inputs"}
HOST = {"peeking"}
"""Cases whose own code takes tensors for NumPy's."""
TABLE = [
    pytest.param(case, id=case.name, marks=[] if case.name in QUICK else [pytest.mark.long])
    for case in CASES
    if case.name not in HOST
]
table = pytest.mark.parametrize("case", TABLE)


def on_device(model: nn.Module, device: Device) -> bool:
    """Whether all of a model's tensors are where they were."""
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return all(tensor.device == device.place for tensor in (*tensors, *grads))


def trained(model: nn.Module, batch: Any) -> torch.optim.Optimizer:
    """An optimizer that has taken one step of a model."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    sum(out.square().mean() for out in outputs_with_gradients(model, batch)).backward()  # type: ignore[union-attr]
    optimizer.step()
    return optimizer


def outputs_with_gradients(model: nn.Module, batch: Any) -> list[Tensor]:
    from tests.helpers.cases import run

    model.train()  # cuDNN's recurrent layers have no backward pass in eval mode.
    found = run(model, batch)
    model.eval()
    return [out for out in found if out.requires_grad]


@table
def test_the_graph_is_that_of_the_cpu_and_the_random_stream_goes_on_as_it_was(case: Case, device: Device) -> None:
    model, inputs = device.model(case), device.inputs(case)
    torch.randn(3, device=device.place)
    before = device.random_state(), torch.get_rng_state()
    values = [tensor.clone() for tensor in (*model.parameters(), *model.buffers())]
    graph = evolvenet.trace(model, inputs)
    assert without_reasons(graph) == without_reasons(graph_of(case))
    assert torch.equal(device.random_state(), before[0])
    assert torch.equal(torch.get_rng_state(), before[1])
    assert all(map(torch.equal, values, (*model.parameters(), *model.buffers())))
    assert on_device(model, device)


def maps_of(graph: WidthGraph) -> dict[str, IndexMap]:
    """Every second width with a unit less, the others in another order."""
    return {
        name: IndexMap.keep(range(1, size), size) if k % 2 else shuffled(size)
        for k, (name, size) in enumerate(graph.sizes.items())
    }


@table
def test_resizing_gives_the_model_and_the_optimizer_of_the_cpu(case: Case, device: Device) -> None:
    maps = maps_of(graph_of(case))
    model = device.model(case)
    optimizer = trained(model, device.inputs(case))
    host, state = case.model().to(device.dtype), copy.deepcopy(optimizer.state_dict())
    host.load_state_dict(model.state_dict())
    host_optimizer = torch.optim.Adam(host.parameters(), lr=1e-3)
    host_optimizer.load_state_dict(state)
    found = [(model, optimizer), (host, host_optimizer)]
    for each, its in found:
        evolvenet.resize(each, graph_of(case), maps, optimizers=[its])
    assert on_device(found[0][0], device)
    for one, two in zip(found[0][0].state_dict().values(), found[1][0].state_dict().values(), strict=True):
        assert torch.equal(one.cpu(), two)
    states = [optimizer.state_dict()["state"] for _, optimizer in found]
    for key in states[1]:
        for name, two in states[1][key].items():
            assert torch.equal(states[0][key][name].cpu(), two.cpu())
    trained(found[0][0], device.inputs(case))  # It trains on.


@table
def test_growing_keeps_the_function(case: Case, device: Device) -> None:
    model, inputs = device.model(case), device.inputs(case)
    before = outputs(model, inputs)
    sizes = {
        name: size + 2 * graph_of(case).widths[name].multiple
        for name, size in case.sizes.items()
        if name not in case.mixed
    }
    evolvenet.grow(model, graph_of(case), sizes)
    assert distance(outputs(model, inputs), before) < device.tolerance
    assert on_device(model, device)


@table
def test_pruning_on_batches_gives_the_outputs_that_it_gives_on_the_cpu(case: Case, device: Device) -> None:
    graph = graph_of(case)
    sizes = {name: max(width.size - width.multiple, 1) for name, width in graph.widths.items() if name in graph.sizes}
    found = []
    with device_named("cpu") as cpu:
        for place in (device, Device("cpu", cpu.place, device.dtype, device.tolerance)):
            model = place.model(case)
            evolvenet.prune(model, graph, sizes, batches=place.batches(case))
            found.append([out.cpu() for out in outputs(model, place.inputs(case))])
    if case.name.startswith(("lstm", "gru", "rnn")) and device.place.type != "cpu":
        # There the weights of the inputs are multiplied at every step, and what is used several times is not fitted.
        return
    assert distance(*found) < 1000 * device.tolerance
    assert all(bool(out.isfinite().all()) for out in found[0])


@table
def test_a_saved_model_is_loaded_on_the_device_and_on_the_cpu(case: Case, device: Device, tmp_path: Path) -> None:
    model, graph = device.model(case), graph_of(case)
    maps = {name: IndexMap.keep(range(size - graph.widths[name].multiple), size) for name, size in graph.sizes.items()
            if size > graph.widths[name].multiple}  # fmt: skip
    evolvenet.resize(model, graph, maps)
    evolvenet.save(model, tmp_path / "model.pt")
    expected = outputs(model, device.inputs(case))
    loaded = device.model(case, seed=2)
    evolvenet.load(loaded, tmp_path / "model.pt")
    assert on_device(loaded, device)
    assert distance(outputs(loaded, device.inputs(case)), expected) < device.tolerance
    host = case.model(seed=2).to(device.dtype)
    evolvenet.load(host, tmp_path / "model.pt")
    for name, tensor in model.state_dict().items():
        assert torch.equal(host.state_dict()[name], tensor.cpu())


DENSE = [case for case in CASES if case.name in {"mlp", "conv", "conv1d", "attention"}]


@pytest.mark.parametrize("case", DENSE, ids=str)
def test_factors_of_full_energy_compute_the_layers_outputs_and_merge_again(case: Case, device: Device) -> None:
    model, batches = device.model(case), device.batches(case)
    optimizer = trained(model, batches[0])
    before = outputs(model, batches[0])
    report = evolvenet.factorize(model, 0.5, batches=batches, optimizers=[optimizer])
    assert on_device(model, device)
    assert any(layer.kind for layer in report.layers)
    cut = outputs(model, batches[0])
    assert all(bool(out.isfinite().all()) for out in cut)
    evolvenet.trace(model, device.inputs(case))
    evolvenet.merge(model, optimizers=[optimizer])
    assert on_device(model, device)
    assert distance(outputs(model, batches[0]), cut) < device.tolerance
    assert distance(cut, before) < 2
    trained(model, batches[0])


@pytest.mark.parametrize("cost", ["parameters", "macs", "bytes"])
def test_compressing_meets_its_limit(cost: str, device: Device) -> None:
    case = next(case for case in CASES if case.name == "conv")
    model, batches = device.model(case), device.batches(case)
    have: dict[str, int] = {"parameters": parameters_of(model), "macs": 10_000, "bytes": 2_500}
    limit: dict[str, Any] = {cost: int(0.7 * have[cost])}
    done = evolvenet.compress(model, device.inputs(case), [*batches, *batches], **limit)
    assert done.after <= limit[cost]
    assert on_device(model, device)


def parameters_of(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_allocating_gives_sizes_that_fit(device: Device) -> None:
    case = next(case for case in CASES if case.name == "resnet")
    model = device.model(case)
    graph = graph_of(case)
    limit = int(0.6 * parameters_of(model))
    sizes = evolvenet.allocate(model, graph, parameters=limit, batches=device.batches(case))
    evolvenet.prune(model, graph, sizes, batches=device.batches(case))
    assert parameters_of(model) <= limit


class Block(nn.Module):
    """x + down(relu(up(x))), which adds nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, x: Tensor) -> Tensor:
        """As many features as there are."""
        return x + self.down(self.up(x).relu())


def test_a_block_that_carries_nothing_is_removed(device: Device) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), Block(), nn.Linear(4, 2)).to(device.dtype).to(device.place)
    batch = torch.randn(8, 4, dtype=device.dtype, device="cpu").to(device.place)
    before = model(batch)
    assert evolvenet.remove_blocks(model, batch) == {"1": 0.0}
    assert torch.equal(model(batch), before)
    assert on_device(model, device)

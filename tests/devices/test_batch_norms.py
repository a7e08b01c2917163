"""A batch norm is another op on a GPU, and with several processes; what is measured and fitted is the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

import evolvenet
from evolvenet.execution.isolation import isolated
from tests.helpers.cases import distance, outputs, without_reasons
from tests.helpers.devices import Device
from tests.helpers.small_models import Residual, convnet, images, used

aten: Any = torch.ops.aten


def on_gpu(
    x: Tensor, mean: Any, variance: Any, weight: Any = None, bias: Any = None, training: bool = False,
    momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """What `functional.batch_norm` runs on CUDA with cuDNN."""
    return aten.cudnn_batch_norm(x, weight, bias, mean, variance, training, momentum, eps)[0]


@pytest.fixture
def cudnn(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """cuDNN's op, computed by the CPU's kernel; gives what puts it into use."""
    library = torch.library.Library("aten", "IMPL")

    def computed(*args: Any) -> Any:
        return *aten.native_batch_norm(*args), torch.empty(0, dtype=torch.uint8)

    library.impl("cudnn_batch_norm", computed, "CPU")
    yield lambda: monkeypatch.setattr(nn.functional, "batch_norm", on_gpu)
    library._destroy()


@pytest.mark.parametrize("make", [Residual, convnet], ids=["sums", "running means"])
def test_a_cut_is_made_up_for_at_sums_and_in_running_means_as_on_the_cpu(make: Any, cudnn: Any) -> None:
    found = []
    for use in (lambda: None, cudnn):
        use()
        torch.manual_seed(1)
        model = used(make())
        batch = images()
        graph = evolvenet.trace(model, batch[:2])
        evolvenet.prune(
            model, graph, {name: width.size - 2 for name, width in graph.widths.items() if not width.frozen}, [batch]
        )
        found.append((graph, outputs(model, batch), dict(model.state_dict())))
    assert without_reasons(found[0][0]) == without_reasons(found[1][0])
    assert all(map(torch.equal, found[0][1], found[1][1]))
    assert all(torch.equal(tensor, found[1][2][name]) for name, tensor in found[0][2].items())


def test_a_batch_norm_over_several_processes_is_traced_and_fitted_as_the_one_that_it_is(device: Device) -> None:
    found = []
    for convert in (lambda model: model, nn.SyncBatchNorm.convert_sync_batchnorm):
        torch.manual_seed(1)
        model, batch = convert(used(Residual()).to(device.dtype)).to(device.place), device.move(images())
        if found:
            dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
        try:
            graph = evolvenet.trace(model.train(), batch[:2])
            sizes = {width.name: width.size - 2 for width in graph.resizable}
            evolvenet.prune(model, graph, sizes, [batch])
        finally:
            if found:
                dist.destroy_process_group()
        assert all("forward" not in vars(module) for module in model.modules())
        found.append((graph, outputs(model, batch)))
    assert found[0][0].sizes
    assert without_reasons(found[0][0]) == without_reasons(found[1][0])
    assert distance(found[0][1], found[1][1]) <= (0 if device.exact else 1e-6)


def test_a_batch_norm_over_several_processes_runs_alone_in_training_mode() -> None:
    torch.manual_seed(0)
    x, own = torch.randn(4, 3, 5, 5), nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    expected = own.train()(x)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(own)
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        with isolated(model):
            model.train()
            found = model(x)
    finally:
        dist.destroy_process_group()
    assert torch.equal(found, expected)
    assert "forward" not in vars(model.get_submodule("1"))

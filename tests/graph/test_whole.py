"""Parameters of which this process holds a part are refused, with the way out."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import distributed, nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import evolvenet
from evolvenet.errors import UnsupportedStrategyError
from evolvenet.graph.whole import sharded_by


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of this process alone."""
    distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def fsdp2(model: nn.Module) -> nn.Module:
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    return model


def tensor_parallel(model: nn.Module) -> nn.Module:
    return parallelize_module(model, init_device_mesh("cpu", (1,)), {"0": ColwiseParallel()})


def deepspeed(model: nn.Module) -> nn.Module:
    """What ZeRO stage 3, which is not installed here, writes on a parameter."""
    next(model.parameters()).ds_tensor = torch.zeros(1)  # type: ignore[attr-defined]
    return model


@pytest.mark.parametrize(
    ("shard", "text"),
    [
        (fsdp2, r"fully_shard.*under DDP.*evolvenet\.load"),
        (tensor_parallel, r"tensor parallelism.*under DDP.*evolvenet\.load"),
        (deepspeed, r"DeepSpeed.*under DDP.*evolvenet\.load"),
        (
            nn.DataParallel,
            r"nn\.DataParallel at DataParallel, .* Give its module \(model\.module\);.*DistributedDataParallel",
        ),
    ],
)
@pytest.mark.usefixtures("group")
def test_sharded_models_are_refused_with_the_way_out(shard: Callable[[nn.Module], nn.Module], text: str) -> None:
    graph = evolvenet.trace(network(), torch.zeros(1, 4))
    model = shard(network())
    with pytest.raises(UnsupportedStrategyError, match=text):
        evolvenet.trace(model, torch.zeros(1, 4))
    assert sharded_by(model)
    with pytest.raises(UnsupportedStrategyError, match=text):
        evolvenet.prune(model, graph, {"0": 4})

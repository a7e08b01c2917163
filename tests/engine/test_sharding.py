"""`whole_parameters`: a sharded model is an ordinary one for a while, and sharded as before afterwards. Here by one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import evolvenet
from evolvenet.engine.distributed import fingerprint
from evolvenet.errors import UnsupportedStrategyError


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """A process group of this process alone."""
    distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


class Tied(nn.Module):
    """Two layers of one weight, a frozen one, and one that is left out of the sharding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.inner, self.second = nn.Linear(4, 6, bias=False), nn.Linear(4, 9), nn.Linear(9, 4)
        self.again, self.apart = nn.Linear(4, 6, bias=False), nn.Linear(6, 2)
        self.again.weight = self.first.weight
        self.second.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.second(self.inner(x).relu())
        return self.apart(self.first(x) + self.again(hidden))


def sharded(mesh: DeviceMesh) -> Tied:
    model = Tied()
    for layer in (model.inner, model.second):
        fully_shard(layer, mesh=mesh, reshard_after_forward=layer is model.inner)
    fully_shard(model, mesh=mesh, ignored_params=set(model.apart.parameters()))
    model.inner.set_modules_to_forward_prefetch([model.second])  # type: ignore[operator]
    model.second.set_gradient_divide_factor(1.0)  # type: ignore[operator]
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, between: Callable[[], None]) -> None:
    for step in range(steps):
        model(torch.randn(8, 4, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()
        between()
        optimizer.zero_grad()


def settings(model: Tied) -> list[Any]:
    """What the calls of `fully_shard` were given, as private attributes keep it."""
    found: list[Any] = []
    for module in model.modules():
        if isinstance(module, FSDPModule):
            state: Any = module._get_fsdp_state()
            groups = [
                (each.post_forward_mesh_info is None, each.gradient_divide_factor) for each in state._fsdp_param_groups
            ]
            sizes = [[tuple(p.sharded_param.shape) for p in each.fsdp_params] for each in state._fsdp_param_groups]
            found.append((type(module).__name__, groups, sizes, len(state._states_to_forward_prefetch)))
    return found


def test_nothing_changes_where_nothing_is_done(mesh: DeviceMesh) -> None:
    weights: list[str] = []
    for interrupted in (False, True):
        model = sharded(mesh)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        seen: list[Any] = []

        def interrupt(model: Tied = model, optimizer: Any = optimizer, seen: list[Any] = seen) -> None:
            seen.append(settings(model))
            gradient = model.inner.weight.grad
            assert isinstance(gradient, DTensor)
            with evolvenet.whole_parameters(model, [optimizer]):
                assert type(model) is Tied
                assert not any(
                    isinstance(p, DTensor) for p in [*model.parameters(), *optimizer.param_groups[0]["params"]]
                )
                assert model.again.weight is model.first.weight
                assert not model.second.bias.requires_grad
                assert model.inner.weight.grad is not None
                assert torch.equal(model.inner.weight.grad, gradient.full_tensor())
            assert isinstance(model.inner.weight.grad, DTensor)

        train(model, optimizer, 4, interrupt if interrupted else lambda: None)
        assert seen == seen[:1] * len(seen)
        with evolvenet.whole_parameters(model, [optimizer]):
            weights.append(fingerprint(model))
    assert weights[0] == weights[1]


def test_a_cut_of_a_sharded_model_is_that_of_a_whole_one(mesh: DeviceMesh) -> None:
    found: list[Any] = []
    for model in (Tied(), sharded(mesh)):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

        def nothing() -> None:
            return None

        train(model, optimizer, 2, nothing)
        with evolvenet.whole_parameters(model, [optimizer]):
            graph = evolvenet.trace(model, torch.zeros(2, 4))
            evolvenet.prune(model, graph, {"inner": 5}, optimizers=[optimizer])
        train(model, optimizer, 2, nothing)
        with evolvenet.whole_parameters(model, [optimizer]):
            moments = [optimizer.state[p]["exp_avg"] for p in model.parameters() if p.requires_grad]
            found.append((model.inner.out_features, [*model.parameters(), *moments]))
    assert found[0][0] == found[1][0] == 5
    torch.testing.assert_close(found[0][1], found[1][1])


def test_an_error_in_the_body_leaves_the_model_sharded(mesh: DeviceMesh) -> None:
    model = sharded(mesh)
    with pytest.raises(ZeroDivisionError), evolvenet.whole_parameters(model):
        raise ZeroDivisionError
    assert isinstance(model, FSDPModule)
    assert isinstance(model.inner.weight, DTensor)
    model(torch.zeros(2, 4)).sum().backward()


def tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> None:
    parallelize_module(model, mesh, {"0": ColwiseParallel()})


@pytest.mark.parametrize(
    ("shard", "name"),
    [
        (
            lambda m, mesh: fully_shard(m, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)),
            "autocast",
        ),
        (
            lambda m, mesh: fully_shard(m, mesh=mesh, offload_policy=CPUOffloadPolicy(pin_memory=False)),
            "CPUOffloadPolicy",
        ),
        (
            lambda m, mesh: fully_shard(m, mesh=mesh, shard_placement_fn=lambda p: Shard(p.dim() - 1)),
            "shard_placement_fn",
        ),
        (lambda m, mesh: (tensor_parallel(m, mesh), fully_shard(m[1], mesh=mesh)), "tensor parallelism"),
        (tensor_parallel, "tensor parallelism"),
    ],
)
def test_sharding_that_could_not_be_repeated_is_refused_with_the_way_out(
    shard: Any, name: str, mesh: DeviceMesh
) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    shard(model, mesh)
    with pytest.raises(UnsupportedStrategyError, match=rf"{name}.*under DDP"), evolvenet.whole_parameters(model):
        pass

"""DDP's wrapper after a change of widths keeps what it was made with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

import evolvenet
from evolvenet.errors import UnsupportedStrategyError


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    """Two processes, of which this is one; the other is pretended."""
    distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    distributed.destroy_process_group()


def test_settings_hooks_and_mode_stay() -> None:
    wrapper = DistributedDataParallel(
        nn.Linear(4, 2),
        bucket_cap_mb=7,
        broadcast_buffers=False,
        find_unused_parameters=True,
        gradient_as_bucket_view=True,
    ).eval()
    wrapper.register_comm_hook(None, allreduce_hook)
    seen: list[Any] = []
    wrapper.register_forward_hook(lambda *_: seen.append(0))
    evolvenet.renew_ddp(nn.Sequential(wrapper))
    assert not wrapper.training
    assert wrapper.bucket_bytes_cap == 7 * 2**20
    assert (wrapper.broadcast_buffers, wrapper.find_unused_parameters, wrapper.gradient_as_bucket_view) == (
        False,
        True,
        True,
    )
    assert [hook for hook, _ in wrapper._comm_hooks] == [allreduce_hook]
    wrapper(torch.zeros(1, 4))
    assert seen == [0]


@pytest.mark.parametrize(("before", "after"), [(9, 3), (2, 2)])
def test_powersgd_keeps_its_state_without_the_old_buckets_and_soon_exchanges_whole_gradients(
    before: int, after: int
) -> None:
    wrapper = DistributedDataParallel(nn.Linear(4, 2))
    state = PowerSGDState(None, start_powerSGD_iter=5)
    wrapper.register_comm_hook(state, powerSGD_hook)
    tables = (state.error_dict, state.p_memory_dict, state.q_memory_dict)
    for table in tables:
        table[0] = torch.ones(10)
    state.iter = before
    evolvenet.renew_ddp(wrapper)
    ((hook, kept),) = wrapper._comm_hooks
    assert hook is powerSGD_hook
    assert kept is state
    assert tables == ({}, {}, {})
    assert state.iter == after


def test_mixed_precision_of_its_own_is_refused() -> None:
    wrapper = DistributedDataParallel(nn.Linear(4, 2))
    wrapper.mixed_precision = object()  # type: ignore[assignment]
    with pytest.raises(UnsupportedStrategyError, match="without mixed_precision"):
        evolvenet.renew_ddp(wrapper)

"""DDP's wrapper after a change of widths keeps what it was made with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
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


def test_mixed_precision_of_its_own_is_refused() -> None:
    wrapper = DistributedDataParallel(nn.Linear(4, 2))
    wrapper.mixed_precision = object()  # type: ignore[assignment]
    with pytest.raises(UnsupportedStrategyError, match="without mixed_precision"):
        evolvenet.renew_ddp(wrapper)

"""Code that would wait for other processes raises where one process runs it alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import distributed
from torch._C._distributed_c10d import HashStore

from evolvenet.errors import CollectiveError
from evolvenet.execution.collectives import without_collectives


@pytest.fixture
def group() -> Iterator[None]:
    """A group of this process alone."""
    distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_where_there_are_several_processes_an_exchange_is_refused_and_all_else_is_computed(
    group: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "get_world_size", lambda *_: 2)
    numbers = torch.ones(3)
    with without_collectives():
        assert (numbers + 1).tolist() == [2, 2, 2]
        with pytest.raises(CollectiveError, match=r"all_?reduce.*in which all 2 take part"):
            distributed.all_reduce(numbers)
        with pytest.raises(CollectiveError, match="broadcast"):
            distributed.broadcast(numbers, 0)
    distributed.all_reduce(numbers)


def test_one_process_alone_may_exchange_with_itself(group: None) -> None:
    numbers = torch.ones(3)
    with without_collectives():
        distributed.all_reduce(numbers)
    assert numbers.tolist() == [1, 1, 1]

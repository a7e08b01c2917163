"""Kept inputs are copies, in whatever container they come."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from transformers import BatchEncoding

from evolvenet.execution.inputs import copied


@dataclass(frozen=True)
class Graph:
    nodes: Tensor
    edges: dict[str, Tensor]


class Named(dict[str, Tensor]):
    """A dict of one's own, which no copy is made of: its constructor may be any."""


@pytest.mark.parametrize(
    ("made", "read"),
    [
        (lambda x: BatchEncoding({"x": x}), lambda kept: kept["x"]),
        (lambda x: UserDict({"x": [x]}), lambda kept: kept["x"][0]),
        (lambda x: Graph(torch.zeros(1), {"x": x}), lambda kept: kept.edges["x"]),
        (lambda x: (Graph(x, {}),), lambda kept: kept[0].nodes),
    ],
)
def test_what_the_caller_writes_later_does_not_reach_the_copy(
    made: Callable[[Tensor], Any], read: Callable[[Any], Tensor]
) -> None:
    x = torch.zeros(2)
    batch = made(x)
    kept = copied(batch)
    x.fill_(1)
    assert type(kept) is type(batch)
    assert read(kept).tolist() == [0, 0]
    assert read(batch) is x


def test_a_packed_sequence_is_copied() -> None:
    packed = pack_sequence([torch.zeros(2), torch.zeros(1)])
    kept = copied(packed)
    packed.data.fill_(1)
    assert isinstance(kept, PackedSequence)
    assert kept.data.tolist() == [0, 0, 0]


def test_other_objects_are_kept_as_they_are() -> None:
    own, kind = Named(x=torch.zeros(1)), Graph
    assert copied((own, kind, "name", None)) == (own, kind, "name", None)
    assert copied((own,))[0] is own

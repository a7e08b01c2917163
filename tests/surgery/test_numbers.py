"""Numbers in attributes, containers and configs: every one is found, and exchanged in a copy."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import types
from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from evolvenet.surgery.numbers import attribute_of, number_at, numbers_in, with_number


@dataclasses.dataclass(frozen=True)
class Frozen:
    width: int = 8
    name: str = "small"
    kernel: tuple[int, int] = (3, 8)


@dataclasses.dataclass(slots=True)
class Slots:
    width: int = 8
    activation: type[nn.Module] = nn.ReLU
    dtype: torch.dtype = torch.float32


class Pair(NamedTuple):
    width: int = 8
    depth: int = 2


class Holder:
    """Holds a module, so it is no config."""

    def __init__(self) -> None:
        self.width, self.network = 8, nn.Linear(2, 2)


VALUES: dict[str, tuple[Any, dict[str, int]]] = {
    "int": (8, {"": 8}),
    "bool": (True, {}),
    "float": (8.0, {}),
    "tuple": ((8, 16.0, 3), {"[0]": 8, "[2]": 3}),
    "list": ([8, [16]], {"[0]": 8, "[1][0]": 16}),
    "torch.Size": (torch.Size((8, 2)), {"[0]": 8, "[1]": 2}),
    "namedtuple": (Pair(), {"[0]": 8, "[1]": 2}),
    "dict": ({"mlp": 8, "heads": {"q": 4}, 7: 8}, {"['mlp']": 8, "['heads']['q']": 4}),
    "OrderedDict": (OrderedDict(mlp=8), {"['mlp']": 8}),
    "namespace": (types.SimpleNamespace(width=8, dropout=0.1), {".width": 8}),
    "arguments": (argparse.Namespace(width=8, data=None), {".width": 8}),
    "frozen dataclass": (Frozen(), {".width": 8, ".kernel[0]": 3, ".kernel[1]": 8}),
    "slots": (Slots(), {".width": 8}),
    "config in a config": (types.SimpleNamespace(text=Slots(), lr=0.1), {".text.width": 8}),
    "holder of a module": (Holder(), {}),
    "tensor": (torch.arange(3), {}),
    "data": (list(range(1000)), {}),
}


@pytest.mark.parametrize("kind", VALUES)
def test_each_number_is_found_and_exchanged_alone(kind: str) -> None:
    value, expected = VALUES[kind]
    module: Any = nn.Module()
    module.at = value
    before = copy.deepcopy(value)
    found = {name: number for name, number in numbers_in(module) if name != "training"}
    assert found == {f"at{way}": number for way, number in expected.items()}
    for name, number in found.items():
        assert (attribute_of(name), number_at(module, name)) == ("at", number)
        other = nn.Module()
        attribute, changed = with_number(module, name, 99)
        assert type(changed) is type(value)
        setattr(other, attribute, changed)
        assert {n: v for n, v in numbers_in(other) if n != "training"} == {**found, name: 99}
    assert (
        torch.equal(before, value) if isinstance(value, torch.Tensor) else isinstance(value, Holder) or value == before
    )


def test_two_numbers_of_one_attribute_are_exchanged_one_after_the_other() -> None:
    module: Any = nn.Module()
    module.sizes = (8, 8)
    _, once = with_number(module, "sizes[0]", 5)
    assert with_number(module, "sizes[1]", 6, once) == ("sizes", (5, 6))


def test_a_number_that_is_not_there_is_none() -> None:
    module: Any = nn.Module()
    module.sizes = {"a": 1}
    assert [number_at(module, name) for name in ("other", "sizes['b']", "sizes['a'].c")] == [None, None, None]


def test_the_tables_of_modules_are_no_attributes_of_the_users() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    assert dict(numbers_in(model)) == {}

"""A file that is loaded with weights only sets no attribute but whole numbers, and reserves no memory that it does not fill."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import evolvenet
from evolvenet.surgery.checkpoint import fit_shapes
from evolvenet.surgery.untrusted_files import refuse_unsafe


class Net(nn.Module):
    """Two layers, a switch, a path and a list of sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 2)
        self.safe_mode, self.log_path, self.sizes, self.callback = True, "out.log", [6, 8], None
        self.register_buffer("mask", torch.ones(8), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Two outputs."""
        return self.b(self.a(x).relu() * self.mask)


def values(net: Net) -> dict[str, Any]:
    return {name: value for module in net.modules() for name, value in vars(module).items() if not name.startswith("_")}


@pytest.mark.parametrize(
    ("path", "name", "value"),
    [
        ("", "safe_mode", False),
        ("", "callback", 7),
        ("", "log_path", "elsewhere"),
        ("", "forward", 7),
        ("", "__class__", 7),
        ("", "training", 0),
        ("", "sizes[0]", "six"),
        ("", "sizes", 7),
        ("a", "in_features", -1),
        ("a", "in_features", 6.0),
        ("a", "in_features", True),
        ("a", "_parameters", 7),
    ],
)
def test_only_whole_numbers_are_set_where_whole_numbers_were(
    tmp_path: Path, path: str, name: str, value: object
) -> None:
    state = Net().state_dict()
    state._metadata[""]["evolvenet"] = {"buffers": {}, "numbers": [[path, name, value]]}  # type: ignore[attr-defined]
    torch.save(state, tmp_path / "file.pt")
    net = Net()
    before = values(net)
    with pytest.raises(evolvenet.EvolveNetError, match="record of widths sets"):
        evolvenet.load(net, tmp_path / "file.pt")
    assert values(net) == before


def test_numbers_that_this_code_does_not_have_are_passed_over() -> None:
    net = Net()
    before = values(net)
    fit_shapes(net, {}, record={"numbers": [["", "gone", 3], ["gone", "heads", 3]], "buffers": {}})
    assert values(net) == before


def test_numbers_of_sizes_are_set() -> None:
    net = Net()
    fit_shapes(net, {}, record={"numbers": [["", "sizes[1]", 5]], "buffers": {"mask": torch.full((5,), 2.0)}})
    assert net.sizes == [6, 5]
    assert net.get_buffer("mask").tolist() == [2.0] * 5


def test_no_other_number_with_a_fraction_is_set() -> None:
    refuse_unsafe(nn.LayerNorm(4), {}, {"numbers": [["", "eps", 5e-6]], "buffers": {}})
    with pytest.raises(evolvenet.RecordError, match="expected a whole number"):
        refuse_unsafe(nn.BatchNorm1d(4), {}, {"numbers": [["", "momentum", 0.5]], "buffers": {}})


@pytest.mark.parametrize("eps", ["boo", -1.0, float("nan"), True, 7])
@pytest.mark.parametrize("now", [None, 1e-5])
def test_the_eps_of_a_norm_is_a_small_number(now: float | None, eps: object) -> None:
    with pytest.raises(evolvenet.RecordError, match="sets 'eps'"):
        refuse_unsafe(nn.RMSNorm(4, eps=now), {}, {"numbers": [["", "eps", eps]], "buffers": {}})


@pytest.mark.parametrize("buffers", [{"a.weight": torch.ones(2)}, {"mask": 3}])
def test_only_buffers_are_set_to_tensors(buffers: dict[str, object]) -> None:
    with pytest.raises(evolvenet.RecordError, match="buffers"):
        refuse_unsafe(Net(), {}, {"numbers": [], "buffers": buffers})


@pytest.mark.parametrize("where", ["state", "record"])
def test_a_tensor_larger_than_its_data_is_refused_before_memory_is_reserved(where: str) -> None:
    huge = torch.zeros(1).expand(1 << 40)
    net = nn.Linear(3, 2)
    net.register_buffer("mask", torch.ones(2))
    record = {"numbers": [], "buffers": {"mask": huge} if where == "record" else {}}
    state = OrderedDict(net.state_dict()) | ({"mask": huge} if where == "state" else {})
    with pytest.raises(evolvenet.RecordError, match="repeats 1 numbers"):
        refuse_unsafe(net, state, record)


def test_views_that_a_model_has_itself_are_loaded() -> None:
    net = nn.Module()
    net.register_buffer("table", torch.arange(4.0).expand(3, 4))
    refuse_unsafe(net, {"table": torch.arange(4.0).expand(3, 4)}, None)

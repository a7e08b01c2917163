"""Files that are opened without a copy: the model's tensors are parts of the mapped file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import evolvenet
from evolvenet.errors import RecordError
from evolvenet.surgery import checkpoint


class Tied(nn.Module):
    """Two names for one weight, and a buffer."""

    def __init__(self, hidden: int = 12) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 5)
        self.first, self.second = nn.Linear(5, hidden), nn.Linear(hidden, 5)
        self.norm, self.head = nn.BatchNorm1d(5), nn.Linear(5, 9, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.embedding(x)
        return self.head(self.norm(hidden + self.second(self.first(hidden).relu())))


def saved(folder: Path, ending: str) -> tuple[Path, Tied, Tensor]:
    model, x = Tied().eval(), torch.arange(9)
    nn.init.normal_(model.norm.weight)
    graph = evolvenet.prune(model, evolvenet.trace(model, x), {"first": 7})
    assert graph.widths["first"].size == 7
    path = folder / f"narrow{ending}"
    evolvenet.save(model, path)
    return path, model, x


def mapped(path: Path) -> list[range]:
    lines = [line for line in Path("/proc/self/maps").read_text("utf-8").splitlines() if line.endswith(str(path))]
    ends = [line.split()[0].split("-") for line in lines]
    return [range(int(start, 16), int(stop, 16)) for start, stop in ends]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("ending", [".safetensors", ".pt", ".ckpt"])
def test_a_mapped_file_is_the_memory_of_all_weights(tmp_path: Path, ending: str, device: str) -> None:
    path, narrow, x = saved(tmp_path, ending)
    content = path.read_bytes()
    with torch.device(device):
        model = Tied()
    optimizer, known = torch.optim.SGD(model.parameters(), lr=0.1), model.first.weight
    evolvenet.load(model, path, mmap=True).eval()
    assert all(any(p.data_ptr() in part for part in mapped(path)) for p in model.parameters())
    assert model.head.weight is model.embedding.weight
    assert (model.first.in_features, model.first.out_features) == (5, 7)
    torch.testing.assert_close(model(x), narrow(x))
    if device == "cpu":
        assert model.first.weight is known
        model(x).square().sum().backward()
        optimizer.step()
        assert not torch.equal(model.first.weight, narrow.first.weight)
        assert path.read_bytes() == content


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
def test_without_a_map_a_model_on_meta_gets_memory_of_its_own(tmp_path: Path, ending: str) -> None:
    path, narrow, x = saved(tmp_path, ending)
    with torch.device("meta"):
        model = Tied()
    evolvenet.load(model, path).eval()
    assert not any(p.data_ptr() in part for part in mapped(path) for p in model.parameters())
    torch.testing.assert_close(model(x), narrow(x))


def test_other_types_are_converted(tmp_path: Path) -> None:
    path, narrow, x = saved(tmp_path, ".safetensors")
    model = evolvenet.load(Tied().double(), path, mmap=True).eval()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    torch.testing.assert_close(model(x), narrow.double()(x))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_failed_load_leaves_the_model_its_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    path, _, _ = saved(tmp_path, ".safetensors")
    with torch.device(device):
        model = Tied()
    before = [(p, p.data_ptr(), p.shape) for p in model.parameters()]
    assign = checkpoint.assign

    def failing(*arguments: object, **options: object) -> None:
        assign(*arguments, **options)  # pyright: ignore[reportArgumentType]
        raise KeyError("late")

    monkeypatch.setattr(checkpoint, "assign", failing)
    with pytest.raises(KeyError):
        evolvenet.load(model, path, mmap=True)
    assert [(p, p.data_ptr(), p.shape) for p in model.parameters()] == before


class Unsaved(nn.Linear):
    """A buffer that is not persistent."""

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.register_buffer("scale", torch.ones(3), persistent=False)


def test_a_buffer_that_is_in_no_file_is_named(tmp_path: Path) -> None:
    evolvenet.save(Unsaved(), tmp_path / "whole.pt")
    with torch.device("meta"):
        model = Unsaved()
    with pytest.raises(RecordError, match="no values of scale"):
        evolvenet.load(model, tmp_path / "whole.pt")
    assert model.weight.is_meta
    again = evolvenet.load(Unsaved(), tmp_path / "whole.pt", mmap=True)
    assert torch.equal(again.get_buffer("scale"), torch.ones(3))


def test_entries_that_share_memory_become_parameters_of_their_own(tmp_path: Path) -> None:
    def build() -> nn.Sequential:
        return nn.Sequential(*[nn.Linear(3, 3, bias=False) for _ in range(4)])

    tied: Any = build()
    block = torch.randn(5, 3)
    tied[1].weight = tied[0].weight
    state = {**tied.state_dict(), "2.weight": torch.randn(1, 3).expand(3, 3), "3.weight": block[:3]}
    torch.save(state, tmp_path / "tied.pt")
    apart: Any = evolvenet.load(build(), tmp_path / "tied.pt", mmap=True)
    assert all(torch.equal(apart.get_parameter(name), value) for name, value in state.items())
    with torch.no_grad():
        apart[0].weight.zero_()
        apart[2].weight[0] = 0
    assert torch.equal(apart[1].weight, tied[1].weight)
    assert torch.equal(apart[2].weight[1], state["2.weight"][1])
    # What is tied in the model too stays one tensor, a part of the file.
    again: Any = build()
    again[1].weight = again[0].weight
    evolvenet.load(again, tmp_path / "tied.pt", mmap=True)
    assert again[1].weight is again[0].weight
    assert any(again[0].weight.data_ptr() in part for part in mapped(tmp_path / "tied.pt"))

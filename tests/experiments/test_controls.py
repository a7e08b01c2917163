"""Networks to compare with: the widths of an evolved one, the weights of a new one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from evolvenet import IndexMap, RecordError, load, resize, trace
from experiments.models.resnet import UnpaddedResNet
from experiments.training.controls import ControlError, from_scratch


def small() -> UnpaddedResNet:
    return UnpaddedResNet(1, 10, width=6, inside=(8, 16))


@pytest.fixture
def point(tmp_path: Path) -> Path:
    """An evolved network's checkpoint."""
    model = small()
    graph = trace(model, torch.zeros(1, 1, 28, 28))
    resize(model, graph, {"stem": IndexMap.keep(range(3), 6), "blocks.1.pointwise1": IndexMap.keep(range(5), 16)})
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(7)
    torch.save(model.state_dict(), tmp_path / "point.ckpt")
    return tmp_path / "point.ckpt"


def test_the_widths_are_the_points_and_the_weights_are_new(point: Path) -> None:
    evolved = load(small(), point)
    torch.manual_seed(0)
    control = from_scratch(small(), point)
    for (name, new), old in zip(control.state_dict().items(), evolved.state_dict().values(), strict=True):
        assert new.shape == old.shape
        assert not (new == 7).any(), name
    again = [tensor.clone() for tensor in control.state_dict().values()]
    torch.manual_seed(1)
    other = from_scratch(small(), point).state_dict().values()
    assert any(not torch.equal(one, two) for one, two in zip(again, other, strict=True)), "the seed decides"
    for module in control.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.running_mean == 0).all()


def test_missing_files_other_models_and_layers_without_reset_are_refused(point: Path, tmp_path: Path) -> None:
    with pytest.raises(ControlError, match="no file"):
        from_scratch(small(), tmp_path / "nothing.ckpt")
    with pytest.raises(RecordError):
        from_scratch(nn.Linear(3, 3), point)

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

    torch.save(Own().state_dict(), tmp_path / "own.ckpt")
    with pytest.raises(ControlError, match=r"reset_parameters\(\) in every layer"):
        from_scratch(Own(), tmp_path / "own.ckpt")

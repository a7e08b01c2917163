"""`load_from_checkpoint` takes the widths of a run's checkpoint wherever evolvenet is imported, before or after Lightning."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from evolvenet.errors import RecordError
from tests.helpers.interpreters import run_script
from tests.helpers.resuming import evolution
from tests.helpers.runs import Batches, Classifier, fresh, trainer

NET = """
class Net({package}.LightningModule):
    def __init__(self, width=16, lr=1e-2):
        super().__init__()
        self.save_hyperparameters()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(6, width), torch.nn.BatchNorm1d(width), torch.nn.ReLU(), torch.nn.Dropout(0.1),
            torch.nn.Linear(width, width), torch.nn.ReLU(), torch.nn.Linear(width, 3),
        )
"""
LOAD = """
import torch, json, sys
for name in {files!r}:
    model = Net.load_from_checkpoint(name, strict={strict}, weights_only=True).eval()
    assert type(model) is Net and "load_state_dict" not in vars(Net)
    print(json.dumps(model.net(torch.ones(1, 6)).tolist()))
print("evolvenet.lightning.callback" in sys.modules)
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], list[float]]:
    """A checkpoint of a run and one of its weights alone, both of the last step; and what the network computes there."""
    folder = tmp_path_factory.mktemp("run")
    keepers = [
        ModelCheckpoint(folder, filename="whole", every_n_train_steps=24),
        ModelCheckpoint(folder, filename="light", every_n_train_steps=8, save_weights_only=True),
    ]
    model = fresh()
    trainer(folder, [evolution(), *keepers]).fit(model, Batches())
    assert model.net[0].out_features < 16  # type: ignore[operator]
    with torch.no_grad():
        expected = model.cpu().eval().net(torch.ones(1, 6)).tolist()
    return [str(folder / "whole.ckpt"), str(folder / "light.ckpt")], expected


WITHOUT_OPERATORS = """
import sys, torch
try:
    import torchvision
except RuntimeError:
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    for name in [name for name in sys.modules if name.startswith("torchvision")]:
        del sys.modules[name]
"""
"""Lightning can be imported before EvolveNet, which does the same, where torchvision's operators do not load."""
ORDERS = {
    "Lightning last, under both of its names": "import evolvenet, pytorch_lightning, lightning",
    "Lightning and the class first": (
        f"{WITHOUT_OPERATORS}\nimport lightning\n{NET.format(package='lightning')}\nimport evolvenet"
    ),
}


@pytest.mark.parametrize("order", ORDERS)
def test_after_import_evolvenet_alone(order: str, files: tuple[list[str], list[float]]) -> None:
    names, expected = files
    classes = ["lightning"] if "class Net" in ORDERS[order] else ["lightning", "pytorch_lightning"]
    script = ORDERS[order]
    for package in classes:
        define = "" if len(classes) == 1 else NET.format(package=package)
        script += f"\nimport torch\n{define}\n{LOAD.format(files=names, strict=len(classes) == 1)}"
    lines = run_script(script)
    assert [json.loads(line) for line in lines if line[0] == "["] == [expected, expected] * len(classes)
    assert [line for line in lines if line[0] != "["] == ["False"] * len(classes)


class Four(Classifier):
    """Four classes instead of three."""

    def __init__(self) -> None:
        super().__init__()
        self.net[6] = nn.Linear(16, 4)


def test_a_run_does_not_go_on_from_a_checkpoint_of_other_classes(
    files: tuple[list[str], list[float]], tmp_path: Path
) -> None:
    model = Four()
    with pytest.raises(RecordError, match=r"expected net\.6\.weight of shape \(4, 16\), as in this model, got \(3, "):
        trainer(tmp_path, [evolution()]).fit(model, Batches(), ckpt_path=files[0][0], weights_only=True)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == {name: tuple(tensor.shape) for name, tensor in Four().state_dict().items()}


def test_weights_that_a_trainer_saves_after_the_run_have_its_widths(tmp_path: Path) -> None:
    run, model = trainer(tmp_path, [evolution()]), fresh()
    run.fit(model, Batches())
    run.save_checkpoint(tmp_path / "after.ckpt", weights_only=True)
    loaded = Classifier.load_from_checkpoint(tmp_path / "after.ckpt", weights_only=True)
    assert loaded.net[0].out_features == model.net[0].out_features != 16  # type: ignore[union-attr]
    assert not model._state_dict_hooks

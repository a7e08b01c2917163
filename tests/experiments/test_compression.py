"""The factorized LeNet: `train.py`'s comparison of a network with what low rank and 8 bits make of it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate

import evolvenet
from evolvenet.measurement.cost import parameters
from experiments.lowrank.lenet import page
from experiments.models.lenet import LeNet
from experiments.training import compression
from experiments.training.compression import INT8, compression_lines, kilobytes, quantized
from tests.helpers.experiments import configuration, train, write_numbered

SHORT = [
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=2",
    "trainer.accelerator=cpu",
    "+compression.most_steps=2",
]


def test_a_lenet_is_factorized_trained_and_quantized(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compression, "REPEATS", 1)
    write_numbered(tmp_path / "cifar10.npz", (32, 32, 3))
    data = [f"data.root={tmp_path}", "data.batch_size=12", "data.val_size=10", "trainer.log_every_n_steps=1"]
    result = train(
        tmp_path, ["+experiment=cifar_lenet", "model.channels=[8,16]", "model.hidden=[48,32]", *data, *SHORT]
    )
    rows = result["compression"]["rows"]
    schemes = ["original", "EVBMF", "energy 99 %", "same size"]
    assert [(row["network"], row["state"]) for row in rows] == [
        (name, state) for name in schemes for state in ("", "+ epoch", *INT8)
    ]
    whole, article, _, ours = (rows[4 * number] for number in range(4))
    assert whole["accuracy"] == pytest.approx(result["test_acc"])
    assert whole["parameters"] == result["end"]["parameters"], "the run's network is left as it was"
    assert ours["parameters"] <= article["parameters"] < whole["parameters"]
    assert ours["kilobytes"] < whole["kilobytes"]
    assert all(len(row["classes"]) == 10 for row in rows)
    report = "\n".join(result["compression"]["reports"]["EVBMF"])
    assert "conv2: cp of rank 8" in report
    written = (tmp_path / "run" / "compression.md").read_text()
    assert written == "\n".join(compression_lines([result["compression"]]))
    assert written.count("| original |") == 6
    assert "Compressed" in capsys.readouterr().out
    text = page([result, result])
    assert "seeds 0, 0" in text
    assert written.count("\n") < text.count("\n")


def test_the_experiment_is_the_articles() -> None:
    config = configuration("+experiment=cifar_lenet")
    model = instantiate(config.classifier).model
    assert isinstance(model, LeNet)
    assert parameters(model) == 121_182
    scheme = instantiate(config.compression).schemes["EVBMF"]
    assert (scheme.ranks, scheme.data) == ("evbmf", False)
    assert scheme.kinds == {"conv1": "spatial", "conv2": "cp", "fc1": "svd", "fc2": "svd", "fc3": "svd"}


@pytest.mark.parametrize("config", INT8.values())
def test_factorized_networks_are_quantized_and_saved(config: str) -> None:
    torch.manual_seed(0)
    model, images = LeNet(channels=(4, 8)).eval(), torch.randn(8, 3, 32, 32)
    evolvenet.factorize(model, {"conv2": ("cp", 6), "fc1": 8, "fc2": 8})
    before = copy.deepcopy(model)
    small = quantized(model, config)
    torch.testing.assert_close(small(images), model(images), rtol=0, atol=0.02)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), before.parameters(), strict=True))
    assert kilobytes(small) < 0.75 * kilobytes(model)


def test_accuracies_of_the_classes_average_to_that_of_the_split(tmp_path: Path) -> None:
    data = instantiate(configuration().data)
    data.setup()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    accuracy, classes = compression.tested(model, data)
    labels = torch.cat([labels for _, labels in data.test_dataloader()])
    counts = torch.bincount(labels).double()
    assert accuracy == pytest.approx(float((torch.tensor(classes) * counts).sum() / counts.sum()))

"""Every choice of every group composes and builds; a few batches with those that need no other package or device."""

from __future__ import annotations

import itertools
from importlib import import_module
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import get_class, instantiate
from PIL import Image

from experiments.training.jobs import plain_words
from tests.helpers.experiments import configuration, train, write_numbered
from tests.helpers.paths import CONF

GROUPS = ("data", "model", "optimizer", "scheduler", "trainer", "evolve", "logger", "callbacks", "experiment")
CHOICES = {group: sorted(path.stem for path in (CONF / group).glob("*.yaml")) for group in GROUPS}
EXTRA = {
    "data=npz": ["data.path=x.npz", "data.classes=10"],
    "data=image_folder": ["data.root=x", "data.classes=10"],
    "model=torchvision": ["model.name=resnet18"],
    "model=timm": ["model.name=resnet18"],
    "model=mnist_scratch": ["model.checkpoint=x"],
    "model=cifar_scratch": ["model.checkpoint=x"],
    "experiment=mnist_scratch": ["model.checkpoint=x"],
    "experiment=cifar_scratch": ["model.checkpoint=x"],
}
TINY = ["trainer.max_epochs=2", "trainer.limit_train_batches=2", "trainer.log_every_n_steps=1"]
SMALL = ["model.widths=[4,4,4]", "model.hidden=8"]
EAGER = ["evolve.every_n_steps=1", "evolve.start_step=1", "evolve.stop=1.0"]


def written(*words: str) -> list[str]:
    """Overrides as `train.py` takes them, with what they leave open."""
    return [*plain_words(words), *(extra for word in words for extra in EXTRA.get(word, []))]


@pytest.mark.parametrize("choice", [f"{group}={name}" for group in GROUPS for name in CHOICES[group]])
def test_every_choice_composes(choice: str) -> None:
    assert configuration(*written(choice)).title


@pytest.mark.parametrize(("one", "two"), itertools.combinations(("data", "optimizer", "scheduler", "logger"), 2))
def test_choices_of_two_groups_compose_together(one: str, two: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for first, second in itertools.product(CHOICES[one], CHOICES[two]):
            words = written(f"{one}={first}", f"{two}={second}")
            assert compose("train", [*words, "output=unused"]).title
    assert not GlobalHydra.instance().is_initialized()


@pytest.mark.parametrize("launcher", sorted(path.stem for path in (CONF / "hydra" / "launcher").glob("*.yaml")))
def test_launchers_and_the_sweeper_compose(launcher: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        words = [f"hydra/launcher={launcher}", "hydra/sweeper=accuracy_and_size"]
        config = compose("train", words, return_hydra_config=True)
    assert config.hydra.launcher._target_.startswith("hydra_plugins.")
    assert list(config.hydra.sweeper.direction) == ["maximize", "minimize"]
    assert get_class(config.hydra.sweeper._target_)


@pytest.mark.parametrize(
    ("optimizer", "scheduler"),
    [
        pytest.param(one, two, marks=[] if one == "adamw" or two == "one_cycle" else pytest.mark.long)
        for one, two in itertools.product(CHOICES["optimizer"], CHOICES["scheduler"])
    ],
)
def test_every_optimizer_trains_with_every_scheduler(tmp_path: Any, optimizer: str, scheduler: str) -> None:
    words = [
        f"optimizer={optimizer}",
        f"scheduler={scheduler}",
        "optimizer.lr=0.001",
        "evolve=off",
        "logger=none",
        *SMALL,
        *TINY,
    ]
    config = configuration(*words, output=tmp_path)
    data, classifier = instantiate(config.data), instantiate(config.classifier)
    data.setup()
    rates: list[float] = []

    class Rates(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    trainer = instantiate(config.trainer)(
        callbacks=[Rates()], accelerator="cpu", enable_progress_bar=False, enable_checkpointing=False
    )
    trainer.fit(classifier, datamodule=data)
    assert len(rates) == 4
    assert all(0 <= rate <= 0.0011 for rate in rates)
    assert (len(set(rates)) == 1) == (scheduler == "constant")


@pytest.mark.parametrize(
    "words",
    [
        ["evolve=budget", "evolve.policy.params=null", "evolve.policy.macs=1e6"],
        ["evolve=budget", "evolve.policy.params=null", "evolve.policy.bytes=4e6", "evolve.policy.lowrank=true"],
        ["evolve=budget", "evolve.policy.params=null", "evolve.policy.latency=0.01"],
        ["evolve=tolerance", "evolve.policy.lowrank=true", "evolve.policy.depth=true"],
        ["evolve=price", "evolve.policy.lowrank=true", "evolve.policy.depth=true"],
        ["evolve=threshold", "evolve.policy.depth=true"],
    ],
)
def test_settings_of_policies_can_be_typed_without_a_plus(words: list[str]) -> None:
    policy = instantiate(configuration(*words).evolve).policy
    for word in words[1:]:
        name, _, typed = word.removeprefix("evolve.policy.").partition("=")
        expected = {"null": None, "true": True}[typed] if typed in ("null", "true") else float(typed)
        assert getattr(policy, name) == expected


@pytest.mark.parametrize("name", ["none", "off"])
def test_a_run_without_evolving_has_two_names(name: str) -> None:
    assert configuration(f"evolve={name}").evolve is None


@pytest.mark.parametrize("evolve", ["budget", "front", "price", "threshold", "tolerance", "off"])
def test_every_policy_runs(tmp_path: Any, evolve: str) -> None:
    eager = [] if evolve == "off" else EAGER[1:] if evolve == "tolerance" else EAGER
    result = train(tmp_path, [f"evolve={evolve}", "logger=none", *SMALL, *TINY, *eager, "trainer.accelerator=cpu"])
    assert result["steps"] == 4
    assert (result["history"]["events"] == []) == (evolve == "off")
    assert all(event["skipped"] is None for event in result["history"]["events"])


@pytest.mark.parametrize(
    ("callbacks", "logger", "left"),
    [
        ("early_stopping", ["logger=wandb", "logger.offline=true"], "wandb/*/*.wandb"),
        ("ema", ["logger=mlflow"], "mlflow/*/artifacts/evolve/network/*.png"),
        ("learning_rate", ["logger=csv"], "csv/metrics.csv"),
    ],
)
def test_callbacks_and_loggers_take_part(
    tmp_path: Any, monkeypatch: Any, callbacks: str, logger: list[str], left: str
) -> None:
    # All three are written to by the loggers.
    for name, value in (("WANDB_MODE", "offline"), ("MLFLOW_DISABLE_TELEMETRY", "true"), ("MLFLOW_TRACKING_URI", "")):
        monkeypatch.setenv(name, value)
    result = train(tmp_path, [f"callbacks={callbacks}", *logger, *SMALL, *TINY, *EAGER, "trainer.accelerator=cpu"])
    assert result["steps"] == 4
    assert list((tmp_path / "run").glob(left))
    assert import_module("wandb").run is None, "the next run of a sweep would be written into it"
    if logger == ["logger=csv"]:
        assert "lr-AdamW" in (tmp_path / "run" / "csv" / "metrics.csv").read_text()
        assert "seed: 0" in (tmp_path / "run" / "csv" / "hparams.yaml").read_text()


@pytest.mark.parametrize("model", ["torchvision:squeezenet1_1", "timm:test_vit"])
def test_models_of_other_libraries_train(tmp_path: Any, model: str) -> None:
    write_numbered(tmp_path / "images.npz", (32, 32, 3))
    more = ["+model.img_size=32"] if model.startswith("timm:test_vit") else []
    own = [
        "data=npz",
        f"data.path={tmp_path / 'images.npz'}",
        "data.classes=10",
        "data.batch_size=12",
        "data.val_size=10",
    ]
    result = train(
        tmp_path,
        plain_words([f"model={model}", *more, *own, *TINY, "evolve=off", "logger=none", "trainer.accelerator=cpu"]),
    )
    assert result["steps"] == 4


@pytest.mark.parametrize("channels", [1, 3])
def test_folders_of_images_are_data(tmp_path: Any, channels: int) -> None:
    draw = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 3)):
        for label in ("cat", "dog"):
            (tmp_path / split / label).mkdir(parents=True)
            for k in range(count):
                Image.fromarray(draw.integers(0, 255, (20, 30, 3), np.uint8)).save(
                    tmp_path / split / label / f"{k}.png"
                )
    words = [
        "data=image_folder",
        f"data.root={tmp_path}",
        "data.classes=2",
        "data.size=16",
        f"data.channels={channels}",
        "data.val_size=4",
    ]
    data = instantiate(configuration(*words).data)
    data.setup()
    assert data.splits["train"].images.shape == (12, channels, 16, 16)
    assert torch.bincount(data.splits["test"].labels).tolist() == [3, 3]


@pytest.mark.parametrize(
    ("words", "message"), [(["data.classes=5"], "expected labels 0 … 4"), (["data.channels=3"], "3 channels, got 1")]
)
def test_data_of_another_kind_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(Exception, match=message):
        instantiate(configuration(*words).data).setup()


def test_unknown_models_are_refused_with_names() -> None:
    for library in ("torchvision", "timm"):
        with pytest.raises(Exception, match="expected a classifier of"):
            instantiate(configuration(f"model={library}", "model.name=resnet1800").model)

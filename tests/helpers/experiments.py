"""Made-up data sets, a configuration of `conf`, and what `train.py` does with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from experiments.training.run import run_config
from tests.helpers.paths import CONF


def write_numbered(path: Path, shape: tuple[int, ...], train: int = 40, test: int = 12) -> Path:
    """Write a file in Keras' layout in which the pixels of every image are its number."""
    count = train + test
    images = np.broadcast_to(np.arange(count, dtype=np.uint8).reshape(-1, *[1] * len(shape)), (count, *shape))
    labels = (np.arange(count) % 10).astype(np.uint8)
    np.savez(path, x_train=images[:train], y_train=labels[:train], x_test=images[train:], y_test=labels[train:])
    return path


def write_random(folder: Path, count: int) -> Path:
    """Write mnist.npz with random images, the same for training and test, into a folder, and return the folder."""
    draw = np.random.default_rng(0)
    images, labels = draw.integers(0, 256, (count, 28, 28), np.uint8), draw.integers(0, 10, count)
    np.savez(folder / "mnist.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    return folder


def configuration(*overrides: str, output: str | Path = "unused") -> DictConfig:
    """What Hydra makes of `conf/train.yaml` and these overrides."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", [*overrides, f"output={output}"])


def train(folder: Path, overrides: list[str]) -> dict[str, Any]:
    """What `train.py` does with these overrides; returns the result file's content."""
    output = folder / "run"
    run_config(configuration(*overrides, output=output))
    return json.loads((output / "result.json").read_text())

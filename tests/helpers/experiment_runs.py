"""A run of `train.py`, in this process."""

import json

from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from experiments.training.run import readable_errors, run
from tests.helpers.paths import ROOT


def train(tmp_path, overrides):
    """What `train.py` does with these overrides; returns the result file's content."""
    output = tmp_path / "run"
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("train", [*overrides, f"output={output}"])
    with readable_errors():
        run(
            config,
            data=instantiate(config.data),
            classifier=instantiate(config.classifier),
            trainer=instantiate(config.trainer),
            evolution=instantiate(config.evolve),
            points=instantiate(config.points),
            callbacks=instantiate(config.callbacks),
        )
    return json.loads((output / "result.json").read_text())

"""Train one experiment: `python train.py`, `python train.py +experiment=mnist_resnet data.root=DIR evolve=none`."""

import evolvenet  # isort: skip  # noqa: F401  (first: it mends PyPI's torchvision, which Lightning imports)

import hydra
import lightning
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from experiments.training.run import readable_errors, run


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(config: DictConfig) -> float:
    """Build what the configuration names, and run it; returns the validation accuracy."""
    with readable_errors():
        if config.threads:
            torch.set_num_threads(config.threads)
        lightning.seed_everything(config.seed, verbose=False)
        return run(
            config,
            data=instantiate(config.data),
            classifier=instantiate(config.classifier),
            trainer=instantiate(config.trainer),
            evolution=instantiate(config.evolve),
            points=instantiate(config.points),
            callbacks=instantiate(config.callbacks),
        )


if __name__ == "__main__":
    main()

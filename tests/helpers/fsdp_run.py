"""Runs of sharded models (FSDP2) for the tests: `python tests/helpers/fsdp_run.py RESULTS file:7 files:6,7,11`.

Each argument is a form of checkpoints and the steps to resume after. Lightning starts this file anew for the second process.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import evolvenet  # noqa: I001  before Lightning: it mends torchvision's import
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from evolvenet import WidthEvolution
from evolvenet.engine.distributed import fingerprint
from tests.helpers.ddp_run import SIZES, leave
from tests.helpers.policies import Walk
from tests.helpers.runs import Batches, Classifier, trainer


class Sharded(Classifier):
    """Each rank has data of its own, two layers and the network a group of parameters each."""

    def configure_model(self) -> None:
        if not isinstance(self.net, FSDPModule):
            self.net[3] = nn.Identity()  # Lightning restores no random generators.
            # Running statistics are each rank's own, and torch's distributed checkpoints keep those of any.
            vars(self.net[1])["momentum"] = 0.0
            assert self.device_mesh is not None
            mesh = self.device_mesh["data_parallel"]
            for layer in (self.net[0], self.net[4]):
                fully_shard(layer, mesh=mesh)
            fully_shard(self.net, mesh=mesh)

    def train_dataloader(self) -> Batches:
        return Batches(8, self.trainer.global_rank, self.trainer.world_size)


def fit(folder: Path, one_file: bool, start: int | None) -> dict[str, Any]:
    """One run, or one resumed after a step; what came of it."""
    torch.manual_seed(3)
    model = Sharded()
    keeper = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1, enable_version_counter=False)
    evolution = WidthEvolution(Walk(*SIZES), every_n_steps=5, calibration_batches=3, stop=1.0)
    strategy = ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=not one_file, process_group_backend="gloo",
        timeout=timedelta(seconds=240),
    )  # fmt: skip
    run = trainer(
        folder,
        [evolution, *[keeper] * (start is None)],
        strategy=strategy,
        devices=2,
        max_epochs=2,
        use_distributed_sampler=False,
    )
    run.fit(model, ckpt_path=None if start is None else str(folder / f"step={start}.ckpt"), weights_only=True)
    assert evolution.history is not None
    sharded = [type(module).__name__ for module in model.modules() if isinstance(module, FSDPModule)]
    with evolvenet.whole_parameters(model, run.optimizers):
        moments = [value for state in run.optimizers[0].state.values() for value in state.values()]
        return {
            "events": [[event.step, len(event.changes), event.skipped] for event in evolution.history.events],
            "sizes": evolution.history.events[-1].sizes,
            "layers": [model.net[place].out_features for place in (0, 4)],
            "weights": fingerprint(model),
            "moments": fingerprint(nn.ParameterList(moments)),
            "sharded": sharded,
        }


def main() -> None:
    torch.set_num_threads(1)
    results = Path(sys.argv[1])
    found = {}
    for argument in sys.argv[2:]:
        name, steps = argument.split(":")
        folder = results.parent / name
        found[name] = [fit(folder, name == "file", start) for start in (None, *map(int, steps.split(",")))]
    Path(f"{results}.{os.environ.get('LOCAL_RANK', '0')}.json").write_text(json.dumps(found), encoding="utf-8")
    leave()


if __name__ == "__main__":
    main()

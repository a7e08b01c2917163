"""Runs under DDP for the tests: `python tests/helpers/ddp_run.py RESULTS --devices 2 --start popen plain …`.

Lightning starts this file anew for each further process, so what is run depends on the arguments alone.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import evolvenet  # noqa: I001  before Lightning: it mends torchvision's import
import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

from evolvenet import Tolerance, WidthEvolution, errors
from evolvenet.engine import distributed as processes
from evolvenet.errors import RankMismatchError
from tests.helpers.policies import Chains, Walk
from tests.helpers.runs import Batches, Classifier, trainer

SIZES = ((9, 16), (9, 20), (12, 7), (6, 11))
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "unused": {"find_unused_parameters": True},
    "static": {"static_graph": True},
    "buckets": {"gradient_as_bucket_view": True, "broadcast_buffers": False},
    "manual": {},
    "accumulated": {},
    "skips": {"find_unused_parameters": True},
    "powersgd": {"ddp_comm_hook": powerSGD_hook},
    "resumed": {},
    "judged": {},
    "chains": {},
    "fails on one rank": {},
    "fails on rank 0": {},
    "other weights": {},
    "other widths": {},
    "other times": {},
}


class Distributed(Classifier):
    """Each rank has data of its own; a branch that only every second batch uses, where DDP is told to expect that."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        self.variant = variant
        self.automatic_optimization = variant != "manual"
        self.extra = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)
        used = self.variant != "unused" or not self.training or self.trainer.global_step % 2
        return out + self.extra(out) if used else out

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.variant == "skips" and self.global_rank == 1 and self.trainer.global_step in (0, 1, 8, 9, 15):
            return sum((parameter * 0).sum() for parameter in self.parameters())
        loss = super().training_step(batch, batch_idx)
        if self.automatic_optimization:
            return loss
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        return optimizer.step()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """The last epoch is a bad one; each rank has a value of its own, of which that of rank 0 counts."""
        bad = self.current_epoch == 2
        self.log("val/acc", (0.5 if bad else 0.9) if self.global_rank == 0 else 0.7)

    def val_dataloader(self) -> Batches:
        return Batches(1)

    def train_dataloader(self) -> Batches:
        return Batches(8, self.trainer.global_rank, self.trainer.world_size)


class Watch(lightning.Callback):
    """After every step all ranks must have the same weights; some variants break something at step 9."""

    def __init__(self, variant: str, evolution: WidthEvolution) -> None:
        self.variant, self.evolution, self.compared = variant, evolution, 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any, **_: Any) -> None:
        if self.variant.startswith("other"):
            return
        mine = processes.fingerprint(pl_module)
        found: list[Any] = [None] * trainer.world_size
        distributed.all_gather_object(found, mine)
        assert len(set(found)) == 1, f"step {trainer.global_step}: {found}"
        self.compared += 1

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *rest: Any, **_: Any) -> None:
        if trainer.global_step != 9 or trainer.global_rank != (0 if self.variant == "fails on rank 0" else 1):
            return
        if self.variant in ("fails on one rank", "fails on rank 0"):
            break_once(self.variant)
        elif self.variant == "other weights":
            with torch.no_grad():
                pl_module.extra.bias[0] += 1
        elif self.variant == "other widths":
            evolver = self.evolution.evolver
            assert evolver is not None
            keep = evolvenet.IndexMap.keep(range(5), evolver.graph.widths["net.0"].size)
            evolver.graph = evolvenet.resize(evolver.model, evolver.graph, {"net.0": keep})


class Leave(lightning.Callback):
    """Spawned processes end with their run; those of popen go on to the next variant in the same group."""

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        leave()


def leave() -> None:
    """Join gloo's threads before the interpreter ends: one that frees a tensor of Python's later aborts the process.

    Lightning does so for NCCL only. Without it, and without EvolveNet, 2 of 8 plain spawned runs of this file aborted.
    """
    if distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


def break_once(variant: str) -> None:
    """The next event fails on this rank: after it has exchanged four tensors, or where rank 0 plans."""
    stage, at = ("tensor exchange", 9) if variant == "fails on one rank" else ("reconstruction", 1)
    inner, passed = errors.stage_boundary, 0

    def boundary(name: str, entering: bool) -> None:
        nonlocal passed
        passed += name == stage
        if passed == at:
            errors.stage_boundary = inner
            raise RuntimeError("boom")

    errors.stage_boundary = boundary


def strategy_of(variant: str, options: argparse.Namespace) -> DDPStrategy:
    """DDP under gloo."""
    state: dict[str, Any] = (
        {"ddp_comm_state": PowerSGDState(None, start_powerSGD_iter=2)} if variant == "powersgd" else {}
    )
    return DDPStrategy(
        start_method=options.start,
        process_group_backend="gloo",
        timeout=timedelta(seconds=240),
        **VARIANTS[variant],
        **state,
    )


def resume(options: argparse.Namespace) -> dict[str, Any]:
    """A run, and the same one resumed from its checkpoints before, while and after batches are gathered."""
    folder = Path(options.results).parent / "steps"
    found: list[str] = []
    for start in (None, 7, 8, 9):
        torch.manual_seed(3)
        model, saving = Distributed("resumed"), start is None
        # Lightning restores no random generators.
        for module in model.modules():
            vars(module).update({"p": 0.0} if isinstance(module, nn.Dropout) else {})
        keeper = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1, enable_version_counter=False)
        trainer(
            folder, [WidthEvolution(Walk(*SIZES), every_n_steps=6, calibration_batches=3, stop=1.0), *[keeper] * saving],
            strategy=strategy_of("resumed", options), devices=options.devices, max_epochs=3, use_distributed_sampler=False,
        ).fit(model, ckpt_path=None if saving else folder / f"step={start}.ckpt", weights_only=True)  # fmt: skip
        found.append(processes.fingerprint(model))
    states = [torch.load(path, weights_only=True)["callbacks"]["WidthEvolution"] for path in folder.glob("*.ckpt")]
    ranks = [[len(rank["batches"]) for rank in state["evolver"]["ranks"]] for state in states if "evolver" in state]
    return {"whole": found[0], "again": found[1:], "gathering": sum(min(each) > 0 for each in ranks)}


def run(variant: str, options: argparse.Namespace) -> dict[str, Any]:
    """One fit; what came of it."""
    if variant == "resumed":
        return resume(options)
    torch.manual_seed(3)
    model = Distributed(variant)
    steps = 3 if variant == "other times" and int(os.environ.get("LOCAL_RANK", "0")) else 2
    evolution = WidthEvolution(Walk(*SIZES), every_n_steps=steps, calibration_batches=1, stop=1.0)
    if variant == "judged":
        judging = Tolerance("val/acc", drop=0.01, validations=1, share=0.3)
        evolution = WidthEvolution(judging, every_n_epochs=1, calibration_batches=1, stop=1.0)
    if variant == "chains":
        evolution = WidthEvolution(Chains(), every_n_steps=2, calibration_batches=1, stop=1.0)
    watch = Watch(variant, evolution)
    strategy = strategy_of(variant, options)
    leaving = [Leave()] if options.start == "spawn" else []
    fitting = trainer(
        Path(options.results).parent, [watch, evolution, *leaving], strategy=strategy, devices=options.devices, max_epochs=3,
        use_distributed_sampler=False, accumulate_grad_batches=2 if variant == "accumulated" else 1,
    )  # fmt: skip
    try:
        fitting.fit(model)
    except RankMismatchError as error:
        return {"error": str(error)}
    assert evolution.history is not None
    return {
        "compared": watch.compared,
        "events": [[event.step, len(event.changes), event.skipped] for event in evolution.history.events],
        "sizes": evolution.history.events[-1].sizes,
        "layers": [getattr(model.net[place], "out_features", None) for place in (0, 4)],
        "changes": sorted(
            {change.reason.split(":")[0] for event in evolution.history.events for change in event.changes}
        ),
        "shapes": {name: list(parameter.shape) for name, parameter in model.named_parameters()},
        "finite": all(bool(parameter.isfinite().all()) for parameter in model.parameters()),
        "optimizers": [type(each).__name__ for each in fitting.optimizers],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("results")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--start", default="popen")
    parser.add_argument("variants", nargs="+", choices=VARIANTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {variant: run(variant, options) for variant in options.variants}
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    Path(f"{options.results}.{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    leave()


if __name__ == "__main__":
    main()

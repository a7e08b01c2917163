"""Runs of the transformers `Trainer`, and of a loop of accelerate, in several processes. Started by torchrun, or alone.

What came of each goes to `<results>.<rank>.json`, for `tests/transformers/test_processes.py`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import evolvenet  # first: it mends PyPI's torchvision beside a CPU-only torch

# isort: split
import torch
from accelerate import Accelerator
from torch import distributed, nn
from transformers import TrainerCallback

from evolvenet import Tolerance
from evolvenet.engine.distributed import fingerprint
from evolvenet.transformers.callback import WidthEvolutionCallback
from tests.helpers.policies import Fixed
from tests.helpers.transformers_runs import SIZES, bert, evolution, sentences, trainer

SCORES = (1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 1.0, 1.0)
"""Of the network after each step: the first cut is kept, the second one is undone."""


class Compares(TrainerCallback):
    """Every rank has the same weights at every step."""

    def __init__(self) -> None:
        self.compared = 0

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **unused: Any) -> None:
        assert_alike(model)
        self.compared += 1


def assert_alike(model: nn.Module) -> None:
    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, fingerprint(model))
    assert len(set(found)) == 1, found


def report(model: nn.Module, optimizer: Any, history: Any) -> dict[str, Any]:
    states = optimizer.state
    return {
        "events": [[event.step, event.skipped, len(event.changes)] for event in history.events],
        "sizes": history.events[-1].sizes,
        "follows": all(states[p]["exp_avg"].shape == p.shape for p in model.parameters() if p in states),
        "states": len(states),
        "moved": all(bool(states[p]["exp_avg"].abs().sum() > 0) for p in model.parameters() if p in states),
        "weights": fingerprint(model),
    }


def run_trainer(folder: Path, callback: WidthEvolutionCallback, resume: str | None = None, **options: Any) -> Any:
    model, compares = bert(seed=0 if resume is None else 1), Compares()
    run = trainer(folder, model, callback, compares, **options)
    scores = iter(SCORES if resume is None else SCORES[6:])
    run.compute_metrics = lambda prediction: {"score": next(scores)}
    run.train(resume_from_checkpoint=resume)
    inner: Any = run.optimizer
    return {**report(model, inner.optimizer, callback.history), "compared": compares.compared}


def contrast(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """A loss that compares each sample with those of all ranks."""
    logits = outputs["logits"].flatten(1)
    others = [torch.zeros_like(logits) for _ in range(distributed.get_world_size())]
    distributed.all_gather(others, logits.detach().contiguous())
    return (logits @ torch.cat(others).T).square().mean()


def run_gathered(folder: Path) -> dict[str, Any]:
    """Rank 0 alone measures on a loss in which all take part: the model is traced by itself instead."""
    callback, model = evolution(), bert()
    run = trainer(folder, model, callback, Compares())
    run.compute_loss_func = contrast
    run.train()
    assert callback.history is not None
    return {"skipped": [event.skipped for event in callback.history.events], "sizes": callback.history.latest.sizes}


def judged() -> WidthEvolutionCallback:
    policy = Tolerance("score", drop=0.1, validations=2, share=0.3)
    return WidthEvolutionCallback(policy, every_n_steps=2, stop=1.0)


def run_accelerate() -> dict[str, Any]:
    """A loop of one's own, in bfloat16."""
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = bert()
    rows = [{name: row[name] for name in ("input_ids", "labels")} for row in sentences(96)]
    loader = torch.utils.data.DataLoader(rows, batch_size=8)  # type: ignore[arg-type]
    wrapped, optimizer, loader = accelerator.prepare(model, torch.optim.AdamW(model.parameters()), loader)
    evolver = None
    for step, batch in enumerate(loader):
        if evolver is None:
            evolver = evolvenet.Evolver(
                model, optimizer.optimizer, Fixed(SIZES), batch, after_change=lambda: evolvenet.renew_ddp(wrapped)
            )
        evolver.observe(batch)
        if step == 3:
            evolver.step()
        accelerator.backward(wrapped(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
        assert_alike(model)
    assert evolver is not None
    return report(model, optimizer.optimizer, evolver.history)


class Residual(nn.Module):
    """A block that adds nothing until it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x).relu())


def run_depth() -> dict[str, Any]:
    """A block is removed on all ranks, and training goes on."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), Residual(), nn.Linear(8, 2))
    wrapped, optimizer = nn.parallel.DistributedDataParallel(model), torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(distributed.get_rank()))
    evolver = evolvenet.Evolver(model, optimizer, Fixed({}), x, after_change=lambda: evolvenet.renew_ddp(wrapped))
    evolver.observe(x)
    removed = evolver.remove_blocks()
    for _ in range(2):
        optimizer.zero_grad()
        wrapped(x).square().mean().backward()
        optimizer.step()
        assert_alike(model)
    return {"removed": removed, "parameters": sum(each.numel() for each in model.parameters())}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    saving: Mapping[str, Any] = {
        "max_steps": 8,
        "save_strategy": "steps",
        "save_steps": 6,
        "per_device_train_batch_size": 8,
    }
    judging: Mapping[str, Any] = {**saving, "eval_strategy": "steps", "eval_steps": 1}
    found = {
        # First: the trainer makes accelerate's state anew, where this cannot.
        "accelerate": run_accelerate(),
        "depth": run_depth(),
        "gathered": run_gathered(folder / "gathered"),
        "whole": run_trainer(folder / "whole", evolution(start_step=3, stop=0.6), **saving),
        "resumed": run_trainer(
            folder / "again", evolution(start_step=3, stop=0.6), str(folder / "whole" / "checkpoint-6"), **saving
        ),
        "accumulated": run_trainer(folder / "accumulated", evolution(), gradient_accumulation_steps=2, bf16=True),
        "judged": run_trainer(folder / "judged", judged(), **judging),
        "judged again": run_trainer(
            folder / "judged_again", judged(), str(folder / "judged" / "checkpoint-6"), **judging
        ),
    }
    (folder / f"found.{os.environ['RANK']}.json").write_text(json.dumps(found), encoding="utf-8")
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""The running `transformers.Trainer`, which hands itself to no callback, and what its checkpoints hold besides JSON."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from evolvenet._compat.torch import tree_map_only

TENSORS = "evolvenet.pt"
"""The file in a checkpoint's folder with what its JSON cannot hold; it is there while a cut is pending."""


def running_trainer() -> Trainer | None:
    """The trainer whose method calls, directly or not, the caller of this function."""
    return next((frame.f_locals["self"] for frame in _frames_of_trainers()), None)


def resumed_folder() -> Path | None:
    """The checkpoint that the running trainer resumes from."""
    found = (frame.f_locals.get("resume_from_checkpoint") for frame in _frames_of_trainers())
    return next((Path(each) for each in found if isinstance(each, str)), None)


def loaded_folder() -> Path | None:
    """The checkpoint that the running trainer is loading into its model: the one that it resumes from, or the best at the end.

    None for everything else that is loaded during its run, as weights that a callback exchanges for their moving average.
    """
    frame = next(_frames_of_trainers(), None)
    loading = None if frame is None else frame.f_code.co_name
    if frame is None or loading not in ("_load_from_checkpoint", "_load_best_model"):
        return None
    best = frame.f_locals["self"].state.best_model_checkpoint
    folder = best if loading == "_load_best_model" else frame.f_locals.get("resume_from_checkpoint")
    return Path(folder) if isinstance(folder, str) else None


def save_tensors(args: TrainingArguments, state: TrainerState, tensors: Mapping[str, Any]) -> None:
    """Write tensors and plain data into the checkpoint that has just been saved, on the rank that saves.

    Nothing is written if nothing can be resumed from the checkpoint (`save_only_model`), or it has been deleted meanwhile.
    """
    name = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
    output = Path(args.output_dir or ".")
    # A search for hyperparameters has a folder for each of its runs.
    folders = [folder for folder in (output / name, *output.glob(f"*/{name}")) if folder.is_dir()]
    if folders and args.should_save and not args.save_only_model:
        torch.save(dict(tensors), max(folders, key=lambda folder: folder.stat().st_mtime) / TENSORS)


def load_tensors(folder: Path | None, device: torch.device) -> dict[str, Any]:
    """What `save_tensors` wrote into a checkpoint, on a device; {} if it wrote nothing. Nothing but data is unpickled."""
    if folder is None or not (folder / TENSORS).is_file():
        return {}
    # Not by map_location, which does not know accelerate's "cpu:0".
    tensors = torch.load(folder / TENSORS, map_location="cpu", weights_only=True)
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), tensors)


def _frames_of_trainers() -> Iterator[FrameType]:
    frame = inspect.currentframe()
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), Trainer):
            yield frame
        frame = frame.f_back


def metrics_of(logs: Mapping[str, Any]) -> dict[str, Any]:
    """What is logged without where the run is and how fast.

    >>> metrics_of({"loss": 0.5, "epoch": 1.0, "eval_samples_per_second": 9.0, "step": 3})
    {'loss': 0.5}
    """
    others = ("epoch", "step", "total_flos")
    return {
        name: each
        for name, each in logs.items()
        if name not in others and not name.endswith(("runtime", "_per_second"))
    }


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """The optimizer inside of accelerate's wrappers."""
    inner = getattr(optimizer, "optimizer", None)
    return unwrapped(inner) if isinstance(inner, Optimizer) else optimizer

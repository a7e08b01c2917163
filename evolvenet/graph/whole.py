"""Whether a model's parameters are whole on this process, as every change of their shapes needs them."""

# nn.Module.named_modules has no full type.
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import sys

from torch import nn

from evolvenet.errors import UnsupportedStrategyError

_REPLICATED = "nn.DataParallel"
_WRAPPERS = (
    ("torch.distributed.fsdp", "FullyShardedDataParallel", "FSDP1 (FullyShardedDataParallel)"),
    ("torch.nn.parallel", "DataParallel", _REPLICATED),
)
"""(module, class in it, how it is called) of modules that keep parts or copies of the parameters inside of them."""
REMEDY = (
    "Under FSDP2 (fully_shard), enter evolvenet.whole_parameters(model, optimizers) on all ranks for it. Elsewhere change widths "
    "first, in one process or under DDP, and shard afterwards: save the model (evolvenet.save), load it into a freshly built one "
    "(evolvenet.load), and shard that."
)


def sharded_by(model: nn.Module) -> str | None:
    """What keeps parts of the model's parameters on other processes, with an example; None where all are whole.

    >>> sharded_by(nn.Linear(2, 2)) is None
    True
    """
    for place, name, called in _WRAPPERS:
        # What is not imported has wrapped nothing.
        wrapper = getattr(sys.modules.get(place), name, None)
        if wrapper is not None:
            for path, module in model.named_modules():
                if isinstance(module, wrapper):
                    return f"{called} at {path or type(module).__name__}"
    distributed_tensor = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    for name, parameter in model.named_parameters():
        if distributed_tensor is not None and isinstance(parameter, distributed_tensor):
            return f"a DTensor (fully_shard, or a plan of tensor parallelism) in {name}"
        if hasattr(parameter, "ds_tensor"):
            return f"DeepSpeed's ZeRO stage 3 in {name}"
    return None


def check_whole(model: nn.Module) -> None:
    """Check that all parameters are whole on this process.

    Raises:
        UnsupportedStrategyError: if one is not; the message says what to do.
    """
    found = sharded_by(model)
    if found is not None and found.startswith(_REPLICATED):
        raise UnsupportedStrategyError(
            f"Expected a model that runs on one device of each process, got {found}, which copies it to several devices "
            "for every batch. Give its module (model.module); to train on several devices, start one process for each (torchrun) "
            "with DistributedDataParallel."
        )
    if found is not None:
        raise UnsupportedStrategyError(
            f"Expected a model whose parameters lie whole on this process, since their shapes change, got {found}. {REMEDY}"
        )

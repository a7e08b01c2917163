"""`ModelParallelStrategy` with `fully_shard` (FSDP2): whole parameters for an event, and checkpoints of other widths."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy

from evolvenet.engine.depth import removes_blocks
from evolvenet.engine.sharding import check_sharding, is_sharded, whole_parameters
from evolvenet.errors import UnsupportedStrategyError
from evolvenet.graph.serialization import from_state_dict
from evolvenet.policies.base import Policy
from evolvenet.surgery.checkpoint import fit_shapes


def check_shards(module: LightningModule, policy: Policy) -> None:
    """Check that widths of a module can change if it is sharded.

    Raises:
        UnsupportedStrategyError: where it is sharded by more than FSDP2, see `check_sharding`, or where the policy replaces
            modules, which `fully_shard` may have been called on.
    """
    check_sharding(module)
    if is_sharded(module) and (getattr(policy, "lowrank", False) or removes_blocks(policy)):
        raise UnsupportedStrategyError(
            f"{type(policy).__name__}: expected neither lowrank=True nor depth=True under FSDP2, since they replace modules, "
            'on which fully_shard may have been called. Take strategy="ddp" for it, or leave it out.'
        )


def fit_before_load(strategy: Strategy, key: str) -> None:
    """Let the strategy's module have a checkpoint's widths before it is loaded into sharded parameters.

    Args:
        strategy: the trainer's; others than `ModelParallelStrategy` load whole state dicts, for which hooks do that.
        key: of the callback's state in checkpoints.
    """
    if isinstance(strategy, ModelParallelStrategy) and "load_checkpoint" not in vars(strategy):
        vars(strategy)["load_checkpoint"] = _Fitting(strategy.load_checkpoint, strategy, key)


def no_longer_fit_before_load(strategy: Strategy) -> None:
    """Undo `fit_before_load`."""
    if isinstance(vars(strategy).get("load_checkpoint"), _Fitting):
        del vars(strategy)["load_checkpoint"]


class _Fitting:
    def __init__(self, load: Callable[..., Any], strategy: Strategy, key: str) -> None:
        self._load, self._strategy, self._key = load, strategy, key

    def __call__(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        weights_only = args[0] if args else kwargs.get("weights_only")
        state = _callback_state(Path(self._strategy.broadcast(checkpoint_path)), self._key, weights_only)
        # Now: a strategy may serve one module after the other.
        module = self._strategy.lightning_module
        if state and "evolver" in state and module is not None:
            graph = from_state_dict(state["evolver"]["graph"])
            shapes = {name: torch.empty(shape, device="meta") for name, shape in graph.shapes.items()}
            with whole_parameters(module, self._strategy.optimizers):
                fit_shapes(module.get_submodule(state["root"]), shapes, record=state["evolver"]["note"])
        return self._load(checkpoint_path, *args, **kwargs)


def _callback_state(path: Path, key: str, weights_only: bool | None) -> Mapping[str, Any] | None:
    """The callback's state in a checkpoint of one file, or in a folder of one file a rank and "meta.pt".

    Args:
        path: of the file or folder.
        key: of the state.
        weights_only: as the trainer was given it; with False a checkpoint may hold objects of any class beside the state.
    """
    file = path / "meta.pt" if path.is_dir() else path
    checkpoint = torch.load(file, map_location="cpu", weights_only=weights_only, mmap=not path.is_dir())
    return checkpoint.get("callbacks", {}).get(key)

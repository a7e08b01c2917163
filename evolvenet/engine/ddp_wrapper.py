"""DDP's wrapper after a change of widths: the same object, with hooks and buckets for the parameters' new shapes."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from evolvenet._compat.torch import communication_hooks, hook_tables
from evolvenet.errors import UnsupportedStrategyError
from evolvenet.signals import deferred_signals

_NOT_SETTINGS = ("self", "module", "device_mesh", "init_sync")


@deferred_signals("the renewal of the DDP wrapper")
def renew_ddp(wrapper: nn.Module) -> None:
    """Make a `DistributedDataParallel` wrapper anew in place: whoever holds the wrapper goes on with it.

    Its reducer has buckets for gradients of the shapes that the parameters had when it was made. The wrapper keeps its
    settings, its communication hooks (see `forget_buckets`) and the hooks on itself. Nothing is sent: weights and buffers must
    be equal on all ranks already, as after `Evolver.step`. Give it to an `Evolver` in a loop of your own, or one of
    accelerate: `Evolver(wrapper.module, …, after_change=lambda: evolvenet.renew_ddp(wrapper))`.

    Args:
        wrapper: what `DistributedDataParallel(…)` or `accelerator.prepare(…)` returned, or a module around it. A module
            without such a wrapper is left as it is.

    Raises:
        UnsupportedStrategyError: for a wrapper with DDP's own `mixed_precision` (autocast is no such): its hooks on the modules
            cannot be taken off.

    >>> renew_ddp(nn.Linear(2, 2))
    """
    for module in list(wrapper.modules()):
        if isinstance(module, DistributedDataParallel):
            _renew(module)


def _renew(wrapper: DistributedDataParallel) -> None:
    """One wrapper.

    Raises:
        UnsupportedStrategyError: with `mixed_precision`.
    """
    if wrapper.mixed_precision is not None:
        raise UnsupportedStrategyError(
            "renew_ddp: expected a DistributedDataParallel without mixed_precision, got one with "
            f"{wrapper.mixed_precision}: its hooks cannot be taken off the modules. Use torch.autocast instead."
        )
    module, settings = wrapper.module, _settings(wrapper)
    tables, communication = hook_tables(wrapper), list(communication_hooks(wrapper))
    training = wrapper.training
    # The old reducer takes its hooks off the parameters as it goes.
    del wrapper.reducer, wrapper.logger
    wrapper.__init__(module, init_sync=False, **settings)  # type: ignore[misc]  so that it stays the same object
    vars(wrapper).update(tables)
    wrapper.training = training
    for hook, state in communication:
        forget_buckets(state)
        wrapper.register_comm_hook(state, hook)


def forget_buckets(state: Any) -> None:
    """Drop what the state of a communication hook keeps of DDP's buckets, which are others after a change of widths.

    PowerSGD (Vogels et al., 2019) keeps of each bucket its factors and the error of the last compression, in tensors of the
    bucket's size. The next two steps exchange whole gradients, as DDP makes its buckets anew in the first of them.

    Args:
        state: any; that of another hook is left as it is.
    """
    known = getattr(sys.modules.get("torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook"), "PowerSGDState", None)
    if known is not None and isinstance(state, known):
        for kept in (state.error_dict, state.p_memory_dict, state.q_memory_dict):
            kept.clear()
        state.iter = min(state.iter, max(0, state.start_powerSGD_iter - 2))


def _settings(wrapper: DistributedDataParallel) -> Mapping[str, Any]:
    """The arguments that the wrapper was made with, as far as it keeps them under their names."""
    names = inspect.signature(DistributedDataParallel.__init__).parameters
    found = {name: getattr(wrapper, name) for name in names if name not in _NOT_SETTINGS and hasattr(wrapper, name)}
    if "forward_sync_buffers" in found:
        # The older name of the same.
        found.pop("broadcast_buffers", None)
    if not wrapper.bucket_bytes_cap_default:
        found["bucket_cap_mb"] = wrapper.bucket_bytes_cap / 2**20
    return found

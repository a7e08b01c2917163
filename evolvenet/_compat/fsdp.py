"""FSDP2 (`fully_shard`): its private state, by which a module is made whole again and sharded as it was.

torch has no public way back from `fully_shard`. Imported where a sharded module is met only.
"""

# What is private in torch has no types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportPrivateUsage=false
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import distributed, nn
from torch.distributed import _composable_state as composable_state
from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard

_OF_GROUPS = (
    "reduce_grads",
    "all_reduce_grads",
    "reshard_after_backward",
    "reduce_scatter_max_input_buffers",
    "gradient_divide_factor",
    "reduce_scatter_unused_params",
    "force_sum_reduction_for_comms",
    "unshard_async_op",
    "unshard_in_backward",
    "_all_reduce_hook",
    "_all_reduce_hook_stream",
    "_all_gather_comm",
    "_reduce_scatter_comm",
)
"""Settings of a group of parameters that methods of `FSDPModule` write."""
_MARKS = ("_is_fsdp_managed_module", "_fsdp_use_orig_params")
"""Attributes that `fully_shard` writes on every module of a group."""


@dataclass(frozen=True, eq=False)
class ShardingCall:
    """One call of `fully_shard`, as it is to be repeated.

    Args:
        modules: that it was given.
        arguments: by name.
        settings: of the group of parameters, that were changed afterwards.
        forward, backward: the modules that are prefetched.
    """

    modules: list[nn.Module]
    arguments: dict[str, Any]
    settings: dict[str, Any]
    forward: list[nn.Module] = field(default_factory=list[nn.Module])
    backward: list[nn.Module] = field(default_factory=list[nn.Module])


def sharding_problem(root: nn.Module) -> str | None:
    """What of a module's sharding could not be repeated; None where all of it can, and where nothing is sharded."""
    managed: set[int] = set()
    for state in _states(root):
        if not hasattr(state, "_fsdp_param_groups"):
            return "another version of torch than 2.13, whose fully_shard keeps its state otherwise"
        if any(set(vars(module).get(REGISTRY_KEY, {})) - {"fully_shard"} for module in state._modules):
            return "other composable wrappers (replicate, checkpoint) on the same module"
        if len(state._fsdp_param_groups) > 1:
            return "parameters of one module on several meshes"
        for group in state._fsdp_param_groups:
            managed |= {id(each.sharded_param) for each in group.fsdp_params}
            problem = _problem_of_group(group)
            if problem is not None:
                return problem
    reshard(root)
    if any(isinstance(each, DTensor) and id(each) not in managed for each in root.parameters()):
        return "a DTensor that no fully_shard within the module holds (a plan of tensor parallelism, or an outer fully_shard)"
    return None


def _problem_of_group(group: Any) -> str | None:
    if group.mesh_info.mesh.size() != distributed.get_world_size():
        return "a mesh of some of the processes (a mesh beside tensor or pipeline parallelism)"
    if isinstance(group.offload_policy, CPUOffloadPolicy):
        return "CPUOffloadPolicy"
    if any(each.is_dtensor for each in group.fsdp_params):
        return "parameters that are sharded by a plan of tensor parallelism as well"
    if any(each.fsdp_placement != Shard(0) for each in group.fsdp_params):
        return "a shard_placement_fn, since the new sizes may not be divisible"
    precision = group.mp_policy.param_dtype
    if any(precision not in (None, each.sharded_param.dtype) for each in group.fsdp_params):
        return f"MixedPrecisionPolicy(param_dtype={precision}); autocast can be used"
    return None


def is_sharded(root: nn.Module) -> bool:
    """Whether `fully_shard` was called on a module or one inside of it."""
    return any(isinstance(module, FSDPModule) for module in root.modules())


def reshard(root: nn.Module) -> None:
    """Let go of parameters that were gathered for a forward pass."""
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def unwrap(root: nn.Module) -> list[ShardingCall]:
    """Take `fully_shard` off a module, whose parameters are local tensors' DTensors after it, and tell how to repeat it.

    The caller replaces the parameters.
    """
    states = list(_states(root))
    calls = [_call(state) for state in states]
    for state in states:
        state._pre_forward_hook_handle.remove()
        state._post_forward_hook_handle.remove()
        for group in state._fsdp_param_groups:
            for handles in (
                group._module_to_pre_save_state_dict_hook_handle,
                group._module_to_pre_load_state_dict_hook_handle,
            ):
                for handle in handles.values():
                    handle.remove()
            for each in group.fsdp_params:
                each._post_load_hook_handle.remove()
        for module in state._modules:
            module.__class__ = type(module).__mro__[type(module)._orig_cls_mro_index]
            for key in (STATE_KEY, REGISTRY_KEY):
                vars(module).pop(key, None)
            composable_state._module_state_mapping.pop(module, None)
    for module in root.modules():
        for name in _MARKS:
            vars(module).pop(name, None)
    return calls


def wrap_again(root: nn.Module, calls: list[ShardingCall]) -> None:
    """Call `fully_shard` as before, inner modules first; modules that are no longer there are left out."""
    present = set(root.modules())
    kept = [call for call in calls if all(module in present for module in call.modules)]
    for call in reversed(kept):
        modules = call.modules if len(call.modules) > 1 else call.modules[0]
        fully_shard(modules, **call.arguments)  # type: ignore[arg-type]
    for call in kept:
        state = call.modules[0]._get_fsdp_state()  # type: ignore[operator]
        for group in state._fsdp_param_groups:
            vars(group).update(call.settings)
        state._states_to_forward_prefetch = [each._get_fsdp_state() for each in call.forward if each in present]  # type: ignore[operator]
        state._states_to_backward_prefetch = [each._get_fsdp_state() for each in call.backward if each in present]  # type: ignore[operator]


def _states(root: nn.Module) -> Iterator[Any]:
    seen: set[int] = set()
    for module in root.modules():
        state = module._get_fsdp_state() if isinstance(module, FSDPModule) else None
        if state is not None and id(state) not in seen:
            seen.add(id(state))
            yield state


def _call(state: Any) -> ShardingCall:
    arguments: dict[str, Any] = {"mp_policy": state._mp_policy}
    settings: dict[str, Any] = {}
    for group in state._fsdp_param_groups:
        after = group.post_forward_mesh_info
        # The root of a model that runs has None there, whatever it was given.
        size = None if after is None else after.shard_mesh_size
        again = True if size == group.mesh_info.shard_mesh_size else size or False
        arguments |= {
            "mesh": group.mesh_info.mesh,
            "offload_policy": group.offload_policy,
            "reshard_after_forward": None if state._auto_reshard_after_forward else again,
            "ignored_params": _plain_parameters(state._modules),
        }
        settings = {name: getattr(group, name) for name in _OF_GROUPS if hasattr(group, name)}
    return ShardingCall(
        list(state._modules),
        arguments,
        settings,
        [each._modules[0] for each in state._states_to_forward_prefetch],
        [each._modules[0] for each in state._states_to_backward_prefetch],
    )


def _plain_parameters(modules: tuple[nn.Module, ...]) -> set[nn.Parameter]:
    return {each for module in modules for each in module.parameters() if not isinstance(each, DTensor)}

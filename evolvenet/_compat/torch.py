"""The private names of torch that the package relies on, each reached in this module alone.

`tests/test_compat.py` has one test for each of them, so a torch release without one is seen by its name.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.nn.modules.batchnorm import _NormBase as NormBase
from torch.nn.modules.conv import _ConvNd as ConvNd
from torch.nn.modules.conv import _ConvTransposeNd as ConvTransposeNd
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import _WeightNorm as WeightNorm
from torch.nn.utils.prune import BasePruningMethod
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes as unseen_by_modes
from torch.utils._pytree import register_pytree_node, tree_flatten, tree_leaves, tree_map_only, tree_unflatten
from torch.utils.flop_counter import FlopCounterMode

__all__ = [
    "AUTOGRAD_ENGINE",
    "LBFGS_SIZE_CACHE",
    "TENSOR_TABLES",
    "UNSAFE_VIEW",
    "ConvNd",
    "ConvTransposeNd",
    "NormBase",
    "OpOverload",
    "TorchDispatchMode",
    "WeightNorm",
    "adopt_hooks",
    "autocast_on_meta",
    "base_of",
    "child_table",
    "forward_hooks",
    "in_backward",
    "load_state_dict_pre_hooks",
    "masked_name",
    "own_tensors",
    "parameter_table",
    "plain_attributes",
    "register_pytree_node",
    "renew_flat_weights",
    "reset_compiled_code",
    "runs_forward_of",
    "schema_of",
    "shallow_copy",
    "sparse_parts",
    "state_dict_metadata",
    "storage_id",
    "tensor_tables",
    "torch_functions_off",
    "torch_functions_on",
    "tree_flatten",
    "tree_leaves",
    "tree_map_only",
    "tree_unflatten",
    "unseen_by_modes",
    "version_of",
    "without_module_tracker",
    "without_tensors",
]

TENSOR_TABLES = ("_parameters", "_buffers")
"""The attributes in which a module keeps its own tensors."""
AUTOGRAD_ENGINE = "_engine_run_backward"
"""The function in `torch.autograd` by which `grad` and `backward` run, whichever name they were imported by."""
LBFGS_SIZE_CACHE = "_numel_cache"
"""The attribute in which LBFGS keeps the number of its parameters' entries."""
UNSAFE_VIEW = torch.ops.aten._unsafe_view.default
"""The op by which a matrix product lays its output out anew."""
SAFE_SOFTMAX = torch.ops.aten._safe_softmax.default
"""The op by which attention takes a softmax whose rows may be masked as a whole."""


def parameter_table(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """A module's own parameters by name, None for one that it does without.

    >>> list(parameter_table(nn.Linear(2, 3, bias=False)))
    ['weight', 'bias']
    """
    return module._parameters


def tensor_tables(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tables of a module's own parameters and of its own buffers; writing to one changes the module."""
    return cast(Any, module._parameters), cast(Any, module._buffers)


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters and buffers by name, in this order, without those that are None.

    >>> list(own_tensors(nn.BatchNorm1d(2)))
    ['weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked']
    """
    return {name: tensor for table in tensor_tables(module) for name, tensor in table.items() if tensor is not None}


def child_table(module: nn.Module) -> dict[str, nn.Module | None]:
    """A module's children by name; writing to the table changes the module.

    >>> list(child_table(nn.Sequential(nn.ReLU())))
    ['0']
    """
    return module._modules


def shallow_copy(module: nn.Module) -> nn.Module:
    """A module of the same type with the same attributes, tensors and children, but a table of children of its own.

    >>> network = nn.Sequential(nn.Linear(2, 3))
    >>> copy = shallow_copy(network)
    >>> child_table(copy)["0"] = nn.ReLU()
    >>> network
    Sequential(
      (0): Linear(in_features=2, out_features=3, bias=True)
    )
    """
    made = object.__new__(type(module))
    vars(made).update(vars(module), _modules=dict(module._modules))
    return made


def without_tensors(module: nn.Module) -> nn.Module:
    """A module of the same type with the same attributes, without parameters, buffers and children.

    >>> without_tensors(nn.Linear(2, 3)).weight is None
    True
    """
    made = object.__new__(type(module))
    empty = {table: dict.fromkeys(vars(module)[table]) for table in (*TENSOR_TABLES, "_modules")}
    vars(made).update(vars(module), **empty)
    return made


_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def adopt_hooks(module: nn.Module, other: nn.Module) -> None:
    """Give a module the forward and backward hooks of another one, in the same tables: their handles remove them there too."""
    for name in _HOOKS:
        setattr(module, name, getattr(other, name))


def hook_tables(module: nn.Module) -> dict[str, Any]:
    """{attribute: table} of a module's forward and backward hooks."""
    return {name: getattr(module, name) for name in _HOOKS}


def communication_hooks(wrapper: DistributedDataParallel) -> list[tuple[Any, Any]]:
    """(hook, state) of each communication hook that was registered with a DDP wrapper."""
    return wrapper._comm_hooks


def forward_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """The hooks that run before and after a module's forward pass."""
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


def masked_name(method: BasePruningMethod) -> str:
    """The name of the tensor that a pruning method of torch.nn.utils.prune masks."""
    return cast(Any, method)._tensor_name


def load_state_dict_pre_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """The functions that were given to `register_load_state_dict_pre_hook`."""
    return [getattr(hook, "hook", hook) for hook in module._load_state_dict_pre_hooks.values()]


def state_dict_metadata(state: Any) -> dict[str, dict[str, Any]]:
    """{path of a module: what its state dict says beside tensors}; empty for a plain dict.

    >>> state_dict_metadata(nn.ReLU().state_dict())[""]
    {'version': 1}
    """
    return getattr(state, "_metadata", {})


def with_metadata(entries: Mapping[str, Any], metadata: Mapping[str, Mapping[str, Any]]) -> OrderedDict[str, Any]:
    """A state dict that says something beside its tensors.

    >>> dict(state_dict_metadata(with_metadata({"weight": torch.zeros(2)}, {"": {"version": 1}})))
    {'': {'version': 1}}
    """
    state: Any = OrderedDict(entries)
    state._metadata = OrderedDict(metadata)
    return state


def renew_flat_weights(module: nn.RNNBase) -> None:
    """Make a recurrent module compute with the parameters that it has now; it keeps a list of those that it had."""
    module._flat_weights = [getattr(module, name, None) for name in module._flat_weights_names]
    if all(weight is None or weight.device.type != "meta" for weight in module._flat_weights):
        module.flatten_parameters()


def runs_forward_of(module: nn.Module, base: type[nn.Module]) -> bool:
    """Whether a module of a subclass computes what its base class computes, a convolution's inner function included.

    >>> runs_forward_of(nn.Linear(1, 1), nn.Linear), runs_forward_of(nn.Identity(), nn.Linear)
    (True, False)
    """
    same = type(module).forward is base.forward and "forward" not in vars(module)
    return same and getattr(type(module), "_conv_forward", None) is getattr(base, "_conv_forward", None)


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """A module's attributes that are neither its parameters, nor its buffers, nor its children."""
    return {name: value for name, value in vars(module).items() if name not in (*TENSOR_TABLES, "_modules")}


def version_of(tensor: Tensor) -> int:
    """How often a tensor has been written to in place.

    >>> version_of(torch.zeros(2).add_(1))
    1
    """
    return tensor._version


def base_of(tensor: Tensor) -> Tensor | None:
    """The tensor of which another one is a view, or None."""
    return tensor._base


def storage_id(tensor: Tensor) -> int:
    """A number that two tensors have in common if they share memory, also where it holds no data (device "meta")."""
    return tensor.untyped_storage()._cdata


def in_backward() -> bool:
    """Whether an op that a dispatch mode is given belongs to a backward pass, or is computed anew in one (checkpointing).

    >>> in_backward()
    False
    """
    return torch._C._current_autograd_node() is not None


def sparse_parts(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Indices and values of a sparse tensor that need not be coalesced; of a coalesced one there are public ones."""
    return tensor._indices(), tensor._values()


def schema_of(op: Any) -> Any:
    """An operator's schema: its name, arguments, returns, and whether it writes to its arguments.

    >>> schema_of(torch.ops.aten.add_.Tensor).is_mutable
    True
    """
    return op._schema


def torch_functions_off() -> AbstractContextManager[Any]:
    """Functions of torch run without the modes around them: a default device is one.

    >>> with torch.device("meta"), torch_functions_off():
    ...     torch.zeros(1).device
    device(type='cpu')
    """
    return torch._C.DisableTorchFunction()


def torch_functions_on() -> AbstractContextManager[Any]:
    """Undoes `torch_functions_off` inside of it.

    >>> with torch.device("meta"), torch_functions_off(), torch_functions_on():
    ...     torch.zeros(1).device
    device(type='meta')
    """
    return torch._C._EnableTorchFunction()


@contextmanager
def autocast_on_meta() -> Iterator[None]:
    """Inside, `torch.autocast("meta", ...)` is that of the CPU, which changes no op on meta tensors; torch has none and raises.

    Models of the transformers library before 5 turn autocast off on the device of their activations.

    >>> with autocast_on_meta(), torch.autocast("meta", enabled=False):
    ...     torch.ones(2, device="meta").shape
    torch.Size([2])
    """
    original = torch.autocast.__init__

    def init(self: Any, device_type: str, *args: Any, **options: Any) -> None:
        original(self, "cpu" if device_type == "meta" else device_type, *args, **options)

    torch.autocast.__init__ = init
    try:
        yield
    finally:
        torch.autocast.__init__ = original


def without_module_tracker(counter: FlopCounterMode) -> FlopCounterMode:
    """A flop counter that does not say which module an operation was in: the hooks for that fail in `torch.autograd.grad`."""
    counter.mod_tracker = cast(Any, _NoModules())
    return counter


class _NoModules(nullcontext[None]):
    parents = frozenset({"Global"})


def reset_compiled_code() -> None:
    """Discard what `torch.compile` has compiled: after some eight shapes it would run a module eagerly for good."""
    # Importing dynamo takes seconds, and if it was never imported there is no compiled code.
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()

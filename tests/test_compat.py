"""Every private name of torch and Lightning that the package relies on is there, and is reached through `_compat` alone."""

from __future__ import annotations

import ast
import pkgutil
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.utils.hooks import RemovableHandle

from tests.helpers.paths import ROOT

PACKAGE = ROOT / "evolvenet"
IMPORTED = (
    "torch._C:DisableTorchFunction",
    "torch._C:_EnableTorchFunction",
    "torch._C:_current_autograd_node",
    "torch._dynamo:reset",
    "torch.distributed._composable.contract:REGISTRY_KEY",
    "torch.distributed._composable.contract:STATE_KEY",
    "torch.distributed._composable_state:_module_state_mapping",
    "torch.distributed.fsdp:FSDPModule._get_fsdp_state",
    "torch.distributed.fsdp:FSDPModule._orig_cls_mro_index",
    "torch._ops:OpOverload",
    "torch.autograd:_engine_run_backward",
    "torch.nn.modules.batchnorm:_NormBase",
    "torch.nn.modules.conv:_ConvNd",
    "torch.nn.modules.conv:_ConvTransposeNd",
    "torch.nn.utils.parametrizations:_WeightNorm",
    "torch.utils._python_dispatch:TorchDispatchMode",
    "torch.utils._python_dispatch:_disable_current_modes",
    "torch.utils._pytree:register_pytree_node",
    "torch.utils._pytree:tree_flatten",
    "torch.utils._pytree:tree_leaves",
    "torch.utils._pytree:tree_map_only",
    "torch.utils._pytree:tree_unflatten",
    "lightning.pytorch.core.saving:_load_state",
    "lightning.pytorch.strategies.launchers.multiprocessing:_MultiProcessingLauncher",
    "lightning.pytorch.strategies.launchers.multiprocessing:_MultiProcessingLauncher.get_extra_results",
    "lightning.pytorch.strategies.launchers.multiprocessing:_MultiProcessingLauncher._recover_results_in_main_process",
)
"""What is found by its place; names of a release that moved them elsewhere fail here."""


def _masking() -> prune.BasePruningMethod:
    return prune.L1Unstructured.apply(nn.Linear(2, 2), "weight", 0.5)


def _sparse() -> torch.Tensor:
    return torch.eye(2).to_sparse()


def _lbfgs() -> torch.optim.Optimizer:
    return torch.optim.LBFGS([torch.zeros(2, requires_grad=True)])


def _epoch_loop() -> Any:
    return pkgutil.resolve_name("lightning.pytorch:Trainer")(
        logger=False, enable_checkpointing=False
    ).fit_loop.epoch_loop


def _ddp() -> Any:
    return pkgutil.resolve_name("lightning.pytorch.strategies:DDPStrategy")()


def _ddp_wrapper() -> nn.Module:
    torch.distributed.init_process_group(
        "gloo", store=pkgutil.resolve_name("torch.distributed:HashStore")(), rank=0, world_size=1
    )
    try:
        return nn.parallel.DistributedDataParallel(nn.Linear(1, 1))
    finally:
        torch.distributed.destroy_process_group()


def _sharded() -> Any:
    """The state that `fully_shard` keeps of a module."""
    distributed, fsdp = map(pkgutil.resolve_name, ("torch.distributed", "torch.distributed.fsdp"))
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = pkgutil.resolve_name("torch.distributed.device_mesh:init_device_mesh")("cpu", (1,))
        layer = nn.Linear(1, 1)
        fsdp.fully_shard(layer, mesh=mesh)
        return layer._get_fsdp_state()  # type: ignore[operator]
    finally:
        distributed.destroy_process_group()


def _sharded_group() -> Any:
    return _sharded()._fsdp_param_groups[0]


def _with_hyperparameters() -> Any:
    lightning = pkgutil.resolve_name("lightning.pytorch")

    class Net(lightning.LightningModule):
        def __init__(self, width: int = 3) -> None:
            super().__init__()
            self.save_hyperparameters()

    return Net()


def _bert() -> Any:
    library = pkgutil.resolve_name("transformers")
    sizes = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "vocab_size": 9,
    }
    model = library.BertModel(library.BertConfig(**sizes))
    model.init_weights()
    return model


OF_INSTANCES: dict[str, tuple[Callable[[], Any], type | tuple[type, ...]]] = {
    "torch.nn.Module._parameters": (lambda: nn.Linear(1, 1), dict),
    "torch.nn.Module._buffers": (lambda: nn.BatchNorm1d(1), dict),
    "torch.nn.Module._modules": (lambda: nn.Sequential(), dict),
    "torch.nn.Module._forward_pre_hooks": (lambda: nn.ReLU(), dict),
    "torch.nn.utils.prune.BasePruningMethod._tensor_name": (_masking, str),
    "torch.nn.Module._forward_hooks": (lambda: nn.ReLU(), dict),
    "torch.nn.Module._forward_hooks_with_kwargs": (lambda: nn.ReLU(), dict),
    "torch.nn.Module._forward_hooks_always_called": (lambda: nn.ReLU(), dict),
    "torch.nn.Module._forward_pre_hooks_with_kwargs": (lambda: nn.ReLU(), dict),
    "torch.nn.Module._backward_hooks": (lambda: nn.ReLU(), dict),
    "torch.nn.Module._backward_pre_hooks": (lambda: nn.ReLU(), dict),
    "torch.nn.Module._load_state_dict_pre_hooks": (lambda: nn.ReLU(), dict),
    "torch.nn.Module.state_dict()._metadata": (lambda: nn.ReLU().state_dict(), dict),
    "torch.nn.RNNBase._flat_weights": (lambda: nn.LSTM(1, 1), list),
    "torch.nn.RNNBase._flat_weights_names": (lambda: nn.LSTM(1, 1), list),
    "torch.nn.Conv1d._conv_forward": (lambda: nn.Conv1d(1, 1, 1), Callable),  # type: ignore[dict-item]
    "torch.nn.Conv2d._conv_forward": (lambda: nn.Conv2d(1, 1, 1), Callable),  # type: ignore[dict-item]
    "torch.nn.Conv3d._conv_forward": (lambda: nn.Conv3d(1, 1, 1), Callable),  # type: ignore[dict-item]
    "torch.nn.parallel.DistributedDataParallel._comm_hooks": (_ddp_wrapper, list),
    "FSDPState._fsdp_param_groups": (_sharded, list),
    "FSDPState._auto_reshard_after_forward": (_sharded, bool),
    "FSDPState._mp_policy": (_sharded, object),
    "FSDPState._pre_forward_hook_handle": (_sharded, RemovableHandle),
    "FSDPState._post_forward_hook_handle": (_sharded, RemovableHandle),
    "FSDPState._states_to_forward_prefetch": (_sharded, list),
    "FSDPState._states_to_backward_prefetch": (_sharded, list),
    "FSDPParamGroup._module_to_pre_save_state_dict_hook_handle": (_sharded_group, dict),
    "FSDPParamGroup._module_to_pre_load_state_dict_hook_handle": (_sharded_group, dict),
    "FSDPParam._post_load_hook_handle": (lambda: _sharded_group().fsdp_params[0], RemovableHandle),
    "torch.optim.LBFGS._numel_cache": (_lbfgs, (int, type(None))),
    "torch.Tensor._version": (lambda: torch.zeros(1), int),
    "torch.Tensor._base": (lambda: torch.zeros(2)[:1], torch.Tensor),
    "torch.Tensor._indices": (_sparse, Callable),  # type: ignore[dict-item]
    "torch.Tensor._values": (_sparse, Callable),  # type: ignore[dict-item]
    "torch.UntypedStorage._cdata": (lambda: torch.zeros(1).untyped_storage(), int),
    "torch.ops.aten._unsafe_view": (lambda: torch.ops.aten, Callable),  # type: ignore[dict-item]
    "torch.ops.aten._safe_softmax": (lambda: torch.ops.aten, Callable),  # type: ignore[dict-item]
    "torch.ops.aten.add.Tensor._schema": (lambda: torch.ops.aten.add.Tensor, torch.FunctionSchema),
    "lightning.pytorch.strategies.DDPStrategy._pl_static_graph_delay_done": (_ddp, bool),
    "lightning.pytorch.strategies.DDPStrategy._ddp_comm_state": (_ddp, type(None)),
    "transformers.PreTrainedModel._init_weights": (_bert, Callable),  # type: ignore[dict-item]
    "torch.nn.Module._is_hf_initialized": (lambda: _bert().embeddings, bool),
    "lightning.pytorch.LightningModule._trainer": (
        lambda: pkgutil.resolve_name("lightning.pytorch:LightningModule")(),
        type(None),
    ),
    "lightning.pytorch.LightningModule._hparams_name": (_with_hyperparameters, (str, type(None))),
    "lightning.pytorch.callbacks.ModelSummary._max_depth": (
        lambda: pkgutil.resolve_name("lightning.pytorch.callbacks:ModelSummary")(),
        int,
    ),
    "lightning.pytorch.Trainer.fit_loop.epoch_loop._batches_that_stepped": (_epoch_loop, int),
}
"""{attribute: (what makes an object that has it, the type of its value)}."""


def private(name: str) -> bool:
    """One leading underscore and a letter."""
    return re.fullmatch(r"_[A-Za-z]\w*", name) is not None


def private_names(tree: ast.AST) -> Iterator[str]:
    """Private names that a module takes from elsewhere: imported, attributes of anything but itself, in a string."""
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    own |= {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from (part for part in (node.module or "").split(".") if private(part) and part != "_compat")
            yield from (alias.name for alias in node.names if private(alias.name) and alias.name != "_compat")
        elif isinstance(node, ast.Import):
            yield from (part for alias in node.names for part in alias.name.split(".") if private(part))
        elif isinstance(node, ast.Attribute) and private(node.attr) and node.attr not in own:
            if not _is_self(node.value) and not node.attr.startswith("_evolvenet"):
                yield node.attr
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and node.value in _TESTED - {"_unsafe_view", "_safe_softmax"}
        ):
            yield node.value


def _is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in {"self", "cls"}


_TESTED = {part for name in (*IMPORTED, *OF_INSTANCES) for part in re.split(r"[.:]", name) if private(part)}
"""Looked for in strings, too, by which an attribute can be reached; ops are named in the tables of the tracing rules."""


@pytest.mark.parametrize("name", IMPORTED)
def test_the_private_name_is_there(name: str) -> None:
    assert pkgutil.resolve_name(name) is not None


@pytest.mark.parametrize("name", OF_INSTANCES)
def test_the_private_attribute_is_there_and_of_its_type(name: str) -> None:
    make, expected = OF_INSTANCES[name]
    assert isinstance(getattr(make(), name.rpartition(".")[2]), expected)


def test_every_private_name_in_compat_has_a_test() -> None:
    used = {name for file in (PACKAGE / "_compat").glob("*.py") for name in private_names(ast.parse(file.read_text()))}
    assert used == _TESTED


def test_no_other_module_takes_a_private_name_from_elsewhere() -> None:
    found = {
        f"{file.relative_to(ROOT)}: {name}"
        for folder in (PACKAGE, ROOT / "experiments")
        for file in folder.rglob("*.py")
        if file.parent.name != "_compat"
        for name in private_names(ast.parse(file.read_text()))
    }
    assert found == set()


@pytest.mark.parametrize(
    "source",
    [
        "from torch.utils import _pytree",
        "from torch._ops import OpOverload",
        "import torch._dynamo",
        "table = module._parameters",
        "table = getattr(module, '_parameters')",
    ],
)
def test_a_private_name_is_found_however_it_is_reached(source: str) -> None:
    assert len(list(private_names(ast.parse(source)))) == 1


def test_private_names_of_ones_own_are_no_matter() -> None:
    source = "class A:\n    def _f(self): self._x = 1\n    def g(self, other): return other._x + other._f() + self._y"
    assert list(private_names(ast.parse(source))) == []


def test_importing_evolvenet_imports_no_private_name_of_lightning() -> None:
    from tests.helpers.interpreters import run_script

    assert run_script("import sys, evolvenet\nprint('evolvenet._compat.lightning' in sys.modules)") == ["False"]

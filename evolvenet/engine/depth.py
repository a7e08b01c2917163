"""Depth as a last width: residual blocks that carry nothing are removed whole.

A block computes y = x + f(x). On some batches every module with parameters is observed that is called once and returns a
tensor of its input's shape. Where Σ‖y − x‖² is at most a share of Σ‖y‖², the block is replaced by its input. Where a module
inside of a block returns nothing, Σ‖f‖² at most that share of the block's Σ‖y‖², this branch alone is replaced by zeros. The
outermost of such modules are removed, one after the other, each only if the model's outputs lose no more than that share
of their energy: with 0 they are the same. Whole layers of a model of the transformers library leave its list of layers,
and its configuration counts them: layers number their places in the cache. An attention that has such a number is removed
with its layer only.

What is removed stands in checkpoints (`evolvenet.surgery.module_replacement`), so that a freshly built model gets the same
modules before it is loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from evolvenet._compat.torch import version_of
from evolvenet.errors import ResizeError
from evolvenet.execution.isolation import isolated
from evolvenet.execution.step import run_model
from evolvenet.linalg.precision import in_float64
from evolvenet.measurement.output_error import outputs_on
from evolvenet.signals import deferred_signals
from evolvenet.surgery.module_replacement import Replacement, exchange_modules
from evolvenet.surgery.optimizer_parameters import as_list, parameter_names, replace_parameters
from evolvenet.surgery.removed_block import NOTHING, PASSES, RemovedBlock
from evolvenet.surgery.width_record import forget

log = logging.getLogger("evolvenet")
PLACE = "layer_idx"
"""The attribute by which modules of the transformers library find their entry of the cache."""
COUNTS = frozenset({"num_hidden_layers", "n_layer", "num_layers", "n_layers"})
EACH_LAYER = frozenset({"layer_types", "mlp_layer_types"})
"""Fields of the library's configurations: the number of layers, and lists with an entry for each."""
ROUNDING = 1e-5
"""Relative error of outputs that are the same but for the order of sums."""


@dataclass
class Observed:
    """What a module returned, summed over all batches.

    Args:
        argument: place or name of its first tensor among the arguments.
        outputs: see `RemovedBlock`.
        calls: in all batches.
        change: Σ‖y − x‖².
        energy: Σ‖y‖².
        shape: of the last output.
    """

    argument: int | str
    outputs: int
    calls: int = 0
    change: float = 0.0
    energy: float = 0.0
    shape: tuple[int, ...] = ()


@deferred_signals("the removal of blocks")
def remove_blocks(
    model: nn.Module,
    example_inputs: Any,
    batches: Sequence[Any] = (),
    share: float = 0.0,
    optimizers: Optimizer | Sequence[Optimizer] = (),
) -> dict[str, float]:
    """Remove residual blocks, and branches of them, that carry nothing or next to nothing; in place.

    Call it after `prune`; the graph has to be traced anew afterwards. In a run call `Evolver.remove_blocks`. Branches that are
    zero because they have just been initialized so would learn: remove them only once they have been trained.

    Args:
        model: any module.
        example_inputs: what it is called with.
        batches: more inputs, on which blocks are observed; the example inputs alone if there are none.
        share: of a block's energy, and of that of the model's outputs, that may be lost with what is removed; 0 for what adds
            exactly nothing.
        optimizers: those that hold the model's parameters: what is removed leaves them.

    Returns:
        {path of what was removed, by the names before: share of the energy that it carried}.

    Raises:
        ResizeError: for a share outside of 0 … 1.

    >>> class Block(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)
    ...     def forward(self, x):
    ...         return x + self.down(self.up(x).relu())
    >>> model = nn.Sequential(nn.Linear(4, 4), Block(), nn.Linear(4, 2))
    >>> _ = nn.init.zeros_(model[1].down.weight), nn.init.zeros_(model[1].down.bias)
    >>> remove_blocks(model, torch.randn(2, 4))
    {'1': 0.0}
    >>> model[1]
    RemovedBlock(Block, returns its input)
    """
    if not 0 <= share <= 1:
        raise ResizeError(f"remove_blocks: expected a share in 0 … 1, got {share!r}. Take for example share=1e-4.")
    removals = find_removals(model, list(batches) or [example_inputs], share)
    with ExitStack() as undo:
        for removal in removals:
            apply_removal(model, removal, as_list(optimizers), undo)
        undo.pop_all()
    if removals:
        # It names tensors that are gone.
        forget(model)
    return {removal.path: removal.lost for removal in reversed(removals)}


@dataclass(frozen=True)
class Removal:
    """A block or a branch that is removed, as plain data that can be sent to other processes.

    Args:
        path: by the names before the removals that precede it in a list.
        returns, argument, outputs: see `RemovedBlock`.
        lost: share of the energy that it carried.
    """

    path: str
    returns: str
    argument: int | str
    outputs: int
    lost: float


def find_removals(model: nn.Module, inputs: Sequence[Any], share: float) -> list[Removal]:
    """What `remove_blocks` removes, from the last block to the first: what leaves a list of layers moves those after it.

    Args:
        model: is left as it was.
        inputs: of the model.
        share: see `remove_blocks`.
    """
    seen = observe_blocks(model, inputs)
    before = outputs_on(model, inputs, most=None)
    found: list[Removal] = []
    with ExitStack() as every:
        for path, returns, lost in reversed(list(_chosen(model, seen, share))):
            removal = Removal(path, returns, seen[path].argument, seen[path].outputs, lost)
            with ExitStack() as undo:
                apply_removal(model, removal, (), undo)
                if _is_as_good(model, inputs, before, share):
                    found.append(removal)
                    every.enter_context(undo.pop_all())
                else:
                    log.info("%s stays: without it the model's outputs lose more than a share of %g", path, share)
    return found


def observe_blocks(model: nn.Module, inputs: Sequence[Any]) -> dict[str, Observed]:
    """{path: what it returned} of each module with parameters that returns a tensor of its input's shape, once a batch."""
    found: dict[str, Observed] = {}
    # Hooks that are there before would find what they have written taken back.
    with isolated(model), _hooks(model, found):
        for batch in inputs:
            run_model(model, batch)
    return {path: each for path, each in found.items() if each.calls == len(inputs)}


@contextmanager
def _hooks(model: nn.Module, found: dict[str, Observed]) -> Iterator[None]:
    versions: dict[str, int | None] = {}
    observed = [
        (path, module)
        for path, module in model.named_modules()
        if path and not isinstance(module, Replacement) and any(True for _ in module.parameters())
    ]
    handles = [
        handle
        for path, module in observed
        for handle in (
            module.register_forward_pre_hook(partial(_note_version, versions, path), with_kwargs=True),
            module.register_forward_hook(partial(_observe, found, versions, path), with_kwargs=True),
        )
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _given(args: Any, kwargs: Mapping[str, Any]) -> tuple[int | str, Tensor] | None:
    """Place or name of the first tensor among the arguments, and the tensor."""
    return next(((key, each) for key, each in (*enumerate(args), *kwargs.items()) if isinstance(each, Tensor)), None)


def _note_version(versions: dict[str, int | None], path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
    given = _given(args, kwargs)
    versions[path] = None if given is None else version_of(given[1])


def _observe(
    found: dict[str, Observed],
    versions: Mapping[str, int | None],
    path: str,
    module: nn.Module,
    args: Any,
    kwargs: Mapping[str, Any],
    result: Any,
) -> None:
    given = _given(args, kwargs)
    several = isinstance(result, tuple) and bool(result) and all(each is None for each in result[1:])
    main = result[0] if several else result
    if given is None or not isinstance(main, Tensor) or not main.is_floating_point():
        return
    if versions[path] != version_of(given[1]):
        # It has written to its input, which is not what it was given any more.
        return
    argument, x = given
    if x.shape != main.shape or x.dtype != main.dtype:
        return
    entry = found.setdefault(path, Observed(argument, len(result) if several else 0))
    entry.calls += 1
    entry.change += float(in_float64(main - x).square().sum())
    entry.energy += float(in_float64(main).square().sum())
    entry.shape = tuple(main.shape)


def _chosen(model: nn.Module, seen: Mapping[str, Observed], share: float) -> Iterator[tuple[str, str, float]]:
    """(path, what it returns from now on, share of the energy) of the outermost modules that carry nothing."""
    modules, done = dict(model.named_modules()), list[str]()
    for path in modules:
        each = seen.get(path)
        if each is None or any(path.startswith(f"{outer}.") for outer in done):
            continue
        lost = _lost(path, each, modules, seen)
        for returns, value in lost.items():
            if value <= share and not _keeps_its_place(modules, path, returns):
                done.append(path)
                yield path, returns, value
                break


def _lost(
    path: str, each: Observed, modules: Mapping[str, nn.Module], seen: Mapping[str, Observed]
) -> dict[str, float]:
    """{what it could return: share of the energy that is lost}."""
    lost: dict[str, float] = {}
    if any(True for _ in modules[path].children()) and each.energy:
        # A layer alone is no block: a norm may find its inputs normalized already.
        lost[PASSES] = each.change / each.energy
    parts = path.split(".")
    around = [seen.get(".".join(parts[:length])) for length in range(1, len(parts))]
    blocks = [block.energy for block in around if block is not None and block.shape == each.shape and block.energy]
    if blocks or each.energy == 0:
        lost[NOTHING] = each.energy / blocks[-1] if blocks else 0.0
    return lost


def _keeps_its_place(modules: Mapping[str, nn.Module], path: str, returns: str) -> bool:
    """Whether something inside has a place in the cache, and is no layer of a list from which it could be taken.

    Layers of encoder and decoder stay: their configurations have names of their own for both numbers.
    """
    if not any(hasattr(module, PLACE) for module in modules[path].modules()):
        return False
    if any(getattr(getattr(module, "config", None), "is_encoder_decoder", False) for module in modules.values()):
        return True
    return returns != PASSES or not isinstance(modules[path.rpartition(".")[0]], nn.ModuleList)


def apply_removal(model: nn.Module, removal: Removal, optimizers: Sequence[Optimizer], undo: ExitStack) -> None:
    """Remove one block or branch; closing `undo` puts it back."""
    module = model.get_submodule(removal.path)
    if any(hasattr(each, PLACE) for each in module.modules()):
        _take_out(model, removal.path, undo)
    else:
        stand_in = RemovedBlock(module, removal.returns, removal.argument, removal.outputs)
        exchange_modules(model, {module: stand_in}, undo)
    left = set(model.parameters())
    gone: dict[Tensor, Sequence[Tensor]] = {each: [] for each in module.parameters() if each not in left}
    replace_parameters(optimizers, gone, parameter_names(model), undo)


def _take_out(model: nn.Module, path: str, undo: ExitStack) -> None:
    """Take a layer out of its list; the layers after it take the places before them, in the cache and in the configuration."""
    parent, _, index = path.rpartition(".")
    layers = model.get_submodule(parent)
    assert isinstance(layers, nn.ModuleList)
    count, before = len(layers), list(layers)
    del layers[int(index)]

    def put_back() -> None:
        while len(layers):
            del layers[-1]
        layers.extend(before)

    undo.callback(put_back)
    for later in layers[int(index) :]:
        for module in later.modules():
            if hasattr(module, PLACE):
                undo.callback(setattr, module, PLACE, getattr(module, PLACE))
                setattr(module, PLACE, getattr(module, PLACE) - 1)
    configs = {id(config): config for each in model.modules() if (config := getattr(each, "config", None)) is not None}
    for config in configs.values():
        for name, value in list(vars(config).items()):
            if name in COUNTS and value == count:
                changed: Any = count - 1
            elif name in EACH_LAYER and isinstance(value, list) and len(value) == count:
                changed = [entry for place, entry in enumerate(value) if place != int(index)]
            else:
                continue
            undo.callback(vars(config).__setitem__, name, value)
            vars(config)[name] = changed


def _is_as_good(model: nn.Module, inputs: Sequence[Any], before: Sequence[Tensor], share: float) -> bool:
    """Whether the model still runs, and its outputs have lost no more than a share of their energy."""
    try:
        now = outputs_on(model, inputs, most=None)
    except Exception as problem:
        log.debug("A removed block is put back", exc_info=problem)
        return False
    return [each.shape for each in now] == [each.shape for each in before] and all(
        torch.dist(one, other) <= max(ROUNDING, share**0.5) * other.norm()
        for one, other in zip(now, before, strict=True)
    )

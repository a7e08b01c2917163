"""Which entries of a state dict are a model's: names, tied tensors, the part behind a prefix, modules that are replaced there."""

# nn.Module.named_parameters has no full type.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from evolvenet.errors import RecordError
from evolvenet.graph.plain_data import reading
from evolvenet.surgery.module_replacement import (
    Record,
    behind,
    find_replacements,
    fit_replacements,
    replacements,
    whole_names,
)
from evolvenet.surgery.remaining_layers import is_without

_made_later: dict[str, str] = {}


def register_made_later(entry: str, call: str) -> None:
    """Entries of a state dict that a freshly built model lacks until something has been called on it.

    Args:
        entry: the last part of their names.
        call: what makes them, as in code; a message about a file that has them says so.
    """
    _made_later[entry] = call


def own_names(model: nn.Module) -> set[str]:
    """The names of the entries of a model's state dict."""
    return set(model.state_dict())


def tied_to(model: nn.Module, there: set[str]) -> set[str]:
    """The names of tensors that are in a state dict under another name, since they are tied."""
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    saved = {id(tensor) for name, tensor in named if name in there}
    return {name for name, tensor in named if id(tensor) in saved} & own_names(model)


def own_part(model: nn.Module, state: Mapping[str, Any], what: str) -> tuple[Mapping[str, Any], str]:
    """The entries of a state dict under the model's own names, all of them or those behind one prefix, and the prefix.

    Raises:
        RecordError: if they are there behind several prefixes.
    """
    own = own_names(model)
    untied = own - {name for name in own if len(tied_to(model, {name})) > 1}
    prefix = _own_prefix(own, state, what, min(untied or own, default=""), lambda names: tied_to(model, names))
    if not prefix:
        return state, ""
    return {name: state[prefix + name] for name in own if prefix + name in state}, prefix


def _own_prefix(
    own: set[str],
    state: Mapping[str, Any],
    what: str,
    some: str,
    tied_to: Callable[[set[str]], set[str]] = lambda names: set(),
) -> str:
    """The one prefix behind which a state dict has all the names, "" if it has them as they are or not at all.

    Args:
        own: the names.
        state: the state dict.
        what: the name of the file.
        some: one of the names that the state dict has if it has all.
        tied_to: the names of which a state dict with certain names need not hold the tensors.
    """
    there = set(state)
    whole = own <= there | tied_to(there)
    prefixes = [name.removesuffix(some) for name in state if name.endswith(f".{some}")]
    parts = {prefix: {n.removeprefix(prefix) for n in state if n.startswith(prefix)} for prefix in prefixes}
    inside = [prefix for prefix, part in parts.items() if own <= part | tied_to(part)]
    if len(inside) == 1 and not (whole and there <= own):
        return inside[0]
    if inside and not whole:
        raise RecordError(
            f"{what} holds {len(inside)} networks like this one: expected one, got {', '.join(inside)}. Build the module "
            "that holds them all and load it as a whole."
        )
    return ""


def refuse_others(own: set[str], state: set[str], what: str) -> None:
    """Raise unless a state dict has a model's own names and no others."""
    missing, unexpected = sorted(own - state), sorted(state - own)
    if missing or unexpected:
        made_by = {_made_later.get(name.rpartition(".")[2]) for name in unexpected}
        remedies = "".join(f"Call {call} on the model first. " for call in sorted(made_by - {None}, key=str))
        raise RecordError(
            f"{what} is of another model: expected entries that it lacks {missing[:5]}, and it has entries "
            f"unknown here {unexpected[:5]} ({len(missing)} and {len(unexpected)} in all). {remedies}Build the model as it was "
            "built for that run; only its widths may differ."
        )


def fit_file_replacements(model: nn.Module, state: Mapping[str, Any], found: Any, what: str) -> Callable[[], None]:
    """Give the model the replacements of a file (factorized layers), in which it may lie behind a prefix.

    Args:
        model: freshly built, or with replacements already.
        state: the file's state dict.
        found: all that the file holds.
        what: the name of the file.

    Returns:
        What puts everything back.

    Raises:
        RecordError: as `fit_replacements`; nothing has changed then.
    """
    with reading(what):
        records = {path: each for path, each in find_replacements(found).items() if not _built_so(model, path, each)}
    own = {name: module.record() for name, module in replacements(model).items()}
    if not records and not own:
        return lambda: None
    names = whole_names(own_names(model), own)
    whole = dict.fromkeys(whole_names(state, records))
    prefix = _own_prefix(names, whole, what, min(names, default=""))
    if not prefix:
        refuse_others(names, set(whole) | (tied_to(model, set(state)) & names), what)
    inside = [name.removeprefix(prefix) for name in state if name.startswith(prefix)]
    return fit_replacements(model, behind(records, prefix), inside)


def _built_so(model: nn.Module, path: str, record: Record) -> bool:
    """Whether the model was built with what a replacement of a file stands for; behind a prefix there if it has no such path."""
    modules = dict(model.named_modules())
    if path in modules:
        return is_without(modules[path], record)
    return any(is_without(module, record) for own, module in modules.items() if own and path.endswith(f".{own}"))

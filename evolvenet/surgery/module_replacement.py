"""Modules that stand in a model for others, and their record in checkpoints.

A replacement computes what the module before it computed in another way (a chain of factors for a layer). It writes into
the metadata of its state dict how it is built, so that a freshly built model gets the same modules before it is reshaped
to a checkpoint's widths and loaded.
"""

# nn.Module.named_modules and its hooks have no full types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from evolvenet._compat.torch import child_table, state_dict_metadata
from evolvenet.errors import RecordError
from evolvenet.graph.format_version import FORMAT, FORMAT_KEY, checked_format

REPLACEMENT_KEY = "evolvenet.replacement"
"""The key of a replacement's record in the metadata of its state dict."""

Record = Mapping[str, Any]
"""{"type": name in `BUILDERS`, "whole": names of the tensors of the module before it, and what the builder needs}."""

BUILDERS: dict[str, Callable[[nn.Module, Record], nn.Module]] = {}
"""{type of a replacement: (module before it, record) → replacement, its values undefined}."""


class Replacement(nn.Module):
    """Base of the modules that stand for others. A subclass calls `record_in_checkpoints` at the end of its `__init__`."""

    in_configuration = False
    """Whether a configuration of the transformers library can say it, so that plain `from_pretrained` builds it."""

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """How it is built, as plain data; see `Record`."""

    @abstractmethod
    def whole(self) -> nn.Module:
        """The module that computes the same in the original way, with the replacement's biases and merged weights."""

    def chain(self) -> Sequence[nn.Module]:
        """The layers that it runs one after the other with nothing between them that is not linear; none by default."""
        return ()

    def has_come(self, model: nn.Module, before: nn.Module, undo: ExitStack) -> None:
        """Bring up to date what else in a model depends on it, after it has taken the place of a module."""

    def has_gone(self, model: nn.Module, after: nn.Module, undo: ExitStack) -> None:
        """Bring that up to date after another module has taken its place."""

    def record_in_checkpoints(self) -> None:
        """Write the record into the metadata of this module's state dicts."""
        self.register_state_dict_post_hook(_write_record)


def _write_record(module: nn.Module, state: Any, prefix: str, local_metadata: dict[str, Any]) -> None:
    """A state-dict hook; a top-level function, so that a module that carries it can be pickled."""
    assert isinstance(module, Replacement)
    local_metadata[REPLACEMENT_KEY] = {FORMAT_KEY: FORMAT, **module.record()}


def find_replacements(found: Any) -> dict[str, Record]:
    """{path: record} of the replacements in a file's contents.

    Args:
        found: a Lightning checkpoint, or a state dict.
    """
    # Callbacks that average weights put their own under "state_dict", without metadata, and the network's under another key.
    for place in (found, found.get("state_dict"), *found.values()):
        records = {
            path: _without_format(metadata[REPLACEMENT_KEY])
            for path, metadata in state_dict_metadata(place).items()
            if REPLACEMENT_KEY in metadata
        }
        if records:
            return records
    return {}


def _without_format(record: Record) -> Record:
    checked = checked_format(record, "The file's record of a factorized layer")
    kind, whole = checked.get("type"), checked.get("whole")
    if not isinstance(kind, str) or not isinstance(whole, (list, tuple)) or not all(isinstance(n, str) for n in whole):
        raise RecordError(
            "The file's record of a replaced module cannot be read: expected its type and the names of the tensors before it, "
            f"got {kind!r} and {whole!r}. The file may be damaged, or edited: use another checkpoint."
        )
    return {name: value for name, value in checked.items() if name != FORMAT_KEY}


def behind(records: Mapping[str, Record], prefix: str) -> dict[str, Record]:
    """The records of the part of a model behind a prefix, by their paths in it.

    >>> behind({"net.fc": {}, "head": {}}, "net.")
    {'fc': {}}
    """
    return {path.removeprefix(prefix): record for path, record in records.items() if path.startswith(prefix)}


def whole_names(names: Iterable[str], records: Mapping[str, Record]) -> set[str]:
    """Names of tensors as they would be without replacements.

    >>> sorted(whole_names(["fc.0.weight", "fc.1.weight", "out.bias"], {"fc": {"whole": ["weight"]}}))
    ['fc.weight', 'out.bias']
    """
    outer = [path for path in records if not any(path.startswith(f"{other}.") for other in records)]
    kept = {name for name in names if not any(name.startswith(f"{path}.") for path in outer)}
    return kept | {f"{path}.{name}" for path in outer for name in records[path]["whole"]}


def names_when_whole(module: nn.Module) -> tuple[str, ...]:
    """The names of the entries of a module's state dict as they would be without replacements in it.

    >>> names_when_whole(nn.Linear(2, 2))
    ('bias', 'weight')
    """
    records = {path: each.record() for path, each in replacements(module).items()}
    return tuple(sorted(whole_names(module.state_dict(), records)))


def replacements(model: nn.Module) -> dict[str, Replacement]:
    """{path: replacement} of a model, under every path; outer ones before those that they hold."""
    return {
        path: module for path, module in model.named_modules(remove_duplicate=False) if isinstance(module, Replacement)
    }


def exchange_modules(model: nn.Module, exchanged: Mapping[nn.Module, nn.Module], undo: ExitStack) -> None:
    """Put other modules into the places of some, wherever the model has them.

    Args:
        model: is changed; it is itself none of them.
        exchanged: {module: the one in its place}.
        undo: closing it puts everything back.
    """
    assert model not in exchanged
    for parent in list(model.modules()):
        table = child_table(parent)
        for name, child in list(table.items()):
            if child is not None and child in exchanged:
                undo.callback(table.__setitem__, name, child)
                table[name] = exchanged[child]
    for old, new in exchanged.items():
        if isinstance(old, Replacement):
            old.has_gone(model, new, undo)
        if isinstance(new, Replacement):
            new.has_come(model, old, undo)


def whole_in(model: nn.Module, own: Replacement) -> nn.Module:
    """`Replacement.whole`, its new modules in the replacement's mode, its new tensors on its device, or that of the model.

    What was removed has no part in `model.to(...)`: parameters of a type that the model has no more get that of its others, and
    so do buffers of that type, unless the model keeps buffers of it.
    """
    whole, present = own.whole(), set(own.modules())
    for module in whole.modules():
        if module not in present:
            module.training = own.training
    others = [*own.parameters(), *model.parameters()]
    if not others:
        return whole
    like, kinds, kept = others[0], {each.dtype for each in others}, {each.dtype for each in model.buffers()}
    known = {id(each) for each in (*others, *own.buffers())}
    parameters, buffers = (
        [each for each in tensors if id(each) not in known] for tensors in (whole.parameters(), whole.buffers())
    )
    stale = {each.dtype for each in parameters if each.is_floating_point() and each.dtype not in kinds}
    stale = stale if like.is_floating_point() else set[torch.dtype]()
    with torch.no_grad():
        for tensors, old in ((parameters, stale), (buffers, stale - kept)):
            for tensor in tensors:
                tensor.data = tensor.data.to(like.device, like.dtype if tensor.dtype in old else tensor.dtype)
    return whole


def fit_replacements(model: nn.Module, records: Mapping[str, Record], names: Iterable[str]) -> Callable[[], None]:
    """Give a model the replacements of a checkpoint, and no others. Their values are undefined until it is loaded.

    Args:
        model: freshly built, or with replacements already.
        records: {path in the model: record}, from `find_replacements`.
        names: of the checkpoint's tensors, as the model names them. A replacement that is not recorded there is merged only
            if the checkpoint has the tensors of the module before it.

    Returns:
        What puts everything back: modules, and what else of the model was changed with them (`Replacement.has_come`).

    Raises:
        RecordError: if the model has no such module, or one that cannot be replaced like this; nothing has changed then.
    """
    there = set(names)
    with ExitStack() as undo:
        for path, own in reversed(replacements(model).items()):
            wanted = records.get(path)
            unlike = own.record() != wanted if wanted else {f"{path}.{name}" for name in own.record()["whole"]} <= there
            if unlike and not (wanted and _alike(own.record(), wanted)):
                exchange_modules(model, {own: whole_in(model, own)}, undo)
        for path in sorted(records, key=lambda path: path.count(".")):
            module = _module_at(model, path)
            if not isinstance(module, Replacement):
                built = _built(path, module, records[path])
                exchange_modules(model, {} if built is module else {module: built}, undo)
        return undo.pop_all().close


def _alike(own: Record, wanted: Record) -> bool:
    """Whether two records differ in nothing but ranks, which are widths: they are reshaped like any other."""
    return {**own, "ranks": None} == {**wanted, "ranks": None}


def _module_at(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as missing:
        raise RecordError(
            f"The checkpoint is of another model: expected a module {path!r}, which is factorized there, got none. Build the "
            "model as it was built for that run; only its widths and ranks may differ."
        ) from missing


def _built(path: str, module: nn.Module, record: Record) -> nn.Module:
    builder = BUILDERS.get(record["type"])
    if builder is None:
        raise RecordError(
            f"The checkpoint's {path!r} is a replacement of type {record['type']!r}: expected one of {sorted(BUILDERS)}. "
            "Import the package that registers it in evolvenet.surgery.module_replacement.BUILDERS, or update evolvenet."
        )
    try:
        return builder(module, record)
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise RecordError(f"The checkpoint is of another model, at {path}: {error}") from error

"""Files that hold a state dict: how each kind is read and written.

Nothing but tensors and plain data is unpickled (`weights_only=True`), and a file is complete or not there at all.
"""

# torch.load and safetensors have no full types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import base64
import json
import os
import pickle
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from evolvenet._compat.torch import state_dict_metadata, with_metadata
from evolvenet._compat.wrapping import hparams_name
from evolvenet.errors import MissingPackageError, RecordError
from evolvenet.graph.format_version import checked_format
from evolvenet.surgery.module_replacement import REPLACEMENT_KEY, find_replacements
from evolvenet.surgery.width_record import RECORD_KEY

STATE_KEYS = ("state_dict", "model_state_dict", "model", "module", "net", "network", "weights", "params")
"""Where checkpoints keep the state dict, in the order in which it is looked for."""
FOLDER_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
"""What `save_pretrained` writes, in the order in which it is looked for: an index names the files of a model in parts."""
FOLDER_RECORD = "evolvenet.json"
"""The file in such a folder with the widths."""


def read(path: Path, map_location: Any = "cpu", mmap: bool = False) -> Any:
    """What a file or folder holds: a state dict, or a checkpoint with one.

    Args:
        path: of the file or folder.
        map_location: as in `torch.load`.
        mmap: whether tensors are parts of the mapped file, read when they are used; those of safetensors always are. A write
            to them is a write to a copy in memory, not to the file.

    Raises:
        FileNotFoundError: if it is not there.
        RecordError: if it cannot be read.
    """
    if path.is_dir():
        return _read_folder(path, map_location, mmap)
    try:
        return READERS.get(path.suffix, _read_pickle)(path, map_location, mmap)
    except FileNotFoundError:
        raise
    except pickle.UnpicklingError as error:
        raise RecordError(
            f"{path} cannot be read: expected tensors and plain data, got {error}. If the file is complete and its objects "
            "are of classes that you trust, load it inside `with torch.serialization.safe_globals([TheClass]):`."
        ) from error
    except (MissingPackageError, MemoryError):
        raise
    except Exception as error:  # each kind of file has errors of its own for one that is damaged
        raise RecordError(
            f"{path} cannot be read: expected a complete {path.suffix or 'torch.save'} file, got {type(error).__name__}: "
            f"{error}. It may be truncated, or of another kind than its name says."
        ) from error


def state_in(found: Any, what: str) -> Mapping[str, Any]:
    """The state dict in what a file holds.

    Raises:
        RecordError: if there is none, or it is one of several.
    """
    if isinstance(found, Mapping):
        parts = {key: part for key, part in found.items() if isinstance(part, Mapping) and _has_tensors(part)}
        key = next((key for key in STATE_KEYS if key in parts), next(iter(parts), None))
        if _has_tensors(found):
            return found
        if key is not None and (len(parts) == 1 or key in STATE_KEYS):
            return parts[key]
        raise RecordError(
            f"{what} holds no state dict, or several: expected one of {', '.join(STATE_KEYS)} among its keys, got "
            f"{', '.join(map(str, found)) or 'none'}. Save model.state_dict() by itself, or use evolvenet.save."
        )
    raise RecordError(
        f"{what} holds a {type(found).__name__}: expected a state dict. Save model.state_dict(), or use evolvenet.save."
    )


def _has_tensors(part: Mapping[Any, Any]) -> bool:
    return any(isinstance(value, Tensor) for value in part.values())


def write(path: Path, model: nn.Module, state: Mapping[str, Any]) -> None:
    """Write a state dict as the kind of file that the name says; on any failure a file that is there stays.

    Args:
        path: of the file.
        model: whose state dict it is.
        state: with its metadata.

    Raises:
        RecordError: for a name without a known ending, or a state dict that such a file cannot hold.
    """
    writer = WRITERS.get(path.suffix)
    if writer is None or path.is_dir():
        raise RecordError(
            f"{path}: expected a file that ends in {', '.join(WRITERS)}, got {'a folder' if path.is_dir() else 'another name'}."
        )
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        writer(Path(name), model, state)
        Path(name).chmod(0o666 & ~_umask())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _read_pickle(path: Path, map_location: Any, mmap: bool) -> Any:
    return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)


def _write_state(path: Path, model: nn.Module, state: Mapping[str, Any]) -> None:
    torch.save(state, path)


def _write_checkpoint(path: Path, model: nn.Module, state: Mapping[str, Any]) -> None:
    """As Lightning's `trainer.save_checkpoint(path, weights_only=True)`, which needs a trainer."""
    checkpoint: dict[str, Any] = {"state_dict": state}
    lightning = next((cls for cls in type(model).__mro__ if cls.__name__ == "LightningModule"), None)
    if lightning is not None:
        module: Any = model
        package = sys.modules[lightning.__module__.partition(".")[0]]
        checkpoint |= {"epoch": 0, "global_step": 0, "pytorch-lightning_version": package.__version__, "loops": {}}
        if module.hparams:
            checkpoint[module.CHECKPOINT_HYPER_PARAMS_NAME] = hparams_name(module)
            checkpoint[module.CHECKPOINT_HYPER_PARAMS_KEY] = dict(module.hparams)
        module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, path)


def _safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"Files that end in .safetensors: expected the package safetensors, got {error}. Install it with pip install "
            "safetensors, or use a name that ends in .pt."
        ) from error
    return safetensors.torch


def _write_safetensors(path: Path, model: nn.Module, state: Mapping[str, Any]) -> None:
    """Tensors alone. A tied one is written once; its other names stand in the metadata, as `save_model` writes them."""
    package, first, tensors, metadata = _safetensors(), {}, {}, {"format": "pt"}
    ids = {name: id(t) for name, t in (*model.named_parameters(remove_duplicate=False),
                                       *model.named_buffers(remove_duplicate=False))}  # fmt: skip
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise RecordError(
                f"A .safetensors file holds tensors alone: expected a tensor under {name}, got a {type(value).__name__}. "
                "Save to a name that ends in .pt."
            )
        kept = first.setdefault(ids.get(name, name), name)
        if kept == name:
            # A clone: two tensors of one memory cannot be told from tied ones there.
            tensors[name] = value.detach().clone(memory_format=torch.contiguous_format)
        else:
            metadata[name] = kept
    record = state_dict_metadata(state).get("", {}).get(RECORD_KEY)
    if record is not None:
        metadata[RECORD_KEY] = record_to_json(record)
    replaced = find_replacements(state)
    if replaced:
        metadata[REPLACEMENT_KEY] = json.dumps(replaced)
    package.save_file(tensors, path, metadata)


def _read_safetensors(path: Path, map_location: Any, mmap: bool) -> Any:
    _safetensors()
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: _placed(file.get_tensor(name), map_location) for name in file.keys()}  # noqa: SIM118
    replaced = json.loads(metadata.get(REPLACEMENT_KEY, "{}"))
    entries: dict[str, dict[str, Any]] = {path: {REPLACEMENT_KEY: record} for path, record in replaced.items()}
    if RECORD_KEY in metadata:
        entries.setdefault("", {})[RECORD_KEY] = record_from_json(metadata[RECORD_KEY])
    return with_metadata(tensors, entries)


def record_to_json(record: Mapping[str, Any]) -> str:
    """What `WidthRecord.state_dict` returned, as text; buffers in the format of safetensors, base64."""
    buffers = _safetensors().save({name: tensor.contiguous() for name, tensor in record["buffers"].items()})
    return json.dumps({**record, "buffers": base64.b64encode(buffers).decode()})


def record_from_json(text: str) -> dict[str, Any]:
    """What `record_to_json` was given."""
    record = checked_format(json.loads(text), "The file's record of widths")
    return {**record, "buffers": _safetensors().load(base64.b64decode(record["buffers"]))}


def write_folder_record(folder: Path, state: Mapping[str, Any]) -> None:
    """Write what a state dict's metadata says of widths and replaced modules beside a model that `save_pretrained` wrote."""
    record = state_dict_metadata(state).get("", {}).get(RECORD_KEY)
    found = {RECORD_KEY: record and record_to_json(record), REPLACEMENT_KEY: find_replacements(state)}
    written = folder / f".{FOLDER_RECORD}.part"
    written.write_text(json.dumps(found), "utf-8")
    written.replace(folder / FOLDER_RECORD)


def read_folder_record(folder: Path) -> dict[str, dict[str, Any]]:
    """The metadata that `write_folder_record` was given; empty if the folder has none.

    Raises:
        RecordError: if it cannot be read.
    """
    if not (folder / FOLDER_RECORD).is_file():
        return {}
    try:
        found = json.loads((folder / FOLDER_RECORD).read_text("utf-8"))
        entries = {path: {REPLACEMENT_KEY: record} for path, record in found[REPLACEMENT_KEY].items()}
        if found[RECORD_KEY]:
            entries.setdefault("", {})[RECORD_KEY] = record_from_json(found[RECORD_KEY])
    except (ValueError, KeyError, TypeError) as error:
        raise RecordError(
            f"{folder / FOLDER_RECORD} cannot be read: expected the widths as evolvenet.transformers.save_pretrained writes "
            f"them, got {type(error).__name__}: {error}. Save the model anew."
        ) from error
    return entries


def _placed(tensor: Tensor, map_location: Any) -> Tensor:
    """A tensor of a file that says no device; it counts as saved on the CPU."""
    place = map_location.get("cpu", "cpu") if isinstance(map_location, Mapping) else map_location
    return tensor if place is None else tensor.to(place)


def _read_folder(path: Path, map_location: Any, mmap: bool) -> Any:
    """The parts of a model together, with the first record that one of them has."""
    name = next((name for name in FOLDER_FILES if (path / name).is_file()), None)
    if name is None:
        raise RecordError(
            f"{path} is a folder: expected one of {', '.join(FOLDER_FILES)} in it, as save_pretrained writes them, got none."
        )
    parts = [name]
    if name.endswith(".index.json"):
        parts = sorted(set(json.loads((path / name).read_text("utf-8"))["weight_map"].values()))
    tensors: dict[str, Any] = {}
    metadata: dict[str, dict[str, Any]] = {}
    for part in parts:
        found = read(path / part, map_location, mmap)
        tensors.update(found)
        metadata.update(state_dict_metadata(found))
    return with_metadata(tensors, {**metadata, **read_folder_record(path)})


READERS: Mapping[str, Callable[[Path, Any, bool], Any]] = {".safetensors": _read_safetensors}
"""How a file is read, by its ending; any other one is torch's."""
WRITERS: Mapping[str, Callable[[Path, nn.Module, Mapping[str, Any]], None]] = {
    ".ckpt": _write_checkpoint,
    ".pt": _write_state,
    ".pth": _write_state,
    ".safetensors": _write_safetensors,
}
"""How a file is written, by its ending."""

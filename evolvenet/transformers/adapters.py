"""Models with LoRA adapters of the package PEFT in a folder: the base beside its adapters, ranks in their configurations.

PEFT builds an adapter from the layer that it stands at, so the adapters of a base with other widths fit by themselves. What it
does not know are ranks that differ between layers after a cut: they are written as `rank_pattern`, and as `alpha_pattern` the
numbers that keep each layer's scaling. So PEFT alone loads the adapters onto the base.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from evolvenet.engine.saving import state_with_record
from evolvenet.errors import MissingPackageError, RecordError
from evolvenet.execution.chosen_outputs import Outputs
from evolvenet.surgery.checkpoint_file import FOLDER_RECORD, read_folder_record, write_folder_record
from evolvenet.surgery.width_record import RECORD_KEY, WidthRecord, forget, record_of, remember, shapes_of
from evolvenet.transformers.folders import known_widths, load_model, save_model
from evolvenet.transformers.rank_patterns import ranks_of, write_ranks

ADAPTER = "adapter_config.json"
"""The file by which a folder of PEFT's is known."""
BASE = "base_model"
"""The folder of the base within it."""


def is_adapted(model: Any) -> bool:
    """Whether a model is PEFT's. Told by the name of its class: PEFT may not be installed."""
    return any(kind.__name__ == "PeftModel" for kind in type(model).__mro__)


def is_adapted_folder(folder: Path) -> bool:
    """Whether `save_adapted` wrote a folder."""
    return (folder / ADAPTER).is_file() and (folder / BASE).is_dir()


def save_adapted(
    model: Any, folder: Path, example_inputs: Any, outputs: Outputs | None, options: Mapping[str, Any]
) -> bool:
    """Write what PEFT writes, the base in a folder of its own within, and the widths.

    Args:
        model: a `PeftModel` with LoRA adapters.
        folder: is made if it is not there.
        example_inputs: as for `save_model`.
        outputs: as for `save_model`.
        options: of the base's `save_pretrained`.

    Returns:
        Whether PEFT and the transformers library alone load the folder.

    Raises:
        RecordError: for adapters of another kind, or widths that are not known.
    """
    others = {name: config.peft_type.value for name, config in model.peft_config.items() if config.peft_type != "LORA"}
    base = model.get_base_model()
    if others or not isinstance(base, PreTrainedModel):
        raise RecordError(
            "save_pretrained: expected LoRA adapters on a model of the transformers library, got "
            f"{', '.join(f'{name} of type {kind}' for name, kind in others.items()) or type(base).__name__}. Save its state dict "
            "with evolvenet.save(model, path)."
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FOLDER_RECORD).unlink(missing_ok=True)
    behind = dict(_behind(base, model.active_adapter))
    _rename_earlier_record(base, behind)
    state = state_with_record(model, example_inputs, outputs)
    with model.disable_adapter():
        alone = save_model(base, folder / BASE, None, None, options, lambda name: _base_name(name, behind))
    configs = dict(model.peft_config)
    try:
        for name, config in configs.items():
            model.peft_config[name] = copy.deepcopy(config)
            write_ranks(model.peft_config[name], ranks_of(base, name))
            model.peft_config[name].base_model_name_or_path = str((folder / BASE).resolve())
        model.save_pretrained(folder)
    finally:
        model.peft_config.update(configs)
    # The base that is loaded has what replaced a layer in its place: it has other shapes than this one.
    if known_widths(state) is not None and not behind:
        write_folder_record(folder, state)
    return alone


def load_adapted(folder: Path, model_class: type[PreTrainedModel] | None, options: Mapping[str, Any]) -> Any:
    """Build and load what `save_adapted` wrote: the base, then its adapters.

    Args:
        folder: from `save_adapted`.
        model_class: of the base; by default the class that its configuration names.
        options: of `model_class.from_pretrained`; "is_trainable" is PEFT's.

    Raises:
        RecordError: if a part of it is missing.
        MissingPackageError: without PEFT.
    """
    try:
        from peft import PeftModel
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"{folder} holds adapters of PEFT: expected the package peft, got {error}. Install it with pip install peft."
        ) from error
    trainable = options.get("is_trainable", False)
    record = read_folder_record(folder).get("", {}).get(RECORD_KEY)
    base = load_model(
        folder / BASE, model_class, {key: value for key, value in options.items() if key != "is_trainable"}
    )
    # Its layers are about to get other names.
    forget(base)
    try:
        model = PeftModel.from_pretrained(base, str(folder), is_trainable=trainable)
        for other in sorted(path.parent for path in folder.glob(f"*/{ADAPTER}")):
            model.load_adapter(str(other), other.name, is_trainable=trainable)
    except (OSError, ValueError, RuntimeError) as error:
        raise RecordError(f"{folder}: expected adapters that fit the model in {BASE}, got {error}") from error
    if record is not None:
        remember(model, WidthRecord.from_state_dict(record))
    return model


def _base_name(name: str, behind: Mapping[str, str] | None = None) -> str | None:
    """The name that a tensor or module of the base has without adapters; None for what is an adapter's.

    Args:
        name: in the base with adapters.
        behind: from `_behind`.

    >>> _base_name("encoder.query.base_layer.weight"), _base_name("encoder.query.lora_A.default.weight")
    ('encoder.query.weight', None)
    """
    for path, used in (behind or {}).items():
        if name.startswith(f"{path}."):
            return f"{path}{name[len(used) :]}" if f"{name}.".startswith(f"{used}.") else None
    parts = name.split(".")
    if "modules_to_save" in parts or any(part.startswith("lora_") for part in parts):
        return None
    return ".".join(part for part in parts if part not in ("base_layer", "original_module"))


def _behind(base: nn.Module, adapter: str) -> Iterator[tuple[str, str]]:
    """(path of a layer, path of the trained copy in it) where the layer that it replaces has not followed the widths.

    PEFT keeps a head that is trained whole beside the untrained one, which never runs. Its widths are not known then.
    """
    for path, module in base.named_modules():
        copies, own = getattr(module, "modules_to_save", None), getattr(module, "original_module", None)
        if not isinstance(copies, nn.ModuleDict) or not isinstance(own, nn.Module) or adapter not in copies:
            continue
        if shapes_of(own) != shapes_of(copies[adapter]):
            yield path, f"{path}.modules_to_save.{adapter}"


def _rename_earlier_record(base: nn.Module, behind: Mapping[str, str]) -> None:
    """Rename what is recorded of a base whose widths had changed before it got its adapters."""
    record, shapes = record_of(base), shapes_of(base)
    if record is None or record.graph is None or set(record.graph.shapes) <= set(shapes):
        return
    names = (*shapes, *(path for path, _ in base.named_modules()))
    now = {before: name for name in names if (before := _base_name(name, behind)) is not None}
    if set(record.graph.shapes) <= set(now):
        remember(base, record.renamed(now.get))

"""One model of the transformers library in a folder: written with its widths, and built from them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

from evolvenet._compat.initialization import initialize, mark_initialized
from evolvenet._compat.torch import state_dict_metadata, with_metadata
from evolvenet.engine.saving import graph_of_shapes, refuse_unsaved_buffers, state_with_record
from evolvenet.errors import RecordError, TraceError
from evolvenet.execution.chosen_outputs import Outputs
from evolvenet.execution.dummy_inputs import dummy_inputs
from evolvenet.graph.naming import and_above, named_tensors
from evolvenet.graph.renaming import Rename
from evolvenet.graph.serialization import to_state_dict
from evolvenet.graph.sizes import sizes_from_shapes
from evolvenet.surgery.checkpoint import fit_shapes
from evolvenet.surgery.checkpoint_file import FOLDER_RECORD, read, read_folder_record, write_folder_record
from evolvenet.surgery.module_replacement import Record, find_replacements, fit_replacements
from evolvenet.surgery.resize_model import scaled_numbers
from evolvenet.surgery.width_record import RECORD_KEY, WidthRecord, remember, renamed_state, shapes_of
from evolvenet.transformers.configuration import Shapes, builds, equal_configuration
from evolvenet.transformers.unit_numbers import has_all_units, is_number, number_as

log = logging.getLogger("evolvenet")


def save_model(
    model: PreTrainedModel,
    folder: Path,
    example_inputs: Any,
    outputs: Outputs | None,
    options: Mapping[str, Any],
    rename: Rename | None = None,
) -> bool:
    """Write a model, its widths, and the configuration that says them if there is one.

    Args:
        model: with any widths.
        folder: is made if it is not there.
        example_inputs: to trace it on if its widths are not known, and to compare outputs on; None for made-up ones.
        outputs: as for `evolvenet.trace`.
        options: of `model.save_pretrained`; a `state_dict` among them is written in place of the model's own.
        rename: from the names of its tensors and modules to those in the file; None for what is left out. Its outputs have to
            be those of the model in the file.

    Returns:
        Whether the transformers library alone loads the folder.

    Raises:
        RecordError: if its widths are not known, or the given `state_dict` is not that of the model.
    """
    state = state_with_record(model, example_inputs, outputs)
    given = options.get("state_dict")
    if given is not None:
        options = {**options, "state_dict": _checked(model, state, given, rename)}
    folder.mkdir(parents=True, exist_ok=True)
    state = _renamed(state, rename)
    shapes = shapes_of(model) if rename is None else _by_new_name(shapes_of(model), rename)
    inputs = dummy_inputs(model) if example_inputs is None else example_inputs
    record, plain = known_widths(state), None
    if rename is None and not find_replacements(state) and has_all_units(model):
        plain = _without_numbers(state), _without_numbers(shapes)
    config = None if plain is None else _configuration(model, *plain, inputs, record)
    if plain is not None and config is not None:
        # A record would say of heads that they can go, which need their numbers for that.
        (state, shapes), record = plain, None
        options = {**options, "state_dict": state if given is None else _without_numbers(given)}
    elif not any(map(is_number, shapes)):
        config = _configuration(model, state, shapes, inputs, record)
    if config is None and record is None:
        raise _unknown_widths(model, shapes)
    (folder / FOLDER_RECORD).unlink(missing_ok=True)
    own = model.config
    try:
        model.config = own if config is None else config
        model.save_pretrained(folder, **(options if rename is None else {**options, "state_dict": dict(state)}))
    finally:
        model.config = own
    if record is not None or find_replacements(state):
        write_folder_record(folder, state)
    return config is not None


def _unknown_widths(model: PreTrainedModel, shapes: Shapes) -> RecordError:
    differs = "numbers of its units, which no" if any(map(is_number, shapes)) else "other widths than its"
    return RecordError(
        f"The {type(model).__name__} has {differs} configuration says, expected a record of its widths, got none: they were "
        "never traced, it was copied or unpickled, or its weights were exchanged by other code. Give "
        "save_pretrained(example_inputs=...)."
    )


def _checked(model: PreTrainedModel, state: Mapping[str, Any], given: Any, rename: Rename | None) -> dict[str, Any]:
    """A copy of a given state dict, since the transformers library takes tied tensors out of the one that it writes.

    Raises:
        RecordError: naming those that differ, and for a model with adapters, whose base has other names in its file.
    """
    if rename is not None:
        raise RecordError(
            "save_pretrained(state_dict=...): expected a model without adapters, got one with adapters of PEFT, whose base is "
            "written under other names. Load the state dict into the model, and save without it."
        )
    shapes, others = (
        {name: tuple(each.shape) for name, each in entries.items() if isinstance(each, torch.Tensor)}
        for entries in (state, given)
    )
    wrong = sorted(name for name, shape in others.items() if shapes.get(name) != shape)
    if wrong:
        raise RecordError(
            f"save_pretrained(state_dict=...): expected the tensors of the {type(model).__name__}, {wrong[0]} of shape "
            f"{shapes.get(wrong[0], 'none')}, got {others[wrong[0]]}{f', and {len(wrong) - 1} more' if wrong[1:] else ''}. Give "
            "the state dict of the model as it is now."
        )
    tied = {state[name].data_ptr() for name in others}
    missing = sorted(name for name in shapes.keys() - others.keys() if state[name].data_ptr() not in tied)
    if missing:
        raise RecordError(
            f"save_pretrained(state_dict=...): expected all tensors of the {type(model).__name__}, got none for {missing[0]}"
            f"{f', and {len(missing) - 1} more' if missing[1:] else ''}. Give the state dict of the model as it is now."
        )
    return dict(given)


def _configuration(
    model: PreTrainedModel, state: Mapping[str, Any], shapes: Shapes, inputs: Any, record: Mapping[str, Any] | None
) -> Any:
    """The model's own configuration if it says the widths, or another one that does, or None."""
    if builds(model, model.config, shapes) and not _changed(record):
        return model.config
    return equal_configuration(model, state, shapes, inputs)


def _without_numbers(entries: Mapping[str, Any]) -> dict[str, Any]:
    return {name: entry for name, entry in entries.items() if not is_number(name)}


def _renamed(state: Mapping[str, Any], rename: Rename | None) -> Mapping[str, Any]:
    if rename is None:
        return state
    metadata = {path: dict(entries) for path, entries in _by_new_name(state_dict_metadata(state), rename).items()}
    metadata.setdefault("", {}).pop(RECORD_KEY, None)
    if (record := known_widths(state)) is not None:
        metadata[""][RECORD_KEY] = renamed_state(record, rename)
    return with_metadata(_by_new_name(state, rename), metadata)


def _by_new_name(entries: Mapping[str, Any], rename: Rename) -> dict[str, Any]:
    return {new: entry for name, entry in entries.items() if (new := rename(name)) is not None}


def known_widths(state: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The record in a state dict's metadata, if it has the widths of the tensors."""
    record = state_dict_metadata(state).get("", {}).get(RECORD_KEY)
    return record if record is not None and "graph" in record else None


def _changed(record: Mapping[str, Any] | None) -> bool:
    """Whether widths have other sizes than at first."""
    graph = None if record is None else WidthRecord.from_state_dict(record).graph
    if graph is None or record is None:
        return False
    return any(width.size != record["original"].get(name, width.size) for name, width in graph.widths.items())


def load_model(
    folder: Path,
    model_class: type[PreTrainedModel] | None,
    options: Mapping[str, Any],
    example_inputs: Any = None,
    outputs: Outputs | None = None,
    heads: bool | None = None,
) -> Any:
    """Build, reshape and load what `save_model` wrote, or the transformers library itself did.

    Args:
        folder: with a config.json.
        model_class: by default the class that the configuration names.
        options: of `model_class.from_pretrained`.
        example_inputs: to trace the model on where the folder does not say its widths; None for made-up ones.
        outputs: as for `trace`, with that; None for those of the main head.
        heads: as for `trace`, with that; None for whatever can have the shapes in the folder.

    Raises:
        RecordError: if the folder does not hold the whole model.
    """
    metadata = read_folder_record(folder)
    record = metadata.get("", {}).get(RECORD_KEY)
    kind = _class_of(folder) if model_class is None else model_class
    if not metadata:
        model, found = _read(kind, folder, options)
        if not found["mismatched_keys"]:
            return _whole(model, found, folder)
        record = _traced(model, _shapes_in_folder(found, folder), example_inputs, outputs, heads, folder)
        del model
    model = _whole(
        *_read(_reshaping(kind, record, find_replacements(with_metadata({}, metadata))), folder, options), folder
    )
    model.__class__ = kind
    if record is not None:
        # The transformers library has computed buffers that are not saved by the configuration.
        fit_shapes(model, {}, record=record)
        remember(model, WidthRecord.from_state_dict(record))
    return model


def _shapes_in_folder(found: Mapping[str, Any], folder: Path) -> dict[str, tuple[int, ...]]:
    """{name: shape in the folder} of tensors with other shapes there; releases before 5 of the library say their names alone."""
    entries = [(entry, None) if isinstance(entry, str) else entry[:2] for entry in found["mismatched_keys"]]
    there = read(folder, "cpu") if any(shape is None for _, shape in entries) else {}
    return {name: tuple(there[name].shape if shape is None else shape) for name, shape in entries}


def _traced(
    model: PreTrainedModel,
    others: Mapping[str, tuple[int, ...]],
    example_inputs: Any,
    outputs: Outputs | None,
    heads: bool | None,
    folder: Path,
) -> Any:
    """The record of a folder without one, whose tensors have other shapes than those that its configuration builds.

    Args:
        model: as the configuration builds it.
        others: {name: shape in the folder} of tensors with other shapes.
        example_inputs: as for `load_model`.
        outputs: as for `load_model`.
        heads: as for `load_model`.
        folder: for messages.

    Raises:
        RecordError: if the model cannot be traced, or more than widths differ.
    """
    inputs = dummy_inputs(model) if example_inputs is None else example_inputs
    shapes = {**shapes_of(model), **others}
    _, aliases, _ = named_tensors(model)
    shapes |= {other: shapes[first] for other, first in aliases.items() if first in others}
    shapes |= {first: shapes[other] for other, first in aliases.items() if other in others}
    saved = set(model.state_dict()) | {name for name, _ in model.named_parameters()}
    there = {name: shape for name, shape in shapes.items() if name in saved}
    try:
        graph = graph_of_shapes(model, inputs, outputs, there, heads)
    except TraceError as error:
        raise RecordError(
            f"{folder} has no record of its widths, and other ones than config.json, and the model could not be traced to "
            f"know them: {error} Give from_pretrained(example_inputs=...)."
        ) from error
    sizes, misfits = sizes_from_shapes(graph, there)
    if misfits:
        tensor = misfits[0].tensor
        raise RecordError(
            f"{folder} does not hold the {type(model).__name__} of its config.json: expected {tensor} of shape "
            f"{graph.shapes[graph.aliases.get(tensor, tensor)]}, got {shapes[tensor]}. {misfits[0].reason}. Save the model anew "
            "with evolvenet.transformers.save_pretrained."
        )
    refuse_unsaved_buffers(
        model,
        graph,
        {name: torch.empty(shape, device="meta") for name, shape in there.items()},
        folder,
    )
    numbers = scaled_numbers(model, graph, shapes)
    widths = {"graph": to_state_dict(graph.with_sizes(sizes)), "original": graph.sizes, "replicas": {}}
    return {"numbers": numbers, "buffers": {}, **widths}


def _class_of(folder: Path) -> type[PreTrainedModel]:
    """The class that a folder's configuration names."""
    config = AutoConfig.from_pretrained(folder)
    names = getattr(config, "architectures", None) or []
    found = getattr(transformers, names[0], None) if names else None
    if found is None:
        raise RecordError(
            f"{folder}: expected config.json to name a class of the transformers library under 'architectures', got {names}. "
            "Give from_pretrained(directory, model_class=...)."
        )
    return found


def _reshaping(
    kind: type[PreTrainedModel], record: Mapping[str, Any] | None, replaced: Mapping[str, Record]
) -> type[PreTrainedModel]:
    """A subclass that is built with the recorded widths, so that the transformers library loads into the right shapes."""
    graph = None if record is None else WidthRecord.from_state_dict(record).graph
    shapes = {} if graph is None else dict(graph.shapes)
    shapes |= (
        {} if graph is None else {other: shapes[first] for other, first in graph.aliases.items() if first in shapes}
    )
    # Buffers that are not saved are initialized in the shapes of the configuration, and exchanged after loading.
    hidden = set(() if record is None else record["buffers"])
    wanted = {name: torch.empty(shape, device="meta") for name, shape in shapes.items() if name not in hidden}
    numbers = {"numbers": () if record is None else record["numbers"], "buffers": {}}

    def build(self: PreTrainedModel, *args: Any, **options: Any) -> None:
        kind.__init__(self, *args, **options)
        number_as(self, shapes)
        fit_replacements(self, replaced, wanted)
        fit_shapes(self, wanted, record=numbers)
        _leave_out_of_initialization(self)

    names = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__init__": build,
        "__doc__": kind.__doc__,
    }
    return type(kind.__name__, (kind,), names)


def _leave_out_of_initialization(model: PreTrainedModel) -> None:
    """Mark modules whose initialization does not take the present widths as initialized.

    Whisper's encoder has no initialization for an odd width, Mamba's mixer one for the configured width alone. Their weights are
    loaded, or the folder is refused. A module that has tensors which no file holds is not marked.
    """
    for path, module in model.named_modules():
        owner = next(each for each in map(model.get_submodule, and_above(path)) if isinstance(each, PreTrainedModel))
        try:
            initialize(owner, module)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001  each family initializes, and fails, in its own way
            log.debug("%s is not initialized in its present widths: %s", path, error)
            saved = set(module.state_dict())
            if all(name in saved for name, _ in module.named_buffers(recurse=False)):
                mark_initialized(module)


def _read(kind: type[PreTrainedModel], folder: Path, options: Mapping[str, Any]) -> tuple[Any, Mapping[str, Any]]:
    """What the transformers library loads, and what it says of that.

    Raises:
        RecordError: if it cannot.
    """
    level = transformers.logging.get_verbosity()
    # What it says of tensors that do not fit is told afterwards, or mended.
    transformers.logging.set_verbosity_error()
    try:
        # Releases before 5 would load everything in float32.
        dtype = {} if "torch_dtype" in options else {"dtype": "auto"}
        loaded: Any = kind.from_pretrained(
            folder, **{**dtype, **options, "output_loading_info": True, "ignore_mismatched_sizes": True}
        )
    except (OSError, ValueError) as error:
        raise RecordError(
            f"{folder} cannot be read: expected a folder that save_pretrained wrote, got {error}"
        ) from error
    finally:
        transformers.logging.set_verbosity(level)
    return loaded


def _whole(model: Any, found: Mapping[str, Any], folder: Path) -> Any:
    """The model, unless the transformers library has initialized a part of it at random or left something out.

    Raises:
        RecordError: naming the tensors.
    """
    problems = [
        f"{what} {sorted(map(str, found[key]))[:5]}"
        for key, what in (
            ("missing_keys", "without"), ("unexpected_keys", "with the unknown"), ("mismatched_keys", "of other shapes"),
        )
        if found.get(key)
    ]  # fmt: skip
    if problems:
        raise RecordError(
            f"{folder} does not hold a {type(model).__name__} of the widths in {FOLDER_RECORD} and config.json: expected all "
            f"of its tensors, got a state dict {', '.join(problems)}. Save the model anew with "
            "evolvenet.transformers.save_pretrained."
        )
    return model

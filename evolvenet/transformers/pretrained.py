"""`save_pretrained` and `from_pretrained`: models of the transformers library whose widths have changed, out and in again."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

from evolvenet._compat.torch import state_dict_metadata, with_metadata
from evolvenet.errors import RecordError
from evolvenet.execution.dummy_inputs import dummy_inputs
from evolvenet.surgery.checkpoint import fit_shapes
from evolvenet.surgery.checkpoint_file import FOLDER_RECORD, read_folder_record, write_folder_record
from evolvenet.surgery.module_replacement import Record, find_replacements, fit_replacements
from evolvenet.surgery.width_record import RECORD_KEY, WidthRecord, record_of, remember
from evolvenet.tracing.trace import trace
from evolvenet.transformers.configuration import builds, equal_configuration

log = logging.getLogger("evolvenet")


def save_pretrained(model: Any, directory: str | Path, example_inputs: Any = None, **options: Any) -> bool:
    """Write what `model.save_pretrained` writes, and the widths.

    Where a configuration can say the widths (as many inner units, heads and so on in every layer: `evolvenet.allocate(...,
    uniform="layers")`), `config.json` is written so, and the transformers library alone loads the folder,
    `AutoModel….from_pretrained(directory)`, to the same outputs. That is tried: a model of that configuration is built, and
    its outputs with the model's weights are compared. Otherwise `from_pretrained` of this module loads it.
    The widths stand in `evolvenet.json`; no file is pickled.

    Args:
        model: of the transformers library, whose widths EvolveNet has changed, or not.
        directory: is made if it is not there.
        example_inputs: as `trace` takes them. Needed for a model whose widths are not known in this process, one that was
            copied or unpickled. Outputs are compared on them, by default on made-up words, images or sounds.
        **options: of `model.save_pretrained`: `max_shard_size` for example.

    Returns:
        Whether the transformers library alone loads the folder.

    Raises:
        RecordError: for another kind of model, or one whose widths are not known.

    >>> from tempfile import TemporaryDirectory
    >>> import evolvenet
    >>> from transformers import AutoModel, BertConfig, BertModel
    >>> config = BertConfig(vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)
    >>> inputs = {"input_ids": torch.randint(0, 40, (1, 8))}
    >>> graph = evolvenet.trace(model := BertModel(config), inputs)
    >>> graph = evolvenet.prune(model, graph, {"encoder.layer.0.intermediate.dense": 20})
    >>> with TemporaryDirectory() as folder:
    ...     save_pretrained(model, folder), AutoModel.from_pretrained(folder).config.intermediate_size
    (True, 20)
    """
    if not isinstance(model, PreTrainedModel):
        raise RecordError(
            f"save_pretrained: expected a model of the transformers library, got a {type(model).__name__}. Use "
            "evolvenet.save(model, path) for other models."
        )
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    state = _with_record(model, example_inputs)
    inputs = dummy_inputs(model) if example_inputs is None else example_inputs
    config = model.config if _unchanged(model, state) else equal_configuration(model, inputs)
    known = RECORD_KEY in state_dict_metadata(state).get("", {})
    if config is None and not known and not builds(model, model.config):
        raise RecordError(
            f"The {type(model).__name__} has other widths than its configuration, expected a record of them, got none: it was "
            "copied or unpickled, or its weights were exchanged by other code. Give save_pretrained(example_inputs=...)."
        )
    (folder / FOLDER_RECORD).unlink(missing_ok=True)
    own = model.config
    try:
        model.config = own if config is None else config
        model.save_pretrained(folder, **options)
    finally:
        model.config = own
    if known or find_replacements(state):
        write_folder_record(folder, state)
    return config is not None


def _with_record(model: PreTrainedModel, example_inputs: Any) -> Mapping[str, Any]:
    """The model's state dict, with the record of its widths in its metadata if there is one."""
    state: Any = model.state_dict()
    record = record_of(model)
    found = None if record is None else record.state_dict(model)
    if (found is None or "graph" not in found) and example_inputs is not None:
        record = WidthRecord.of(model, trace(model, example_inputs))
        remember(model, record)
        found = record.state_dict(model)
    metadata = {path: dict(entries) for path, entries in state_dict_metadata(state).items()}
    if found is not None and "graph" in found:
        metadata.setdefault("", {}).setdefault(RECORD_KEY, found)
    return with_metadata(state, metadata)


def _unchanged(model: PreTrainedModel, state: Mapping[str, Any]) -> bool:
    """Whether the model is as its configuration builds it: its shapes, and the numbers that follow widths."""
    record = state_dict_metadata(state).get("", {}).get(RECORD_KEY)
    original = {} if record is None else record["original"]
    changed = record is not None and any(
        width.size != original.get(name, width.size)
        for name, width in WidthRecord.from_state_dict(record).graph.widths.items()  # type: ignore[union-attr]
    )
    return not changed and builds(model, model.config)


def from_pretrained(directory: str | Path, model_class: type[PreTrainedModel] | None = None, **options: Any) -> Any:
    """The model that `save_pretrained` wrote: built from its configuration, reshaped to its widths, loaded.

    Args:
        directory: a folder of `save_pretrained`, of this module or of the transformers library; in one file or in parts.
        model_class: by default the class that was saved, as the configuration names it.
        **options: of `model_class.from_pretrained`: `dtype`, `device_map` and so on.

    Returns:
        The model, in eval mode. Its widths are known: `evolvenet.save` and `save_pretrained` write them again.

    Raises:
        FileNotFoundError: if there is no such folder.
        RecordError: if it holds no such model, or not all of it; the message names what is missing or differs.

    >>> from tempfile import TemporaryDirectory
    >>> import evolvenet
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4))
    >>> graph = evolvenet.trace(model, {"input_ids": torch.randint(0, 40, (1, 8))})
    >>> graph = evolvenet.prune(model, graph, {"transformer.h.1.mlp.c_fc": 20})
    >>> with TemporaryDirectory() as folder:
    ...     save_pretrained(model, folder), from_pretrained(folder).transformer.h[1].mlp.c_fc
    (False, Conv1D(nf=20, nx=32))
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: expected a folder that save_pretrained wrote, got {'a file' if folder.exists() else 'nothing there'}. "
            "Models of a hub are loaded by the transformers library's own from_pretrained."
        )
    if not (folder / "config.json").is_file():
        raise RecordError(
            f"{folder}: expected a folder that save_pretrained wrote, with a config.json, got "
            f"{', '.join(sorted(path.name for path in folder.iterdir())[:5]) or 'an empty folder'}. Load other files with "
            "evolvenet.load(model, path)."
        )
    metadata = read_folder_record(folder)
    record = metadata.get("", {}).get(RECORD_KEY)
    kind = _class_of(folder) if model_class is None else model_class
    built = _reshaping(kind, record, find_replacements(with_metadata({}, metadata))) if metadata else kind
    model = _loaded(built, folder, options)
    model.__class__ = kind
    if record is not None:
        # The transformers library has computed buffers that are not saved by the configuration.
        fit_shapes(model, {}, record=record)
        remember(model, WidthRecord.from_state_dict(record))
    return model


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
        fit_replacements(self, replaced, wanted)
        fit_shapes(self, wanted, record=numbers)

    names = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__init__": build,
        "__doc__": kind.__doc__,
    }
    return type(kind.__name__, (kind,), names)


def _loaded(kind: type[PreTrainedModel], folder: Path, options: Mapping[str, Any]) -> Any:
    """Load, and refuse what the transformers library would initialize at random or leave out.

    Raises:
        RecordError: naming the tensors.
    """
    try:
        # Sizes that differ are refused below, with a message that says what to do.
        loaded: Any = kind.from_pretrained(
            folder, **{**options, "output_loading_info": True, "ignore_mismatched_sizes": True}
        )
    except (OSError, ValueError) as error:
        raise RecordError(
            f"{folder} cannot be read: expected a folder that save_pretrained wrote, got {error}"
        ) from error
    model, found = loaded
    problems = [
        f"{what} {sorted(map(str, found[key]))[:5]}"
        for key, what in (
            ("missing_keys", "without"), ("unexpected_keys", "with the unknown"), ("mismatched_keys", "of other shapes"),
        )
        if found.get(key)
    ]  # fmt: skip
    if problems:
        raise RecordError(
            f"{folder} does not hold a {kind.__name__} of the widths in {FOLDER_RECORD} and config.json: expected all of its "
            f"tensors, got a state dict {', '.join(problems)}. Save the model anew with evolvenet.transformers.save_pretrained."
        )
    return model

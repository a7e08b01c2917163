"""`save_pretrained` and `from_pretrained`: models of the transformers library whose widths have changed, out and in again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from evolvenet.errors import RecordError
from evolvenet.execution.chosen_outputs import Outputs
from evolvenet.transformers.adapters import is_adapted, is_adapted_folder, load_adapted, save_adapted
from evolvenet.transformers.folders import load_model, save_model


def save_pretrained(
    model: Any, directory: str | Path, example_inputs: Any = None, outputs: Outputs | None = None, **options: Any
) -> bool:
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
        outputs: as for `evolvenet.trace`, with example inputs: those with which its widths were changed.
        **options: of `model.save_pretrained`: `max_shard_size` for example.

    Returns:
        Whether the transformers library alone loads the folder.

    Raises:
        RecordError: for another kind of model, or one whose widths are not known.

    >>> from tempfile import TemporaryDirectory
    >>> import torch, evolvenet
    >>> from transformers import AutoModel, BertConfig, BertModel
    >>> config = BertConfig(vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)
    >>> inputs = {"input_ids": torch.randint(0, 40, (1, 8))}
    >>> graph = evolvenet.trace(model := BertModel(config), inputs)
    >>> graph = evolvenet.prune(model, graph, {"encoder.layer.0.intermediate.dense": 20})
    >>> with TemporaryDirectory() as folder:
    ...     save_pretrained(model, folder), AutoModel.from_pretrained(folder).config.intermediate_size
    (True, 20)
    """
    folder = Path(directory)
    if is_adapted(model):
        return save_adapted(model, folder, example_inputs, outputs, options)
    if not isinstance(model, PreTrainedModel):
        raise RecordError(
            f"save_pretrained: expected a model of the transformers library, or one with adapters of PEFT, got a "
            f"{type(model).__name__}. Use evolvenet.save(model, path) for other models."
        )
    return save_model(model, folder, example_inputs, outputs, options)


def from_pretrained(
    directory: str | Path,
    model_class: type[PreTrainedModel] | None = None,
    example_inputs: Any = None,
    outputs: Outputs | None = None,
    heads: bool | None = None,
    **options: Any,
) -> Any:
    """The model that `save_pretrained` wrote: built from its configuration, reshaped to its widths, loaded.

    Args:
        directory: a folder of `save_pretrained`, of this module or of the transformers library; in one file or in parts.
        model_class: by default the class that was saved, as the configuration names it.
        example_inputs: as `trace` takes them. A folder that `model.save_pretrained` of the transformers library wrote has no
            record of widths that differ from its configuration: the model is traced to know them, by default on made-up
            words, images or sounds.
        outputs: as for `evolvenet.trace`, where the model is traced: those with which the widths were changed. By default
            those of the main head: `logits`, or `last_hidden_state` where there are none, see
            `evolvenet.engine.saving.MAIN_OUTPUTS`.
        heads: as for `evolvenet.load`, where the model is traced.
        **options: of `model_class.from_pretrained`: `dtype`, by default that of the file, `device_map` and so on.

    Returns:
        The model, in eval mode. Its widths are known: `evolvenet.save` and `save_pretrained` write them again.

    Raises:
        FileNotFoundError: if there is no such folder.
        RecordError: if it holds no such model, or not all of it; the message names what is missing or differs.

    >>> from tempfile import TemporaryDirectory
    >>> import torch, evolvenet
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
    if is_adapted_folder(folder):
        return load_adapted(folder, model_class, options)
    if not (folder / "config.json").is_file():
        raise RecordError(
            f"{folder}: expected a folder that save_pretrained wrote, with a config.json, got "
            f"{', '.join(sorted(path.name for path in folder.iterdir())[:5]) or 'an empty folder'}. Load other files with "
            "evolvenet.load(model, path)."
        )
    return load_model(folder, model_class, options, example_inputs, outputs, heads)

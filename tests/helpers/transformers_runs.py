"""Small real runs of the transformers library's `Trainer`, on a BERT with random weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForTokenClassification,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from evolvenet.transformers.callback import WidthEvolutionCallback
from tests.helpers.policies import Fixed

STREAM = "bert.embeddings.word_embeddings"
HEADS = "bert.encoder.layer.0.attention.self.query"
INNER = "bert.encoder.layer.0.intermediate.dense"
SIZES = {STREAM: 24, HEADS: 5, INNER: 20}


def bert(kind: type[PreTrainedModel] = BertForTokenClassification, seed: int = 0, layers: int = 1) -> Any:
    """A BERT with 32 features, 4 heads and 48 inner units; the same weights for the same seed."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 4, "intermediate_size": 48}
    rest: dict[str, Any] = {"vocab_size": 40, "num_labels": 3, "max_position_embeddings": 16}
    return kind(BertConfig(**sizes, **rest))


def sentences(count: int) -> list[dict[str, Tensor]]:
    """Eight random words each, with labels that depend on the words."""
    words = torch.randint(0, 40, (count, 8), generator=torch.Generator().manual_seed(count))
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row % 3} for row in words]


def evolution(sizes: Mapping[str, int] = SIZES, **options: Any) -> WidthEvolutionCallback:
    """One event after 4 steps, to given sizes."""
    return WidthEvolutionCallback(Fixed(sizes), **{"every_n_steps": 4, "stop": 1.0, **options})


def trainer(folder: Path, model: nn.Module, *callbacks: TrainerCallback, **options: Any) -> Trainer:
    """Six steps on the CPU, with a line of the log every other step."""
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 16,
        "max_steps": 6,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 2,
    }
    arguments = TrainingArguments(str(folder), **{**settings, **options})
    return Trainer(model, arguments, train_dataset=sentences(96), eval_dataset=sentences(16), callbacks=list(callbacks))

"""Shrink a BERT while it is fine-tuned: `python -m examples.shrink_bert`.

The model is a small one with random weights, so that nothing has to be downloaded; put
`from_pretrained("bert-base-uncased")` in its place. A quarter of the parameters is gone at 60 % of the run. Every layer has
the same size, so that a configuration can say it: the folder that is written is read by the transformers library alone.

On 2026-11-27, commit f069f3f, seed 0, on one core, its last line was

    3,425,027 → 2,571,395 parameters; loads without EvolveNet: True
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import evolvenet  # first: it mends PyPI's torchvision beside a CPU-only torch

# isort: split
import torch
from transformers import BertConfig, BertForTokenClassification, Trainer, TrainingArguments


class EqualLayers(evolvenet.Budget):
    """A budget that gives the layers of a network one size: the mean of those that it would give each."""

    def propose(self, context: Any) -> dict[str, evolvenet.Proposal]:
        """See `evolvenet.Policy`."""
        found, present = super().propose(context), context.graph.sizes
        sizes = present | {name: proposal.size for name, proposal in found.items()}
        alike: dict[str, list[str]] = {}
        for name in present:
            alike.setdefault(re.sub(r"\d+", "*", name), []).append(name)
        widths = context.graph.widths
        means = {
            n: widths[n].rounded(sum(map(sizes.get, names)) // len(names)) for names in alike.values() for n in names
        }
        return {
            name: evolvenet.Proposal(size, "the mean of all layers")
            for name, size in means.items()
            if size != present[name]
        }


def build(tiny: bool) -> Any:
    """A BERT that labels each word."""
    size, layers, vocabulary = (32, 2, 100) if tiny else (256, 4, 1000)
    config = BertConfig(
        vocab_size=vocabulary, hidden_size=size, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=4 * size,
        max_position_embeddings=32,
    )  # fmt: skip
    config.num_labels = 3
    return BertForTokenClassification(config)


def sentences(count: int, vocabulary: int) -> list[dict[str, torch.Tensor]]:
    """Made-up words; the label of each is told by it and by the one before."""
    words = torch.randint(0, vocabulary, (count, 16), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": (row + row.roll(1)) % 3} for row in words]


def main(folder: Path, tiny: bool = False) -> Any:
    """Fine-tune, shrink, write and read.

    Args:
        folder: for checkpoints and the result.
        tiny: a run of seconds.

    Returns:
        The model that was read.
    """
    torch.manual_seed(0)
    model = build(tiny)
    whole = sum(parameter.numel() for parameter in model.parameters())
    data = sentences(64 if tiny else 2048, model.config.vocab_size)
    shrinking = evolvenet.transformers.WidthEvolutionCallback(
        policy=EqualLayers(params=int(0.75 * whole), by=0.6),
        every_n_steps=2 if tiny else 20,
        stop=0.8,
        multiple=model.config.num_attention_heads,  # of which a BERT's hidden size has to be a multiple
    )
    arguments = TrainingArguments(
        str(folder), max_steps=8 if tiny else 300, per_device_train_batch_size=16, learning_rate=1e-3, use_cpu=True,
        report_to="none", save_strategy="no", logging_steps=100, disable_tqdm=True,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=data, callbacks=[shrinking]).train()
    alone = evolvenet.transformers.save_pretrained(model, folder / "small")
    print(
        f"{whole:,} → {sum(each.numel() for each in model.parameters()):,} parameters; loads without EvolveNet: {alone}"
    )
    return evolvenet.transformers.from_pretrained(folder / "small")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("outputs/shrink_bert"))
    parser.add_argument("--tiny", action="store_true")
    main(**vars(parser.parse_args()))

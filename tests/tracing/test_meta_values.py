"""Values of small tensors in runs on meta tensors: what code decides by values of inputs does not need a copy of the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from evolvenet.tracing.trace import run_for_labels
from tests.helpers.transformers_families import FAMILIES

WORDS = torch.tensor([[0, 0, 5, 6, 7], [4, 5, 6, 7, 8]])


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "gpt2", "gpt_neox", "opt"])
def test_a_decoder_without_data_is_traced_with_a_padding_mask_and_without_a_cache(name: str) -> None:
    kind, config, options = FAMILIES[name]
    with torch.device("meta"):
        model = getattr(transformers, kind)(getattr(transformers, config)(**options, use_cache=False)).eval()
    inputs = {"input_ids": WORDS, "attention_mask": (WORDS > 0).long()}
    assert run_for_labels(model, inputs, "meta").output_shapes[0] == (*WORDS.shape, 48)


class Branching(nn.Module):
    """Takes another layer for each answer to a question about its indices."""

    def __init__(self, question: Any) -> None:
        super().__init__()
        self.question = question
        self.table, self.yes, self.no = nn.Embedding(9, 4), nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        return self.yes(x) if self.question(ids, x) else self.no(x)


def in_parts(ids: Tensor, x: Tensor) -> bool:
    mask = torch.zeros(ids.shape, dtype=torch.bool, device=x.device)
    mask[0].fill_(True)
    mask.view(-1)[5:].logical_or_(ids[1] == 4)
    return bool(mask.sum() == 6)


QUESTIONS = {
    "one number": (lambda ids, x: ids[0, 2].item() == 5, True),
    "all of them": (lambda ids, x: bool((ids > 0).all()), False),
    "a range on the model's device": (lambda ids, x: bool((torch.arange(5, device=x.device) >= ids[0, 0]).all()), True),
    "ones like the activations": (lambda ids, x: bool(x.new_ones(3).sum() == 3), True),
    "writes to parts of a mask": (in_parts, True),
    "how many are left": (lambda ids, x: len(ids[ids > 6]) == 3, True),
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_code_takes_the_branch_that_the_values_of_its_inputs_say(question: str) -> None:
    asked, answer = QUESTIONS[question]
    with torch.device("meta"):
        model = Branching(asked)
    used = run_for_labels(model, WORDS, "meta", (False,)).first_use
    assert ("yes.weight" in used, "no.weight" in used) == (answer, not answer)


def test_values_that_depend_on_weights_are_not_known() -> None:
    with torch.device("meta"):
        model = Branching(lambda ids, x: bool(torch.zeros(4, device=x.device).copy_(x[0, 0]).sum() > 0))
    with pytest.raises(RuntimeError, match="meta"):
        run_for_labels(model, WORDS, "meta", (False,))


def test_a_buffer_of_indices_is_written_once() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2, device="meta")
            self.count: Tensor
            self.register_buffer("count", torch.zeros(1, dtype=torch.int64))

        def forward(self, ids: Tensor) -> Tensor:
            self.count.add_(1)
            assert self.count.item() == 1
            return self.layer(torch.zeros(ids.shape[0], 4, device="meta"))

    run_for_labels(Counting(), WORDS, "meta", (False,))

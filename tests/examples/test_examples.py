"""Each program in examples/ does what it says, at a tiny size."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import BertForTokenClassification

from evolvenet import Budget
from examples import halve_gpt, shrink_bert, timm_convnext


def test_bert_shrinks_while_it_is_fine_tuned(tmp_path: Path) -> None:
    whole = sum(parameter.numel() for parameter in shrink_bert.build(tiny=True).parameters())
    small = shrink_bert.main(tmp_path, tiny=True)
    assert sum(parameter.numel() for parameter in small.parameters()) <= 0.76 * whole
    alone = BertForTokenClassification.from_pretrained(tmp_path / "small")
    assert [tuple(one.shape) for one in alone.parameters()] == [tuple(two.shape) for two in small.parameters()]


def test_a_gpt_is_halved_and_goes_on() -> None:
    model, losses = halve_gpt.main(tiny=True)
    assert len(losses) == 3
    whole = 18_912  # of one block of 32 channels with tables of 128 characters and 64 places
    assert sum(parameter.numel() for parameter in model.parameters()) <= 0.51 * whole
    assert losses[2] < losses[0]
    assert model.generate(torch.zeros(1, 1, dtype=torch.long), max_new_tokens=4, do_sample=False).shape == (1, 5)


def test_a_convnext_of_timm_shrinks_in_timms_loop_and_its_average_with_it() -> None:
    whole = sum(parameter.numel() for parameter in timm_convnext.build(tiny=True).parameters())
    # Not by latency, which another load of this machine changes.
    model, average = timm_convnext.main(tiny=True, policy=Budget(params=whole // 2, by=0.5))
    shapes = [tuple(parameter.shape) for parameter in model.parameters()]
    assert shapes == [tuple(parameter.shape) for parameter in average.parameters()]
    assert sum(parameter.numel() for parameter in model.parameters()) <= whole // 2

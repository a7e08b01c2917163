"""Whole heads and smaller heads in files that hold shapes alone: which of them are gone is told, or warned of."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import evolvenet
from evolvenet.transformers import from_pretrained
from tests.helpers.transformers_families import family, inputs_of, logits


def cut(name: str, sizes: tuple[int, ...], heads: bool | None) -> Any:
    """A model, its attentions cut to these sizes."""
    model = family(name)
    graph = evolvenet.trace(model, inputs_of(name, 1), "logits", heads=heads)
    attentions = [width.name for width in graph.resizable if width.kind == "attention"]
    evolvenet.prune(model, graph, dict(zip(attentions, sizes, strict=False)))
    return model


def test_whole_heads_of_gpt_2_keep_their_size_in_a_bare_state_dict(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By default GPT-2's places of heads are tied to its stream: no width of the default trace can have these shapes."""
    model = cut("gpt2", (3, 1), heads=True)
    model.save_pretrained(tmp_path)
    loads: list[Any] = [evolvenet.load(family("gpt2", seed=1), tmp_path), from_pretrained(tmp_path)]
    for loaded in loads:
        assert torch.equal(logits(loaded, "gpt2"), logits(model, "gpt2"))
        assert [block.attn.head_dim for block in loaded.transformer.h] == [8, 8]
    assert "head_dim of transformer.h.0.attn is as built with trace(heads=True), as is assumed" in caplog.text
    with caplog.at_level(logging.WARNING, logger="evolvenet"):
        caplog.clear()
        smaller: Any = evolvenet.load(family("gpt2"), tmp_path, heads=False)
    assert [block.attn.head_dim for block in smaller.transformer.h] == [6, 2]
    assert not caplog.text


def test_smaller_heads_that_no_number_of_whole_heads_has_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = cut("gpt2", (3,), heads=False)
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    loaded = evolvenet.load(family("gpt2", seed=1), tmp_path / "bare.pt")
    assert torch.equal(logits(loaded, "gpt2"), logits(model, "gpt2"))
    assert not [record for record in caplog.records if "heads" in record.message]


def test_where_the_default_has_smaller_heads_whole_ones_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = cut("bert", (2,), heads=True)
    model.save_pretrained(tmp_path)
    loaded = evolvenet.load(family("bert", seed=1), tmp_path)
    assert not torch.allclose(logits(loaded, "bert"), logits(model, "bert"))
    assert "with trace(heads=None), as is assumed, another number with heads=True" in caplog.text
    for loaded in (evolvenet.load(family("bert", seed=1), tmp_path, heads=True), from_pretrained(tmp_path, heads=True)):
        assert torch.equal(logits(loaded, "bert"), logits(model, "bert"))

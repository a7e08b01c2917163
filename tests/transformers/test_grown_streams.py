"""A stream that has grown, with the eps of its norms, in a folder: in the configuration where it fits, else in the record."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

import evolvenet
from evolvenet.transformers import from_pretrained, save_pretrained
from tests.helpers.transformers_families import family, inputs_of, logits


def test_the_configuration_has_the_eps_of_a_grown_stream(tmp_path: Path) -> None:
    model = family("llama")
    graph, before = evolvenet.trace(model, inputs_of("llama", 1)), logits(model, "llama")
    evolvenet.grow(model, graph, {"model.embed_tokens": 48})
    assert torch.allclose(logits(model, "llama"), before, rtol=1e-4, atol=1e-4)
    assert save_pretrained(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["hidden_size"], config["rms_norm_eps"]) == (48, pytest.approx(1e-6 * 32 / 48))
    plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    for again in (plain, from_pretrained(tmp_path)):
        assert torch.equal(logits(again, "llama"), logits(model, "llama"))
    assert {m.variance_epsilon for m in plain.modules() if hasattr(m, "variance_epsilon")} == {1e-6 * 32 / 48}


def test_the_record_has_the_eps_where_no_configuration_says_the_widths(tmp_path: Path) -> None:
    model = family("gpt2")
    model.transformer.h[0].ln_1.eps = 0.25
    graph, before = evolvenet.trace(model, inputs_of("gpt2", 1), heads=True), logits(model, "gpt2")
    (stream,) = (width for width in graph.resizable if width.kind == "stream")
    evolvenet.grow(model, graph, {stream.name: 40})
    assert torch.allclose(logits(model, "gpt2"), before, rtol=1e-4, atol=1e-4)
    assert not save_pretrained(model, tmp_path)
    again = from_pretrained(tmp_path)
    assert again.transformer.h[0].ln_1.eps == 0.25 * 32 / 40
    assert torch.equal(logits(again, "gpt2"), logits(model, "gpt2"))

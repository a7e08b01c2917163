"""Heads of queries that share one key, and groups of heads in one weight: cut, generated with, saved and loaded."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import evolvenet
from evolvenet.graph.index_map import IndexMap
from evolvenet.graph.width_graph import WidthGraph
from evolvenet.transformers import from_pretrained, number_alibi_heads, save_pretrained

SIZES: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 20,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
OLD: dict[str, Any] = {"vocab_size": 40, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 32}
GROUPS: dict[str, Any] = {"num_attention_heads": 6, "num_kv_heads": 3, "new_decoder_architecture": True}
KINDS: dict[str, tuple[str, dict[str, Any], str, str, int]] = {
    "rotary": ("Falcon", {**SIZES, "bias": True}, "transformer.h.{}.self_attention.query_key_value", "dense", 12),
    "slopes": ("Falcon", {**SIZES, "bias": False, "alibi": True}, "transformer.h.{}.self_attention.query_key_value", "dense", 12),
    "groups": ("Falcon", {**SIZES, **GROUPS}, "transformer.h.{}.self_attention.query_key_value", "dense", 8),
    "own layers": ("Llama", {**SIZES, "num_key_value_heads": 1}, "model.layers.{}.self_attn.q_proj", "o_proj", 12),
    "learned positions": ("GPTBigCode", {**OLD, **{k: SIZES[k] for k in SIZES if "token" in k}},
                          "transformer.h.{}.attn.c_attn", "c_proj", 12),
}  # fmt: skip
"""{kind: (family, options, name of the heads of each layer, layer that consumes them, its columns for each)}."""
QUICK = ("rotary", "groups")
"""Tracing is what takes long; the others are tried by `make test-all`."""
WORDS = torch.randint(3, 40, (2, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])


def made(kind: str, seed: int = 0) -> Any:
    family, options, *_ = KINDS[kind]
    torch.manual_seed(seed)
    make = getattr(transformers, f"{family}ForCausalLM")
    model = make(make.config_class(**options)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    if kind == "slopes":
        number_alibi_heads(model)
    return model


@cache
def graph_of(kind: str) -> WidthGraph:
    return evolvenet.trace(made(kind), {"input_ids": WORDS}, "logits", heads=True)


def logits(model: Any, mask: Tensor = MASK) -> Tensor:
    with torch.no_grad():
        return model(input_ids=WORDS, attention_mask=mask).logits


def cut(kind: str) -> tuple[Any, WidthGraph]:
    """A model of which each layer has lost another head, and the second layer one more, and its graph."""
    model, name = made(kind), KINDS[kind][2]
    size = graph_of(kind).sizes[name.format(0)]
    maps = {name.format(n): IndexMap.keep([h for h in range(size) if h != n], size) for n in range(2)}
    graph = evolvenet.resize(model, graph_of(kind), maps)
    return model, evolvenet.prune(model, graph, {name.format(1): size - 2})


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_goes_as_if_the_columns_that_consume_it_were_zero(kind: str) -> None:
    model, graph = made(kind), graph_of(kind)
    _, _, name, out, columns = KINDS[kind]
    width = graph.widths[name.format(1)]
    heads = 3 if kind == "groups" else 4
    assert (width.size, width.frozen, width.mixed, width.kind) == (heads, None, None, "attention")
    shared = [w for w in graph.widths.values() if "shared by all heads" in (w.frozen or "")]
    assert bool(shared) == (kind != "groups")
    path, places = f"{name.format(1).rpartition('.')[0]}.{out}.weight", columns * (2 if kind == "groups" else 1)
    whole = logits(model)
    with torch.no_grad():
        model.get_parameter(path)[:, places : 2 * places] = 0
    expected = logits(model)
    assert float((expected - whole).abs().max()) > 1e-3
    evolvenet.resize(model, graph, {width.name: IndexMap.keep([h for h in range(heads) if h != 1], heads)})
    assert model.get_parameter(path).shape[1] == places * (heads - 1)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_words_are_generated_with_the_cache_as_without(kind: str) -> None:
    model, _ = cut(kind)
    options: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "attention_mask": MASK}
    cached, plain = (model.generate(WORDS, use_cache=use_cache, **options) for use_cache in (True, False))
    assert torch.equal(cached, plain)
    alone = model.generate(WORDS[:1, 2:], **{**options, "attention_mask": MASK[:1, 2:]})
    if kind != "learned positions":  # Padding in front shifts them in the library's own code.
        assert torch.equal(cached[:1, 2:], alone)


@pytest.mark.parametrize("kind", KINDS)
def test_new_heads_change_nothing_and_learn(kind: str) -> None:
    model, graph = cut(kind)
    name, expected = KINDS[kind][2].format(0), logits(model)
    evolvenet.grow(model, graph, {name: graph.sizes[name] + 2})
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-12)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=WORDS, labels=WORDS).loss.backward()
        optimizer.step()
    path = f"{name.rpartition('.')[0]}.{KINDS[kind][3]}.weight"
    assert float(model.get_parameter(path)[:, -KINDS[kind][4] :].detach().abs().min()) > 0


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.long) for kind in KINDS]
)
def test_saved_and_loaded_it_computes_the_same(kind: str, tmp_path: Path) -> None:
    model, _ = cut(kind)
    expected = logits(model)
    assert not save_pretrained(model, tmp_path / "folder"), "layers of unequal sizes"
    torch.testing.assert_close(logits(from_pretrained(tmp_path / "folder", dtype=torch.float64)), expected)
    evolvenet.save(model, tmp_path / "record.pt")
    assert torch.equal(logits(evolvenet.load(made(kind, seed=1), tmp_path / "record.pt")), expected)
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    assert torch.equal(logits(evolvenet.load(made(kind, seed=1), tmp_path / "bare.pt")), expected)


def test_equal_layers_with_one_key_are_said_by_the_configuration(tmp_path: Path) -> None:
    model = made("own layers")
    evolvenet.prune(model, graph_of("own layers"), {KINDS["own layers"][2].format(n): 3 for n in range(2)})
    assert save_pretrained(model, tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert (loaded.config.num_attention_heads, loaded.config.num_key_value_heads, loaded.config.head_dim) == (3, 1, 12)
    assert torch.equal(logits(loaded), logits(model))

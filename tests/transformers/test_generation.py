"""`generate` after each kind of cut: with its cache as without, for several samples as for one, and the cache is as small."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import evolvenet
from evolvenet import WidthGraph
from evolvenet.graph.block_kinds import ATTENTION, EXPERTS, FEED_FORWARD, STREAM
from tests.helpers.transformers_families import GROUPS, SIZES

LATENT = {
    "q_lora_rank": 12, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 10,
    "num_key_value_heads": 4, "first_k_dense_replace": 2,
}  # fmt: skip
OLD: dict[str, Any] = {"vocab_size": 48, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
DECODERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "groups of heads": ("Llama", {**SIZES, **GROUPS}, {}),
    "pairs of places, one key": ("Falcon", {**SIZES, "bias": False}, {"heads": False}),
    "whole heads": ("GPT2", OLD, {"heads": True}),
    "places, one key": ("GPTBigCode", OLD, {}),
    "sliding window": ("Mistral", {**SIZES, **GROUPS, "sliding_window": 4}, {}),
    "two windows": ("Gemma3", {**SIZES, **GROUPS, "head_dim": 8, "sliding_window": 4}, {}),
    "latent keys": ("DeepseekV3", {**SIZES, **LATENT}, {}),
    "sinks": ("GptOss", {**SIZES, **GROUPS, "head_dim": 8, "num_local_experts": 4, "sliding_window": 4}, {}),
    "slopes": ("Mpt", {"vocab_size": 48, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 32}, {}),
    "slopes, one weight": ("Bloom", {"vocab_size": 48, "hidden_size": 32, "n_head": 4, "n_layer": 2}, {}),
    "yarn": ("Llama", {**SIZES, **GROUPS, "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8}}, {}),
}  # fmt: skip
QUICK = ("groups of heads", "latent keys")
"""Tracing is what takes long; the others are tried by `make test-all`."""
INNER = (FEED_FORWARD, EXPERTS)
WORDS = torch.randint(3, 48, (2, 9), generator=torch.Generator().manual_seed(1))
PADDED = torch.ones_like(WORDS)
PADDED[0, :3] = 0


@cache
def traced(name: str) -> tuple[Any, WidthGraph]:
    kind, options, how = DECODERS[name]
    torch.manual_seed(0)
    make = getattr(transformers, f"{kind}{'LMHeadModel' if kind == 'GPT2' else 'ForCausalLM'}")
    model = make(make.config_class(**{**options, "eos_token_id": 2, "pad_token_id": 0})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model, evolvenet.trace(model, {"input_ids": WORDS[:1]}, outputs="logits", **how)


def words_after(model: Any, words: Tensor, mask: Tensor, use_cache: bool = True, **how: Any) -> Any:
    torch.manual_seed(0)
    return model.generate(
        words,
        attention_mask=mask,
        max_new_tokens=6,
        min_new_tokens=6,
        use_cache=use_cache,
        **{"do_sample": False, **how},
    )


def cached(model: Any) -> int:
    """Numbers that the cache holds after one sample."""
    found = words_after(model, WORDS[:1], PADDED[1:], return_dict_in_generate=True)
    # Its name before release 5 of the library is the second.
    layers = found.get("cache", found.get("past_key_values")).layers
    return sum(layer.keys.numel() + layer.values.numel() for layer in layers)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.long) for n in DECODERS])
@pytest.mark.parametrize("kinds", [INNER, (ATTENTION,), (STREAM,), (*INNER, ATTENTION, STREAM)], ids=str)
def test_words_are_the_same_with_a_cache_in_a_batch_and_sampled(name: str, kinds: tuple[str, ...]) -> None:
    whole, graph = traced(name)
    model = copy.deepcopy(whole)
    sizes = {w.name: max(w.smallest, w.size // 2 // w.step * w.step) for w in graph.resizable if w.kind in kinds}
    assert sizes
    evolvenet.prune(model, graph, sizes)
    assert {p.shape for p in model.parameters()} != {p.shape for p in whole.parameters()}
    words = words_after(model, WORDS, PADDED)
    assert torch.equal(words, words_after(model, WORDS, PADDED, use_cache=False))
    for place, padding in enumerate((3, 0)):
        alone = words_after(model, WORDS[place : place + 1, padding:], PADDED[place : place + 1, padding:])
        assert torch.equal(words[place : place + 1, padding:], alone)
    drawn = words_after(model, WORDS, PADDED, do_sample=True)
    assert torch.equal(drawn, words_after(model, WORDS, PADDED, do_sample=True, use_cache=False))
    assert not torch.equal(drawn, words)
    assert cached(model) < cached(whole) if ATTENTION in kinds else cached(model) == cached(whole)

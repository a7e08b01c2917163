"""Families of the transformers library that read texts alone: decoders, mixtures of experts, recurrences, encoders."""

from __future__ import annotations

from typing import Any

from experiments.coverage.families.family import (
    EXPERT,
    EXPERTS,
    FFN,
    GROUPS,
    GROUPS_EACH,
    HEADS,
    HEADS_EACH,
    INNER,
    PLACES,
    PLACES_EACH,
    STREAM,
    TEXT,
    WIDTH,
    WORDS,
    Family,
)

GROUPED: dict[str, Any] = {"num_key_value_heads": GROUPS_EACH}
WITH_PLACES: dict[str, Any] = {**GROUPED, "head_dim": PLACES_EACH}
GEMMA: dict[str, Any] = {**WITH_PLACES, "query_pre_attn_scalar": PLACES_EACH, "sliding_window": 8}
WIDER: dict[str, Any] = {"hidden_size": 96}
"""Places of 24: those that turn, a half (Phi) or a quarter (GPT-NeoX), are in as many units as no number of heads is."""
SPECIAL: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
ALL, IN_GROUPS = (FFN, HEADS, PLACES, STREAM), (FFN, GROUPS, PLACES, STREAM)
MIXTURE = (EXPERTS, GROUPS, PLACES, STREAM)


def _decoder(name: str, kinds: tuple[str, ...] = IN_GROUPS, **options: Any) -> Family:
    return Family(f"{name}ForCausalLM", f"{name}Config", {**TEXT, **options}, kinds, generates=True)


def _encoder(name: str, **options: Any) -> Family:
    return Family(f"{name}ForMaskedLM", f"{name}Config", {**TEXT, **options}, ALL)


DECODERS: dict[str, Family] = {
    "llama": _decoder("Llama", **GROUPED),
    "llama_tied": _decoder("Llama", ALL, tie_word_embeddings=True),
    "llama_long": _decoder(
        "Llama",
        **GROUPED,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "mistral": _decoder("Mistral", **GROUPED, sliding_window=8),
    "qwen2": _decoder("Qwen2", **GROUPED),
    "qwen3": _decoder("Qwen3", **WITH_PLACES),
    "gemma2": _decoder("Gemma2", **GEMMA),
    "gemma3": Family(
        "Gemma3ForCausalLM", "Gemma3TextConfig", {**TEXT, **GEMMA}, IN_GROUPS, generates=True
    ),
    "phi": _decoder("Phi", ALL, **WIDER, partial_rotary_factor=0.5),
    "phi3": _decoder("Phi3", **GROUPED),
    "gpt_neox": _decoder("GPTNeoX", ALL, **WIDER),
    "gpt2": Family(
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": WORDS, "n_embd": WIDTH, "n_layer": 2, "n_head": HEADS_EACH, "n_positions": 128, **SPECIAL},
        ALL,
        generates=True,
    ),
    "smollm3": _decoder("SmolLM3", **GROUPED),
    "olmo2": _decoder("Olmo2", **GROUPED),
    "bloom": Family(
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": WORDS, "hidden_size": WIDTH, "n_layer": 2, "n_head": HEADS_EACH, **SPECIAL},
        ALL,
        generates=True,
        numbered="number_alibi_heads",
    ),
    "opt": _decoder("OPT", ALL, ffn_dim=INNER, word_embed_proj_dim=WIDTH),
    "falcon": _decoder("Falcon", (FFN, HEADS, PLACES, STREAM), multi_query=True, parallel_attn=True, bias=False),
    "falcon_groups": _decoder(
        "Falcon", (FFN, GROUPS, PLACES, STREAM), new_decoder_architecture=True, num_kv_heads=GROUPS_EACH, bias=False
    ),
}  # fmt: skip
"""Words from words."""

DEEPSEEK: dict[str, Any] = {
    "num_key_value_heads": HEADS_EACH, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 12, "qk_nope_head_dim": 16,
    "v_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
    "moe_intermediate_size": EXPERT, "first_k_dense_replace": 1,
}  # fmt: skip
MIXTURES: dict[str, Family] = {
    "mixtral": _decoder("Mixtral", MIXTURE, **GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": _decoder(
        "Qwen3Moe", MIXTURE, **WITH_PLACES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=EXPERT,
        mlp_only_layers=[],
    ),
    "deepseek_v2": _decoder("DeepseekV2", (FFN, HEADS, PLACES, STREAM, EXPERTS), **DEEPSEEK),
    "deepseek_v3": _decoder("DeepseekV3", (FFN, HEADS, PLACES, STREAM, EXPERTS), **DEEPSEEK),
    "gpt_oss": _decoder(
        "GptOss", MIXTURE, **WITH_PLACES, num_local_experts=4, num_experts_per_tok=2, sliding_window=8
    ),
}  # fmt: skip
"""Decoders with several feed-forward networks in a layer, of which a router picks some for each word."""

MAMBA: dict[str, Any] = {"vocab_size": WORDS, "hidden_size": WIDTH, "num_hidden_layers": 2, **SPECIAL}
RECURRENCES: dict[str, Family] = {
    "mamba": Family("MambaForCausalLM", "MambaConfig", {**MAMBA, "state_size": 8}, (FFN, STREAM), generates=True),
    "mamba2": Family(
        "Mamba2ForCausalLM",
        "Mamba2Config",
        {**MAMBA, "state_size": 12, "num_heads": 8, "head_dim": 16, "expand": 2, "n_groups": 4, "chunk_size": 8},
        (FFN, STREAM),
        generates=True,
    ),
}
"""Of state-space models, FFN stands for the inner units of a layer; Mamba-2's are groups of heads."""

ENCODERS: dict[str, Family] = {
    "bert": _encoder("Bert"),
    "roberta": _encoder("Roberta"),
    "distilbert": Family(
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        {"vocab_size": WORDS, "dim": WIDTH, "n_layers": 2, "n_heads": HEADS_EACH, "hidden_dim": INNER,
         "max_position_embeddings": 128, "pad_token_id": 0},
        ALL,
    ),
    "deberta_v2": _encoder(
        "DebertaV2", relative_attention=True, pos_att_type=["c2p", "p2c"], max_relative_positions=16
    ),
    "modernbert": _encoder(
        "ModernBert", global_attn_every_n_layers=2, local_attention=8, cls_token_id=1, sep_token_id=2
    ),
    "electra": _encoder("Electra", embedding_size=WIDTH),
    "albert": _encoder("Albert", embedding_size=WIDTH),
}  # fmt: skip
"""Words in both directions."""

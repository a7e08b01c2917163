"""Tiny, random models of the transformers library for `experiments.coverage.run`: 48 channels, two or three layers."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

Entry = tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...], tuple[int, ...], tuple[str, ...]]
"""(how to make it, shapes of its inputs without the batch, vocabulary of each or 0, their names)."""

HIDDEN, HEADS, WORDS = 48, 4, 99
COMMON: dict[str, Any] = {"vocab_size": WORDS, "hidden_size": HIDDEN, "num_attention_heads": HEADS}


def _make(model: str, config: str, **options: Any) -> nn.Module:
    library = importlib.import_module("transformers")
    return getattr(library, model)(getattr(library, config)(**options))


bert = partial(
    _make, "BertForSequenceClassification", "BertConfig", **COMMON, num_hidden_layers=3, intermediate_size=96
)
gpt2 = partial(
    _make, "GPT2LMHeadModel", "GPT2Config", vocab_size=WORDS, n_embd=HIDDEN, n_layer=3, n_head=HEADS, use_cache=False
)
vit = partial(
    _make,
    "ViTForImageClassification",
    "ViTConfig",
    hidden_size=HIDDEN,
    num_hidden_layers=3,
    num_attention_heads=HEADS,
    intermediate_size=96,
    image_size=32,
    patch_size=8,
    num_labels=10,
)
llama = partial(
    _make,
    "LlamaForCausalLM",
    "LlamaConfig",
    **COMMON,
    num_hidden_layers=3,
    num_key_value_heads=2,
    intermediate_size=96,
    use_cache=False,
)
t5 = partial(
    _make,
    "T5ForConditionalGeneration",
    "T5Config",
    vocab_size=WORDS,
    d_model=HIDDEN,
    d_kv=12,
    d_ff=96,
    num_layers=2,
    num_heads=HEADS,
    use_cache=False,
)
whisper = partial(
    _make,
    "WhisperForConditionalGeneration",
    "WhisperConfig",
    vocab_size=WORDS,
    d_model=HIDDEN,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=HEADS,
    decoder_attention_heads=HEADS,
    encoder_ffn_dim=96,
    decoder_ffn_dim=96,
    num_mel_bins=16,
    max_source_positions=50,
    max_target_positions=32,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=1,
    suppress_tokens=None,
    begin_suppress_tokens=None,
    use_cache=False,
)
mamba = partial(
    _make,
    "MambaForCausalLM",
    "MambaConfig",
    vocab_size=WORDS,
    hidden_size=HIDDEN,
    num_hidden_layers=3,
    state_size=8,
    use_cache=False,
)

TEXT = ("input_ids",)
MODELS: dict[str, Entry] = {
    "bert": (bert, ((12,),), (WORDS,), TEXT),
    "gpt2": (gpt2, ((12,),), (WORDS,), TEXT),
    "vit": (vit, ((3, 32, 32),), (0,), ("pixel_values",)),
    "llama": (llama, ((12,),), (WORDS,), TEXT),
    "t5": (t5, ((12,), (7,)), (WORDS, WORDS), ("input_ids", "decoder_input_ids")),
    "whisper": (whisper, ((16, 100), (7,)), (0, WORDS), ("input_features", "decoder_input_ids")),
    "mamba": (mamba, ((12,),), (WORDS,), TEXT),
}
"""Every model by name. LLaMA has two key-value heads for four query heads."""

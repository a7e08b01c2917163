"""Small models of the transformers library, with weights at which every part of them counts, and inputs for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor

WORDS = 48
SIZES: dict[str, Any] = {
    "vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40,
    "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GROUPS = {"num_key_value_heads": 2}
IMAGES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40, "image_size": 16,
    "patch_size": 8, "num_labels": 5,
}  # fmt: skip
PAIRS: dict[str, Any] = {
    "vocab_size": WORDS, "d_model": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 0,
}  # fmt: skip
FAMILIES: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**SIZES, **GROUPS}),
    "llama tied": ("LlamaForCausalLM", "LlamaConfig", {**SIZES, "tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**SIZES, **GROUPS, "sliding_window": 8}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {**SIZES, **GROUPS}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"vocab_size": WORDS, "n_embd": 32, "n_layer": 2, "n_head": 4,
                                              "n_positions": 32, "bos_token_id": 1, "eos_token_id": 2}),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", SIZES),
    "opt": ("OPTForCausalLM", "OPTConfig", {**SIZES, "ffn_dim": 40, "word_embed_proj_dim": 32}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**SIZES, **GROUPS, "num_local_experts": 4}),
    "bert": ("BertForMaskedLM", "BertConfig", SIZES),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", SIZES),
    "distilbert": ("DistilBertForMaskedLM", "DistilBertConfig", {"vocab_size": WORDS, "dim": 32, "n_layers": 2, "n_heads": 4,
                                                                "hidden_dim": 40, "max_position_embeddings": 32}),
    "t5": ("T5ForConditionalGeneration", "T5Config", {**PAIRS, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4}),
    "vit": ("ViTForImageClassification", "ViTConfig", IMAGES),
}  # fmt: skip
DECODERS = ("llama", "llama tied", "mistral", "qwen2", "gpt2", "gpt_neox", "opt", "mixtral", "t5")
"""Those that generate words."""


def family(name: str, seed: int = 0) -> Any:
    """A model in eval mode; every weight is so large that no part of it is a linear function, or the same for all inputs."""
    kind, config, options = FAMILIES[name]
    torch.manual_seed(seed)
    model = getattr(transformers, kind)(getattr(transformers, config)(**options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def inputs_of(name: str, samples: int = 2) -> dict[str, Tensor]:
    """Random inputs of a family."""
    random = torch.Generator().manual_seed(1)
    if name == "vit":
        return {"pixel_values": torch.randn(samples, 3, 16, 16, generator=random)}
    words = torch.randint(3, WORDS, (samples, 9), generator=random)
    return {"input_ids": words, **({"decoder_input_ids": words[:, :5]} if name == "t5" else {})}


def logits(model: Any, name: str) -> Tensor:
    """What a model computes on its random inputs."""
    with torch.no_grad():
        return model.eval()(**inputs_of(name)).logits


def generated(model: Any, name: str) -> Tensor:
    """Six words after one sample's, greedily."""
    words: Callable[..., Tensor] = model.generate
    return words(inputs_of(name, 1)["input_ids"], max_new_tokens=6, min_new_tokens=6, do_sample=False)

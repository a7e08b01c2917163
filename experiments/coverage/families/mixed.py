"""Families of the transformers library with an encoder and a decoder, of sounds, and of images with texts."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import torch
from torch import Tensor

from experiments.coverage.families.family import (
    FFN,
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
    words,
    words_both_sides,
)

ALL = (FFN, HEADS, PLACES, STREAM)
PAIR: dict[str, Any] = {
    "vocab_size": WORDS, "d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": HEADS_EACH,
    "decoder_attention_heads": HEADS_EACH, "encoder_ffn_dim": INNER, "decoder_ffn_dim": INNER, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1,
}  # fmt: skip
T5: dict[str, Any] = {
    "vocab_size": WORDS, "d_model": WIDTH, "d_kv": PLACES_EACH, "d_ff": INNER, "num_layers": 2, "num_heads": HEADS_EACH,
    "decoder_start_token_id": 0, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
}  # fmt: skip
SOUND: dict[str, Any] = {
    "vocab_size": WORDS, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS_EACH,
    "intermediate_size": INNER, "conv_dim": (32, 32, 32), "conv_kernel": (10, 3, 3), "conv_stride": (5, 2, 2),
    "num_feat_extract_layers": 3, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "mask_time_prob": 0.0,
    "layerdrop": 0.0,
}  # fmt: skip
EYE: dict[str, Any] = {
    "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": 2, "num_attention_heads": HEADS_EACH,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip


def _clip() -> Any:
    text = {**TEXT, "hidden_size": 48, "intermediate_size": 96}
    return importlib.import_module("transformers").CLIPConfig(text_config=text, vision_config=EYE, projection_dim=32)


def _llava() -> Any:
    library = importlib.import_module("transformers")
    return library.LlavaConfig(
        vision_config=library.CLIPVisionConfig(**EYE),
        text_config=library.LlamaConfig(**TEXT, num_key_value_heads=GROUPS_EACH),
        image_token_index=5,
        vision_feature_layer=-1,
    )


def _image_and_text(samples: int, dtype: torch.dtype) -> dict[str, Tensor]:
    text = words(samples)
    text["input_ids"][:, -1] = 2  # the text model reads the state at its end
    return {**text, "pixel_values": torch.randn(samples, 3, 32, 32, dtype=dtype)}


def _text_around_an_image(samples: int, dtype: torch.dtype) -> dict[str, Tensor]:
    text = words(samples, 24)
    text["input_ids"][:, 2:18] = 5  # one word for each patch
    return {**text, "pixel_values": torch.randn(samples, 3, 32, 32, dtype=dtype)}


def _spectrum_and_words(samples: int, dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        "input_features": torch.randn(samples, 16, 100, dtype=dtype),
        "decoder_input_ids": torch.randint(6, WORDS, (samples, 7)),
    }


def _sound(samples: int, dtype: torch.dtype) -> dict[str, Tensor]:
    return {"input_values": torch.randn(samples, 1600, dtype=dtype)}


WHISPER: dict[str, Any] = {
    **PAIR, "num_mel_bins": 16, "max_source_positions": 50, "max_target_positions": 64, "suppress_tokens": None,
    "begin_suppress_tokens": None,
}  # fmt: skip
PAIRS: dict[str, Family] = {
    "t5": Family("T5ForConditionalGeneration", "T5Config", T5, ALL, inputs=words_both_sides, generates=True),
    "bart": Family(
        "BartForConditionalGeneration",
        "BartConfig",
        {**PAIR, "max_position_embeddings": 64, "forced_eos_token_id": None},
        ALL,
        inputs=words_both_sides,
        generates=True,
    ),
    "whisper": Family(
        "WhisperForConditionalGeneration", "WhisperConfig", WHISPER, ALL, inputs=_spectrum_and_words, generates=True
    ),
}
"""With an encoder and a decoder."""

SOUNDS_AND_MORE: dict[str, Family] = {
    "wav2vec2": Family("Wav2Vec2ForCTC", "Wav2Vec2Config", SOUND, ALL, inputs=_sound),
    "clip": Family("CLIPModel", partial(_clip), kinds=ALL, output="logits_per_image", inputs=_image_and_text),
    "llava": Family("LlavaForConditionalGeneration", partial(_llava), kinds=ALL, inputs=_text_around_an_image),
}
"""Sounds, and images with texts."""

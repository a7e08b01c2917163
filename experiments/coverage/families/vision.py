"""Families of the transformers library that look at images."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import torch
from torch import Tensor

from experiments.coverage.families.family import (
    FFN,
    HEADS,
    HEADS_EACH,
    INNER,
    PLACES,
    STREAM,
    WIDTH,
    Family,
    images,
)

VISION: dict[str, Any] = {
    "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS_EACH, "intermediate_size": INNER,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
ALL = (FFN, HEADS, PLACES, STREAM)
PYRAMID: dict[str, Any] = {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]}


def _classifier(name: str, **options: Any) -> Family:
    return Family(
        f"{name}ForImageClassification",
        f"{name}Config",
        {**VISION, "num_labels": 10, **options},
        ALL,
        inputs=images(32),
    )


def _library() -> Any:
    return importlib.import_module("transformers")


def _detr() -> Any:
    library = _library()
    backbone = library.ResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 32, 48, 64],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage4"],
    )
    return library.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone, d_model=WIDTH,
        encoder_layers=2, decoder_layers=2, encoder_attention_heads=HEADS_EACH, decoder_attention_heads=HEADS_EACH,
        encoder_ffn_dim=INNER, decoder_ffn_dim=INNER, num_queries=10, num_labels=5,
    )  # fmt: skip


def _sam() -> Any:
    vision = {
        "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS_EACH, "image_size": 64, "patch_size": 8,
        "window_size": 4, "global_attn_indexes": [1], "output_channels": 32, "mlp_dim": INNER, "num_pos_feats": 16,
    }  # fmt: skip
    prompts = {"hidden_size": 32, "image_size": 64, "patch_size": 8, "mask_input_channels": 16}
    masks = {
        "hidden_size": 32, "mlp_dim": 64, "num_hidden_layers": 2, "num_attention_heads": HEADS_EACH,
        "iou_head_hidden_dim": 32,
    }  # fmt: skip
    return _library().SamConfig(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=masks)


def _image_and_point(samples: int, dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        "pixel_values": torch.randn(samples, 3, 64, 64, dtype=dtype),
        "input_points": torch.rand(samples, 1, 1, 2, dtype=dtype) * 64,
    }


IMAGES: dict[str, Family] = {
    "vit": _classifier("ViT"),
    "deit": _classifier("DeiT"),
    "beit": _classifier("Beit", use_relative_position_bias=True),
    "dinov2": _classifier("Dinov2"),
    # Positions on two axes turn quarters of a head together: 6 units of places of 24, other than the 4 heads.
    "dinov3": Family(
        "DINOv3ViTModel", "DINOv3ViTConfig", {**VISION, "hidden_size": 96}, ALL, "last_hidden_state", images(32)
    ),
    "swin": Family(
        "SwinForImageClassification",
        "SwinConfig",
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4,
         "num_labels": 10, "mlp_ratio": 2.0},
        ALL,
        inputs=images(32),
        heads=(2, 4),
        groups=(),
    ),
    "segformer": Family(
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        {**PYRAMID, "num_attention_heads": [1, 2, 3, 4], "decoder_hidden_size": 32, "num_labels": 5,
         "mlp_ratios": [2, 2, 2, 2]},
        ALL,
        inputs=images(64),
        heads=(1, 2, 3, 4),
        groups=(),
    ),
    "convnextv2": Family(
        "ConvNextV2ForImageClassification", "ConvNextV2Config", {**PYRAMID, "num_labels": 10}, (FFN, STREAM),
        inputs=images(64),
    ),
    "detr": Family(
        "DetrForObjectDetection", partial(_detr), kinds=ALL, inputs=images(64), numbered="number_position_channels"
    ),
    "sam": Family("SamModel", partial(_sam), kinds=ALL, output="pred_masks", inputs=_image_and_point),
}  # fmt: skip
"""Images alone, or with a point to segment."""

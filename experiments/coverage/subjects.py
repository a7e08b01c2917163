"""The table of models for `experiments.coverage.run`: torchvision, timm, transformers and small ones of our own.

No model is built and no other library imported before `Subject.make` is called.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models

from experiments.coverage import kinds, small_networks
from experiments.coverage.families import FAMILIES, Family

IMAGE = (3, 224, 224)


@dataclass(frozen=True)
class Subject:
    """One model of the table.

    Args:
        name: as its library calls it.
        library: "torchvision" (its classifiers), "torchvision-other", "timm", "transformers", "own" or "kinds".
        make: builds it with random weights.
        shapes: of its inputs without the batch, in order.
        tokens: 0, or the size of the vocabulary that whole-number inputs are drawn from; one per input.
        family: of the transformers library, which makes the inputs by name.
    """

    name: str
    library: str
    make: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...] = (IMAGE,)
    tokens: tuple[int, ...] = (0,)
    family: Family | None = None

    def inputs(self, batch: int, dtype: torch.dtype) -> Any:
        """Random inputs for `batch` samples: a tensor, a tuple of tensors, or a dict of them."""
        if self.family is not None:
            return self.family.inputs(batch, dtype)
        made = [
            torch.randint(count, (batch, *shape)) if count else torch.randn(batch, *shape, dtype=dtype)
            for shape, count in zip(self.shapes, self.tokens, strict=True)
        ]
        return made[0] if len(made) == 1 else tuple(made)


class OneOutput(nn.Module):
    """A model that returns one of its outputs: the others (an encoder's states) would freeze widths as outputs of the model."""

    def __init__(self, model: nn.Module, output: str) -> None:
        super().__init__()
        self.model = model
        self.output = output

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """That output."""
        return getattr(self.model(*args, **kwargs), self.output)


def subjects() -> dict[str, Subject]:
    """Every model of the table by "library/name", in the order of the table."""
    found = [*_classifiers(), *_other_vision(), *_transformers(), *_timm(), *_own(), *_kinds()]
    return {f"{subject.library}/{subject.name}": subject for subject in found}


SLOW_TO_INITIALISE = {"googlenet": {"init_weights": False}, "inception_v3": {"init_weights": False}}


def _classifiers() -> list[Subject]:
    """All classification models of torchvision."""
    made = []
    for name in models.list_models(module=models):
        make = partial(models.get_model, name, weights=None, **SLOW_TO_INITIALISE.get(name, {}))
        size = 299 if name == "inception_v3" else 224
        made.append(Subject(name, "torchvision", make, ((3, size, size),)))
    return made


def _other_vision() -> list[Subject]:
    """Two segmenters and three models of video, at small inputs."""
    segment = partial(models.get_model, weights=None, weights_backbone=None, aux_loss=True)
    return [
        Subject("deeplabv3_resnet50", "torchvision-other", partial(segment, "deeplabv3_resnet50"), ((3, 96, 96),)),
        Subject("fcn_resnet50", "torchvision-other", partial(segment, "fcn_resnet50"), ((3, 96, 96),)),
        Subject("r3d_18", "torchvision-other", partial(models.get_model, "r3d_18"), ((3, 8, 56, 56),)),
        Subject("mvit_v2_s", "torchvision-other", partial(models.get_model, "mvit_v2_s"), ((3, 16, 224, 224),)),
        Subject("swin3d_t", "torchvision-other", partial(models.get_model, "swin3d_t"), ((3, 8, 64, 64),)),
    ]


def _transformers() -> list[Subject]:
    """Small configurations of the library's families; each returns one of its outputs alone."""
    return [
        Subject(name, "transformers", partial(_one_output, family), family=family) for name, family in FAMILIES.items()
    ]


def _one_output(family: Family) -> nn.Module:
    return OneOutput(family.make(), family.output)


TIMM = {
    "resnet18": 64, "resnest14d": 64, "skresnet18": 64, "seresnet18": 64, "res2net50_14w_8s": 64, "regnetx_002": 64,
    "densenet121": 64, "dla46_c": 64, "dpn48b": 64, "hrnet_w18_small": 64, "hgnet_tiny": 64, "repvgg_a0": 64,
    "mobileone_s0": 64, "ghostnet_050": 64, "rexnet_100": 64, "efficientnet_lite0": 64, "mobilenetv3_small_050": 64,
    "mobilenetv4_conv_small": 64, "lcnet_050": 64, "tinynet_e": 64, "ese_vovnet19b_dw": 64, "cspresnet50": 64,
    "selecsls42": 64, "nfnet_l0": 64, "xception41": 96, "inception_v4": 128, "convnext_atto": 64,
    "inception_next_atto": 64, "convmixer_768_32": 64, "starnet_s1": 64, "mambaout_femto": 64, "repvit_m0_9": 64,
    "fastvit_t8": 128, "poolformer_s12": 64, "edgenext_xx_small": 64, "mobilevit_xxs": 64, "efficientvit_b0": 64,
    "efficientformer_l1": 224, "vit_tiny_patch16_224": 224, "deit_tiny_patch16_224": 224, "cait_xxs24_224": 224,
    "beit_base_patch16_224": 224, "eva02_tiny_patch14_224": 224, "xcit_nano_12_p16_224": 224, "levit_128s": 224,
    "pit_ti_224": 224, "convit_tiny": 224, "crossvit_tiny_240": 240, "coat_tiny": 224, "tnt_s_patch16_224": 224,
    "pvt_v2_b0": 64, "twins_svt_small": 224, "swin_tiny_patch4_window7_224": 224, "swinv2_tiny_window8_256": 256,
    "tiny_vit_5m_224": 224, "davit_tiny": 224, "focalnet_tiny_srf": 64, "visformer_tiny": 224, "volo_d1_224": 224,
    "hiera_tiny_224": 224, "coatnet_nano_rw_224": 224, "botnet26t_256": 256, "mixer_s32_224": 224,
    "gmlp_s16_224": 224, "resmlp_12_224": 224, "sequencer2d_s": 224,
}  # fmt: skip
"""Small variants of timm's families → side of their input, smaller than usual where the model allows it."""


def _timm() -> list[Subject]:
    return [Subject(name, "timm", partial(_make_timm, name), ((3, side, side),)) for name, side in TIMM.items()]


def _make_timm(name: str) -> nn.Module:
    return importlib.import_module("timm").create_model(name, pretrained=False, num_classes=1000)


def _own() -> list[Subject]:
    return [
        Subject(name, "own", make, shapes, tokens) for name, (make, shapes, tokens) in small_networks.NETWORKS.items()
    ]


def _kinds() -> list[Subject]:
    return [Subject(name, "kinds", make, shapes, tokens) for name, (make, shapes, tokens) in kinds.NETWORKS.items()]

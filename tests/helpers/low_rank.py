"""Networks of whole layers with decaying spectra, for runs in which layers become chains."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from evolvenet.graph.width_graph import WidthGraph
from tests.helpers.factorized import decaying, seeded


def dense(width: int = 24) -> Any:
    """Three dense layers in float64; input `[b, 16]`."""
    source = seeded()
    return nn.Sequential(
        decaying(nn.Linear(16, width), source), nn.ReLU(), decaying(nn.Linear(width, width), source), nn.ReLU(),
        decaying(nn.Linear(width, 4), source),
    )  # fmt: skip


def convolutions() -> Any:
    """Two convolutions and a dense layer after a flatten, in float64; input `[b, 2, 6, 6]`."""
    source = seeded()
    return nn.Sequential(
        decaying(nn.Conv2d(2, 12, 3, padding=1), source), nn.BatchNorm2d(12).double(), nn.ReLU(),
        decaying(nn.Conv2d(12, 12, 3, padding=1), source), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        decaying(nn.Linear(108, 16), source), nn.ReLU(), decaying(nn.Linear(16, 3), source),
    )  # fmt: skip


def vectors(count: int = 128, seed: int = 1) -> Tensor:
    """Inputs of `dense`."""
    return torch.randn(count, 16, generator=seeded(seed)).double()


def images(count: int = 64, seed: int = 1) -> Tensor:
    """Inputs of `convolutions`."""
    return torch.randn(count, 2, 6, 6, generator=seeded(seed)).double()


def without_names(graph: WidthGraph) -> tuple[Any, ...]:
    """All that a graph says, its widths named by where they lie; a trace names one by the layer that produces it."""
    named = {
        name: str(min(((tie.tensor, tie.dim, tie.start) for tie in width.ties), default=name))
        for name, width in graph.widths.items()
    }
    widths = {
        named[name]: replace(
            width, name="", frozen=width.frozen and "yes", ties=tuple(sorted(width.ties, key=str)), patches=()
        )
        for name, width in graph.widths.items()
    }
    layouts = {
        (tensor, dim): tuple(replace(segment, width=segment.width and named[segment.width]) for segment in segments)
        for tensor, axes in graph.layouts.items()
        for dim, segments in axes.items()
    }
    return widths, layouts, dict(graph.shapes), graph.trainable, dict(graph.aliases)

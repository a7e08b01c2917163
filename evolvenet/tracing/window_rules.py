"""Label rules of ops that take windows or points of images: channels pass, places are frozen.

Importing this module registers them in `rules.RULES`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from evolvenet.tracing.labels import varying
from evolvenet.tracing.merging import merge
from evolvenet.tracing.rules import Call, rule


@rule("im2col")
def windows(call: Call) -> None:
    """The windows of an image `[…, channels, rows, columns]` as columns `[…, channels · places in a window, windows]`."""
    source = call.args[0]
    places = math.prod(call.argument("kernel_size"))
    layers = [layer.flatten(-2).repeat_interleave(places, -2) for layer in _of_channels(call, source, 3)]
    call.label_output(call.out, layers)


@rule("col2im")
def from_windows(call: Call) -> None:
    """The reverse of `im2col`, overlaps added: all places of a window of a channel are one unit."""
    source = call.args[0]
    places = math.prod(call.argument("kernel_size"))
    layers = []
    for layer in _of_channels(call, source, 2):
        rows = layer.reshape(-1, places)
        call.label_graph.union(rows, rows[:, :1])
        layers.append(rows[:, 0].view([-1 if dim == call.out.dim() - 3 else 1 for dim in range(call.out.dim())]))
    call.label_output(call.out, layers)


@rule("grid_sampler_2d", "grid_sampler_3d", "_grid_sampler_2d_cpu_fallback", "cudnn_grid_sampler", "grid_sampler")
def sampled(call: Call) -> None:
    """Each channel of an image is sampled at the same points."""
    source, grid = call.args[0], call.args[1]
    for layer in call.label_of(grid).layers:
        call.label_graph.freeze(layer, f"{call.location} takes them for coordinates")
    call.label_output(call.out, _of_channels(call, source, source.dim() - 1))


@rule("affine_grid_generator")
def coordinates(call: Call) -> None:
    """Coordinates from the six (or twelve) numbers of a transform, which are frozen."""
    call.freeze_all(f"{call.location} takes them for a transform of coordinates")
    call.label_output(call.out, ())


@rule("max_unpool2d", "max_unpool3d")
def unpooled(call: Call) -> None:
    """Every channel is put back to the places that its own indices name."""
    source, indices = call.args[0], call.args[1]
    space = int(call.op[-2])
    call.label_output(
        call.out,
        merge(call.label_graph, [_of_channels(call, each, space + 1) for each in (source, indices)]),
    )


def _of_channels(call: Call, source: Tensor, last: int) -> Sequence[Tensor]:
    """The layers that vary along channels only, the first of the last `last` dimensions; the others are frozen."""
    channels = (source.dim() - last,)
    kept = []
    for layer in call.label_of(source).layers:
        if varying(layer) == channels:
            kept.append(layer)
        else:
            call.label_graph.freeze(layer, f"{call.location} works along its units")
    return kept

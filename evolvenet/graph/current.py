"""Whether a graph is of a model as it is now: widths may have changed since it was made."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from evolvenet.errors import ResizeError
from evolvenet.graph.naming import named_tensors
from evolvenet.graph.whole import check_whole
from evolvenet.graph.width_graph import WidthGraph


def check_current(model: nn.Module, graph: WidthGraph) -> Mapping[str, Tensor]:
    """The model's tensors, by their names in its graph.

    Parameters are compared, and the buffers of widths that can be resized: others may be caches, which grow by themselves.

    Raises:
        ResizeError: if one has another shape than in the graph, or a parameter is missing: the graph is of an older state of
            the model, or of another model.
        UnsupportedStrategyError: if parameters are sharded.

    >>> from evolvenet import prune, trace
    >>> from torch import zeros
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> first = trace(model, zeros(1, 4))
    >>> second = prune(model, first, {"0": 6})
    >>> sorted(check_current(model, second))
    ['0.bias', '0.weight', '2.bias', '2.weight']
    >>> check_current(model, first)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    evolvenet.errors.ResizeError: Expected the graph of the model as it is now, ...
    """
    check_whole(model)
    tensors, _, _ = named_tensors(model)
    known = {width.name for width in graph.resizable}
    for name, expected in graph.shapes.items():
        found = tensors.get(name)
        if found is not None and tuple(found.shape) == expected:
            continue
        segments = [part for axis in graph.layouts[name].values() for part in axis]
        if name not in graph.trainable and not any(part.width in known for part in segments):
            continue
        if found is None:
            raise ResizeError(
                f"Expected the graph of the model as it is now, got one with a tensor {name!r} of shape {expected}, which "
                "the model does not have. The graph is of another model, or layers were replaced or renamed since it was "
                "made: trace the model again."
            )
        raise ResizeError(
            f"Expected the graph of the model as it is now, with {name!r} of shape {tuple(found.shape)}, got one with "
            f"{expected}. Widths have changed since it was made: use the graph that prune returned (resize and grow return "
            "one as well), or trace the model again."
        )
    return tensors

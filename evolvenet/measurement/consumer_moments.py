"""About which point the inputs of a consumer vary: their mean where its bias can take that up, 0 otherwise."""

from __future__ import annotations

from torch import Tensor, nn

from evolvenet.graph.width_graph import Tie, WidthGraph
from evolvenet.measurement.activation_moments import Moments


def is_unshared(graph: WidthGraph, tensor: str) -> bool:
    """Whether no other module uses the tensor: a change for one consumer would be wrong for the other."""
    return tensor in graph.shapes and tensor not in graph.aliases.values()


def bias_of(model: nn.Module, graph: WidthGraph, tie: Tie) -> str | None:
    """Name of the consumer's bias; None if it has none, or another module uses it or the weight too."""
    # "weight" has "bias" beside it, "in_proj_weight" has "in_proj_bias"; by any other name (LoRA's "lora_b") none is known.
    weight = tie.tensor.rpartition(".")[2]
    local = weight.replace("weight", "bias")
    if local == weight:
        return None
    name = f"{tie.module}.{local}" if tie.module else local
    has = getattr(model.get_submodule(tie.module), local, None) is not None
    return name if has and is_unshared(graph, name) and is_unshared(graph, tie.tensor) else None


def second_moment(model: nn.Module, graph: WidthGraph, tie: Tie, moments: Moments) -> Tensor:
    """The covariance of a consumer's inputs where it has a bias, which takes a change of the mean, else E[x·xᵀ]; `[n, n]`."""
    return moments.second if bias_of(model, graph, tie) is None else moments.covariance

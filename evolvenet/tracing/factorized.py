"""Which widths of a graph are ranks: those between two layers of a chain that stands for one factorized layer."""

# nn.Module's tables have no full types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import nn

from evolvenet._compat.torch import parameter_table
from evolvenet.graph.naming import named_tensors
from evolvenet.graph.width_graph import Width, WidthGraph, Widths
from evolvenet.surgery.module_replacement import replacements


def with_ranks(model: nn.Module, graph: WidthGraph) -> WidthGraph:
    """The graph with `Width.rank_of` set for every width that lies between two layers of a chain.

    The ties alone do not tell a rank from a linear layer before a ReLU. The chain is what a `Replacement` says that it
    runs, or the two factors of an adapter (LoRA of the package PEFT, told by their names: it may not be installed). A
    width that reaches a tensor outside of chains is none of their ranks; neither is one whose weight is shared with a
    layer outside. Chains that share their factors share their ranks, which are those of the first.

    Args:
        model: the model of the graph.
        graph: its widths.

    >>> import torch
    >>> from evolvenet.lowrank.factorize import factorize
    >>> from evolvenet.tracing.trace import trace
    >>> model = nn.Sequential(nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 2))
    >>> _ = factorize(model, {"0": 3})
    >>> [(width.name, width.size, width.rank_of) for width in trace(model, torch.zeros(1, 10)).resizable]
    [('0.0', 3, '0'), ('0.1', 10, None)]
    """
    chains = _chains(model)
    if not chains:
        return graph
    starts = tuple(f"{path}." if path else "" for path, _ in chains)
    outside = {name for name in graph.shapes if not name.startswith(starts)}
    outside |= {first for other, first in graph.aliases.items() if not other.startswith(starts)}
    inside = set(graph.shapes) - outside
    widths = {name: replace(width, rank_of=_rank_of(width, chains, inside)) for name, width in graph.widths.items()}
    return replace(graph, widths=Widths(widths))


Chain = Sequence[tuple[str, str | None]]
"""(name of the weight, name of the bias) of each layer of a chain."""


def _chains(model: nn.Module) -> list[tuple[str, Chain]]:
    names = {id(tensor): name for name, tensor in named_tensors(model)[0].items()}

    def named(layer: nn.Module) -> tuple[str, str | None]:
        weight, bias = (parameter_table(layer).get(name) for name in ("weight", "bias"))
        return names.get(id(weight), ""), None if bias is None else names.get(id(bias))

    made = [(path, module.chain()) for path, module in replacements(model).items()]
    return [
        (path, [named(layer) for layer in layers]) for path, layers in (*made, *_adapters(model)) if len(layers) > 1
    ]


def _adapters(model: nn.Module) -> Iterator[tuple[str, Sequence[nn.Module]]]:
    """(path of a layer, the two factors) of each pair of linear layers that PEFT adds to a layer for LoRA."""
    for path, module in model.named_modules():
        first, last = (getattr(module, name, None) for name in ("lora_A", "lora_B"))
        if not isinstance(first, nn.ModuleDict) or not isinstance(last, nn.ModuleDict):
            continue
        for name in first:
            pair = [first[name], last[name]] if name in last else []
            if all(isinstance(factor, (nn.Linear, nn.Conv1d, nn.Conv2d)) for factor in pair):
                yield path, pair


def _rank_of(width: Width, chains: Sequence[tuple[str, Chain]], inside: set[str]) -> str | None:
    """The path of the first chain within which a width is produced and consumed, if it lies in such chains alone."""
    ties = {tie.tensor for tie in width.ties}
    producers = {tie.tensor for tie in width.producers}
    consumers = {tie.tensor for tie in width.consumers}
    paths: list[str] = []
    own: set[str] = set()
    for path, chain in chains:
        weights = [weight for weight, _ in chain]
        made = next((place for place, weight in enumerate(weights) if weight in producers), len(weights))
        if consumers & set(weights[made + 1 :]):
            paths.append(path)
            own |= {*weights, *(bias for _, bias in chain[:-1] if bias is not None)}
    return paths[0] if paths and ties <= own & inside else None

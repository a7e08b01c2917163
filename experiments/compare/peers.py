"""What EvolveNet's pruning is compared with: Torch-Pruning, random units, and the projection of SVD-evolutive-CNN (2021).

Every peer returns the units to keep, as `{width: IndexMap}`, and `evolvenet.resize` cuts. Torch-Pruning's own cut of the
same units gives the same network (tests/experiments/compare_torch_pruning.py), so only the choice of units is compared.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from evolvenet import IndexMap, Width, WidthGraph

Maps = dict[str, IndexMap]
Sizes = dict[str, int]

STEPS = 18
"""Halvings in the search for a parameter count: finer than one unit of any network here."""

NEAR = 0.01
"""Largest miss of a parameter count, as a share of the uncut network's."""


def fitted(graph: WidthGraph, target: int, propose: Callable[[float], Sizes]) -> float:
    """The setting in 0 … 1 whose sizes come nearest to a parameter count; larger settings propose more units.

    Args:
        graph: of the uncut network.
        target: number of parameters after the cut.
        propose: setting → {width: size}.

    Raises:
        ValueError: if no setting comes within 1 % of the uncut network's parameters.
    """
    low, high = 0.0, 1.0
    tried: dict[float, int] = {}
    for _ in range(STEPS):
        middle = (low + high) / 2
        tried[middle] = graph.proposed_parameters(propose(middle))
        low, high = (low, middle) if tried[middle] > target else (middle, high)
    best = min(tried, key=lambda setting: abs(tried[setting] - target))
    if abs(tried[best] - target) > NEAR * graph.parameters:
        raise ValueError(f"expected {target:,} parameters within {NEAR:.0%}, the nearest that fits is {tried[best]:,}")
    return best


def equal_sizes(graph: WidthGraph, target: int) -> Sizes:
    """Sizes of all widths scaled by one factor, to within a unit, such that about `target` parameters are left."""
    # If all widths of one size were rounded at the same factor, the count would be missed by more than 1 %: each width has its
    # own rounding point.
    points = {width.name: (i + 1) / (len(graph.resizable) + 1) for i, width in enumerate(graph.resizable)}

    def propose(share: float) -> Sizes:
        return {w.name: max(w.smallest, min(w.size, int(share * w.size + points[w.name]))) for w in graph.resizable}

    return propose(fitted(graph, target, propose))


def best(graph: WidthGraph, scores: Mapping[str, Tensor], sizes: Mapping[str, int]) -> Maps:
    """The units of each width with the highest scores, `[size]` each, in their old order."""
    return {
        name: IndexMap.keep(scores[name].topk(size).indices.sort().values, graph.widths[name].size)
        for name, size in sizes.items()
    }


def best_of_all(graph: WidthGraph, scores: Mapping[str, Tensor], target: int) -> Maps:
    """The units with the highest scores of the whole network, so that about `target` parameters are left."""
    ranked = torch.cat([scores[width.name] for width in graph.resizable]).sort(descending=True).values

    def propose(share: float) -> Sizes:
        least = ranked[round(share * (len(ranked) - 1))]
        return {w.name: max(w.smallest, int((scores[w.name] >= least).sum())) for w in graph.resizable}

    return best(graph, scores, propose(fitted(graph, target, propose)))


def random_scores(graph: WidthGraph, seed: int) -> dict[str, Tensor]:
    """A random number for each unit of each width."""
    generator = torch.Generator().manual_seed(seed)
    return {width.name: torch.rand(width.size, generator=generator) for width in graph.resizable}


# Torch-Pruning


def importance(kind: str | Any) -> Any:
    """Torch-Pruning's importance measure: "l2" (group norm, Fang et al. 2023) or "bn" (BatchNorm's scale, Liu et al. 2017).

    An importance object of Torch-Pruning is returned as it is.
    """
    if not isinstance(kind, str):
        return kind
    measures: Any = importlib.import_module("torch_pruning").importance
    return measures.GroupMagnitudeImportance(p=2) if kind == "l2" else measures.BNScaleImportance()


def pruner(model: nn.Module, example: Tensor, kind: str, ratio: float | dict[nn.Module, float]) -> Any:
    """Torch-Pruning's pruner, the last dense layer kept: global for one ratio of units, local for one ratio a layer."""
    *_, head = (layer for layer in model.modules() if isinstance(layer, nn.Linear))
    local = isinstance(ratio, dict)
    return importlib.import_module("torch_pruning").pruner.BasePruner(
        model,
        example,
        importance=importance(kind),
        global_pruning=not local,
        pruning_ratio=0.5 if local else ratio,
        pruning_ratio_dict=ratio if local else None,
        ignored_layers=[head],
    )


def torch_pruning_scores(model: nn.Module, graph: WidthGraph, example: Tensor, kind: str) -> dict[str, Tensor]:
    """Torch-Pruning's importance of every unit of every width.

    Units that no BatchNorm follows have no BN-scale; they get their L2 importance.

    Raises:
        ValueError: if its groups are not our widths.
    """
    whole = pruner(model, example, kind, 0.5)
    names = {module: name for name, module in model.named_modules()}
    scores: dict[str, Tensor] = {}
    for group in whole.DG.get_all_groups(
        ignored_layers=whole.ignored_layers, root_module_types=whole.root_module_types
    ):
        found = whole.importance(group)
        width = graph.widths[names[group[0].dep.target.module]]
        scores[width.name] = importance("l2")(group) if found is None else found
    if {name: len(found) for name, found in scores.items()} != graph.sizes:
        raise ValueError(f"Torch-Pruning's groups {sorted(scores)} are not the widths {graph.sizes}")
    return scores


def torch_pruning_global(model: nn.Module, graph: WidthGraph, example: Tensor, kind: str, target: int) -> Maps:
    """The units that Torch-Pruning keeps under global pruning, its ratio such that about `target` parameters are left."""

    def propose(share: float) -> Sizes:
        return {
            name: kept.new_size for name, kept in torch_pruning_kept(model, graph, example, kind, 1 - share).items()
        }

    return torch_pruning_kept(model, graph, example, kind, 1 - fitted(graph, target, propose))


def torch_pruning_kept(
    model: nn.Module, graph: WidthGraph, example: Tensor, kind: str, ratio: float | dict[nn.Module, float]
) -> Maps:
    """The units that Torch-Pruning keeps at a ratio (see `pruner`); the model stays as it is."""
    names = {module: name for name, module in model.named_modules()}
    kept = {width.name: IndexMap.identity(width.size) for width in graph.resizable}
    for group in pruner(model, example, kind, ratio).step(interactive=True):
        width = graph.widths[names[group[0].dep.target.module]]
        removed = set(group[0].idxs)
        kept[width.name] = IndexMap.keep([unit for unit in range(width.size) if unit not in removed], width.size)
    return kept


# The projection of SVD-evolutive-CNN (2021)


def projection_sizes(model: nn.Module, graph: WidthGraph, target: int) -> Sizes:
    """As many units as directions that hold a share of the producers' energy, one share for all widths, to fit `target`."""
    energy = {w.name: torch.linalg.svdvals(producer_rows(model, w)).square().cumsum(0) for w in graph.resizable}

    def propose(share: float) -> Sizes:
        ranks = {name: int((total < share * total[-1]).sum()) + 1 for name, total in energy.items()}
        return {w.name: max(w.smallest, min(w.size, ranks[w.name])) for w in graph.resizable}

    return propose(fitted(graph, target, propose))


def project_consumers(model: nn.Module, graph: WidthGraph, sizes: Mapping[str, int]) -> Maps:
    """Keep the first units of each width and project its consumers onto them as SVD-evolutive-CNN (2021) did.

    With W = U·S·Vᵀ of the producers `[size, inputs]` and r units to stay, U11 = U[:r, :r] and U21 = U[r:, :r]. The projector
    on the r leading directions, U·Uᵀ, replaces the removed units by U21·U11ᵀ·y_kept + U21·U21ᵀ·y_removed. The second term was
    left out there, so the consumers' removed columns times U21·U11ᵀ are added to their kept columns. BatchNorm and ReLU in
    between are ignored, as they were there. With several producers their matrices stand side by side.

    Args:
        model: its consumers' weights are changed in place; nothing is cut yet.
        graph: its widths.
        sizes: {width: units that stay}.

    Returns:
        The units to cut to.
    """
    projections = {name: projection(producer_rows(model, graph.widths[name]), size) for name, size in sizes.items()}
    for name, size in sizes.items():
        width = graph.widths[name]
        for tie in width.consumers:
            weight = model.get_parameter(tie.tensor).data
            columns = weight.narrow(tie.dim, tie.start, width.size * tie.repeat).movedim(tie.dim, 0)
            places = columns.reshape(width.size, -1)
            taken = projections[name].T.to(places.dtype) @ places[size:]
            columns[: size * tie.repeat] += taken.reshape(columns[: size * tie.repeat].shape)
    return {name: IndexMap.keep(range(size), graph.widths[name].size) for name, size in sizes.items()}


def projection(rows: Tensor, size: int) -> Tensor:
    """U21·U11ᵀ of a matrix `[units, inputs]`: the removed units as combinations of the kept ones, `[units − size, size]`."""
    u = torch.linalg.svd(rows, full_matrices=False).U[:, :size]
    return u[size:] @ u[:size].T


def producer_rows(model: nn.Module, width: Width) -> Tensor:
    """The rows of a width's producers, all producers side by side, `[size, inputs]` float64."""
    parts = []
    for tie in width.producers:
        weight = model.get_parameter(tie.tensor).detach().double()
        rows = weight.narrow(tie.dim, tie.start, width.size * tie.repeat).movedim(tie.dim, 0)
        parts.append(rows.reshape(width.size, -1))
    return torch.cat(parts, dim=1)

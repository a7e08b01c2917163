"""The norms over each width, collected in the trace, and the growth that they may allow."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from torch import Tensor, nn

from evolvenet.graph.block_kinds import STREAM
from evolvenet.graph.exact_growth import COPY, ExactGrowth
from evolvenet.surgery.norms import norm_of
from evolvenet.tracing.labels import LabelGraph
from evolvenet.tracing.rules import Call


def mark_normalised(call: Call, layer: Tensor, reason: str, along: Iterable[int] | None = None) -> None:
    """Keep that an op computes a statistic over units, as norms do: they are mixed, and the module may be a norm.

    Args:
        call: the op.
        layer: the units.
        reason: the op, and what it does.
        along: the dimensions along which it works, all by default.
    """
    call.label_graph.mark_mixed(layer, reason, along)
    call.label_graph.normalised.append((layer.reshape(-1), call.where.rpartition(" (")[0]))


def norms_over(label_graph: LabelGraph, component: np.ndarray) -> dict[int, tuple[str, ...]]:
    """{component: paths of the modules that compute a statistic over it and others}."""
    found: dict[int, dict[str, None]] = {}
    for labels, path in dict.fromkeys((labels, path) for labels, path in label_graph.normalised):
        for member in np.unique(component[labels[labels >= 0].numpy()]).tolist():
            found.setdefault(member, {})[path] = None
    return {member: tuple(paths) for member, paths in found.items()}


def possible_growth(model: nn.Module, kind: str, paths: Sequence[str]) -> ExactGrowth | None:
    """The growth to try first for a width that norms mix: the streams by zeros or means, others by copies; None without norms.

    Hidden units that a norm mixes would stay 0 for good behind a ReLU, so that they get copies too.
    """
    if not paths:
        return None
    norms = [norm_of(model.get_submodule(path)) for path in paths]
    kinds = {None if norm is None else norm.new_units for norm in norms}
    wanted = next(iter(kinds)) if len(kinds) == 1 else None
    return ExactGrowth(COPY) if wanted is None or kind != STREAM else ExactGrowth(wanted, tuple(paths))

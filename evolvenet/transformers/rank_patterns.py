r"""The ranks of LoRA adapters in a configuration of PEFT: one rank and one alpha for all layers, and patterns for the others.

PEFT takes the first pattern that matches the end of a layer's name, as a regular expression: "fc" is a pattern of "fc" and of
"head.fc". Releases before 0.15 match only what follows a dot, and otherwise look for the whole name among the patterns. So
"^fc" is no pattern of "fc" there, and "head.fc" none of "head.fc" where "fc" is one. What all releases read alike is the last
part of a name behind a look at everything before it: `(?<=^head\.)fc`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn


def ranks_of(base: nn.Module, adapter: str) -> dict[str, tuple[int, float]]:
    """{path of a layer: (rank, scaling)} of an adapter, its rank by the shape of its first factor.

    Args:
        base: with LoRA adapters, without the `PeftModel` around it.
        adapter: its name.
    """
    return dict(_ranks(base, adapter))


def _ranks(base: nn.Module, adapter: str) -> Iterator[tuple[str, tuple[int, float]]]:
    for path, module in base.named_modules():
        layer: Any = module
        factors = getattr(layer, "lora_A", None)
        if not isinstance(factors, nn.ModuleDict):
            continue
        if adapter in factors:
            yield path, (int(factors[adapter].weight.shape[0]), layer.scaling[adapter])  # type: ignore[union-attr, index]
        elif adapter in layer.lora_embedding_A:
            yield path, (int(layer.lora_embedding_A[adapter].shape[0]), layer.scaling[adapter])


def alpha_of(config: Any, rank: int, scaling: float) -> float:
    """The alpha that gives a layer of some rank a scaling."""
    return scaling * (math.sqrt(rank) if config.use_rslora else rank)


def write_ranks(config: Any, ranks: Mapping[str, tuple[int, float]]) -> None:
    """Write the patterns of a configuration anew, so that it says these ranks and scalings. Its `r` and `lora_alpha` stay.

    Args:
        config: of an adapter.
        ranks: {path: (rank, scaling)} of all of its layers, from `ranks_of`.
    """
    alphas = {path: alpha_of(config, rank, scaling) for path, (rank, scaling) in ranks.items()}
    config.rank_pattern = patterns_of({path: rank for path, (rank, _) in ranks.items()}, config.r)
    config.alpha_pattern = patterns_of(alphas, config.lora_alpha)


def patterns_of(values: Mapping[str, float], default: float) -> dict[str, Any]:
    r"""The patterns by which PEFT finds each layer's number; the layer's own name where it is the pattern of no other layer.

    Args:
        values: {path of a layer: its number}, of all layers of the adapter.
        default: what a layer without a pattern has.

    >>> patterns_of({"fc": 2, "head.fc": 4, "body": 4}, default=4)
    {'(?<=^head\\.)fc': 4, 'fc': 2}
    >>> patterns_of({"body.fc": 2, "head.fc": 4}, default=4)
    {'body.fc': 2}
    """
    needed = {path for path, value in values.items() if not math.isclose(value, default, rel_tol=1e-9)}
    # A layer whose name matches the pattern of another one has a pattern of its own before that.
    caught = {path: _matching(path, values) for path in needed}
    needed |= {other for others in caught.values() for other in others}
    unclear = {path for path in needed if _matching(path, values) or any(path in others for others in caught.values())}
    return {
        _exactly(path) if path in unclear else path: values[path]
        for path in sorted(needed, key=lambda path: (-path.count("."), list(values).index(path)))
    }


def _matching(path: str, others: Iterable[str]) -> list[str]:
    """The other paths that a path is a pattern of."""
    pattern = re.compile(rf"(.*\.)?({path})$")
    return [other for other in others if other != path and pattern.match(other)]


def _exactly(path: str) -> str:
    """A pattern of one path alone. The name of a child of the model itself has none in all releases: it stands last."""
    *parents, last = path.split(".")
    return rf"(?<=^{re.escape('.'.join(parents))}\.){re.escape(last)}" if parents else path

"""What `experiments.coverage.run` does to a family of the transformers library, beyond what it does to every model.

For each kind of units that the architecture has: cut it alone, run, generate words with and without the cache, save, load.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import evolvenet
from experiments.coverage.checks import TOLERANCE, Note, attempt, check_ours, pruned_size, randomised, runs
from experiments.coverage.families.family import EXPERTS, FFN, GROUPS, HEADS, PLACES, STREAM, Family
from experiments.coverage.subjects import Subject

NEW_WORDS = 6
EXPERT_NAMES = ("expert", "router", "mlp.gate.")
"""Parts of the names of what belongs to a mixture of experts."""


@dataclass(frozen=True)
class Traced:
    """A family's model and its two graphs: whole heads as units where the code permits, and places of all heads."""

    family: Family
    dtype: torch.dtype
    heads: evolvenet.WidthGraph
    places: evolvenet.WidthGraph

    def graph(self, kind: str) -> evolvenet.WidthGraph:
        """The one in which units of a kind are looked for."""
        return self.heads if kind in (HEADS, GROUPS) else self.places

    def model(self) -> nn.Module:
        """A fresh one, with the weights of every other."""
        return randomised(self.family.make, self.dtype)


def check_family(subject: Subject, note: Note) -> None:
    """What every model goes through, then each kind of units by itself."""
    family = subject.family
    assert family is not None, "only families are checked here"
    dtype = check_ours(subject, note)
    found: list[Traced] = []
    attempt("graphs", lambda: _traced(family, dtype, found), note)
    for kind in family.kinds if found else ():
        attempt(kind, partial(_one_kind, found[0], kind), note)


def _traced(family: Family, dtype: torch.dtype, found: list[Traced]) -> dict[str, Any]:
    model = randomised(family.make, dtype)
    heads, places = (
        evolvenet.trace(model, family.inputs(1, dtype), family.output, heads=heads) for heads in (True, False)
    )
    found.append(Traced(family, dtype, heads, places))
    return {"kinds": places.coverage_by_kind}


def widths_of_kind(graph: evolvenet.WidthGraph, kind: str, family: Family) -> list[evolvenet.Width]:
    """Those widths of a graph whose units are of a kind; frozen ones too.

    Args:
        graph: of the family's model.
        kind: one of `experiments.coverage.families.family.KINDS`.
        family: says how many heads and groups there are, by which widths of an attention are told apart.
    """
    tests: Mapping[str, Callable[[evolvenet.Width], bool]] = {
        FFN: lambda width: width.kind == "FFN" and not _of_experts(width),
        EXPERTS: _of_experts,
        STREAM: lambda width: width.kind == "stream",
        HEADS: lambda width: width.kind == "attention" and width.size in family.heads,
        GROUPS: lambda width: width.kind == "attention" and width.size in family.groups,
        PLACES: lambda width: width.kind == "attention" and width.size not in (*family.heads, *family.groups),
    }
    return [width for width in graph.widths.values() if tests[kind](width)]


def _of_experts(width: evolvenet.Width) -> bool:
    return width.kind != "stream" and any(part in f"{tie.tensor}." for tie in width.ties for part in EXPERT_NAMES)


def _one_kind(traced: Traced, kind: str) -> dict[str, Any]:
    """Cut 30 % of the units of every width of the kind, and use the result as its owner would."""
    family, graph = traced.family, traced.graph(kind)
    widths = widths_of_kind(graph, kind, family)
    sizes = {width.name: size for width in widths if width.frozen is None and (size := pruned_size(width)) < width.size}
    if not sizes:
        raise RuntimeError(_why_none(graph, widths))
    model = traced.model()
    after = evolvenet.prune(model, graph, sizes)
    figures = {
        "widths": len(sizes),
        "parameters": after.parameters,
        **runs(model, lambda: family.inputs(2, traced.dtype)),
    }
    model.eval()
    if family.generates:
        figures["generate"] = _generates(model, family, traced.dtype)
    return figures | {"loaded": _loads(model, family, traced.dtype)}


def _why_none(graph: evolvenet.WidthGraph, widths: list[evolvenet.Width]) -> str:
    """The reason of the weightiest frozen width of the kind; of any width of attention where none is of the kind."""
    candidates = widths or [width for width in graph.widths.values() if width.kind == "attention"]
    frozen = sorted((width for width in candidates if width.frozen), key=lambda width: -width.parameters)
    if frozen:
        return str(frozen[0].frozen)
    if widths:
        return "each width has its fewest units"
    # Units of attention of another kind, which an op ties: places of all heads by one key, for example.
    mixed = [str(width.mixed) for width in candidates if width.mixed]
    return f"no width has units of this kind: {mixed[0]}" if mixed else "no width has units of this kind"


def _output(model: nn.Module, family: Family, dtype: torch.dtype) -> Tensor:
    torch.manual_seed(1)
    with torch.no_grad():
        return getattr(model(**family.inputs(2, dtype)), family.output).double()


def _generates(model: Any, family: Family, dtype: torch.dtype) -> str:
    """Whether the same words come with the cache as without."""
    torch.manual_seed(1)
    inputs = {name: tensor for name, tensor in family.inputs(1, dtype).items() if name != "decoder_input_ids"}
    options = {"max_new_tokens": NEW_WORDS, "min_new_tokens": NEW_WORDS, "do_sample": False}
    try:
        one, two = (model.generate(**inputs, **options, use_cache=cache) for cache in (True, False))
    except Exception as error:  # noqa: BLE001  whatever a model raises is a result of this table
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return "yes" if torch.equal(one, two) else "other words with the cache than without"


def _loads(model: nn.Module, family: Family, dtype: torch.dtype) -> str:
    """How the saved model loads to equal outputs: "plain" by the transformers library alone, "widths" by ours."""
    from evolvenet.transformers import from_pretrained, save_pretrained

    before = _output(model, family, dtype)
    with tempfile.TemporaryDirectory() as folder:
        try:
            plain = save_pretrained(model, folder)
            loaded = type(model).from_pretrained(folder, dtype=dtype) if plain else from_pretrained(folder, dtype=dtype)  # type: ignore[attr-defined]
            after = _output(loaded.eval(), family, dtype)
        except Exception as error:  # noqa: BLE001  as above
            return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    difference = float((after - before).norm() / before.norm())
    if not math.isfinite(difference) or difference > TOLERANCE[torch.float32]:
        return f"loads to other outputs, by {difference:.1e}"
    return "plain" if plain else "widths"

"""Places of heads in the decoders of transformers: in pairs where positions turn pairs, for queries, keys, values and tables."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import evolvenet
from evolvenet.errors import RecordError
from tests.helpers.transformers_families import family, inputs_of, logits

PLACES = 8
"""Of a head, in all families here."""


def zeroed(weight: Tensor, gone: list[int]) -> None:
    """Set the rows of some pairs of places to zero, in every head."""
    with torch.no_grad():
        weight.view(-1, PLACES, weight.shape[1])[:, [*gone, *(place + PLACES // 2 for place in gone)]] = 0


@pytest.mark.parametrize("name", ["llama", "llama tied", "mistral"])
def test_a_pair_of_places_that_goes_was_the_same_as_zeros(name: str) -> None:
    model = family(name).double()
    graph = evolvenet.trace(model, inputs_of(name, 1), "logits", heads=False)
    (width,) = (width for width in graph.resizable if width.kind == "attention")
    assert width.size == PLACES // 2, "a pair is one unit, the same in all heads and layers, which share the positions"
    gone = [1, 2]
    for layer in model.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            zeroed(projection.weight, gone)
    before = logits(model, name)
    kept = [unit for unit in range(width.size) if unit not in gone]
    graph = evolvenet.resize(model, graph, {width.name: evolvenet.IndexMap.of(kept, width.size)})
    assert model.model.layers[0].self_attn.v_proj.out_features == model.model.layers[1].self_attn.v_proj.out_features
    assert graph.widths[width.name].size == len(kept)
    torch.testing.assert_close(logits(model, name), before)
    assert model.model.rotary_emb.inv_freq.shape == (len(kept),)


def test_places_that_are_multiplied_with_each_other_do_not_grow() -> None:
    model = family("llama").double()
    before = logits(model, "llama")
    graph = evolvenet.trace(model, inputs_of("llama", 1), "logits", heads=False)
    (width,) = (width for width in graph.resizable if width.kind == "attention")
    with pytest.raises(evolvenet.EvolveNetError, match="without changing the function"):
        evolvenet.grow(model, graph, {width.name: width.size + 2})
    torch.testing.assert_close(logits(model, "llama"), before)


def test_a_bare_state_dict_with_fewer_places_is_refused_by_the_frequencies_that_it_does_not_hold(
    tmp_path: Path,
) -> None:
    """It is the same model with other widths, and says nothing of which frequencies were kept."""
    model = family("llama")
    graph = evolvenet.trace(model, inputs_of("llama", 1), "logits", heads=False)
    (width,) = (width for width in graph.resizable if width.kind == "attention")
    evolvenet.prune(model, graph, {width.name: 3})
    torch.save(dict(model.state_dict()), tmp_path / "bare.pt")
    with pytest.raises(RecordError, match=r"of 3 units, expected 4: the buffer model\.rotary_emb\.inv_freq follows it"):
        evolvenet.load(family("llama"), tmp_path / "bare.pt")


def test_heads_go_where_their_places_cannot() -> None:
    name = "gpt_neox"
    model = family(name)
    graph = evolvenet.trace(model, inputs_of(name, 1), "logits", heads=False)
    sizes = [width.size for width in graph.resizable if width.kind == "attention"]
    assert sizes == [4, 4], "its positions turn a part of each head"

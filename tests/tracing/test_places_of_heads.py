"""Places of heads of which a part turns, and groups of heads in fused projections and under norms over all heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

import evolvenet
from evolvenet.graph.index_map import IndexMap
from evolvenet.tracing.trace import trace
from tests.helpers.cases import distance, outputs

SIZES: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 64, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "pad_token_id": 0, "use_cache": False,
}  # fmt: skip
PLACES = 16
INPUTS = {"input_ids": torch.randint(1, 40, (2, 6), generator=torch.Generator().manual_seed(0))}
SECOND = [1, 5, 10, 11]
"""Places of the second unit: a pair of 4 among the first 8 places, which turn, and 2 of the others."""
PARTIAL = {
    "phi": (PhiForCausalLM, PhiConfig, {"q_proj": [SECOND], "k_proj": [SECOND], "v_proj": [SECOND]}),
    "gpt_neox": (GPTNeoXForCausalLM, GPTNeoXConfig, {"query_key_value": [SECOND, SECOND, [4, 5, 6, 7]]}),
}


def made(kind: Any, config: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    model = kind(config(**{**SIZES, **options})).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


@pytest.mark.parametrize("kind", PARTIAL)
def test_a_pair_that_turns_goes_with_its_part_of_the_places_that_pass(kind: str) -> None:
    make, config, projections = PARTIAL[kind]
    model = made(make, config, num_hidden_layers=1, rotary_pct=0.5, partial_rotary_factor=0.5)
    graph = trace(model, INPUTS, "logits", heads=False)
    (width,) = (width for width in graph.resizable if width.kind == "attention")
    assert width.size == 4, "8 of 16 places turn, in 4 pairs: a unit is a pair and 2 other places of all heads"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parts = projections.get(name.split(".")[-2], [])
            for part, places in enumerate(parts):
                parameter.unflatten(0, (-1, len(parts), PLACES))[:, part, places] = 0
    expected = outputs(model, INPUTS)
    graph = evolvenet.resize(model, graph, {width.name: IndexMap.keep([0, 2, 3], 4)})
    assert distance(outputs(model, INPUTS), expected) < 1e-9
    numbers = {name: value for module in model.modules() for name, value in vars(module).items()}
    assert numbers.get("head_dim", numbers.get("head_size")) == 12
    assert kind != "phi" or numbers["rotary_ndims"] == 6, "a number that GPT-NeoX does not use stays as it is"
    assert graph.sizes[width.name] == 3


GROUPED = {"phi3": (Phi3ForCausalLM, Phi3Config), "olmo2": (Olmo2ForCausalLM, Olmo2Config)}


@pytest.mark.parametrize("kind", GROUPED)
def test_each_layer_loses_groups_of_its_own(kind: str) -> None:
    """Queries, keys and values in one weight, cut at a number of the configuration (Phi-3); a norm over all heads (OLMo 2)."""
    model = made(*GROUPED[kind], num_key_value_heads=2)
    graph = trace(model, INPUTS, "logits", heads=True)
    names = [width.name for width in graph.resizable if width.kind == "attention"]
    assert [graph.sizes[name] for name in names] == [2, 2]
    expected = outputs(model, INPUTS)
    graph = evolvenet.resize(model, graph, dict.fromkeys(names, IndexMap.of([1, 0], 2)))
    assert distance(outputs(model, INPUTS), expected) < 1e-6, "OLMo 2 computes its norms in single precision"
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        attention.o_proj.weight[:, 2 * PLACES :] = 0
    expected = outputs(model, INPUTS)
    evolvenet.resize(model, graph, {names[0]: IndexMap.keep([0], 2)})
    assert attention.o_proj.in_features == 2 * PLACES
    assert model.model.layers[1].self_attn.o_proj.in_features == 4 * PLACES
    if kind == "phi3":  # a norm over all heads changes with those that go
        assert distance(outputs(model, INPUTS), expected) < 1e-9


def test_places_of_gpt2_go_without_its_stream() -> None:
    torch.manual_seed(0)
    model: Any = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=32, n_layer=1, n_head=4, use_cache=False)).double()
    graph = trace(model, INPUTS, "logits", heads=False)
    places = [width.name for width in graph.resizable if width.kind == "attention"]
    assert [graph.sizes[name] for name in places] == [8]
    assert [width.size for width in graph.resizable if width.kind == "stream"] == [32]
    expected = outputs(model, INPUTS)
    graph = evolvenet.resize(model, graph, dict.fromkeys(places, IndexMap.of([7, 0, 1, 3, 2, 4, 6, 5], 8)))
    assert distance(outputs(model, INPUTS), expected) < 1e-9
    evolvenet.prune(model, graph, {places[0]: 5})
    assert model.transformer.h[0].attn.head_dim == 5
    assert outputs(model, INPUTS)[0].shape == expected[0].shape

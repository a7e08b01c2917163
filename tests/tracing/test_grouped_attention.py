"""Attention in which heads share keys and values, or positions tie all heads: whole groups of heads go."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import evolvenet
from evolvenet.graph.index_map import IndexMap
from evolvenet.graph.width_graph import WidthGraph
from evolvenet.tracing.trace import trace
from tests.helpers.cases import distance, outputs
from tests.helpers.networks.grouped_attention import PLACES, REPEAT, TURN, GroupedAttention
from tests.helpers.tracing import shuffle_and_widen

X = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
WAYS = [
    *((4, 2, repeat, turn, False) for repeat, turn in itertools.product([*REPEAT, "enable_gqa"], TURN)),
    (6, 3, "expand", "half", True),
    (4, 4, "expand", "half", True),
    (4, 4, "expand", "pairs", False),
    (8, 2, "repeat_interleave", "none", True),
]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_unit_is_a_head_of_keys_and_values_with_its_queries(way: tuple[int, int, str, str, bool]) -> None:
    heads, groups = way[:2]
    torch.manual_seed(0)
    model = GroupedAttention(*way).double()
    graph = trace(model, X)
    assert graph.sizes == {"first": 12, "q": groups}
    places = {tie.tensor: tie.repeat for tie in graph.widths["q"].ties if tie.tensor.endswith("weight")}
    share = heads // groups * PLACES
    assert places == {"q.weight": share, "k.weight": PLACES, "v.weight": PLACES, "o.weight": share}
    shuffle_and_widen(model, graph, X)


def test_heads_go_whole_where_angles_are_a_matrix_product() -> None:
    torch.manual_seed(0)
    model = GroupedAttention(4, 2, product=True).double()
    graph = trace(model, X)
    assert (graph.sizes["q"], graph.widths["q"].frozen) == (2, None)
    shuffle_and_widen(model, graph, X)


def test_the_group_that_goes_is_that_of_the_chosen_head() -> None:
    """The same as zeros in the columns that consume the group."""
    torch.manual_seed(0)
    model = GroupedAttention(6, 3).double()
    graph = trace(model, X)
    whole = outputs(model, X)
    weight = model.o.weight.detach().clone()
    with torch.no_grad():
        model.o.weight[:, 2 * PLACES : 4 * PLACES] = 0
    expected = outputs(model, X)
    assert distance(expected, whole) > 1e-3
    with torch.no_grad():
        model.o.weight.copy_(weight)
    evolvenet.resize(model, graph, {"q": IndexMap.keep([0, 2], 3)})
    assert model.q.weight.shape == (4 * PLACES, 12)
    assert distance(outputs(model, X), expected) < 1e-12


@pytest.mark.parametrize("turn", TURN)
def test_with_one_head_of_keys_and_values_places_go_in_pairs_that_the_embedding_turns(turn: str) -> None:
    torch.manual_seed(0)
    model = GroupedAttention(4, 1, turn=turn).double()
    graph = trace(model, X, heads=False)
    assert graph.sizes == {"first": 12, "q": PLACES if turn == "none" else PLACES // 2}
    assert graph.widths["q"].patches[0] == ("", "places")
    graph = shuffle_and_widen(model, graph, X, heads=False)
    shape = outputs(model, X)[0].shape
    evolvenet.prune(model, graph, {"q": 3})
    assert (outputs(model, X)[0].shape, model.places) == (shape, 3 if turn == "none" else 6)
    assert model.v.weight.shape == (model.places, 15)


def test_what_all_heads_share_keeps_its_size() -> None:
    graph = trace(GroupedAttention(norm=True).double(), X)
    assert graph.shapes["norm_q.weight"] == (PLACES,)
    assert "shared by all heads" in (graph.widths["norm_q.weight[0]"].frozen or "")


SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
MODELS = {"llama": (LlamaForCausalLM, LlamaConfig), "qwen3": (Qwen3ForCausalLM, Qwen3Config)}
PARTIAL = {
    "phi": (PhiForCausalLM, PhiConfig, "model.layers.{}.self_attn", "dense"),
    "gpt_neox": (GPTNeoXForCausalLM, GPTNeoXConfig, "gpt_neox.layers.{}.attention", "dense"),
}


def check_heads(
    model: nn.Module, graph: WidthGraph, inputs: Any, heads: list[str], consumer: str, transposed: bool = False
) -> WidthGraph:
    """Heads of 8 places in another order, with new ones between, change nothing; the first of the last width goes alone."""
    expected = outputs(model, inputs)
    graph = evolvenet.resize(model, graph, {name: IndexMap.of([1, -1, 3, 0, 2, -1, -1], 4) for name in heads})
    assert distance(outputs(model, inputs), expected) < 1e-9
    with torch.no_grad():
        weight = model.get_parameter(consumer)
        (weight if transposed else weight.T)[:8] = 0
    without = outputs(model, inputs)
    assert distance(without, expected) > 1e-6
    graph = evolvenet.resize(model, graph, {heads[-1]: IndexMap.keep([1, 2, 3, 4, 5, 6], 7)})
    assert distance(outputs(model, inputs), without) < 1e-12
    return graph


@pytest.mark.parametrize("kind", PARTIAL)
def test_heads_of_which_some_places_turn_and_others_pass_go_whole(kind: str) -> None:
    """In GPT-NeoX they lie in one weight, queries, keys and values of a head beside each other."""
    make, config, path, out = PARTIAL[kind]
    torch.manual_seed(0)
    model: Any = make(config(**SIZES, rotary_pct=0.5, partial_rotary_factor=0.5, use_cache=False)).double()
    inputs = {"input_ids": torch.randint(0, 40, (2, 6), generator=torch.Generator().manual_seed(0))}
    graph = trace(model, inputs)
    heads = [name for name in graph.sizes if name.startswith(path.format(0)) or name.startswith(path.format(1))]
    assert [graph.sizes[name] for name in heads] == [4, 4]
    graph = check_heads(model, graph, inputs, heads, f"{path.format(1)}.{out}.weight")
    assert trace(model, inputs).sizes == graph.sizes


ENCODERS = {
    "bert": (BertModel, BertConfig, "encoder.layer.0.attention.self.query", "encoder.layer.0.attention.output.dense"),
    "gpt2": (GPT2LMHeadModel, GPT2Config, "transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_proj"),
}


@pytest.mark.parametrize("kind", ENCODERS)
def test_whole_heads_are_units_if_asked_for(kind: str) -> None:
    make, config, name, out = ENCODERS[kind]
    torch.manual_seed(0)
    model: Any = make(config(**{"n_embd": 32, "n_layer": 2, "n_head": 4} if kind == "gpt2" else SIZES)).double()
    model.config.use_cache = False
    inputs = {"input_ids": torch.randint(0, 40, (2, 6), generator=torch.Generator().manual_seed(0))}
    graph = trace(model, inputs, outputs="0", heads=True)
    assert graph.sizes[name] == 4
    assert 32 in graph.sizes.values()
    assert 8 in trace(model, inputs, outputs="0").sizes.values()
    check_heads(model, graph, inputs, [name], f"{out}.weight", transposed=kind == "gpt2")


def test_new_heads_are_zero_to_the_others_and_learn() -> None:
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, head_dim=8, use_cache=False)).double()
    inputs = {"input_ids": torch.randint(0, 40, (2, 6), generator=torch.Generator().manual_seed(0))}
    graph, expected = trace(model, inputs), outputs(model, inputs)
    evolvenet.grow(model, graph, {"model.layers.0.self_attn.q_proj": 3})
    assert distance(outputs(model, inputs), expected) < 1e-12
    attention = model.model.layers[0].self_attn
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
    for layer, places in ((attention.q_proj, 32), (attention.k_proj, 16), (attention.v_proj, 16)):
        assert float(layer.weight.grad[places:].norm()) > 0
    assert float(attention.o_proj.weight[:, 32:].abs().min()) > 0


@pytest.mark.parametrize("kind", MODELS)
def test_each_layer_of_a_language_model_loses_groups_of_its_own(kind: str) -> None:
    make, config = MODELS[kind]
    torch.manual_seed(0)
    model: Any = make(config(**SIZES, num_key_value_heads=2, head_dim=8, use_cache=False)).double()
    inputs = {"input_ids": torch.randint(0, 40, (2, 6), generator=torch.Generator().manual_seed(0))}
    graph = trace(model, inputs)
    heads = {name: size for name, size in graph.sizes.items() if name.endswith("q_proj")}
    assert heads == {f"model.layers.{layer}.self_attn.q_proj": 2 for layer in range(2)}
    expected = outputs(model, inputs)
    first, second = heads
    graph = evolvenet.resize(model, graph, {first: IndexMap.of([1, 0, -1], 2)})
    assert distance(outputs(model, inputs), expected) < 1e-9
    evolvenet.resize(model, graph, {first: IndexMap.keep([0], 3), second: IndexMap.keep([1], 2)})
    assert outputs(model, inputs)[0].shape == expected[0].shape
    assert model.get_parameter("model.layers.0.self_attn.k_proj.weight").shape == (8, 32)


def test_layers_that_share_a_rotary_embedding_lose_the_same_places() -> None:
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1, head_dim=8, use_cache=False)).double()
    inputs = {"input_ids": torch.randint(0, 40, (2, 6), generator=torch.Generator().manual_seed(0))}
    graph = trace(model, inputs, heads=False)
    name = "model.layers.0.self_attn.q_proj"
    assert {width for width in graph.sizes if "attn" in width} == {name}
    assert graph.sizes[name] == 4
    expected = outputs(model, inputs)
    graph = evolvenet.resize(model, graph, {name: IndexMap.keep([2, 0, 3, 1], 4)})
    assert distance(outputs(model, inputs), expected) < 1e-9
    evolvenet.resize(model, graph, {name: IndexMap.keep([0, 2, 3], 4)})
    assert [layer.self_attn.head_dim for layer in model.model.layers] == [6, 6]
    assert outputs(model, inputs)[0].shape == expected[0].shape


FUSED = {
    "one key": ({"multi_query": True}, 4),
    "a key for two queries": ({"new_decoder_architecture": True, "num_kv_heads": 2}, 4),
}


@pytest.mark.parametrize("kind", FUSED)
def test_keys_that_a_list_of_one_number_picks_are_those_of_a_slice(kind: str) -> None:
    """Of Falcon: queries, keys and values lie in one weight, of which `[..., [-2], :]` are keys."""
    options, pairs = FUSED[kind]
    torch.manual_seed(0)
    model: Any = FalconForCausalLM(FalconConfig(**SIZES, **options, bias=False, use_cache=False)).double()
    inputs = {"input_ids": torch.randint(0, 40, (2, 6), generator=torch.Generator().manual_seed(0))}
    graph = trace(model, inputs, heads=False)
    name = "transformer.h.0.self_attention.query_key_value"
    assert (graph.sizes[name], graph.widths[name].patches) == (
        pairs,
        tuple((f"transformer.h.{n}.self_attention", "head_dim") for n in range(2)),
    )
    expected = outputs(model, inputs)
    graph = evolvenet.resize(model, graph, {name: IndexMap.keep([2, 0, 3, 1], 4)})
    assert distance(outputs(model, inputs), expected) < 1e-9
    evolvenet.resize(model, graph, {name: IndexMap.keep([0, 2, 3], 4)})
    assert [layer.self_attention.head_dim for layer in model.transformer.h] == [6, 6]
    assert outputs(model, inputs)[0].shape == expected[0].shape


def test_places_of_heads_go_where_slopes_keep_the_heads() -> None:
    """Of BLOOM: queries, keys and values of a head lie beside each other in one weight."""
    torch.manual_seed(0)
    model: Any = BloomForCausalLM(
        BloomConfig(vocab_size=40, hidden_size=32, n_layer=2, n_head=4, use_cache=False)
    ).double()
    inputs = {"input_ids": torch.randint(0, 40, (2, 6), generator=torch.Generator().manual_seed(0))}
    graph, expected = trace(model, inputs, outputs="logits"), outputs(model, inputs)
    names = [f"transformer.h.{layer}.self_attention.query_key_value" for layer in range(2)]
    assert [graph.sizes[name] for name in names] == [8, 8]
    graph = evolvenet.resize(model, graph, {name: IndexMap.keep([3, 0, 7, 1, 2, 6, 5, 4], 8) for name in names})
    assert distance(outputs(model, inputs), expected) < 1e-9
    evolvenet.prune(model, graph, {names[0]: 5})
    assert [layer.self_attention.head_dim for layer in model.transformer.h] == [5, 8]
    assert outputs(model, inputs)[0].shape == expected[0].shape

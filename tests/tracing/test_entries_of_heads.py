"""Heads with an entry each in another tensor (a relative bias, a sink, a scale), and heads that share places of their keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from evolvenet.tracing.trace import trace
from tests.helpers.networks.grouped_attention import GroupedAttention
from tests.helpers.tracing import check_units

WORDS: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4,
    "use_cache": False,
}  # fmt: skip
IMAGES: dict[str, Any] = {
    "image_size": 16,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [1],
    "num_heads": [4],
    "window_size": 4,
}
LATENT: dict[str, Any] = {
    **WORDS, "num_key_value_heads": 4, "q_lora_rank": 12, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6,
    "v_head_dim": 10, "first_k_dense_replace": 2,
}  # fmt: skip


def built(kind: str, options: dict[str, Any]) -> tuple[Any, Any]:
    """A model in float64 in which every tensor counts, and its inputs."""
    torch.manual_seed(0)
    make = getattr(transformers, kind)
    model = make(make.config_class(**options)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    random = torch.Generator().manual_seed(0)
    if "image_size" in options:
        return model, {"pixel_values": torch.randn(1, 3, 16, 16, generator=random, dtype=torch.float64)}
    return model, {"input_ids": torch.randint(0, 40, (1, 7), generator=random)}


ENTRIES = {
    "T5EncoderModel": (
        {"vocab_size": 40, "d_model": 24, "d_kv": 6, "d_ff": 20, "num_layers": 2, "num_heads": 4},
        ["encoder.block.0.layer.0.SelfAttention.q"],
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", 1),
    ),
    "SwinModel": (
        IMAGES,
        ["encoder.layers.0.blocks.0.attention.q_proj"],
        ("encoder.layers.0.blocks.0.attention.relative_position_bias.relative_position_bias_table", 1),
    ),
    "Swinv2Model": (
        IMAGES,
        ["encoder.layers.0.blocks.0.attention.self.query"],
        ("encoder.layers.0.blocks.0.attention.self.logit_scale", 0),
    ),
}  # fmt: skip


LAYERS = {"T5EncoderModel": {"0", "1"}, "SwinModel": {"0"}, "Swinv2Model": {"0"}}
"""Those that share an entry: in T5 all share the relative bias of the first, so that they lose the same heads."""


@pytest.mark.parametrize("kind", ENTRIES)
def test_an_entry_goes_with_its_head_where_heads_are_asked_for(kind: str) -> None:
    options, names, entry = ENTRIES[kind]
    model, inputs = built(kind, options)
    graph = trace(model, inputs, outputs="0", heads=True)
    assert entry in {(tie.tensor, tie.dim) for tie in graph.widths[names[0]].ties}
    assert {tie.module.split(".")[2] for tie in graph.widths[names[0]].ties} == LAYERS[kind]
    graph = check_units(model, graph, inputs, names)
    assert model.get_parameter(entry[0]).shape[entry[1]] == graph.sizes[names[0]] == 5


def test_a_group_of_heads_goes_with_its_sinks() -> None:
    torch.manual_seed(0)
    model = GroupedAttention(sinks=True).double()
    inputs = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    graph = trace(model, inputs)
    assert graph.sizes == {"first": 12, "q": 2}
    check_units(model, graph, inputs, ["q"])
    assert model.get_parameter("sinks").shape == (6,)


def test_heads_with_latent_keys_share_the_places_that_turn() -> None:
    """Of DeepSeek-V3: whole heads, and the ranks of queries, and of keys and values."""
    model, inputs = built("DeepseekV3ForCausalLM", LATENT)
    graph = trace(model, inputs)
    layers = [f"model.layers.{layer}.self_attn" for layer in range(2)]
    found = {name: size for name, size in graph.sizes.items() if name.startswith(layers[1])}
    assert found == {f"{layers[1]}.q_a_proj": 12, f"{layers[1]}.q_b_proj": 4, f"{layers[1]}.kv_a_proj_with_mqa": 8}
    places = {
        tie.tensor.rpartition(".")[0].rpartition(".")[2]: tie.repeat
        for tie in graph.widths[f"{layers[0]}.q_b_proj"].ties
    }
    assert places == {"q_b_proj": 10, "kv_b_proj": 16, "o_proj": 10}
    graph = check_units(model, graph, inputs, [f"{layer}.q_b_proj" for layer in layers])
    assert "data that has a fixed size" in (graph.widths[f"{layers[0]}.kv_a_proj_with_mqa#2"].frozen or "")


def test_ranks_of_latent_keys_beside_pairs_of_complex_numbers_are_even() -> None:
    """Of DeepSeek-V2, whose rotary embedding needs even strides: a slice of `kv_lora_rank` + 4 places."""
    model, inputs = built("DeepseekV2ForCausalLM", {**LATENT, "num_hidden_layers": 1})
    graph = trace(model.float(), inputs)
    rank = graph.widths["model.layers.0.self_attn.kv_a_proj_with_mqa"]
    assert (rank.size, rank.multiple, rank.frozen) == (8, 2, None)

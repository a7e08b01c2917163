"""Families with code of their own kind: what of them changes, and which line keeps the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import evolvenet
from evolvenet import WidthGraph
from evolvenet.transformers import from_pretrained, number_position_channels, save_pretrained
from tests.helpers.cases import shuffled
from tests.helpers.transformers_families import IMAGES, SIZES

WORDS = SIZES["vocab_size"]
VISION: dict[str, Any] = {name: value for name, value in IMAGES.items() if name != "num_labels"}


def llava() -> tuple[Any, dict[str, Tensor]]:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=transformers.LlamaConfig(**SIZES, num_key_value_heads=2, use_cache=False),
        image_token_index=5,
        vision_feature_layer=-1,
    )
    words = torch.randint(6, WORDS, (1, 9))
    words[:, 2:6] = 5
    return transformers.LlavaForConditionalGeneration(config), {
        "input_ids": words,
        "pixel_values": torch.randn(1, 3, 16, 16),
    }


def phi3() -> tuple[Any, dict[str, Tensor]]:
    """Nothing is left to pass beside the turned places: a tensor without elements."""
    config = transformers.Phi3Config(**SIZES, num_key_value_heads=2, use_cache=False)
    return transformers.Phi3ForCausalLM(config), {"input_ids": torch.randint(3, WORDS, (1, 9))}


def dinov3() -> tuple[Any, dict[str, Tensor]]:
    """No register tokens: a parameter without elements."""
    model = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**VISION, num_register_tokens=0))
    return model, {"pixel_values": torch.randn(1, 3, 16, 16)}


def sam() -> tuple[Any, dict[str, Tensor]]:
    config = transformers.SamConfig(
        vision_config={
            "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 32, "patch_size": 8,
            "window_size": 2, "global_attn_indexes": [0], "output_channels": 16, "mlp_dim": 40, "num_pos_feats": 8,
        },
        prompt_encoder_config={"hidden_size": 16, "image_size": 32, "patch_size": 8, "mask_input_channels": 8},
        mask_decoder_config={
            "hidden_size": 16, "mlp_dim": 24, "num_hidden_layers": 1, "num_attention_heads": 4, "iou_head_hidden_dim": 12,
        },
    )  # fmt: skip
    return transformers.SamModel(config), {
        "pixel_values": torch.randn(1, 3, 32, 32),
        "input_points": torch.rand(1, 1, 1, 2) * 32,
    }


def detr() -> tuple[Any, dict[str, Tensor]]:
    small: dict[str, Any] = {
        "hidden_sizes": [8, 16],
        "depths": [1, 1],
        "layer_type": "basic",
        "out_features": ["stage2"],
    }
    backbone = transformers.ResNetConfig(embedding_size=8, **small)
    options: dict[str, Any] = {
        "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None, "backbone_config": backbone,
        "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "num_labels": 3,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "num_queries": 5,
    }  # fmt: skip
    config = transformers.DetrConfig(**options)
    return transformers.DetrForObjectDetection(config), {"pixel_values": torch.randn(1, 3, 32, 32)}


def deepseek_in_groups() -> tuple[Any, dict[str, Tensor]]:
    """The router selects groups of experts first."""
    config = transformers.DeepseekV3Config(**{
        **SIZES, "num_hidden_layers": 1, "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 8, "num_experts_per_tok": 2,
        "n_group": 4, "topk_group": 2, "moe_intermediate_size": 24, "n_shared_experts": 1,
        "first_k_dense_replace": 0, "use_cache": False,
    })  # fmt: skip
    return transformers.DeepseekV3ForCausalLM(config), {"input_ids": torch.randint(3, WORDS, (1, 9))}


def changed(build: Any, outputs: str | None) -> tuple[Any, WidthGraph]:
    """The model with the units of each width in another order and then some fewer, and its graph; it computes the same before."""
    torch.manual_seed(0)
    model, inputs = build()
    with torch.no_grad():
        for parameter in model.eval().parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    graph = evolvenet.trace(model, inputs, outputs)

    def run() -> Tensor:
        with torch.no_grad():
            found = model(**inputs)
        return found[0] if outputs is None else found[outputs]

    expected = run()
    traced = graph
    graph = evolvenet.resize(model, graph, {width.name: shuffled(width.size) for width in graph.resizable})
    assert torch.allclose(run(), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    smaller = {width.name: max(width.smallest, width.size - width.step) for width in graph.resizable}
    evolvenet.prune(model, graph, smaller)
    assert run().shape == expected.shape
    return model, traced


def frozen_of(graph: WidthGraph, kind: str) -> str:
    return " ".join(width.frozen for width in graph.widths.values() if width.kind == kind and width.frozen is not None)


@pytest.mark.long
@pytest.mark.parametrize(
    ("build", "outputs", "kinds"),
    [
        (llava, "logits", {"attention", "FFN", "stream"}),
        (phi3, None, {"attention", "FFN", "stream"}),
        (dinov3, None, {"attention", "FFN"}),
        (sam, "pred_masks", {"attention", "FFN", "stream"}),
        (detr, "logits", {"attention", "FFN"}),
        (deepseek_in_groups, None, {"attention", "FFN", "experts", "stream"}),
    ],
)
def test_what_can_change_permutes_exactly_and_is_cut(build: Any, outputs: str | None, kinds: set[str]) -> None:
    _, graph = changed(build, outputs)
    assert kinds <= {width.kind for width in graph.resizable}


@pytest.mark.long
def test_positions_of_detr_are_data_as_wide_as_its_stream() -> None:
    model, inputs = detr()
    assert "position_embeddings" in frozen_of(evolvenet.trace(model.eval(), inputs, "logits"), "stream")


def numbered_detr() -> tuple[Any, dict[str, Tensor]]:
    model, inputs = detr()
    with torch.no_grad():
        plain = model.eval()(**inputs).logits
        assert number_position_channels(model) == number_position_channels(model) == 1
        assert torch.equal(model(**inputs).logits, plain)
    return model, inputs


def test_units_of_detrs_stream_keep_their_positions(tmp_path: Path) -> None:
    """Where they have numbers, the encoder's stream goes with its positions; the folder and the file hold the numbers."""
    model, graph = changed(numbered_detr, "logits")
    assert graph.widths["model.input_projection"].frozen is None
    assert {tie.tensor for tie in graph.widths["model.input_projection"].ties} >= {
        "model.position_embedding.position_channels",
        "model.encoder.layers.0.self_attn.q_proj.weight",
    }
    numbers = model.model.position_embedding.position_channels
    assert len(numbers) == 31
    assert len(set(numbers.tolist())) == 31
    pixels = torch.randn(2, 3, 48, 32)
    with torch.no_grad():
        expected = model(pixels).logits
        assert not save_pretrained(model, tmp_path, {"pixel_values": pixels}, "logits")
        assert torch.equal(from_pretrained(tmp_path).eval()(pixels).logits, expected)
        evolvenet.save(model, tmp_path / "model.pt")
        again, _ = detr()
        with pytest.raises(
            evolvenet.RecordError, match=r"Call evolvenet\.transformers\.number_position_channels\(model\)"
        ):
            evolvenet.load(again, tmp_path / "model.pt")
        number_position_channels(again)
        evolvenet.load(again, tmp_path / "model.pt")
        assert torch.equal(again.eval()(pixels).logits, expected)


def test_a_model_without_computed_positions_is_refused() -> None:
    with pytest.raises(evolvenet.TraceError, match="computes positions of its stream"):
        number_position_channels(torch.nn.Linear(2, 2))


@pytest.mark.long
def test_groups_of_experts_go_whole() -> None:
    """A router that never selects a group computes the same without it; two groups must remain, as it selects two."""
    torch.manual_seed(0)
    model, inputs = deepseek_in_groups()
    model.eval()
    moe, name = model.model.layers[0].mlp, "model.layers.0.mlp.gate"
    graph = evolvenet.trace(model, inputs, "logits")
    width = graph.widths[name]
    assert (width.size, width.frozen, width.smallest, width.kind) == (4, None, 2, "experts")
    assert {(tie.tensor.rpartition("mlp.")[2], tie.repeat) for tie in width.ties} == {
        ("gate.weight", 2), ("gate.e_score_correction_bias", 2), ("experts.gate_up_proj", 2), ("experts.down_proj", 2),
    }  # fmt: skip
    with torch.no_grad():
        moe.gate.e_score_correction_bias[4:6] = -9  # those of the group that goes
        expected = model(**inputs).logits
        evolvenet.resize(model, graph, {name: evolvenet.IndexMap.keep([0, 1, 3], size=4)})
        assert (moe.gate.num_group, moe.gate.num_experts, moe.experts.num_experts) == (3, 6, 6)
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-5, atol=1e-6)


def test_groups_of_heads_of_a_state_space_model_go_whole() -> None:
    """Of Mamba-2: a group has inputs and outputs of its states in common; states of a head meet places without labels."""
    torch.manual_seed(0)
    config = transformers.Mamba2Config(
        vocab_size=WORDS, hidden_size=32, num_hidden_layers=1, state_size=12, num_heads=6, head_dim=16, expand=3, n_groups=3,
        chunk_size=8, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model: Any = transformers.Mamba2ForCausalLM(config).double().eval()
    inputs = {"input_ids": torch.randint(3, WORDS, (1, 9))}
    graph = evolvenet.trace(model, inputs, outputs="logits")
    name = "backbone.layers.0.mixer.in_proj"
    assert (graph.sizes[name], graph.widths[name].frozen) == (3, None)
    with torch.no_grad():
        # The consumer's columns of the group that goes.
        weight = model.get_parameter("backbone.layers.0.mixer.out_proj.weight")
        weight[:, 32:64] = 0
        expected = model(**inputs).logits
        evolvenet.resize(model, graph, {name: evolvenet.IndexMap.keep([0, 2], size=3)})
        assert torch.allclose(model(**inputs).logits, expected, atol=1e-9)
        words = model.generate(inputs["input_ids"], max_new_tokens=4, do_sample=False)
        assert torch.equal(
            words, model.generate(inputs["input_ids"], max_new_tokens=4, do_sample=False, use_cache=False)
        )


def latent() -> tuple[Any, dict[str, Tensor]]:
    """DeepSeek-V2: all heads share the keys' complex places, which a rotary embedding turns."""
    torch.manual_seed(0)
    config = transformers.DeepseekV2Config(**{
        **SIZES, "num_hidden_layers": 1, "num_key_value_heads": 4, "q_lora_rank": None, "kv_lora_rank": 16,
        "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 24, "n_shared_experts": 1, "first_k_dense_replace": 1,
    })  # fmt: skip
    model: Any = transformers.DeepseekV2ForCausalLM(config).double().eval()
    return model, {"input_ids": torch.randint(3, WORDS, (1, 9))}


def test_heads_with_latent_keys_go_and_come() -> None:
    model, inputs = latent()
    name = "model.layers.0.self_attn.q_proj"
    graph = evolvenet.trace(model, inputs, "logits", heads=True)
    assert (graph.sizes[name], graph.widths[name].mixed) == (4, None)
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        plain = model(**inputs).logits
        graph = evolvenet.grow(model, graph, {name: 5})
        assert attention.q_proj.out_features == 50
        torch.testing.assert_close(model(**inputs).logits, plain, rtol=1e-10, atol=1e-10)
        attention.o_proj.weight[:, 8:16] = 0  # the consumer's columns of the head that goes
        expected = model(**inputs).logits
        evolvenet.resize(model, graph, {name: evolvenet.IndexMap.keep([0, 2, 3, 4], size=5)})
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-10, atol=1e-10)
        evolvenet.resize(model, graph.with_sizes({name: 4}), {name: evolvenet.IndexMap.keep([2, 0], size=4)})
        options: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
        with_cache, without = (model.generate(inputs["input_ids"], **options, use_cache=each) for each in (True, False))
        assert torch.equal(with_cache, without)

"""Mixtures of experts of the transformers library, as it loads them: stream, inner widths and whole experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import evolvenet
from tests.helpers.cases import shuffled
from tests.helpers.transformers_families import GROUPS, SIZES

OF_EXPERTS: dict[str, Any] = {**SIZES, **GROUPS, "num_hidden_layers": 1, "num_experts_per_tok": 2, "use_cache": True}
MODELS: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8, "mlp_only_layers": []},
    "GptOss": {"num_local_experts": 4, "head_dim": 8, "sliding_window": 8},
    "DeepseekV3": {
        "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
        "v_head_dim": 8, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 24,
        "first_k_dense_replace": 0,
    },
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("name", MODELS)
def test_experts_inner_widths_and_the_stream_change_exactly(name: str) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**OF_EXPERTS, **MODELS[name]})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    words = torch.randint(3, SIZES["vocab_size"], (1, 9))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)

    def logits() -> Tensor:
        with torch.no_grad():
            return model(words).logits.double()

    graph = evolvenet.trace(model, {"input_ids": words}, outputs="logits")
    experts = {width.name: width for width in graph.resizable if any("experts" in tie.tensor for tie in width.ties)}
    assert {4, 32} < {width.size for width in experts.values()}, "whole experts, their inner width, and the stream"
    expected = logits()
    graph = evolvenet.resize(model, graph, {width: shuffled(size) for width, size in graph.sizes.items()})
    assert float((logits() - expected).norm() / expected.norm()) < 1e-4
    smaller = {width.name: width.size - width.step for width in graph.resizable if width.name in experts}
    evolvenet.prune(model, graph, smaller)
    cached, uncached = (
        model.generate(words, max_new_tokens=5, min_new_tokens=5, do_sample=False, use_cache=cache)
        for cache in (True, False)
    )
    assert torch.equal(cached, uncached)
    model.train()
    model(words).logits.square().mean().backward()
    stacks = [p for n, p in model.named_parameters() if n.endswith("down_proj") and p.dim() == 3]
    assert all(stack.grad is not None and len(stack) == 3 for stack in stacks)

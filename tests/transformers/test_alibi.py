"""Whole heads of attention with ALiBi: those that stay keep their slopes, in each layer by itself."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    MptConfig,
    MptForCausalLM,
)
from transformers.models.bloom.modeling_bloom import BloomAttention

import evolvenet
from evolvenet.errors import RecordError
from evolvenet.transformers import from_pretrained, number_alibi_heads, save_pretrained
from evolvenet.transformers.unit_numbers import has_all_units

SPECIAL: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
KINDS = {
    "bloom": (BloomForCausalLM, BloomConfig, {"hidden_size": 32, "n_layer": 2, "n_head": 4}, "dense"),
    "falcon": (FalconForCausalLM, FalconConfig, {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
                                                "multi_query": False, "alibi": True, "bias": True}, "dense"),
    "mpt": (MptForCausalLM, MptConfig, {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 32}, "out_proj"),
}  # fmt: skip
WORDS = torch.randint(3, 40, (2, 7), generator=torch.Generator().manual_seed(0))
PADDED = {"input_ids": WORDS, "attention_mask": torch.tensor([[1] * 7, [1] * 5 + [0, 0]])}


def made(kind: str) -> Any:
    model_class, config, options, _ = KINDS[kind]
    torch.manual_seed(0)
    model = model_class(config(vocab_size=40, **SPECIAL, **options)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def logits(model: Any, **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("kind", KINDS)
def test_heads_that_stay_keep_their_slopes(kind: str, tmp_path: Path) -> None:
    model, out = made(kind), KINDS[kind][3]
    whole, real = logits(model, **PADDED), PADDED["attention_mask"].bool()
    assert number_alibi_heads(model) == number_alibi_heads(model) == 2
    assert torch.equal(logits(model, **PADDED)[real], whole[real])
    graph = evolvenet.trace(model, {"input_ids": WORDS[:1]}, "logits", heads=True)
    names = [width.name for width in graph.resizable if width.kind == "attention"]
    assert [graph.sizes[name] for name in names] == [4, 4]
    attentions = [module for module in model.modules() if hasattr(module, "alibi_heads")]
    with torch.no_grad():  # the columns of heads 0 and 2 of the first layer, of head 3 of the second
        getattr(attentions[0], out).weight.unflatten(1, (4, -1))[:, [0, 2]] = 0
        getattr(attentions[1], out).weight.unflatten(1, (4, -1))[:, 3] = 0
    padded, plain = logits(model, **PADDED), logits(model, input_ids=WORDS)
    assert not torch.allclose(padded[real], whole[real])
    keep = [evolvenet.IndexMap.of(units, 4) for units in ([3, 1], [0, 1, 2])]
    evolvenet.resize(model, graph, dict(zip(names, keep, strict=True)))
    assert [module.alibi_heads.tolist() for module in attentions] == [[3, 1], [0, 1, 2]]
    torch.testing.assert_close(logits(model, **PADDED)[real], padded[real])
    torch.testing.assert_close(logits(model, input_ids=WORDS), plain)
    torch.testing.assert_close(logits(copy.deepcopy(model), input_ids=WORDS), plain)
    options: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    cached, anew = (model.generate(WORDS[:1], **options, use_cache=cache) for cache in (True, False))
    assert torch.equal(cached, anew)
    assert not save_pretrained(model, tmp_path, {"input_ids": WORDS[:1]}), "no configuration says which heads stay"
    torch.testing.assert_close(logits(from_pretrained(tmp_path, dtype=torch.float64), input_ids=WORDS), plain)


def test_a_model_without_slopes_is_refused() -> None:
    sizes: dict[str, Any] = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    with pytest.raises(evolvenet.EvolveNetError, match="slopes for its heads"):
        number_alibi_heads(BertModel(BertConfig(**sizes, intermediate_size=16)))


def test_a_new_head_has_the_slope_of_one_that_is_there() -> None:
    model = made("bloom")
    number_alibi_heads(model)
    graph = evolvenet.trace(model, {"input_ids": WORDS[:1]}, "logits", heads=True)
    name, expected = "transformer.h.0.self_attention.query_key_value", {0.0, 1.0, 3.0}
    graph = evolvenet.resize(model, graph, {name: evolvenet.IndexMap.keep([0, 1, 3], size=4)})
    heads = model.transformer.h[0].self_attention
    for change in (
        lambda model: evolvenet.grow(model, graph, {name: 5}),
        lambda model: evolvenet.resize(model, graph, {name: evolvenet.IndexMap.grow(3, 2)}),
    ):
        change(grown := copy.deepcopy(model))
        numbers = grown.transformer.h[0].self_attention.alibi_heads.tolist()
        assert numbers[:3] == [0, 1, 3]
        assert len(numbers) == 5
        assert set(numbers) == expected
    assert heads.alibi_heads.tolist() == [0, 1, 3]


@pytest.mark.parametrize(("kind", "cut"), [*((kind, False) for kind in KINDS), ("falcon", True)])
def test_with_all_heads_and_equal_layers_the_transformers_library_alone_loads_it(
    kind: str, cut: bool, tmp_path: Path
) -> None:
    model = made(kind)
    number_alibi_heads(model)
    inputs = {"input_ids": WORDS[:1]}
    if cut:
        graph = evolvenet.trace(model, inputs, "logits", heads=True)
        inner = {width.name: 96 for width in graph.resizable if width.size == 128}
        assert len(inner) == 2
        evolvenet.prune(model, graph, inner)
    expected = logits(model, **PADDED)
    assert save_pretrained(model, tmp_path, inputs)
    assert not (tmp_path / "evolvenet.json").exists()
    for again in (KINDS[kind][0].from_pretrained(tmp_path), from_pretrained(tmp_path)):
        assert not any(name.endswith("alibi_heads") for name, _ in again.named_buffers())
        torch.testing.assert_close(logits(again.double().eval(), **PADDED), expected)


def test_without_the_last_head_in_all_layers_the_numbers_stay(tmp_path: Path) -> None:
    """A configuration of three heads has other slopes."""
    model, inputs = made("bloom"), {"input_ids": WORDS[:1]}
    number_alibi_heads(model)
    graph = evolvenet.trace(model, inputs, "logits", heads=True)
    keep = evolvenet.IndexMap.keep([0, 1, 2], size=4)
    evolvenet.resize(model, graph, {width.name: keep for width in graph.resizable if width.size == 4})
    expected = logits(model, **PADDED)
    assert not save_pretrained(model, tmp_path, inputs)
    torch.testing.assert_close(logits(from_pretrained(tmp_path, dtype=torch.float64), **PADDED), expected)


class OwnAttention(BloomAttention):
    """As a model of one's own derives it."""


def test_an_attention_that_is_derived_from_one_with_slopes_has_them_too() -> None:
    model = made("bloom")
    expected = logits(model, **PADDED)
    for block in model.transformer.h:
        block.self_attention.__class__ = OwnAttention
    assert number_alibi_heads(model) == 2
    torch.testing.assert_close(logits(model, **PADDED), expected)


def test_the_numbers_of_heads_in_a_file_are_named_with_the_call_that_makes_them(tmp_path: Path) -> None:
    model = made("bloom")
    number_alibi_heads(model)
    evolvenet.save(model, tmp_path / "numbered.pt")
    with pytest.raises(
        RecordError, match=r"Call evolvenet\.transformers\.number_alibi_heads\(model\) on the model first"
    ):
        evolvenet.load(made("bloom"), tmp_path / "numbered.pt")
    number_alibi_heads(other := made("bloom"))
    evolvenet.load(other, tmp_path / "numbered.pt")


def test_a_configuration_that_builds_no_model_any_more_is_not_that_of_all_heads(tmp_path: Path) -> None:
    model, inputs = made("bloom"), {"input_ids": WORDS[:1]}
    number_alibi_heads(model)
    expected = logits(model, **PADDED)
    model.config.n_head = 5
    assert not has_all_units(model), "32 is no multiple of 5"
    assert not save_pretrained(model, tmp_path, inputs)
    model.config.n_head = 4
    torch.testing.assert_close(logits(model, **PADDED), expected)


def test_heads_that_no_configuration_says_are_named_where_their_widths_are_not_known(tmp_path: Path) -> None:
    model = made("bloom")
    number_alibi_heads(model)
    for module in model.modules():
        if hasattr(module, "alibi_heads"):
            module.alibi_heads = module.alibi_heads.flip(0)
    with pytest.raises(RecordError, match="has numbers of its units, which no configuration says, expected a record"):
        save_pretrained(model, tmp_path / "unknown")
    assert not save_pretrained(model, tmp_path / "known", {"input_ids": WORDS[:1]})


def test_a_given_state_dict_of_a_model_with_numbered_heads_is_the_one_in_the_file(tmp_path: Path) -> None:
    model, inputs = made("bloom"), {"input_ids": WORDS[:1]}
    number_alibi_heads(model)
    graph = evolvenet.trace(model, inputs, "logits", heads=True)
    average = {name: value / (1 if name.endswith("alibi_heads") else 2) for name, value in model.state_dict().items()}
    assert save_pretrained(model, tmp_path / "plain", inputs, state_dict=average)
    found = from_pretrained(tmp_path / "plain", dtype=torch.float64).state_dict()
    assert all(torch.equal(value, average[name]) for name, value in found.items())
    first = next(width.name for width in graph.resizable if width.kind == "attention")
    evolvenet.resize(model, graph, {first: evolvenet.IndexMap.of([3, 1], 4)})
    average = {name: value.clone() for name, value in model.state_dict().items()}
    average["transformer.ln_f.bias"] += 1
    assert not save_pretrained(model, tmp_path / "numbered", inputs, state_dict=average)
    found = from_pretrained(tmp_path / "numbered", dtype=torch.float64).state_dict()
    assert all(torch.equal(value, average[name]) for name, value in found.items())

"""Models with LoRA adapters: base and adapters follow a cut, ranks too, and both come back, also by PEFT alone."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftModel, RandLoraConfig, get_peft_model
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

import evolvenet
from evolvenet.errors import RecordError
from evolvenet.surgery.width_record import record_of
from evolvenet.transformers import from_pretrained, save_pretrained
from tests.helpers.transformers_families import SIZES, family, inputs_of

LAYERS = ["query", "intermediate.dense"]


def adapted(base: Any = None, **options: Any) -> Any:
    """A base with adapters of rank 4 that count."""
    torch.manual_seed(0)
    model: Any = get_peft_model(
        family("bert") if base is None else base,
        LoraConfig(r=4, lora_alpha=6, target_modules=LAYERS, **options),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


def out(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(**inputs_of("bert")).logits


def cut(model: Any, sizes: dict[int, int]) -> Any:
    """Every width of some sizes to others, ranks of the first layer to one less."""
    graph = evolvenet.trace(model, inputs_of("bert", 1))
    wanted = {width.name: sizes[width.size] for width in graph.resizable if width.size in sizes}
    assert len(wanted) >= len(sizes)
    wanted |= {name: size - 1 for name, size in wanted.items() if "layer.0." in name}
    evolvenet.prune(model, graph, wanted)
    return model


def test_widths_and_ranks_come_back_and_peft_builds_the_adapters_from_their_configuration(tmp_path: Path) -> None:
    model = cut(adapted(), {40: 24, 4: 3})
    assert not save_pretrained(model, tmp_path, max_shard_size="20KB")
    again = from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert torch.equal(out(again), out(model))
    with again.disable_adapter(), model.disable_adapter():
        assert torch.equal(out(again), out(model))
    known, own = record_of(again), record_of(model)
    assert known is not None
    assert own is not None
    assert known.graph_of(again) == own.graph_of(model)
    onto: Any = PeftModel.from_pretrained(from_pretrained(tmp_path / "base_model"), str(tmp_path))
    assert torch.equal(out(onto), out(model))
    ranks = json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    assert ranks["bert.encoder.layer.0.attention.self.query"] == 2
    assert ranks["bert.encoder.layer.1.attention.self.query"] == 3
    trainable = from_pretrained(tmp_path, is_trainable=True)
    assert {name for name, parameter in trainable.named_parameters() if parameter.requires_grad} == {
        name for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    save_pretrained(again, tmp_path / "twice")
    assert torch.equal(out(from_pretrained(tmp_path / "twice")), out(model))


def test_merged_into_a_base_with_equal_layers_nothing_needs_evolvenet(tmp_path: Path) -> None:
    model = adapted()
    graph = evolvenet.trace(model, inputs_of("bert", 1))
    evolvenet.prune(model, graph, {width.name: 24 for width in graph.resizable if width.size == 40})
    assert save_pretrained(model, tmp_path)
    alone: Any = PeftModel.from_pretrained(BertForMaskedLM.from_pretrained(tmp_path / "base_model"), str(tmp_path))
    assert torch.equal(out(alone), out(model))
    merged = model.merge_and_unload()
    assert save_pretrained(merged, tmp_path / "merged")
    assert torch.equal(out(BertForMaskedLM.from_pretrained(tmp_path / "merged")), out(merged))


def test_a_base_that_was_cut_before_it_got_adapters(tmp_path: Path) -> None:
    base = cut(family("bert"), {40: 24})
    model = adapted(base)
    save_pretrained(model, tmp_path)
    assert torch.equal(out(from_pretrained(tmp_path)), out(model))


def test_a_head_that_is_trained_whole_beside_an_untrained_one_of_the_old_width(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = adapted(BertForSequenceClassification(BertConfig(**SIZES)), task_type="SEQ_CLS")
    model = cut(model, {32: 28, 40: 24})
    save_pretrained(model, tmp_path)
    assert torch.equal(out(from_pretrained(tmp_path)), out(model))


def test_what_an_adapter_has_replaced_follows_the_widths(tmp_path: Path) -> None:
    """The untrained head runs where adapters are disabled; another adapter runs once it is set."""
    model = adapted(BertForSequenceClassification(BertConfig(**SIZES)), task_type="SEQ_CLS")
    model.add_adapter("other", LoraConfig(r=2, target_modules=LAYERS, task_type="SEQ_CLS", init_lora_weights=False))
    cut(model, {32: 28, 40: 24})
    with model.disable_adapter():
        assert out(model).shape == (2, 2)
    expected = out(model)
    model.set_adapter("other")
    assert not torch.equal(out(model), expected)
    model.set_adapter("default")
    save_pretrained(model, tmp_path)
    again = from_pretrained(tmp_path)
    assert torch.equal(out(again), expected)
    again.set_adapter("other")
    model.set_adapter("other")
    assert torch.equal(out(again), out(model))
    assert record_of(again) is not None


def test_heads_go_with_the_adapters_at_queries_and_values() -> None:
    torch.manual_seed(0)
    adapters = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model: Any = get_peft_model(family("llama"), adapters).eval()
    words = inputs_of("llama")
    graph = evolvenet.trace(model, words)
    heads = [width for width in graph.resizable if width.size == 2]
    assert len(heads) == 2
    for width in heads:
        tensors = {tie.tensor for tie in width.ties}
        assert any("q_proj.lora_B" in tensor for tensor in tensors)
        assert any("v_proj.lora_B" in tensor for tensor in tensors)
    without = copy.deepcopy(model)
    layer = without.get_submodule("base_model.model.model.layers.0.self_attn")
    with torch.no_grad():
        layer.o_proj.weight[:, :16] = 0
        expected = without(**words).logits
        evolvenet.resize(model, graph, {heads[0].name: evolvenet.IndexMap.keep([1], size=2)})
        assert torch.allclose(model(**words).logits, expected, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        IA3Config(target_modules=LAYERS, feedforward_modules=["intermediate.dense"]),
        AdaLoraConfig(target_modules=["query"], total_step=10),
        RandLoraConfig(r=4, target_modules=["query"]),
    ],
)
def test_other_kinds_of_adapters_are_refused(config: Any, tmp_path: Path) -> None:
    model = get_peft_model(family("bert"), config)
    with pytest.raises(RecordError, match=r"expected LoRA adapters .* got default of type (IA3|ADALORA|RANDLORA)"):
        save_pretrained(model, tmp_path)
    assert not list(tmp_path.iterdir())

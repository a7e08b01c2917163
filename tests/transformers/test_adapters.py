"""Models with LoRA adapters: base and adapters follow a cut, ranks too, and both come back, also by PEFT alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
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


def test_other_kinds_of_adapters_are_refused(tmp_path: Path) -> None:
    model = get_peft_model(family("bert"), IA3Config(target_modules=LAYERS, feedforward_modules=["intermediate.dense"]))
    with pytest.raises(RecordError, match=r"expected LoRA adapters .* got default of type .*IA3"):
        save_pretrained(model, tmp_path)
    assert not list(tmp_path.iterdir())

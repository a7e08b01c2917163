"""Ranks of LoRA adapters change while they train: in the singular basis, noted where PEFT looks, resumed bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

import evolvenet
from evolvenet import Budget, Tolerance
from evolvenet.transformers.callback import WidthEvolutionCallback
from tests.helpers.transformers_runs import bert, evolution, sentences, trainer

LAYER = "base_model.model.bert.encoder.layer.{}.{}"
QUERY = LAYER.format(0, "attention.self.query.lora_A.default")
INNER = LAYER.format(1, "intermediate.dense.lora_A.default")


def adapted(rank: int = 6) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["query", "value", "intermediate.dense"])
    return get_peft_model(bert(layers=2), config)


def layer_of(model: Any, name: str) -> Any:
    return model.get_submodule(name.removesuffix(".lora_A.default"))


def test_ranks_change_in_a_run_and_are_resumed_and_loaded_by_peft_alone(tmp_path: Path) -> None:
    def evolving() -> WidthEvolutionCallback:
        return evolution({QUERY: 3, INNER: 8}, start_step=3, stop=0.6)

    whole, callback = adapted(), evolving()
    trainer(tmp_path, whole, callback, max_steps=8, save_strategy="steps", save_steps=6).train()
    assert callback.history is not None
    assert [(event.step, event.skipped, len(event.changes)) for event in callback.history.events] == [(4, None, 2)]
    assert set(callback.history.initial.sizes.values()) == {6}, "of a base that is not trained nothing changes"
    for name, rank in ((QUERY, 3), (INNER, 8)):
        layer = layer_of(whole, name)
        assert (layer.r["default"], layer.lora_alpha["default"], layer.scaling["default"]) == (rank, 2 * rank, 2.0)
        assert layer.lora_A["default"].out_features == layer.lora_B["default"].in_features == rank

    again = adapted()
    trainer(tmp_path, again, evolving(), max_steps=8).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), again.parameters(), strict=True))
    assert layer_of(again, QUERY).r["default"] == 3
    alone = PeftModel.from_pretrained(bert(layers=2), str(tmp_path / "checkpoint-6"))
    assert layer_of(alone, QUERY).lora_A["default"].weight.shape == (3, 32)


def test_a_rank_is_cut_in_its_singular_basis_however_training_has_mixed_it() -> None:
    """The product of the factors has rank 2, spread over all 6 coordinates: what a cut to 2 keeps is all of it."""
    model = adapted().eval()
    layer, mixture = layer_of(model, QUERY), torch.linalg.qr(torch.randn(6, 6)).Q
    with torch.no_grad():
        first, last = torch.zeros(6, 32), torch.zeros(32, 6)
        first[:2], last[:, :2] = torch.randn(2, 32), torch.randn(32, 2)
        layer.lora_A["default"].weight.copy_(mixture @ first)
        layer.lora_B["default"].weight.copy_(last @ mixture.T)
        inputs = {"input_ids": torch.stack([row["input_ids"] for row in sentences(4)])}
        before = model(**inputs).logits
        graph = evolvenet.trace(model, inputs)
        assert graph.widths[QUERY].rank_of == QUERY.removesuffix(".lora_A.default")
        evolvenet.prune(model, graph, {QUERY: 2})
        assert torch.allclose(model(**inputs).logits, before, atol=1e-4)


def test_a_budget_cuts_ranks_and_a_tolerance_undoes_a_cut_of_them(tmp_path: Path) -> None:
    model = adapted()
    trained = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    whole = sum(p.numel() for p in model.parameters())
    budget = WidthEvolutionCallback(Budget(params=whole - trained // 2, by=0.5), every_n_steps=2, stop=1.0)
    trainer(tmp_path, model, budget, learning_rate=1e-2).train()
    assert sum(p.numel() for p in model.parameters()) <= whole - trained // 2

    scores = iter((1.0, 1.0, 1.0, 0.0, 0.0, 0.0))
    undone = WidthEvolutionCallback(Tolerance("score", drop=0.1, validations=1, share=0.1), every_n_steps=3, stop=0.6)
    run = trainer(tmp_path, model := adapted(), undone, eval_strategy="steps", eval_steps=1)
    run.compute_metrics = lambda prediction: {"score": next(scores)}
    run.train()
    assert undone.history is not None
    assert [(event.step, len(event.changes) > 0) for event in undone.history.events] == [(3, True), (4, True)]
    assert {module.r["default"] for module in model.modules() if hasattr(module, "lora_A")} == {6}

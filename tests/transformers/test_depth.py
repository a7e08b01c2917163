"""Blocks that a run of the transformers `Trainer` removes stand in its checkpoints, from which it resumes bit by bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from evolvenet.policies.base import Judgement
from evolvenet.surgery.remaining_layers import RemainingLayers
from evolvenet.transformers import WidthEvolutionCallback


class Drops:
    """Removes what moves the outputs by little."""

    depth = True

    def propose(self, context: Any) -> dict[str, Any]:
        return {}

    def block_loss(self, context: Any, path: str, saved: Any, accepted: Any) -> float:
        return 1e-3


class Judged(Drops):
    """The same, and every removal is taken back."""

    metric = "loss"

    def record(self, state: Any, widths: Any) -> Any:
        return [*(state or []), list(widths)]

    def judge(self, state: Any, value: float) -> Any:
        return Judgement("undo", state, "no good")


def model(seed: int = 0) -> Any:
    """Its second layer adds next to nothing, and the MLP of its third."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, initializer_range=0.3,
    )  # fmt: skip
    made: Any = LlamaForCausalLM(config)
    with torch.no_grad():
        layers = made.model.layers
        for weight in (
            layers[1].self_attn.o_proj.weight,
            layers[1].mlp.down_proj.weight,
            layers[2].mlp.down_proj.weight,
        ):
            weight.mul_(1e-3)
    return made


def run(folder: Path, policy: Any, resume: str | None = None, **options: Any) -> Any:
    words = torch.randint(0, 20, (32, 6), generator=torch.Generator().manual_seed(0))
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 8, "max_steps": 6, "learning_rate": 1e-5, "use_cpu": True, "report_to": "none",
        "disable_tqdm": True, "save_strategy": "steps", "save_steps": 4, **options,
    }  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in words]
    callback = WidthEvolutionCallback(policy, every_n_steps=2, stop=1.0)
    arguments = TrainingArguments(str(folder), **settings)
    trainer = Trainer(
        model(0 if resume is None else 1), arguments, train_dataset=rows, eval_dataset=rows, callbacks=[callback]
    )
    trainer.train(resume_from_checkpoint=resume)
    trained: Any = trainer.model
    return trained, callback.history


def test_a_run_that_removed_blocks_resumes_bit_by_bit(tmp_path: Path) -> None:
    whole, history = run(tmp_path / "whole", Drops())
    assert sum((event.removed_blocks for event in history.events), ()) == ("model.layers.1", "model.layers.2.mlp")
    assert (len(whole.model.layers), whole.config.num_hidden_layers) == (2, 2)
    again, resumed = run(tmp_path / "again", Drops(), str(tmp_path / "whole" / "checkpoint-4"))
    assert [layer.self_attn.layer_idx for layer in again.model.layers] == [0, 1]
    assert isinstance(again.model.layers, RemainingLayers)
    assert again.config.num_hidden_layers == 2
    first, second = whole.state_dict(), again.state_dict()
    assert list(first) == list(second)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert [event.removed_blocks for event in resumed.events] == [event.removed_blocks for event in history.events]


@pytest.mark.long
def test_a_removal_is_taken_back_by_the_evaluation_also_in_a_resumed_run(tmp_path: Path) -> None:
    judging = {"eval_strategy": "steps", "eval_steps": 5}
    _, first = run(tmp_path / "whole", Judged(), **judging)
    made, history = run(tmp_path / "again", Judged(), str(tmp_path / "whole" / "checkpoint-4"), **judging)
    for each in (first, history):
        restored = sum((event.restored_blocks for event in each.events), ())
        assert restored == ("model.layers.1", "model.layers.2.mlp")
    assert len(made.model.layers) == 3
    assert [layer.self_attn.layer_idx for layer in made.model.layers] == [0, 1, 2]

"""What the trace of a network has found is used by that of a step that calls it, and the graph is that of a trace by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from evolvenet.execution.step import Step
from evolvenet.graph.coverage import OUTPUT, TRIAL
from evolvenet.graph.serialization import to_state_dict
from evolvenet.tracing import verification
from evolvenet.tracing.reasons import frozen_for
from evolvenet.tracing.trace import trace, trace_with_findings

WORDS = torch.arange(10).view(2, 5)
SIZES: dict[str, Any] = {
    "vocab_size": 12, "hidden_size": 16, "intermediate_size": 20, "num_attention_heads": 4, "num_hidden_layers": 1,
    "use_cache": False,
}  # fmt: skip


def llama() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()


def last_words(model: nn.Module, words: Tensor) -> Tensor:
    """The loss of a language model that is a part of another."""
    logits = model.get_submodule("network")(words).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), words[:, 1:].flatten())


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """The outcomes of all trials that are run."""
    outcomes: list[str | None] = []
    own: Callable[..., str | None] = verification._trial_failure  # pyright: ignore[reportPrivateUsage]

    def counted(*given: Any) -> str | None:
        outcomes.append(own(*given))
        return outcomes[-1]

    monkeypatch.setattr(verification, "_trial_failure", counted)
    return outcomes


def test_the_graph_of_a_step_is_that_of_a_trace_without_findings(trials: list[str | None]) -> None:
    network = llama()
    alone, found = trace_with_findings(network, WORDS)
    assert found.choice.run.given  # heads can go, with frequencies of the embedding kept
    assert alone.widths["model.layers.0.self_attn.q_proj"].size == 4
    step, model = Step(last_words, WORDS), nn.ModuleDict({"network": network})
    trials.clear()
    known, _ = trace_with_findings(model, step, known=found.in_step("network"))
    with_findings = len(trials)
    trials.clear()
    assert to_state_dict(known) == to_state_dict(trace(model, step))
    assert with_findings < len(trials) / 4


def test_a_choice_holds_where_all_can_be_resized_again_and_no_other_width_has_failed_a_trial() -> None:
    one, other = (nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2)) for _ in range(2))
    x = torch.randn(2, 3)
    _, found = trace_with_findings(one, x)
    graph = trace(nn.ModuleList([one, other]), Step(lambda both, x: one(x).sum() + other(x).sum(), x))
    known = found.in_step("0")
    assert known.agree(graph)
    assert known.agree(frozen_for(graph, {"1.0": OUTPUT}))
    assert not known.agree(frozen_for(graph, {"0.0": OUTPUT}))
    assert not known.agree(frozen_for(graph, {"1.0": f"{TRIAL}raised"}))


def test_a_trial_that_passed_for_the_network_is_run_again_for_the_step() -> None:
    network = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2))
    x = torch.randn(2, 3)

    def step(model: nn.Module, x: Tensor) -> Tensor:
        assert model.get_parameter("0.0.weight").shape[0] == 6, "six units"
        return model.get_submodule("0")(x).square().sum()

    alone, found = trace_with_findings(network, x)
    assert alone.widths["0"].frozen is None
    assert any(None in trials.values() for trials in found.failures.values())
    assert not any(None in trials.values() for trials in found.in_step("0").failures.values())
    known, _ = trace_with_findings(nn.ModuleList([network]), Step(step, x), known=found.in_step("0"))
    assert "six units" in (known.widths["0.0"].frozen or "")


def test_a_trace_with_other_heads_takes_over_every_trial(trials: list[str | None]) -> None:
    network = llama()
    _, found = trace_with_findings(network, WORDS)
    trials.clear()
    known, _ = trace_with_findings(network, WORDS, heads=True, known=found)
    few = len(trials)
    trials.clear()
    assert to_state_dict(known) == to_state_dict(trace(network, WORDS, heads=True))
    assert few < len(trials)

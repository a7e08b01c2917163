"""What a trace has found is used by another one of the same model and inputs, and the graph is that of a trace by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from evolvenet.graph.serialization import to_state_dict
from evolvenet.tracing import verification
from evolvenet.tracing.trace import trace, trace_with_findings

WORDS = torch.arange(10).view(2, 5)
SIZES: dict[str, Any] = {
    "vocab_size": 12, "hidden_size": 16, "intermediate_size": 20, "num_attention_heads": 4, "num_hidden_layers": 1,
    "use_cache": False,
}  # fmt: skip


def llama() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()


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


def test_a_trace_with_other_heads_takes_over_every_trial(trials: list[str | None]) -> None:
    network = llama()
    _, found = trace_with_findings(network, WORDS)
    trials.clear()
    known, _ = trace_with_findings(network, WORDS, heads=True, known=found)
    few = len(trials)
    trials.clear()
    assert to_state_dict(known) == to_state_dict(trace(network, WORDS, heads=True))
    assert few < len(trials)


@pytest.mark.parametrize("heads", [True, False])
def test_trials_that_an_earlier_trace_has_run_count_as_trials_of_this_one(
    trials: list[str | None], monkeypatch: pytest.MonkeyPatch, heads: bool
) -> None:
    class Halves(nn.Module):
        """A number of another name than those of sizes: its search ends after `MOST_TRIALS`."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.last, self.wide = nn.Linear(4, 6), nn.Linear(6, 2), 6

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x).reshape(-1, self.wide))

    model, x = Halves(), torch.randn(2, 4)
    _, found = trace_with_findings(model, x)
    monkeypatch.setattr(verification, "MOST_TRIALS", len(found.failures[False,]))
    trials.clear()
    graph, again = trace_with_findings(model, x, heads=heads, known=found)
    few = len(trials)
    trials.clear()
    assert to_state_dict(graph) == to_state_dict(trace(model, x, heads=heads))
    assert graph.widths["first"].frozen is None
    assert few < len(trials)
    assert again.failures[False,].items() >= found.failures[False,].items()

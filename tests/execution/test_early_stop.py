"""Runs that end early, and language models without most of their logits."""

from __future__ import annotations

import torch
from torch import nn

from evolvenet.execution.early_stop import Finished, run_until_finished, without_cache, without_logits
from tests.helpers.transformers_families import family, inputs_of


def test_a_run_ends_where_it_is_finished_also_through_code_that_catches_errors() -> None:
    ran: list[str] = []

    class Careful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            try:
                x = self.layer(x)
            except Exception:  # noqa: BLE001  a fallback, as models have for missing kernels
                ran.append("fallback")
            ran.append("rest")
            return x

    def stop(*_: object) -> None:
        raise Finished

    model = Careful()
    handle = model.layer.register_forward_hook(stop)
    run_until_finished(model, torch.zeros(1, 2))
    assert ran == []
    handle.remove()
    run_until_finished(model, torch.zeros(1, 2))
    assert ran == ["rest"]


def test_a_language_model_computes_one_word_of_logits_unless_its_head_is_needed() -> None:
    model, inputs = family("llama"), inputs_of("llama")
    few = without_logits(model, inputs, [model.model.layers[0].mlp.down_proj.weight])
    with torch.no_grad():
        assert model(**few).logits.shape[:2] == (2, 1)
    assert without_logits(model, inputs, [model.lm_head.weight]) is inputs
    assert without_logits(model, {**inputs, "labels": inputs["input_ids"]}, []).keys() == {"input_ids", "labels"}
    tied = family("llama tied")
    assert without_logits(tied, inputs, [tied.model.embed_tokens.weight]) is inputs
    assert without_logits(nn.Linear(2, 2), torch.zeros(1, 2), []).shape == (1, 2)
    assert without_logits(family("bert"), inputs_of("bert"), []).keys() == {"input_ids"}


def test_a_language_model_keeps_no_keys_and_values_unless_the_inputs_say_so() -> None:
    for name in ("llama", "gpt2"):
        model, inputs = family(name), inputs_of(name)
        with torch.no_grad():
            assert model(**inputs).past_key_values is not None
            assert model(**without_cache(model, inputs)).past_key_values is None
        kept = {**inputs, "use_cache": True}
        assert without_cache(model, kept) is kept
    assert without_cache(nn.Linear(2, 2), x := torch.zeros(1, 2)) is x
    assert without_cache(nn.Linear(2, 2), kept := {"input": x}) is kept

"""Trials of cuts in pieces: the moments of some widths at a time, the outputs to fit to recorded once for each width."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from evolvenet.measurement.activation_moments import ActivationMoments, collect
from evolvenet.measurement.output_error import output_error, outputs_on
from evolvenet.pruning import trials
from evolvenet.pruning.reconstruction import reconstruct
from evolvenet.pruning.reconstruction_batch import TRAINING_LIMITS
from evolvenet.pruning.selection import plan_prune
from evolvenet.surgery.resize_model import install
from evolvenet.tracing.trace import trace
from tests.helpers.small_models import mlp


def test_the_moments_of_one_width_at_a_time_give_the_same_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, batches = mlp(6, 12, 10, 3), [torch.randn(30, 6, dtype=torch.float64) for _ in range(2)]
    graph, asked = trace(model, batches[0]), list[list[str]]()

    def counted(model: nn.Module, graph: Any, batches: Any, names: Collection[str]) -> ActivationMoments:
        asked.append(list(names))
        return collect(model, graph, batches, names)

    monkeypatch.setattr(trials, "collect", counted)
    whole = trials.trial_curves(model, graph, batches)
    assert asked == [["0", "2"]]
    monkeypatch.setattr(trials, "MOMENTS", 1)
    assert trials.trial_curves(model, graph, batches) == whole
    assert asked[1:] == [["0"], ["2"]]


def test_a_loss_is_that_of_a_cut_and_a_reconstruction_by_itself() -> None:
    torch.manual_seed(0)
    model, batch = mlp(6, 12, 10, 3), torch.randn(60, 6, dtype=torch.float64)
    graph = trace(model, batch)
    curves = trials.trial_curves(model, graph, [batch], shares=(0.75, 0.5))
    limits, before = replace(TRAINING_LIMITS, samples=trials.SAMPLES), outputs_on(model, [batch])
    for size, loss in curves["2"][1:-1]:
        surgery = plan_prune(model, graph, {"2": size}, collect(model, graph, [batch], ["2"]))
        undo = install(model, reconstruct(model, graph, surgery, [batch], limits))
        assert loss == output_error(before, outputs_on(model, [batch]))
        undo()

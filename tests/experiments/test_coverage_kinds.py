"""The coverage script on networks of further kinds: what it compares, and that no number of a row is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import evolvenet
from experiments.coverage import checks
from experiments.coverage.checks import build, check_ours, outputs_of
from experiments.coverage.subjects import Subject, subjects

KINDS = {name: subject for name, subject in subjects().items() if subject.library == "kinds"}
QUICK = (
    "gcn",
    "stylegan_adain",
    "conv_lstm",
    "pinn",
    "kan",
    "made",
    "moe_top2_index_add",
    "siamese",
    "unet_attention_gates",
)


def figures(subject: Subject) -> dict[str, Mapping[str, Any]]:
    """What the stages have noted."""
    found: dict[str, Mapping[str, Any]] = {}
    check_ours(subject, lambda stage, noted: found.update({stage: dict(noted)}))
    return found


@pytest.mark.parametrize("name", QUICK)
def test_a_row_is_permuted_grown_and_pruned_without_a_wrong_number(name: str) -> None:
    found = figures(KINDS[f"kinds/{name}"])
    assert found["trace"]["ok"]
    assert found["permute"]["equal"]
    assert found["grow"]["equal"]
    assert found["grow"]["grown"]
    assert {found["prune"][run] for run in ("eval", "train", "backward")} == {"yes"}


@pytest.mark.parametrize("name", KINDS)
def test_a_row_runs_on_single_and_several_samples_in_either_precision(name: str) -> None:
    subject = KINDS[name]
    model = build(subject, torch.float32)
    assert all(output.isfinite().all() for output in outputs_of(model, subject.inputs(1, torch.float32)))
    outs = outputs_of(checks.cast(model, torch.float64), subject.inputs(3, torch.float64))
    assert all(output.dtype == torch.float64 and len(output) == 3 for output in outs)


class Scaled(nn.Module):
    """A dense layer whose outputs are multiplied by a number that the code takes from its width."""

    def __init__(self, share: float = 1.0) -> None:
        super().__init__()
        self.share = share
        self.a, self.b = nn.Linear(4, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x)
        scale = self.share * hidden.shape[1] + (1 - self.share) * 10
        return self.b(hidden.relu()) * scale


@pytest.mark.parametrize(("share", "equal"), [(0.0, True), (1.0, False)])
def test_growth_that_changes_the_output_is_no_success(
    monkeypatch: pytest.MonkeyPatch, share: float, equal: bool
) -> None:
    """A graph that says the width may grow, whatever the code does with its number."""
    plain = evolvenet.trace(Scaled(0.0), torch.zeros(1, 4))
    monkeypatch.setattr(evolvenet, "trace", lambda *_: plain)
    found = figures(Subject("scaled", "kinds", lambda: Scaled(share), ((4,),)))
    assert found["permute"]["equal"]
    assert found["grow"]["equal"] is equal


def test_complex_weights_keep_their_imaginary_parts_in_float64() -> None:
    layer = nn.Module()
    layer.weight = nn.Parameter(torch.tensor([1 + 2j]))
    layer.other = nn.Parameter(torch.ones(1))
    cast = checks.cast(layer, torch.float64)
    assert [parameter.dtype for parameter in cast.parameters()] == [torch.complex64, torch.float64]
    assert cast.weight.imag == 2

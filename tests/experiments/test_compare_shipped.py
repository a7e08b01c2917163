"""The comparison on shipped networks, with a small one in their place: results out, kept, failures that end no other row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from experiments.compare import shipped as compare
from experiments.compare.shipped_networks import Fingerprint, Subject, crops, near, neighbours, outputs
from experiments.compare.shipped_sounds import tones, voices

NAME, BROKEN = "torch", "pip"
"""Distributions that are installed, whose versions the page gives."""


def small(_: Path) -> Subject:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    inputs = torch.randn(64, 8)
    labels = outputs(model, inputs).argmax(1)
    batches = list(torch.randn(128, 8).split(32))
    return Subject(
        model, batches, lambda net: float(outputs(net, inputs).argmax(1).eq(labels).double().mean()), "labels"
    )


def broken(_: Path) -> Subject:
    raise OSError("no weights")


@pytest.fixture(autouse=True)
def _networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "SUBJECTS", {BROKEN: broken, NAME: small})


def run(path: Path, *more: str) -> str:
    arguments = [
        "--levels",
        "50",
        "--methods",
        "widths",
        "tp",
        "--cache",
        str(path / "cache"),
        "--page",
        str(path / "page.md"),
    ]
    compare.main([*arguments, *more])
    return (path / "page.md").read_text("utf-8")


def test_results_are_within_the_limit_shown_and_kept(tmp_path: Path) -> None:
    page = run(tmp_path)
    paths = sorted((tmp_path / "cache" / NAME).glob("*.json"))
    records = [json.loads(path.read_text("utf-8")) for path in paths]
    assert [record["method"] for record in records] == ["tp", "widths"]
    assert all(record["left"] <= 0.5 and record["uncut"] == 1 for record in records)
    for record, label in zip(records, ("Torch-Pruning's magnitude", "**ours, widths**"), strict=True):
        assert f"| {label} | {100 * record['score']:.1f} |" in page
    assert "Not run: OSError: no weights" in page
    before = [path.stat().st_mtime_ns for path in paths]
    run(tmp_path)
    assert [path.stat().st_mtime_ns for path in paths] == before


def test_tones_have_the_pitch_that_they_say() -> None:
    sound = tones(4, 0.25, seed=0, low=200, high=400)
    spectrum = torch.fft.rfft(sound.samples * torch.hann_window(sound.samples.shape[1])).abs()
    # The strongest line is a multiple of the pitch in the middle of the sound.
    strongest = spectrum.argmax(1) / 0.25
    ratio = strongest / sound.pitch[:, sound.pitch.shape[1] // 2]
    assert (ratio - ratio.round()).abs().max() < 0.15


def test_inputs_depend_on_the_seed_alone() -> None:
    for make in (lambda: tones(2, 0.1, 3).samples, lambda: voices(2, 2, 0.5, 3)[0], lambda: crops(24, 4, 3)):
        assert torch.equal(make(), make())


def test_scores_are_those_of_the_plain_formulas() -> None:
    assert near(torch.tensor([440.0, 450.0, 460.0, 220.0]), torch.tensor([440.0])) == 0.5
    vectors = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 2.0]])
    assert neighbours(vectors).tolist() == [1, 0, 3, 2]


def test_a_fingerprint_is_the_first_tokens_output() -> None:
    class Bert(nn.Module):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> object:
            states = input_ids[..., None] * attention_mask[..., None]
            return type("Output", (), {"last_hidden_state": states})

    ids = torch.arange(6).reshape(2, 3)
    assert Fingerprint(Bert())(ids, torch.ones(2, 3, dtype=torch.long)).tolist() == [[0], [3]]

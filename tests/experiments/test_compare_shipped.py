"""The comparison on shipped networks, with a small one in their place: results out, kept, failures that end no other row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from experiments.compare import shipped as compare
from experiments.compare.networks import reestimate
from experiments.compare.shipped_molecules import FCC, Crystal, Fingerprint, crystals
from experiments.compare.shipped_networks import PARTS, Subject, crops, near, neighbours, outputs, parts
from experiments.compare.shipped_sounds import tones, voices
from experiments.compare.shipped_table import ROWS, write_page
from experiments.pages import write_whole

NAME, BROKEN = "torch", "pip"
"""Distributions that are installed, whose versions the page gives."""


def small(_: Path) -> Subject:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4)).eval()
    inputs = torch.randn(64, 8)
    labels = outputs(model, inputs).argmax(1)

    def score(net: nn.Module) -> float:
        return float(outputs(net, inputs).argmax(1).eq(labels).double().mean())

    return Subject(model, parts(torch.randn(128, 8)), score, "labels", {"steps": 20}, second=("the same", score))


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
    assert all(record["left"] <= 0.5 and record["uncut"] == [1, 1] for record in records)
    rows = [row for record in records for row in ROWS if row[1] == record["method"] and row[2] in record]
    assert len(rows) == 5
    for label, kind, stage in rows:
        (record,) = (record for record in records if record["method"] == kind)
        assert page.count(f"| {label} | {100 * record[stage][0]:.1f} |") == 2
    assert "Not run: OSError: no weights" in page
    before = [path.stat().st_mtime_ns for path in paths]
    run(tmp_path)
    assert [path.stat().st_mtime_ns for path in paths] == before


def test_ours_is_the_row_with_the_least_error_on_inputs_held_out(tmp_path: Path) -> None:
    polish = {"before": 0.2, "after": 0.1, "kept": True}
    known = {"name": NAME, "uncut": [1.0], "level": 50, "version": "1", "parameters": 8, "coverage": 1, "trace": 0}
    known |= {"task": "t", "inputs": 8, "samples": 8, "settings": {}, "second": None, "commit": "c", "seconds": 1}
    one = {**known, "method": "widths", "cut": [0.5], "polished": [0.7], "polish": polish, "seconds_to_polish": 1}
    two = {**one, "method": "both", "cut": [0.9], "polished": [0.8], "polish": {**polish, "after": 0.15}}
    for record in (one, two):
        write_whole(tmp_path / NAME / f"50-{record['method']}.json", json.dumps(record))
    write_page(tmp_path / "page.md", tmp_path, (NAME,))
    assert f"| {NAME} | 70.0 | widths, polished |" in (tmp_path / "page.md").read_text("utf-8")


def test_statistics_of_norms_are_the_means_over_batches_without_dropout() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3))
    batches = [torch.randn(16, 3) for _ in range(4)]
    reestimate(model, [{"input": batch} for batch in batches])
    found = dict(model[1].named_buffers())
    assert torch.allclose(found["running_mean"], torch.stack(batches).mean((0, 1)), atol=1e-6)
    assert torch.allclose(found["running_var"], torch.stack([batch.var(0) for batch in batches]).mean(0), atol=1e-6)


def test_inputs_stand_in_parts() -> None:
    assert [len(part) for part in parts(torch.zeros(20, 2))] == [3, 3, 3, 3, 2, 2, 2, 2]
    assert PARTS == 8


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


def test_an_atom_of_rock_salt_has_six_neighbours_of_the_other_kind_and_twelve_of_its_own() -> None:
    matrix = 5.6 * torch.tensor(FCC).double()
    salt = Crystal((11, 17), torch.tensor([[0.0] * 3, [0.5] * 3]).double().numpy(), matrix.numpy())
    one, two, images, far = (torch.as_tensor(each) for each in salt.get_neighbor_list(r=4))
    assert [int(((one == 0) & (two == kind)).sum()) for kind in (1, 0)] == [6, 12]
    places = torch.as_tensor(salt.frac_coords)
    assert torch.allclose(((places[two] + images - places[one]) @ matrix).norm(dim=1), far)
    assert sorted(set(far.round(decimals=3).tolist())) == [2.8, 3.96]
    assert [site.specie.Z for site in salt] == [11, 17]
    assert all((a.matrix == b.matrix).all() for a, b in zip(crystals(3, 0), crystals(3, 0), strict=True))


def test_a_fingerprint_is_the_first_tokens_output() -> None:
    class Bert(nn.Module):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> object:
            states = input_ids[..., None] * attention_mask[..., None]
            return type("Output", (), {"last_hidden_state": states})

    ids = torch.arange(6).reshape(2, 3)
    assert Fingerprint(Bert())(ids, torch.ones(2, 3, dtype=torch.long)).tolist() == [[0], [3]]

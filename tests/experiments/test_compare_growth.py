"""The comparison of new units: a short run, and gromo's part on a stand-in, as gromo is not installed here."""

from __future__ import annotations

import evolvenet  # noqa: F401  isort: skip  # its mend comes before torchvision

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from experiments.compare import growth as compare_growth
from experiments.compare.gromo import SCALES, gromo_tiny
from experiments.compare.growth import GROMO, ROWS, SUBJECTS, Images, Outcome, kept, main, table
from experiments.data.images import Split
from tests.helpers.experiments import write_random
from tests.helpers.gromo import Gromo


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A directory with random images in place of MNIST's."""
    return write_random(tmp_path, 300)


def test_the_page_has_a_line_for_every_method_and_the_loss_is_kept(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare_growth, "SUBJECTS", [replace(each, calibration=(2, 32)) for each in SUBJECTS])
    monkeypatch.setattr(compare_growth, "LATER", (1, 2))
    monkeypatch.setattr(compare_growth, "installed", lambda: False)
    page = tmp_path / "page.md"
    main(["--data", str(data), "--out", str(page), "--seeds", "2"])
    text = page.read_text("utf-8")
    titles = [line.split(" | ")[0].removeprefix("| ") for line in text.splitlines() if line.startswith("| ")]
    lines = ["new units", "---", *(row.title for row in ROWS if row.method != GROMO)]
    assert [title.split(" |")[0] for title in titles] == lines * 2
    assert text.count("keeps the function: yes") == 2
    assert "1 steps later | 2 steps later" in text
    assert "gromo (not installed)" in text
    assert "{" not in text
    assert str(tmp_path) not in text


def test_some_networks_and_rows_alone_are_named_in_the_command(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare_growth, "SUBJECTS", [replace(each, calibration=(2, 32)) for each in SUBJECTS])
    monkeypatch.setattr(compare_growth, "LATER", (1, 2))
    page = tmp_path / "page.md"
    chosen = ["--subjects", "dense", "--rows", "paired, update (changes the function)"]
    main(["--data", str(data), "--out", str(page), "--seeds", "2", *chosen])
    text = page.read_text("utf-8")
    assert "--subjects dense --rows 'paired, update (changes the function)'`" in text
    titles = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| ")]
    assert titles == ["| new units", "| ---", "| no growth", "| paired, update (changes the function)"]


def test_one_seed_has_no_deviation(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--data", str(data), "--seeds", "1"])
    assert "expected 2 or more" in capsys.readouterr().err


def test_a_loss_that_changed_is_reported() -> None:
    same, other = Outcome((0.5, 0.5, 0.4), 0.1, 10), Outcome((0.5, 0.51, 0.4), 0.1, 10)
    assert "yes" in kept({"paired": [same, same], "random (changes the function)": [other]})
    assert "**no**, largest relative difference 2e-02" in kept({"paired": [same, other]})


def test_a_line_is_mean_and_deviation() -> None:
    one, two = Outcome((1.0, 1.0, 0.5), 0.25, 1234), Outcome((3.0, 3.0, 0.5), 0.75, 1234)
    control = [replace(one, losses=(1.0, 1.0, 0.75)), replace(two, losses=(3.0, 3.0, 1.25))]
    lines = table({"no growth": control, "paired": [one, two]})[2:]
    assert lines == [
        "| no growth | 2.0000 ± 1.4142 | 2.0000 ± 1.4142 | 1.0000 ± 0.3536 | +0.0000 ± 0.0000 | 1,234 |  |",
        "| paired | 2.0000 ± 1.4142 | 2.0000 ± 1.4142 | 0.5000 ± 0.0000 | -0.5000 ± 0.3536 | 1,234 | 0.50 |",
    ]


def test_batches_are_the_same_for_the_same_seed_and_see_every_image_once_an_epoch() -> None:
    data = Images(Split(torch.arange(100, dtype=torch.uint8).reshape(100, 1, 1, 1), torch.arange(100)), lambda x: x)
    one, two, other = (data.batches(seed, 25, 10) for seed in (0, 0, 1))
    assert all(torch.equal(a[1], b[1]) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one[0][1], other[0][1])
    labels = torch.cat([labels for _, labels in one])
    assert len(labels) == 250
    assert labels[:100].sort().values.tolist() == list(range(100))


def test_gromo_gets_the_same_network_and_the_best_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(importlib, "import_module", lambda name: type("module", (), {"GrowingMLP": Gromo}))
    model: Any = SUBJECTS[0].build()
    x = torch.randn(40, 1, 28, 28)
    labels = torch.where(x[:, 0, 0, 0] > 0, 3, 0)
    grown: Any = gromo_tiny(model, [(x[:20], labels[:20]), (x[20:], labels[20:])])
    for theirs, ours in zip(grown.layers, (model[1], model[3], model[5]), strict=True):
        assert torch.equal(theirs.weight, ours.weight)
        assert torch.equal(theirs.bias, ours.bias)
    loss = nn.functional.cross_entropy(model(x[:20]), labels[:20], reduction="sum")
    torch.testing.assert_close(grown.calls[2][1], torch.autograd.grad(loss, model[5].bias)[0])
    called = [name for name, _ in grown.calls]
    once = ["set_growing_layers", "init_computation", *["update_computation"] * 2, "compute_optimal_updates"]
    assert called == [*once, "reset_computation", "dummy_select_update", "applied"] * 2
    assert grown.calls[4] == ("compute_optimal_updates", {"maximum_added_neurons": 8})
    assert grown.calls[0][1] == {"index": 0}
    scale = grown.calls[7][1]
    assert scale in SCALES
    assert scale > 1
    assert all(parameter.grad is None for parameter in grown.parameters())

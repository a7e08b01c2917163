"""Growing in a schedule: a short run of every row, what a line says, and that all rows train alike."""

from __future__ import annotations

import evolvenet  # noqa: F401  isort: skip  # its mend comes before torchvision

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import AdamW

from experiments.compare import schedule as compare_schedule
from experiments.compare.gromo import Pairs
from experiments.compare.growth import Images
from experiments.compare.schedule import (
    BATCH,
    METHODS,
    Outcome,
    Row,
    Schedule,
    batches,
    gromo,
    main,
    ours,
    rows,
    table,
    train_row,
)
from experiments.data.images import Split
from tests.helpers.gromo import Gromo

SHORT = Schedule(start=2, added=3, growths=2, epochs=3)


@pytest.fixture
def split() -> Split:
    """Random images: three batches an epoch."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (3 * BATCH, 1, 28, 28), generator=draw, dtype=torch.uint8)
    return Split(images, torch.randint(0, 10, (3 * BATCH,), generator=draw))


def plain(images: torch.Tensor) -> torch.Tensor:
    return images


def test_the_page_has_a_line_for_every_row(split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_schedule, "CALIBRATION", (2, 32))
    monkeypatch.setattr(compare_schedule, "Schedule", lambda: SHORT)
    monkeypatch.setattr(compare_schedule, "installed", lambda: False)
    images, labels = split.images[:, 0].numpy(), split.labels.numpy()
    np.savez(tmp_path / "mnist.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    main(["--data", str(tmp_path), "--out", str(tmp_path / "page.md"), "--seeds", "2"])
    text = (tmp_path / "page.md").read_text("utf-8")
    lines = [line.split(" | ")[:2] for line in text.splitlines() if line.startswith("| ")][2:]
    small, large = 785 * 2 + 3 * 2 + 3 * 10, 785 * 8 + 9 * 8 + 9 * 10
    assert lines[:2] == [["| never grown", f"{small:,}"], ["| final widths from the start", f"{large:,}"]]
    names = *METHODS, "paired, fresh AdamW", "paired, update", "tiny, update", "tiny, update, fresh AdamW"
    assert lines[2:] == [[f"| EvolveNet, {name}", f"{large:,}"] for name in names]
    assert "784-2-2-10" in text
    assert "gromo (not installed)" in text
    assert "{" not in text
    assert str(tmp_path) not in text


def test_a_line_is_mean_and_deviation() -> None:
    found = {
        "a": [Outcome(0.5, 1000, 0.0), Outcome(0.75, 1000, 0.0)],
        "b": [Outcome(1, 900, 2.0), Outcome(1, 1000, 3.0)],
    }
    assert table(found)[2:] == [
        "| a | 1,000 | 62.50 ± 17.68 | 50.00 75.00 |  |",
        "| b | 900 … 1,000 | 100.00 ± 0.00 | 100.00 100.00 | 2.5 |",
    ]


def test_growths_come_after_the_first_epochs_and_the_rate_falls_to_zero(split: Split) -> None:
    seen: list[tuple[float, int]] = []

    def change(model: nn.Module, optimizer: AdamW, pairs: Pairs, seed: int) -> tuple[nn.Module, AdamW]:
        seen.append((optimizer.param_groups[0]["lr"], len(pairs)))
        return ours("paired", SHORT.added)(model, optimizer, pairs, seed)

    data = Images(split, plain)
    outcome = train_row(Row("grown", change), SHORT, data, batches(split, data), seed=0)
    # Nine steps: what a growth sees is the rate of the step before it, the third and the sixth.
    assert [(pytest.approx(rate), count) for rate, count in seen] == [(4e-3 * 7 / 9, 8), (4e-3 * 4 / 9, 8)]
    assert (
        outcome.parameters == train_row(Row("whole", None, whole=True), SHORT, data, batches(split, data), 0).parameters
    )
    assert outcome.seconds > 0


def test_only_a_growth_with_a_fresh_optimizer_loses_its_state(split: Split) -> None:
    pairs = Images(split, plain).batches(0, 2, 32)
    for fresh in (False, True):
        model = SHORT.dense(2)
        optimizer = AdamW(model.parameters(), lr=0.25)
        nn.functional.cross_entropy(model(pairs[0][0]), pairs[0][1]).backward()
        optimizer.step()
        after = ours("paired", SHORT.added, fresh)(model, optimizer, pairs, 0)[1]
        assert (len(after.state) == 0) is fresh
        assert after.param_groups[0]["lr"] == 0.25
        assert after.param_groups[0]["params"][0].shape == (5, 784)


def test_the_test_split_is_normalised_as_the_training_images(split: Split) -> None:
    data = Images(split, plain)
    other = Split(split.images[:7] // 2, split.labels[:7])
    [(images, labels)] = batches(other, data)
    pixels = split.images.float() / 255
    torch.testing.assert_close(images, (other.images.float() / 255 - pixels.mean()) / pixels.std())
    assert torch.equal(labels, other.labels)


def test_gromos_network_is_built_once_and_its_optimizer_starts_anew(
    split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib, "import_module", lambda name: type("module", (), {"GrowingMLP": Gromo}))
    model, pairs = SHORT.dense(2), Images(split, plain).batches(0, 2, 32)
    optimizer = AdamW(model.parameters(), lr=0.25)
    first, fresh = gromo(3)(model, optimizer, pairs, 0)
    assert isinstance(first, Gromo)
    assert ("compute_optimal_updates", {"maximum_added_neurons": 3}) in first.calls
    assert fresh.param_groups[0]["lr"] == 0.25
    assert set(fresh.param_groups[0]["params"]) == set(first.parameters())
    second, again = gromo(3)(first, fresh, pairs, 0)
    assert second is first
    assert again is not fresh


def test_gromo_is_a_row_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_schedule, "installed", lambda: True)
    assert rows(SHORT)[-1].title == "gromo's TINY"
    monkeypatch.setattr(compare_schedule, "installed", lambda: False)
    assert "gromo" not in rows(SHORT)[-1].title


def test_one_seed_has_no_deviation(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--seeds", "1"])
    assert "expected 2 or more" in capsys.readouterr().err

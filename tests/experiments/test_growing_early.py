"""Narrow starts that grow early: a short run of every row, and what the page says of them."""

from __future__ import annotations

import evolvenet  # noqa: F401  isort: skip  # its mend comes before torchvision

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.data.images import Split
from experiments.training import growing_early
from experiments.training.growing_early import (
    FINAL,
    GROWN,
    HALF,
    NARROW,
    PLANS,
    WIDE,
    Data,
    Plan,
    Run,
    dense,
    main,
    runs,
    table,
)

SHORT = Plan(dense, (4, 4), (64, 64), most=20_000, last=9_000, steps=20, grown_steps=30, batch=32, events=10, watches=4)


@pytest.fixture
def split() -> Split:
    """Random images with random labels."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (160, 1, 28, 28), generator=draw, dtype=torch.uint8)
    return Split(images, torch.randint(0, 10, (160,), generator=draw))


def test_a_narrow_start_grows_is_cut_and_its_widths_are_trained_anew(split: Split) -> None:
    found = dict(runs(SHORT, Data.of(split, split, 60), 0, (WIDE, HALF, NARROW, GROWN)))
    assert list(found) == [WIDE, HALF, NARROW, GROWN, FINAL]
    sizes = [size for _, size in found[GROWN].parameters]
    assert sizes[0] == found[NARROW].parameters[0][1] < sizes[-1] <= SHORT.last < max(sizes) <= SHORT.most
    assert sizes.index(max(sizes)) < len(sizes) - 1
    assert found[FINAL].parameters == [(0, sizes[-1])]
    assert [found[row].curve[-1][0] for row in found] == [20, 10, 20, 30, 30]
    assert 0 < found[GROWN].event_seconds < found[GROWN].seconds


def test_the_held_out_images_are_not_trained_on(split: Split) -> None:
    data = Data.of(split, split, 60)
    assert len(data.train.labels) == 100
    assert torch.equal(data.validation[1], split.labels[-60:])
    assert torch.equal(next(data.batches(100, 0))[1].bincount(minlength=10), split.labels[:100].bincount(minlength=10))


def test_times_are_shares_of_the_wide_run_of_the_same_seed() -> None:
    wide = [Run([(1, 2.0, 0.5), (2, 4.0, 0.9)], 0.8, parameters=[(0, 99)]) for _ in range(2)]
    grown = [Run([(1, 1.0, 0.9), (2, 2.0, 0.9)], 0.8, parameters=[(0, 9), (1, 20)]), Run([(2, 1.0, 0.89)], 0.6)]
    grown[1].parameters.append((0, 21))
    lines = table({GROWN: grown, WIDE: wide})
    assert lines[2].startswith("| wide from the beginning | 99 | 90.00 ± 0.00 | 80.00 ± 0.00 | 1.00 | 1.00 1.00 |")
    assert lines[3].endswith("| 20 … 21 | 89.50 ± 0.71 | 70.00 ± 14.14 | 0.38 | 0.25 – |")


def test_the_page_has_every_row(split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(growing_early.PLANS, "dense", replace(SHORT, steps=6, grown_steps=6, events=3))
    monkeypatch.setattr(growing_early, "HELD_OUT", 60)
    images, labels = split.images[:, 0].numpy(), split.labels.numpy()
    np.savez(tmp_path / "mnist.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    main(["--data", str(tmp_path), "--only", "dense", "--seeds", "2", "--page", str(tmp_path / "page.md")])
    page = (tmp_path / "page.md").read_text("utf-8")
    assert page.count("\n| ") == 2 + 5
    assert str(tmp_path) not in page


def test_the_plans_start_far_narrower_than_they_end() -> None:
    for plan in PLANS.values():
        narrow, wide = (
            sum(parameter.numel() for parameter in plan.build(sizes).parameters()) for sizes in (plan.narrow, plan.wide)
        )
        assert 2 * narrow < plan.last < plan.most < wide / 2

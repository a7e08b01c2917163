"""The comparison of optimizer states across a factorization: a short run."""

from __future__ import annotations

import evolvenet  # noqa: F401  isort: skip  # its mend comes before torchvision

from pathlib import Path

import pytest

from experiments.compare import factor_state
from experiments.compare.factor_state import STATES, SUBJECTS, main
from tests.helpers.experiments import write_random


def test_the_page_has_a_line_for_every_optimizer_rank_and_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(factor_state, "SUBJECTS", (SUBJECTS[0], SUBJECTS[3]))
    monkeypatch.setattr(factor_state, "RANKS", (4,))
    page = tmp_path / "page.md"
    data = write_random(tmp_path, 100)
    main(["--data", str(data), "--out", str(page), "--seeds", "2", "--before", "2", "--after", "2"])
    lines = [line.split(" | ") for line in page.read_text("utf-8").splitlines() if line.startswith("| ")]
    wanted = [
        [f"| {name}", f"{rate:g}", "4", state] for name, _, rate in (SUBJECTS[0], SUBJECTS[3]) for state in STATES
    ]
    assert [cells[:4] for cells in lines[2:]] == wanted
    assert "{" not in page.read_text("utf-8")

"""The page on language models of growing size."""

from __future__ import annotations

from typing import Any

from experiments.bench import scale


def entry(**others: Any) -> dict[str, Any]:
    return {"wall": None, "cpu": 40.0, "gib": 1.9, "parameters": 134_000_000, "weights": 0.5, "commit": "abc", **others}


def test_the_page_says_what_was_measured_what_follows_and_what_was_not() -> None:
    page = scale._page({"150M": {"build": entry(gib=0.9), "prune": entry()}})
    (row,) = [line for line in page.splitlines() if line.startswith("| 150M")]
    assert [cell.strip() for cell in row.split("|")][1:-1] == [
        "150M", "prune", "134 M", "float32", "0.50", "8", "40", "–", "1.90", "1.00", "2.00", "abc",
    ]  # fmt: skip
    text = " ".join(page.split())
    assert "make bench-scale" in text
    assert "prune of 150M: goal 30 CPU s, now 40 (missed)." in text
    assert "trace of 150M" not in text
    assert "take 1.8 GiB (those of all widths 58 GiB)" in text
    assert "from the seconds of 150M" in text
    assert "Not measured: 150M trace, 150M trace without weights, 400M trace" in text
    assert all(len(line) <= 130 for line in page.splitlines() if not line.startswith(("|", "on ")))


def test_without_a_figure_there_is_no_extrapolation() -> None:
    assert "CPU hours" not in scale._page({"150M": {"trace": entry()}})

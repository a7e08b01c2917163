"""What pages of results share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from experiments.pages import BY_HAND, by_hand


def test_a_page_without_a_part_written_by_hand_or_none_at_all_has_nothing_to_keep(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    assert by_hand(page) == []
    page.write_text("# Title\n", "utf-8")
    assert by_hand(page) == []


@pytest.mark.parametrize(
    "lines", [BY_HAND[:1], BY_HAND[1:], BY_HAND[::-1], [*BY_HAND, *BY_HAND], [*BY_HAND, BY_HAND[1]]]
)
def test_parts_written_by_hand_that_are_not_one_whole_part_are_not_thrown_away(
    tmp_path: Path, lines: Sequence[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text("\n".join(["# Title", *lines, "text"]), "utf-8")
    with pytest.raises(ValueError, match="expected the line"):
        by_hand(page)


def test_spaces_around_the_marks_do_not_hide_a_part_written_by_hand(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("\n".join(["# Title", f"{BY_HAND[0]} ", "text", f" {BY_HAND[1]}", "table"]), "utf-8")
    assert by_hand(page) == [f"{BY_HAND[0]} ", "text", f" {BY_HAND[1]}"]

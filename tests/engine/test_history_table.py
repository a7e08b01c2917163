"""The table of a history, from records written by hand."""

from __future__ import annotations

import re

import pytest

from evolvenet.engine.history import Event, History, WidthChange


def after(step: int, sizes: dict[str, int], parameters: int, skipped: str | None = None, before: int = 5000) -> Event:
    changes = () if skipped else (WidthChange("stem", 64, sizes.get("stem", 64), "why"),)
    return Event(step, changes, sizes, before, parameters, 9 * parameters, 0.1, skipped)


def small() -> History:
    start = {"stem": 64, "hidden": 16}
    events = [
        after(10, {"stem": 40, "hidden": 16}, 3000),
        after(20, {"stem": 40, "hidden": 16}, 3000, "NaN in [stem].weight"),
        after(30, {"stem": 40, "hidden": 16}, 3000, "NaN in [stem].weight"),
    ]
    frozen = {"head": "is the model's output", "norm": "is mixed", "other": "is mixed"}
    return History(after(0, start, 5000), events, frozen)


def many(count: int, shrunk: int) -> History:
    """Networks of `count` widths, of which the first `shrunk` lose one unit more each."""
    start = {f"block{place}.conv": 100 for place in range(count)}
    now = {name: 100 - (place + 1 if place < shrunk else 0) for place, name in enumerate(start)}
    return History(after(0, start, 9000), [after(10, now, 4000)])


@pytest.mark.parametrize("show", [str, History._repr_html_], ids=["text", "html"])
def test_the_table_has_sizes_costs_events_and_reasons(show) -> None:
    text = re.sub(r"<[^>]+>", " ", show(small()).replace("&#x27;", "'"))
    rows = [line.split() for line in text.splitlines()]
    flat = " ".join(" ".join(row) for row in rows)
    for expected in (
        "parameters 5,000 3,000 ÷ 1.7",
        "MACs per sample 45,000 27,000 ÷ 1.7",
        "stem 64 40 ÷ 1.6",
        "hidden 16 16",
        "3 events, 1 of them with changed widths, 2 skipped",
        "skipped 2 times, first at step 20: NaN in [stem].weight",
        "3 widths keep their size:",
        "2 × is mixed",
        "1 × is the model's output",
    ):
        assert expected in flat


@pytest.mark.parametrize(("count", "shrunk"), [(30, 30), (31, 4), (200, 90), (200, 0)])
def test_a_table_of_many_widths_stays_short_and_sums_up_the_rest(count: int, shrunk: int) -> None:
    text = str(many(count, shrunk))
    listed = re.findall(r"^block(\d+)\.conv", text, re.MULTILINE)
    expected = range(count) if count <= 30 else range(max(0, shrunk - 30), shrunk)
    assert [int(place) for place in listed] == list(expected)
    if count > 30:
        same = count - shrunk
        assert re.search(rf"^{same} widths of the same size +{100 * same:,} +{100 * same:,}", text, re.MULTILINE)
    assert ("other widths that changed" in text) == (shrunk > 30 and count > 30)


def test_reasons_that_differ_in_their_module_alone_are_counted_together() -> None:
    history = small()
    history.frozen = {f"b{place}": f"aten::embedding in b{place} (Embedding) looks up rows" for place in range(4)}
    assert "4 × aten::embedding in … (Embedding) looks up rows" in str(history)


def test_the_html_has_no_colours_of_its_own_and_escapes_reasons() -> None:
    history = small()
    history.frozen["x"] = "reads <tensor>"
    page = history._repr_html_()
    assert "color" not in page.replace("colour", "")
    assert "&lt;tensor&gt;" in page
    assert "<tensor>" not in page


def test_frozen_widths_survive_the_way_through_plain_data() -> None:
    assert History.from_dict(small().to_dict()) == small()
    old = small().to_dict()
    del old["frozen"]
    assert History.from_dict(old).frozen == {}

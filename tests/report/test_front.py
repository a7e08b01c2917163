"""The front of several networks: which no other beats, and a picture without labels that cover each other."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from evolvenet.report.front import draw_front, on_front


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), max_size=12))
def test_a_point_is_on_the_front_unless_another_is_no_worse_in_both_and_better_in_one(
    points: list[tuple[int, int]],
) -> None:
    for (cost, accuracy), chosen in zip(points, on_front(points), strict=True):
        beaten = any(c <= cost and a >= accuracy and (c, a) != (cost, accuracy) for c, a in points)
        assert chosen is not beaten


def test_labels_of_a_crowded_front_cover_neither_each_other_nor_the_legend() -> None:
    points: list[dict[str, Any]] = [
        {
            "run": f"run {k}",
            "parameters": 1000 + 20 * k,
            "val_acc": 0.9 + k / 1000,
            "test_acc": 0.9 + k / 900,
            "front": True,
        }
        for k in range(25)
    ]
    figure = draw_front(points)
    figure.draw_without_rendering()
    panel = figure.axes[0]
    boxes = [text.get_window_extent() for text in panel.texts]
    legend = panel.get_legend()
    assert legend is not None
    boxes.append(legend.get_window_extent())
    assert len(boxes) > 3
    assert not any(one.overlaps(two) for k, one in enumerate(boxes) for two in boxes[:k])

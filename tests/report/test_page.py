"""Tables and pictures from a record written by hand."""

import html
import io
import re
import sys

import pytest
from rich.console import Console

from evolvenet.engine.history import Event, History, WidthChange
from evolvenet.errors import EvolveNetError
from evolvenet.report import ReportError, draw, summary_rows, summary_table, write_report
from evolvenet.report.panels import PINK, draw_spectrum


def event(step, changes, sizes, before, after, macs, skipped=None):
    return Event(step, changes, sizes, before, after, macs, 0.1, skipped)


def history():
    """Two widths; the first is pruned and the second grows, then an event is skipped."""
    return History(
        event(0, (), {"stem": 64, "hidden": 16}, 5000, 5000, 90_000),
        [
            event(100, (WidthChange("stem", 64, 40, "24 directions carry < 1 % of the energy"),),
                  {"stem": 40, "hidden": 16}, 5000, 3000, 60_000),
            event(200, (WidthChange("stem", 40, 30, "again"), WidthChange("hidden", 16, 20, "effective rank 15.8 of 16")),
                  {"stem": 30, "hidden": 20}, 3000, 2500, 45_000),
            event(300, (), {"stem": 30, "hidden": 20}, 2500, 2500, 45_000, "NaN in stem.weight"),
        ],
    )  # fmt: skip


def many(count):
    sizes = {f"features.denseblock{place}.conv1": 64 for place in range(count)}
    halved = dict.fromkeys(sizes, 32)
    changes = tuple(WidthChange(name, 64, 32, "no energy") for name in sizes)
    return History(event(0, (), sizes, 9000, 9000, 1000), [event(10, changes, halved, 9000, 4000, 500)])


CURVE = {"validation accuracy": [(150, 0.5), (250, 0.8), (400, 0.9)]}


def test_page_holds_summary_picture_and_every_event(tmp_path):
    path = write_report(history(), tmp_path / "new" / "place", "A <run>", CURVE, {"test accuracy": "98.76 %"})
    page = path.read_text(encoding="utf-8")
    assert path == tmp_path / "new" / "place" / "report.html"
    for text in (
        "A &lt;run&gt;", "5,000", "2,500", "÷ 2.0", "98.76 %", "<svg",
        "24 directions carry &lt; 1 % of the energy", "effective rank 15.8 of 16", "skipped: NaN in stem.weight",
        "<details>", "prefers-color-scheme: dark", "viewport",
    ):  # fmt: skip
        assert text in page
    assert "A <run>" not in page
    assert not re.search(r"(src|href)=['\"](?!#|data:)|url\((?!#)|@import", page), "nothing is loaded"
    assert "<script" not in page
    assert (path.parent / "history.png").read_bytes().startswith(b"\x89PNG")


def test_rows_go_from_start_to_end():
    assert summary_rows(history(), {"time": "3 s"}) == [
        ("parameters", "5,000", "2,500", "÷ 2.0"),
        ("MACs per sample", "90,000", "45,000", "÷ 2.0"),
        ("width stem", "64", "30", "÷ 2.1"),
        ("width hidden", "16", "20", "× 1.2"),
        ("time", "", "3 s", ""),
    ]


def test_table_prints_every_row():
    out = io.StringIO()
    console = Console(file=out, width=120)
    console.print(summary_table(history(), "Digits", {"test accuracy": "98.76 %"}))
    text = out.getvalue()
    for row in summary_rows(history(), {"test accuracy": "98.76 %"}):
        assert all(cell in text for cell in row)


def points(line):
    return line.get_xydata().tolist()


def legend_texts(panel):
    legend = panel.get_legend()
    assert legend is not None
    return [text.get_text() for text in legend.get_texts()]


def labelled(panel):
    return {line.get_label(): points(line) for line in panel.lines if not line.get_label().startswith("_")}


def test_picture_has_the_sizes_and_events_of_the_record():
    parameters, metric, widths = draw(history(), CURVE).axes
    assert parameters.get_yscale() == "log"
    assert points(parameters.lines[0]) == [[0, 5000], [100, 3000], [200, 2500], [300, 2500], [400, 2500]]
    assert {name: [step for step, _ in at] for name, at in labelled(parameters).items()} == {
        "pruned (events: 2)": [100, 200],
        "grown (events: 1)": [200],
        "skipped (events: 1)": [300],
    }
    assert points(metric.lines[0]) == [[150, 0.5], [250, 0.8], [400, 0.9]]
    texts = legend_texts(widths)
    assert {name: [size for _, size in points(line)] for name, line in zip(texts, widths.lines, strict=False)} == {
        "stem  64 → 30": [64, 40, 30, 30, 30],
        "hidden  16 → 20": [16, 16, 20, 20, 20],
    }
    low, high = widths.get_ylim()
    assert low < 16
    assert high > 64


@pytest.mark.parametrize("count", [13, 40])
def test_legend_of_many_widths_covers_no_panel(count):
    figure = draw(many(count), CURVE)
    figure.savefig(io.BytesIO(), format="png")
    boxes = [panel.get_window_extent() for panel in figure.axes]
    found = [panel.get_legend() for panel in figure.axes]
    legends = [legend.get_window_extent() for legend in found if legend is not None]
    assert len(legends) == 3
    assert not any(legend.overlaps(box) for legend in legends for box in boxes)
    assert all(figure.bbox.x1 >= legend.x1 and legend.y0 >= 0 for legend in legends)
    assert not any(a.overlaps(b) for a in legends for b in legends if a is not b)


def test_a_run_without_events_or_metrics_is_reported(tmp_path):
    still = History(event(0, (), {}, 70, 70, 700))
    assert "no width changed" in write_report(still, tmp_path, "still").read_text(encoding="utf-8")
    assert len(draw(still).axes) == 2


def test_a_missing_package_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ReportError, match=r"'\.\[report\]'") as caught:
        write_report(history(), tmp_path, "run")
    assert isinstance(caught.value, EvolveNetError)


@pytest.mark.parametrize(
    "names", [("_conv_stem", "_conv_head"), ("[/x]", "[bold]b"), ("$\\frac$", "a$b"), ("<b>&amp;", "'\"")]
)
def test_any_name_of_a_module_is_shown_as_it_is(names, tmp_path):
    sizes = dict.fromkeys(names, 24)
    change = WidthChange(names[0], 24, 12, f"{names[0]} has no energy")
    run = History(event(0, (), sizes, 900, 900, 90), [event(5, (change,), {**sizes, names[0]: 12}, 900, 500, 50)])
    figure = draw(run, {names[0]: [(1, 0.5)]})
    figure.savefig(io.BytesIO(), format="png")
    texts = [text for panel in figure.axes[1:] for text in legend_texts(panel)]
    assert texts == [f"{names[0]}  0.5 at the end", f"{names[0]}  24 → 12", f"{names[1]}  24 → 24"]
    out = io.StringIO()
    Console(file=out, width=120).print(summary_table(run, names[0], {names[1]: names[0]}))
    assert out.getvalue().count(names[0]) == 3
    page = write_report(run, tmp_path, names[0], {names[1]: [(1, 0.5)]}, {names[1]: names[0]}).read_text("utf-8")
    assert all(html.escape(name) in page for name in names)
    assert "<b>&amp;" not in page


def test_texts_from_outside_are_never_markup(tmp_path):
    """Headings, settings, names of curves and of stages, and the reason of a skipped event."""
    bad = "<i>'</i>"
    skipped = Event(5, (), {"stem": 8}, 900, 900, 90, 0.1, f"skip{bad}", stages={f"stage{bad}": 0.05})
    path = write_report(
        History(event(0, (), {"stem": 8}, 900, 900, 90), [skipped]),
        tmp_path,
        "run",
        {f"curve{bad}": [(1, 0.5)]},
        pictures={f"picture{bad}": draw(history())},
        settings={f"key{bad}": f"value{bad}"},
        made={"command": f"made{bad}"},
    )
    page = path.read_text(encoding="utf-8")
    for name in ("skip", "stage", "curve", "picture", "key", "value", "made"):
        assert html.escape(f"{name}{bad}") in page, name
    assert bad not in page


def test_the_threshold_is_drawn_into_each_spectrum_at_the_units_that_reach_it(tmp_path):
    measured = History(
        event(0, (), {"stem": 4}, 900, 900, 90),
        [
            Event(1, (), {"stem": 4}, 900, 900, 90, 0.1, spectra={"stem": [3.0, 0.8, 0.1, 0.01]}),
            Event(2, (), {"stem": 4}, 900, 900, 90, 0.1, spectra={"stem": [3.0, 0.8, 0.3, 0.25]}),
        ],
    )
    figure = draw_spectrum(measured, "stem", threshold=0.2)
    assert figure is not None
    [dotted] = [line for line in figure.axes[0].lines if line.get_linestyle() == ":"]
    assert points(dotted) == [[-0.5, 2], [0.5, 2], [0.5, 4], [1.5, 4]]
    pages = [
        write_report(measured, tmp_path / str(threshold), "run", threshold=threshold).read_text("utf-8")
        for threshold in (None, 0.2)
    ]
    assert ["at least 0.2 of the mean energy" in page for page in pages] == [False, True]
    assert [PINK in page for page in pages] == [False, True], "the line"

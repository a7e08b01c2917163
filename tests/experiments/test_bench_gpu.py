"""What an event costs on a card: a short run on the CPU, with a variant that fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from experiments.bench import gpu
from experiments.bench.gpu import HEAD, main
from experiments.bench.gpu_run import measure


def test_the_page_has_a_row_for_each_variant_and_the_error_of_one_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails_in_half(subject: Any, variant: Any, *rest: Any) -> dict[str, Any]:
        if variant.precision != "32-true":
            raise RuntimeError("no | kernel\nand more")
        return measure(subject, variant, *rest)

    monkeypatch.setattr(gpu, "measure", fails_in_half)
    given = ["--device", "cpu", "--quick", "--only", "vit_b_16", "--variants", "bf16-mixed", "float32"]
    main([*given, "--out", str(tmp_path), "--commit", "abc"])
    page, data = (tmp_path / "gpu.md").read_text("utf-8"), json.loads((tmp_path / "gpu.json").read_text("utf-8"))
    assert str(tmp_path / "gpu.md") in capsys.readouterr().out
    assert "RuntimeError: no \\| kernel |" in page
    assert ", at abc, " in page
    assert "fails_in_half" in (tmp_path / "gpu.log").read_text("utf-8"), "the traceback"
    failed, run = data["rows"]
    assert failed["error"].startswith("RuntimeError")
    assert [event["changes"] for event in run["events"]] == [0, run["widths"]]
    assert run["events"][1]["after"] < run["events"][1]["before"]
    once = ("trace", "event without a change", "event with a change")
    assert [len(run["seconds"][what]) for what in once] == [1, 1, 1]
    assert all(len(run["seconds"][what]) >= 4 for what in ("step", "step without the callback", "step while recording"))
    cells = gpu.row_of(run)
    assert len(cells) == len(HEAD)
    assert [name for name, cell in zip(HEAD, cells, strict=True) if not cell] == ["memory: step", "trace", "cut"]


def test_what_the_time_limit_leaves_out_is_named(tmp_path: Path) -> None:
    given = ["--device", "cpu", "--quick", "--only", "vit_b_16", "--variants", "float32", "--limit", "0"]
    main([*given, "--out", str(tmp_path)])
    assert "not run: the time limit is over" in (tmp_path / "gpu.md").read_text("utf-8")

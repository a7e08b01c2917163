"""The pages of `docs/` are run as printed; what they say needs no EvolveNet runs where it cannot be imported."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from tests.helpers.interpreters import run_script
from tests.helpers.paths import ROOT

ALONE = "# narrow.py: no evolvenet here\n"
WITHOUT = "import sys\nsys.modules['evolvenet'] = sys.modules['lightning'] = None\n"


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text("utf-8"), re.DOTALL)


def test_the_page_of_export_runs_as_printed_and_the_narrow_class_without_evolvenet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "export"}
    for block in blocks("export.md"):
        if not block.startswith(ALONE):
            exec(compile(block, "export.md", "exec"), names)
    printed = capsys.readouterr().out
    assert re.search(r"Net\(hidden=\d+, inner=\d+\)", printed)
    assert "expected head.weight of shape (7, 96), as in this model, got (2, " in printed
    (alone,) = (block for block in blocks("export.md") if block.startswith(ALONE))
    net = names["net"]
    expected = net(torch.ones(1, 2)).tolist()  # type: ignore[operator]
    assert json.loads(run_script(WITHOUT + alone)[-1]) == expected

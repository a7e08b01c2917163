"""Code blocks of Markdown pages, and what they print."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

BLOCK = re.compile(r"```python\n(.*?)```(?:(?:(?!```).){0,160}```text\n(.*?)```)?", re.DOTALL)


def blocks(page: Path) -> list[tuple[str, str]]:
    """(code, what the page says it prints, "" if it does not say) of each Python block."""
    return [(code, printed) for code, printed in BLOCK.findall(page.read_text("utf-8"))]


def run(code: str, names: dict[str, Any], capture: pytest.CaptureFixture[str]) -> str:
    """What code prints, run in a namespace."""
    capture.readouterr()
    exec(compile(code, "page", "exec"), names)
    return capture.readouterr().out


def shape(printed: str) -> list[str]:
    """Words of a print, numbers left out: processors round differently.

    >>> shape("parameters  67,074   1,995   ÷ 33.6")
    ['parameters', '0', '0', '÷', '0']
    """
    return re.sub(r"\d[\d,.]*", "0", printed).split()


def parameters_fell(names: Mapping[str, Any], name: str) -> bool:
    """Whether the run of a callback or evolver in a namespace ended with fewer parameters."""
    history = names[name].history
    return history.latest.parameters < history.initial.parameters

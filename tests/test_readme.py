"""What the README prints is run as printed, each block alone; the files and modules that it and all other pages name exist."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.helpers.pages import blocks, parameters_fell, run, shape
from tests.helpers.paths import ROOT

README = (ROOT / "README.md").read_text("utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "experiments").rglob("*.md"))]
LINK = re.compile(r"""(?:\]\(|srcset="|src=")([^)"#]+)""")


@pytest.mark.parametrize(("code", "printed"), blocks(ROOT / "README.md"))
def test_every_python_block_runs_by_itself_and_prints_what_the_readme_shows(
    code: str, printed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "readme"}
    assert shape(run(code, names, capsys)) == shape(printed)
    if "evolver" in names:
        assert parameters_fell(names, "evolver")


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_every_make_target_exists() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for page in (README, *(path.read_text("utf-8") for path in (ROOT / "docs").glob("*.md"))):
        named = re.findall(r"(?:^|`)make ([\w-]+)", page, re.MULTILINE)
        assert [target for target in named if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []
    assert {"train", "test"} <= set(re.findall(r"^make ([\w-]+)", README, re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_and_module_of_a_page_exists(page: Path) -> None:
    text = page.read_text("utf-8")
    links = [link for link in LINK.findall(text) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []
    modules = re.findall(r"python -m\s+((?:experiments|examples)[\w.]*)", text)
    assert [module for module in modules if find_spec(module) is None] == []


def test_every_experiment_that_a_page_names_exists() -> None:
    named = {name for page in PAGES for name in re.findall(r"\+experiment=(\w+)", page.read_text("utf-8"))}
    assert len(named) > 5
    assert [name for name in named if not (ROOT / "conf" / "experiment" / f"{name}.yaml").is_file()] == []

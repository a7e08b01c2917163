"""What the README prints is run as printed; the files and modules that it and the result pages name exist."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "experiments").rglob("*.md"))]


def test_every_python_block_runs_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "readme"}
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), names)
    for name in ("evolution", "halving", "evolver", "shrinking"):
        history = names[name].history  # type: ignore[attr-defined]
        assert history.events[-1].parameters < history.initial.parameters, name


def test_every_make_target_exists() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    named = re.findall(r"(?:^|`)make ([\w-]+)", README, re.MULTILINE)
    assert {"train", "test"} <= set(named)
    assert [target for target in named if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_and_module_of_a_page_exists(page: Path) -> None:
    text = page.read_text("utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []
    modules = re.findall(r"python -m\s+(experiments[\w.]+)", text)
    assert [module for module in modules if find_spec(module) is None] == []


def test_every_experiment_of_the_readme_exists() -> None:
    named = re.findall(r"\+experiment=(\w+)", README)
    assert len(named) > 5
    assert [name for name in named if not (ROOT / "conf" / "experiment" / f"{name}.yaml").is_file()] == []


def test_the_layout_names_every_package() -> None:
    table = README[README.index("| package | its job |") :].split("\n\n")[0]
    packages = {file.parent.name for file in (ROOT / "evolvenet").glob("*/__init__.py")}
    assert set(re.findall(r"`(\w+)/`", table)) == packages

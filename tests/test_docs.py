"""The pages of `docs/` are run as printed, their tables are complete, and the notebook runs."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import evolvenet
from evolvenet.policies.base import Policy
from tests.helpers.interpreters import run_script
from tests.helpers.pages import blocks, parameters_fell, run, shape
from tests.helpers.paths import ROOT

DOCS = ROOT / "docs"
ALONE = "# narrow.py: no evolvenet here\n"
WITHOUT = "import sys\nsys.modules['evolvenet'] = sys.modules['lightning'] = None\n"
POLICIES = [
    policy for policy in vars(evolvenet).values() if dataclasses.is_dataclass(policy) and hasattr(policy, "propose")
]
SHRINKS = {
    "start.md": "evolution",
    "writing-a-policy.md": "halving",
    "loops.md": "evolver",
    "transformers.md": "shrinking",
}
"""page → the callback or evolver of its script."""


@pytest.mark.parametrize(
    "page", [page.name for page in sorted(DOCS.glob("*.md")) if blocks(page) and page.name != "export.md"]
)
def test_the_blocks_of_a_page_run_as_printed_one_after_the_other(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "page"}
    for code, printed in blocks(DOCS / page):
        found = run(code, names, capsys)
        assert not printed or shape(found) == shape(printed)
        assert all(line in found for line in re.findall(r"^# (.+)$", code.rpartition("print(")[2], re.MULTILINE))
    if page in SHRINKS:
        assert parameters_fell(names, SHRINKS[page])


def test_the_page_of_export_runs_as_printed_and_the_narrow_class_without_evolvenet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "export"}
    codes = [code for code, _ in blocks(DOCS / "export.md")]
    for code in codes:
        if not code.startswith(ALONE):
            exec(compile(code, "export.md", "exec"), names)
    printed = capsys.readouterr().out
    assert re.search(r"Net\(hidden=\d+, inner=\d+\)", printed)
    assert "expected head.weight of shape (7, 96), as in this model, got (2, " in printed
    (alone,) = (code for code in codes if code.startswith(ALONE))
    net = names["net"]
    expected = net(torch.ones(1, 2)).tolist()  # type: ignore[operator]
    assert json.loads(run_script(WITHOUT + alone)[-1]) == expected


def rows(page: str, heading: str) -> dict[str, str]:
    """{parameter: default} of the table under a heading."""
    part = (DOCS / page).read_text("utf-8").split(f"{heading}\n")[1].split("\n#")[0]
    return dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", part, re.MULTILINE))


def fields(policy: type) -> dict[str, str]:
    """The same, of the arguments of a class."""
    arguments = inspect.signature(policy).parameters.values()
    return {each.name: "required" if each.default is each.empty else f"`{each.default!r}`" for each in arguments}


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.__name__)
def test_every_parameter_of_a_policy_is_in_the_table_with_its_default(policy: type[Policy]) -> None:
    assert rows("policies.md", f"### {policy.__name__}") == fields(policy)


def test_every_argument_of_the_callbacks_is_in_the_table_with_its_default() -> None:
    table = rows("lightning.md", "# Lightning")
    assert table == fields(evolvenet.WidthEvolution)
    assert fields(evolvenet.transformers.WidthEvolutionCallback).items() <= table.items()


def test_every_public_name_is_on_the_page_of_the_api() -> None:
    named = set(re.findall(r"^::: evolvenet\.(\w+)$", (DOCS / "api.md").read_text("utf-8"), re.MULTILINE))
    errors = {name for name in evolvenet.__all__ if name.endswith("Error")}  # all of `evolvenet.errors` is there
    assert set(evolvenet.__all__) - errors - {"Measure"} <= named  # `Measure` is an older name


def test_the_layout_names_every_package() -> None:
    table = (DOCS / "how-it-works.md").read_text("utf-8").split("| package | its job |")[1].split("\n\n")[0]
    packages = {file.parent.name for file in (ROOT / "evolvenet").glob("*/__init__.py")}
    assert set(re.findall(r"`(\w+)/`", table)) == packages


def test_every_page_is_in_the_navigation() -> None:
    named = re.findall(r"(\S+\.md)$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.MULTILINE)
    assert sorted(named) == sorted(["notebook.md", *(page.name for page in DOCS.glob("*.md"))])


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    # Not --quiet, with which no warning is counted.
    assert done.returncode == 0, done.stderr
    api = (tmp_path / "api.html").read_text("utf-8")
    assert [name for name in evolvenet.__all__ if f'id="evolvenet.{name}"' not in api and f".{name}" not in api] == []
    assert "<math" in (tmp_path / "how-it-works.html").read_text("utf-8")
    assert 'srcset="figures/two-starts-dark.svg"' in (tmp_path / "index.html").read_text("utf-8")


def test_the_notebook_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    # Without a kernel: it takes seconds to start, and the cells are plain Python.
    monkeypatch.setenv("MPLBACKEND", "agg")
    cells = json.loads((DOCS / "spectra.ipynb").read_text("utf-8"))["cells"]
    names: dict[str, object] = {"__name__": "notebook"}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), "spectra.ipynb", "exec"), names)
    assert "coverage 100.0%" in capsys.readouterr().out
    assert names["graph"].parameters <= 2_100  # type: ignore[attr-defined]

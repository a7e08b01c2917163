"""`experiments.states`: which commit a result page is of, and what its script depends on."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from experiments import states


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A repository with a page, its script, a module that it imports in a function, and one that it does not."""
    for name in ("GIT_AUTHOR_NAME", "GIT_COMMITTER_NAME", "GIT_AUTHOR_EMAIL", "GIT_COMMITTER_EMAIL"):
        monkeypatch.setenv(name, "someone")
    (tmp_path / "experiments").mkdir()
    (tmp_path / "evolvenet").mkdir()
    write(tmp_path, "evolvenet/__init__.py", "from evolvenet.cuts import prune\n")
    write(tmp_path, "evolvenet/cuts.py", "import evolvenet.other\ndef prune(): ...\n")
    write(tmp_path, "evolvenet/other.py", "")
    write(tmp_path, "evolvenet/apart.py", "")
    write(tmp_path, "experiments/work.py", "import evolvenet\ndef main():\n    return evolvenet.prune()\n")
    monkeypatch.setattr(states, "ROOT", tmp_path)
    states._public.cache_clear()
    git(tmp_path, "init", "-q")
    yield tmp_path
    states._public.cache_clear()


def write(root: Path, name: str, text: str) -> None:
    (root / name).write_text(text, "utf-8")


def git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()


def committed(root: Path) -> str:
    git(root, "add", "-A")
    git(root, "commit", "-qm", "why")
    return git(root, "rev-parse", "HEAD")[:7]


def test_a_page_is_of_the_oldest_commit_that_it_names_and_changes_count_in_what_its_script_imports(
    project: Path,
) -> None:
    first = committed(project)
    write(project, "evolvenet/other.py", "x = 1\n")
    second = committed(project)
    write(project, "experiments/work.md", f"Measured at {second} and {first}; 1234567 parameters, word deadbee.\n")
    write(project, "evolvenet/apart.py", "y = 1\n")
    found = states.state_of("experiments/work.md")
    assert set(found.states) == {first, second}
    assert found.named
    assert found.sources == 3  # the script, cuts and other: neither apart nor the list of public names
    assert found.changed == (("evolvenet/other.py", 1, 0),)


def test_without_a_commit_the_line_with_the_date_tells(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(project, "experiments/work.md", "Written on 2026-01-31 (2 cores).\n")
    first = committed(project)
    write(project, "experiments/work.md", "Written on 2026-01-31 (2 cores).\nAnother word.\n")
    committed(project)
    assert states.state_of("experiments/work.md").states == (first,)
    write(project, "experiments/work.md", "Nothing is told.\n")
    states.main([])
    assert "no state named" in capsys.readouterr().out


def test_every_page_of_the_project_has_a_script() -> None:
    assert states.pages()
    for page in states.pages():
        assert (states.ROOT / states.SCRIPTS.get(page, str(Path(page).with_suffix(".py")))).exists(), page

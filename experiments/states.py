"""Which result pages are of an older state, and what they depend on that has changed since: `python -m experiments.states`.

For every page the states that it names are read (commits that git knows; without any, the commit that wrote the line that says
when it was made), and the sources that its script imports, at any depth. Printed is what `git diff --numstat` says of these
between the oldest of the states and the working tree.
"""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
SCRIPTS = {
    "experiments/coverage/coverage.md": "experiments/coverage/__main__.py",
    "experiments/training/results.md": "train.py",
    "experiments/training/frequency.md": "train.py",
    "experiments/training/lowrank.md": "train.py",
}
"""{page: the script whose figures it holds}, where that is not the one beside it of the same name."""
MADE = re.compile(r"\bon 20\d\d-\d\d-\d\d\b")


@dataclass(frozen=True)
class PageState:
    """What a page was measured with, and what of that has changed.

    Attributes:
        page: its path.
        states: commits that it names, from the oldest to the newest.
        named: whether the page names them itself; else it is the commit that wrote the page's date.
        sources: files that its script depends on, how many.
        changed: those that differ from the oldest state, with the lines added and removed.
    """

    page: str
    states: tuple[str, ...]
    named: bool
    sources: int
    changed: tuple[tuple[str, int, int], ...]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, with `--files` also the changed files."""
    parser = argparse.ArgumentParser(prog="python -m experiments.states", description=__doc__)
    parser.add_argument("pages", nargs="*", help="pages of results; all by default")
    parser.add_argument("--files", action="store_true", help="name the changed files")
    options = parser.parse_args(arguments)
    table = Table("page", "measured at", "sources", "changed since", "lines", box=None)
    found = [state_of(page) for page in options.pages or pages()]
    for state in found:
        states = state.states[:1] + state.states[1:][-1:]
        if not states:
            table.add_row(state.page, "no state named", str(state.sources), "unknown", "")
            continue
        lines = f"+{sum(added for _, added, _ in state.changed)} −{sum(gone for _, _, gone in state.changed)}"
        cells = (str(state.sources), str(len(state.changed)), lines if state.changed else "")
        table.add_row(state.page, " … ".join(states) + ("" if state.named else " (by its date)"), *cells)
    console = Console()
    console.print(table)
    for state in found if options.files else ():
        for file, added, gone in state.changed:
            console.print(f"{state.page}: {file} +{added} −{gone}", highlight=False)


def pages() -> list[str]:
    """Every page below `experiments`."""
    return sorted(str(file.relative_to(ROOT)) for file in (ROOT / "experiments").rglob("*.md"))


def state_of(page: str) -> PageState:
    """What a page was measured with.

    Raises:
        FileNotFoundError: if there is no such page.
    """
    text = (ROOT / page).read_text("utf-8")
    # By the number of commits up to each: two may be of one second.
    states = sorted(_known(text), key=lambda commit: int(_git("rev-list", "--count", commit)))
    named = bool(states)
    if not named and (made := MADE.search(text)):
        states = _git("log", "--format=%h", f"-S{made[0]}", "--", page).split()[:1]
    script = SCRIPTS.get(page, str(Path(page).with_suffix(".py")))
    sources = sorted(str(file.relative_to(ROOT)) for file in depends_on(ROOT / script))
    changed = (
        [line.split("\t") for line in _git("diff", "--numstat", states[0], "--", *sources).splitlines()]
        if states
        else ()
    )
    counted = tuple((file, int(added), int(gone)) for added, gone, file in changed)
    return PageState(page, tuple(states), named, len(sources), counted)


def depends_on(script: Path) -> set[Path]:
    """The project's files that a script imports, at any depth, with itself; a public name is the module that defines it."""
    found, waiting = set[Path](), [script]
    while waiting:
        if (file := waiting.pop()) not in found and file.exists():
            found.add(file)
            waiting += [imported for name in _imports(file) if (imported := _file(name))]
    return found


@cache
def _imports(file: Path) -> tuple[str, ...]:
    return tuple(_imported(ast.parse(file.read_text("utf-8"))))


def _imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names of modules that a file imports; no package is followed through its `__init__`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name != "evolvenet")
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                yield f"{node.module}.{alias.name}"
                yield _public().get(alias.name, "") if node.module == "evolvenet" else node.module
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "evolvenet":
            yield _public().get(node.attr, f"evolvenet.{node.attr}")


def _file(name: str) -> Path | None:
    if name.partition(".")[0] not in ("evolvenet", "experiments"):
        return None
    path = ROOT.joinpath(*name.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.exists()), None)


@cache
def _public() -> dict[str, str]:
    """{public name of the package: module that defines it}."""
    found: dict[str, str] = {}
    for node in ast.walk(ast.parse((ROOT / "evolvenet/__init__.py").read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("evolvenet."):
            found |= {alias.asname or alias.name: node.module for alias in node.names}
    return found


def _known(text: str) -> set[str]:
    """Commits that a text names and git has."""
    named = set(re.findall(r"\b[0-9a-f]{7,12}\b", text))
    # A word such as a number of parameters may be an abbreviation of an object that is no commit, or of several.
    asked = "".join(f"{name}^{{commit}}\n" for name in sorted(named))
    answers = [line.split() for line in _git("cat-file", "--batch-check", given=asked).splitlines()]
    return {answer[0][:7] for answer in answers if answer[1:2] == ["commit"]}


def _git(*arguments: str, given: str | None = None) -> str:
    done = subprocess.run(["git", *arguments], input=given, capture_output=True, text=True, check=True, cwd=ROOT)
    return done.stdout


if __name__ == "__main__":
    main()

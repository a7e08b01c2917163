"""The wheel, installed without extras, needs nothing but what it declares; its metadata agrees with the package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from importlib.metadata import Distribution, PathDistribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import evolvenet
from tests.helpers.pages import blocks, shape
from tests.helpers.paths import ROOT

END = "── end of a block"
IMPORT_ALL = """
import importlib, pkgutil, evolvenet
for module in pkgutil.walk_packages(evolvenet.__path__, "evolvenet."):
    if not module.name.startswith(("evolvenet.transformers", "evolvenet.report")):
        importlib.import_module(module.name)
"""


def run(*command: object) -> str:
    """Output of a command that must succeed."""
    # One thread: beside other tests, two of them wait for each other.
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(part) for part in command], env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def closure(
    dist: Distribution, extras: frozenset[str] = frozenset(), seen: set[object] | None = None
) -> Iterator[Distribution]:
    """The installed distributions that one requires, directly or not."""
    seen = set() if seen is None else seen
    for requirement in map(Requirement, dist.requires or ()):
        needed = requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in {"", *extras})
        key = requirement.name.lower(), frozenset(requirement.extras)
        if needed and key not in seen:
            seen.add(key)
            found = distribution(requirement.name)
            yield found
            yield from closure(found, key[1], seen)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an empty environment that holds the wheel and links to what the wheel requires, no more."""
    folder = tmp_path_factory.mktemp("packaging")
    source = folder / "source"
    shutil.copytree(ROOT / "evolvenet", source / "evolvenet", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source)
    venv.create(folder / "env")
    (site,) = (folder / "env" / "lib").glob("python*/site-packages")
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", site, *folder.glob("*.whl"))
    (info,) = site.glob("evolvenet-*.dist-info")
    for dist in closure(PathDistribution(info)):
        for top in {file.parts[0] for file in dist.files or ()} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(dist.locate_file(top))).resolve())
    return folder / "env" / "bin" / "python"


def test_the_readme_runs_and_every_module_but_the_optional_edges_imports_with_the_core_dependencies_alone(
    environment: Path, tmp_path: Path
) -> None:
    """In one process, since importing torch and Lightning takes seconds."""
    pages = blocks(ROOT / "README.md")
    lines = [f"exec({code!r}, {{'__name__': 'block'}})\nprint({END!r})" for code, _ in pages]
    (tmp_path / "blocks.py").write_text("\n".join([*lines, IMPORT_ALL]))
    found = run(environment, "-I", tmp_path / "blocks.py").split(f"{END}\n")
    assert [shape(each) for each in found[:-1]] == [shape(printed) for _, printed in pages]


def test_an_undeclared_package_is_not_there(environment: Path) -> None:
    names = ("torchvision", "hydra", "pytest", "matplotlib")
    script = f"from importlib.util import find_spec\nprint([find_spec(n) for n in {names}])"
    assert run(environment, "-I", "-c", script) == "[None, None, None, None]\n"


def test_the_wheel_carries_the_version_its_types_and_only_the_core_dependencies(environment: Path) -> None:
    (info,) = environment.parent.parent.glob("lib/python*/site-packages/evolvenet-*.dist-info")
    built = PathDistribution(info)
    core = {r.name for r in map(Requirement, built.requires or ()) if r.marker is None}
    assert core == {"torch", "numpy", "scipy", "tensorly", "lightning", "rich", "tqdm", "typer"}
    assert built.version == evolvenet.__version__
    assert "evolvenet/py.typed" in {str(file) for file in built.files or ()}
    assert f"version: {evolvenet.__version__}\n" in (ROOT / "CITATION.cff").read_text("utf-8")

"""Packages import downward only, nobody imports a private name, and each trainer library is met at one edge alone."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import evolvenet
from tests.helpers.paths import ROOT

FLOORS: Sequence[set[str]] = (
    {"errors", "signals", "_compat"},
    {"linalg"},
    {"graph"},
    {"surgery"},
    {"execution"},
    {"tracing"},
    {"measurement"},
    {"pruning"},
    {"growth"},
    {"lowrank"},
    {"policies"},
    {"engine"},
    {"lightning", "transformers", "report"},
    {"cli"},
    {"__main__"},
)
"""From the ground up: a package imports itself and what is above it in this list, nothing else of the project."""
LIBRARIES = {
    **dict.fromkeys(("lightning", "pytorch_lightning", "lightning_fabric", "torchmetrics"), "lightning"),
    **dict.fromkeys(("transformers", "accelerate"), "transformers"),
    **dict.fromkeys(("matplotlib",), "report"),
    **dict.fromkeys(("typer",), "cli"),
}
"""Libraries that one edge alone may import at run time, with that edge."""
THREADS = {"set_num_threads", "set_num_interop_threads"}
PACKAGE = Path(evolvenet.__file__).parent


def sources(root: Path) -> dict[str, str]:
    """{dotted name: source} of every module below a package's folder but its own `__init__`."""
    found = {file.relative_to(root).with_suffix("").parts: file.read_text("utf-8") for file in root.rglob("*.py")}
    return {".".join(parts): source for parts, source in found.items() if parts != ("__init__",)}


def imported(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(module, name) of everything a module imports anywhere in it; the name is "" where a module is imported whole."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (("." * node.level + (node.module or ""), alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and called(node) in {"import_module", "__import__"} and node.args:
            name = node.args[0]
            yield (name.value if isinstance(name, ast.Constant) and isinstance(name.value, str) else "?"), ""


def only_for_types(tree: ast.AST) -> ast.AST:
    """The tree without what stands under `if TYPE_CHECKING`."""

    class Without(ast.NodeTransformer):
        def visit_If(self, node: ast.If) -> ast.AST | None:
            return None if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING" else node

    return Without().visit(tree)


def called(node: ast.Call) -> str:
    """Last part of the name of what is called."""
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def complaints(modules: Mapping[str, str], floors: Sequence[set[str]] = FLOORS) -> list[str]:
    """Everything that is wrong with the imports of a package, one line each."""
    floor = {package: number for number, packages in enumerate(floors) for package in packages}
    there = {name.partition(".")[0] for name in modules}
    found = [f"{package}: on no floor" for package in sorted(there - set(floor))]
    found += [f"{package}: on a floor, but there is no such package" for package in sorted(set(floor) - there)]
    graph: dict[str, set[str]] = {package: set() for package in there}
    for module, source in modules.items():
        own = module.partition(".")[0]
        tree = ast.parse(source)
        for target, name in imported(tree):
            root, _, inside = target.partition(".")
            if target.startswith("."):
                found.append(f"{module}: imports {target!r}, relative to itself")
            elif root == "evolvenet" and inside.partition(".")[0] not in floor:
                found.append(f"{module}: imports the whole package, not a module of it ({name or target!r})")
            elif root == "evolvenet" and (other := inside.partition(".")[0]) != own:
                graph[own].add(other)
                if floor[other] >= floor.get(own, 0):
                    found.append(f"{module}: imports {inside} from above")
                if name.startswith("_") or any(part.startswith("_") for part in inside.split(".")[1:]):
                    found.append(f"{module}: imports the private name {name or inside} of {other}")
        # The private names of a library come with the library.
        targets = {target.removeprefix("evolvenet._compat.") for target, _ in imported(only_for_types(tree))}
        outside = {target.partition(".")[0] for target in targets} & set(LIBRARIES)
        edge = module.removeprefix("_compat.").partition(".")[0]
        found += [f"{module}: imports {library}" for library in sorted(outside) if LIBRARIES[library] != edge]
        calls = {called(node) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        found += [f"{module}: calls {call}" for call in sorted(calls & THREADS)]
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append("circle: " + " ← ".join(sorted(set(error.args[1]))))
    return found


def test_packages_import_downward_only() -> None:
    assert complaints(sources(PACKAGE)) == []


def test_every_package_says_what_it_is_for_and_what_it_may_import() -> None:
    for package in sorted(set().union(*FLOORS) - {"errors", "signals", "__main__"}):
        said = ast.get_docstring(ast.parse((PACKAGE / package / "__init__.py").read_text("utf-8"))) or ""
        assert "import" in said, package
        assert len(said.splitlines()) == 1, package


def test_the_initial_imports_do_not_reach_the_edges() -> None:
    tree = only_for_types(ast.parse((PACKAGE / "__init__.py").read_text("utf-8")))
    top = ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])  # type: ignore[attr-defined]
    assert not {f"evolvenet.{edge}" for edge in FLOORS[-1]} & {
        ".".join(target.split(".")[:2]) for target, _ in imported(top)
    }


def test_no_test_file_imports_another_one() -> None:
    found = [
        f"{name} imports {target}"
        for name, source in sources(ROOT / "tests").items()
        for target, _ in imported(ast.parse(source))
        if target.startswith("tests.") and not target.startswith("tests.helpers")
    ]
    assert found == []


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("from evolvenet.edge.callback import Callback", "low: imports edge.callback from above"),
        ("import evolvenet.edge.callback as edge", "low: imports edge.callback from above"),
        ("from evolvenet.edge import callback", "low: imports edge from above"),
        ("from . import edge", "low: imports '.', relative to itself"),
        ("def late():\n    from evolvenet.edge import Callback", "low: imports edge from above"),
        ("if False:\n    import evolvenet.edge", "low: imports edge from above"),
        ("import importlib\nimportlib.import_module('evolvenet.edge')", "low: imports edge from above"),
        ("from evolvenet import IndexMap", "low: imports the whole package, not a module of it ('IndexMap')"),
        ("import evolvenet", "low: imports the whole package, not a module of it ('evolvenet')"),
        ("from evolvenet.ground import _hidden", "low: imports the private name _hidden of ground"),
        ("from evolvenet.ground._hidden import x", "low: imports the private name x of ground"),
        ("import lightning.pytorch as pl", "low: imports lightning"),
        ("def late():\n    from pytorch_lightning import Callback", "low: imports pytorch_lightning"),
        ("import transformers", "low: imports transformers"),
        ("from accelerate.optimizer import AcceleratedOptimizer", "low: imports accelerate"),
        ("import torch\ntorch.set_num_threads(1)", "low: calls set_num_threads"),
        ("from evolvenet._compat.lightning import wrap", "low: imports lightning"),
    ],
)
def test_what_is_forbidden_is_found(source: str, complaint: str) -> None:
    modules = {"ground": "", "_compat.lightning": "import lightning", "low": source, "edge.callback": "import torch"}
    assert complaints(modules, ({"ground", "_compat"}, {"low"}, {"edge"})) == [complaint]


def test_a_circle_is_found() -> None:
    found = complaints({"a.x": "import evolvenet.b.x", "b.x": "import evolvenet.a.x"}, ({"a"}, {"b"}))
    assert found == ["a.x: imports b.x from above", "circle: a ← b"]


def test_packages_and_table_must_agree() -> None:
    assert complaints({"new.x": ""}, ({"old"},)) == [
        "new: on no floor",
        "old: on a floor, but there is no such package",
    ]


def test_what_is_allowed_is_left_alone() -> None:
    modules = {
        "low.x": "import torch\nimport math\nfrom evolvenet.low._own import _detail",
        "low._own": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import rich",
        "_compat.lightning": "import lightning",
        "lightning.callback": "import lightning\nfrom evolvenet.low.x import y\nfrom evolvenet._compat.lightning import z",
    }
    assert complaints(modules, ({"low", "_compat"}, {"lightning"})) == []

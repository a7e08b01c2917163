"""Imports run downward only, through the layers of the design, and each trainer library is met at one edge alone."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import evolvenet

LAYERS: dict[int, set[str]] = {
    # tensors only
    0: {"_torchvision", "errors", "index_map", "ranks", "ridge", "spectrum"},
    # modules, no training
    1: {
        "components",
        "cost",
        "graph",
        "inputs",
        "labels",
        "layers",
        "operations",
        "prove",
        "reads",
        "remedies",
        "rules",
        "sums",
        "sandbox",
        "surgery",
        "trace",
        "untouched",
        "axis_rules",
        "weight_rules",
    },
    # decisions, no trainer
    2: {
        "allocation",
        "blocks",
        "bottleneck",
        "budget",
        "compensate",
        "evidence",
        "failures",
        "follow",
        "front",
        "gradients",
        "grow",
        "measure",
        "newborns",
        "observed",
        "nursery",
        "outputs",
        "policy",
        "price",
        "processes",
        "prune",
        "statistics",
        "tolerance",
    },
    # state
    3: {"blueprint", "evolver", "listen", "optim", "record", "resize", "rollback", "schedule", "twins", "validate"},
    # edges
    4: {"callback", "huggingface", "lightning_loading", "lightning_module", "lightning_parts", "report"},
}
EDGE_ONLY = {
    **{
        key: {"callback", "lightning_loading", "lightning_module", "lightning_parts"}
        for key in ("lightning", "pytorch_lightning", "lightning_fabric", "torchmetrics")
    },
    **{key: {"huggingface"} for key in ("transformers", "accelerate")},
}
"""Trainer libraries, each with the modules that meet it."""
THREADS = {"set_num_threads", "set_num_interop_threads"}
PACKAGE = Path(evolvenet.__file__).parent


def package_sources() -> dict[str, str]:
    """Source of each module of the package but `__init__`, which gathers the public names from all layers."""
    files = {file.relative_to(PACKAGE).with_suffix(""): file for file in PACKAGE.rglob("*.py")}
    return {".".join(name.parts): file.read_text("utf-8") for name, file in files.items() if str(name) != "__init__"}


def imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names that a module imports anywhere in it: at the top, in a function, by name at run time."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(part for part in ("evolvenet" if node.level else "", node.module or "") if part)
            # Of the package itself, a name may be a module.
            yield from (f"evolvenet.{alias.name}" for alias in node.names) if base == "evolvenet" else (base,)
        elif isinstance(node, ast.Call) and called(node) in {"import_module", "__import__"} and node.args:
            name = node.args[0]
            yield name.value if isinstance(name, ast.Constant) and isinstance(name.value, str) else "?"


def called(node: ast.Call) -> str:
    """Last part of the name of what is called."""
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def complaints(sources: Mapping[str, str], layers: Mapping[int, set[str]]) -> list[str]:
    """Everything that is wrong with the imports of a package, one line each."""
    layer = {name: level for level, names in layers.items() for name in names}
    found = [f"{name}: in no layer" for name in sources if name not in layer]
    found += [f"{name}: in the table, but there is no such file" for name in layer if name not in sources]
    graph: dict[str, set[str]] = {}
    for name, source in sources.items():
        tree = ast.parse(source)
        targets = set(imported(tree))
        inside = {target.partition(".")[2] for target in targets if target.split(".")[0] == "evolvenet"}
        graph[name] = inside & set(layer)
        found += [f"{name}: imports the package, not a module of it ({target!r})" for target in inside - set(layer)]
        found += [f"{name}: imports {low} from above" for low in graph[name] if layer[low] > layer.get(name, 0)]
        outside = {target.split(".")[0] for target in targets} & set(EDGE_ONLY)
        found += [f"{name}: imports {target}" for target in outside if name not in EDGE_ONLY[target]]
        calls = {called(node) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        found += [f"{name}: calls {call}" for call in calls & THREADS]
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append("cycle: " + " ← ".join(error.args[1]))
    return found


def test_the_package_keeps_to_its_layers() -> None:
    assert complaints(package_sources(), LAYERS) == []


def test_the_initial_imports_do_not_reach_the_edge() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text("utf-8"))
    top = ast.Module([node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))], [])
    assert not {f"evolvenet.{name}" for name in LAYERS[4]} & set(imported(top))
    assert not EDGE_ONLY.keys() & set(imported(tree)), "the edges are named as strings or under TYPE_CHECKING"


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("from evolvenet.callback import WidthEvolution", "low: imports callback from above"),
        ("import evolvenet.callback as edge", "low: imports callback from above"),
        ("from evolvenet import callback", "low: imports callback from above"),
        ("from . import callback", "low: imports callback from above"),
        ("from .callback import WidthEvolution", "low: imports callback from above"),
        ("def late():\n    from evolvenet.callback import WidthEvolution", "low: imports callback from above"),
        ("if False:\n    import evolvenet.callback", "low: imports callback from above"),
        ("import importlib\nimportlib.import_module('evolvenet.callback')", "low: imports callback from above"),
        ("from evolvenet import IndexMap", "low: imports the package, not a module of it ('IndexMap')"),
        ("import evolvenet", "low: imports the package, not a module of it ('')"),
        ("import lightning.pytorch as pl", "low: imports lightning"),
        ("def late():\n    from pytorch_lightning import Callback", "low: imports pytorch_lightning"),
        ("import transformers", "low: imports transformers"),
        ("from accelerate.optimizer import AcceleratedOptimizer", "low: imports accelerate"),
        ("import torch\ntorch.set_num_threads(1)", "low: calls set_num_threads"),
        ("from evolvenet.other import x", "cycle: low ← other ← low"),
    ],
)
def test_what_is_forbidden_is_found(source: str, complaint: str) -> None:
    sources = {"low": source, "other": "import evolvenet.low", "callback": "import lightning"}
    found = complaints(sources, {0: {"low", "other"}, 4: {"callback"}})
    assert [line.replace("other ← low ← other", "low ← other ← low") for line in found] == [complaint]


def test_modules_and_table_must_agree() -> None:
    assert complaints({"new": ""}, {0: {"old"}}) == ["new: in no layer", "old: in the table, but there is no such file"]


def test_what_is_allowed_is_left_alone() -> None:
    sources = {"low": "import torch\nimport math", "callback": "import lightning\nfrom evolvenet.low import x"}
    sources["huggingface"] = "import transformers"
    assert complaints(sources, {0: {"low"}, 4: {"callback", "huggingface"}}) == []


def test_an_edge_meets_its_own_library_only() -> None:
    sources = {"callback": "import transformers", "huggingface": "import lightning"}
    found = complaints(sources, {4: {"callback", "huggingface"}})
    assert found == ["callback: imports transformers", "huggingface: imports lightning"]

"""The house rules that no linter checks: short files, and a reason in every long function."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

FILE, FUNCTION = 400, 40
"""The most lines of a file and of a function, whose docstring is not counted."""
REASON = "# Over 40 lines: "


def complaints(name: str, source: str) -> list[str]:
    """What is too long in a file, one line each."""
    lines = source.splitlines()
    found = [f"{name}: {len(lines)} lines, expected {FILE} at most"] if len(lines) > FILE else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            own = lines[node.lineno - 1 : node.end_lineno]
            length = len(own) - _docstring_lines(node)
            if length > FUNCTION and not any(_gives_reason(line) for line in own):
                found.append(
                    f"{name}: {node.name} has {length} lines, expected {FUNCTION} at most or {REASON!r}<reason>"
                )
    return found


def _docstring_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    first = node.body[0]
    return 0 if ast.get_docstring(node) is None else (first.end_lineno or first.lineno) - first.lineno + 1


def _gives_reason(line: str) -> bool:
    return line.strip().startswith(REASON) and len(line.strip()) > len(REASON)


def files() -> Iterator[Path]:
    for folder in ("evolvenet", "experiments", "tests"):
        yield from sorted((ROOT / folder).rglob("*.py"))


def test_files_and_functions_are_short_or_give_a_reason() -> None:
    found = [line for file in files() for line in complaints(str(file.relative_to(ROOT)), file.read_text("utf-8"))]
    assert found == []


TOO_LONG = "x.py: long has 41 lines, expected 40 at most or '# Over 40 lines: '<reason>"
LONG = "def long():\n" + "    pass\n" * 40


@pytest.mark.parametrize(
    ("source", "found"),
    [
        (LONG, [TOO_LONG]),
        (LONG.removesuffix("    pass\n"), []),
        (LONG.replace("def", "async def"), [TOO_LONG]),
        (LONG.replace("    pass\n", '    """One.\n\n    Two.\n    """\n', 1), []),
        (LONG.replace("    pass\n", "    # Over 40 lines: a table.\n", 1), []),
        (LONG.replace("    pass\n", "    # Over 40 lines: \n", 1), [TOO_LONG]),
        ("x = 1\n" * 401, ["x.py: 401 lines, expected 400 at most"]),
        ("x = 1\n" * 400, []),
    ],
    ids=["long", "40", "async", "docstring", "reason", "empty reason", "file", "400"],
)  # fmt: skip
def test_what_is_too_long_is_found(source: str, found: list[str]) -> None:
    assert complaints("x.py", source) == found


FACTORIES = {
    "arange", "as_tensor", "empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randint", "randn", "randperm",
    "tensor", "zeros",
}  # fmt: skip


def without_device(source: str) -> list[int]:
    """The lines on which a tensor is made on the device that is the default one where the caller is."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [
        call.lineno
        for call in calls
        if isinstance(call.func, ast.Attribute)
        and isinstance(call.func.value, ast.Name)
        and (call.func.value.id, call.func.attr in FACTORIES) == ("torch", True)
        and not any(keyword.arg == "device" for keyword in call.keywords)
    ]


def test_every_tensor_is_made_on_a_device_that_the_code_names() -> None:
    # Tracing runs without a default device, see `plain_surroundings`.
    found = [
        f"{file.relative_to(ROOT)}:{line}"
        for file in files()
        if file.is_relative_to(ROOT / "evolvenet") and not file.is_relative_to(ROOT / "evolvenet" / "tracing")
        for line in without_device(file.read_text("utf-8"))
    ]
    assert found == []
    assert without_device("torch.zeros(2)\ntorch.zeros(2, device=place)") == [1]

"""Objects by name: `package.module:factory` or `folder/file.py:factory`, as other tools write entry points."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from evolvenet.cli.errors import CommandError

KINDS = "expected package.module:name or folder/file.py:name"


def find(name: str) -> Any:
    """The object that a name says.

    Args:
        name: `package.module:name` or `folder/file.py:name`; the name may have dots. The present folder is searched too.

    Raises:
        CommandError: if there is no such module or name, or the module cannot be imported.

    >>> find("torch.nn:Linear.forward").__name__
    'forward'
    """
    where, _, path = name.partition(":")
    if not where or not path:
        raise CommandError(f"{name}: {KINDS}, got no colon between the two. An example: torchvision.models:resnet18.")
    found = _module(where, name)
    for part in path.split("."):
        if not hasattr(found, part):
            names = ", ".join(each for each in vars(found) if not each.startswith("_"))[:200]
            raise CommandError(f"{name}: expected {part!r} in {where}, got a module with {names or 'nothing'}.")
        found = getattr(found, part)
    return found


def _module(where: str, name: str) -> Any:
    # As `python -m` does: a user's own module lies in the present folder.
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        return _from_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name in (where, where.partition(".")[0]):
            raise CommandError(
                f"{name}: {KINDS}, got no module {where!r} in this environment or folder. Install it, change to its folder, "
                "or give the path of the file."
            ) from error
        raise CommandError(
            f"{name}: expected that {where} can be imported, got {type(error).__name__}: {error}."
        ) from error


def _from_file(path: Path) -> Any:
    if not path.is_file():
        raise CommandError(f"{path}: expected a file, got none there.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Classes of the file are looked up by the name of its module: by dataclasses, and by pickle.
    sys.modules[path.stem] = module
    sys.path.insert(0, str(path.parent))
    spec.loader.exec_module(module)
    return module


def build(name: str, arguments: Sequence[str] = ()) -> nn.Module:
    """The network that a factory makes.

    Args:
        name: of a class, a function that returns a network, or a network.
        arguments: `value` or `name=value` each, values as in YAML: `10`, `0.5`, `true`, `[1, 2]`, `resnet18`.

    Raises:
        CommandError: if it makes no network.

    >>> build("torch.nn:Linear", ["4", "out_features=2"])
    Linear(in_features=4, out_features=2, bias=True)
    """
    factory = find(name)
    if isinstance(factory, nn.Module):
        return factory
    if not callable(factory):
        raise CommandError(
            f"{name}: expected a class, a function or a network, got a {type(factory).__name__} that cannot be called."
        )
    placed, named = parsed(arguments)
    try:
        made = factory(*placed, **named)
    except Exception as error:
        given = ", ".join(arguments) or "no arguments"
        raise CommandError(
            f"{name}: expected a call with {given} to make a network, got {type(error).__name__}: {error}. Give its "
            "arguments by --arg value or --arg name=value."
        ) from error
    if not isinstance(made, nn.Module):
        raise CommandError(f"{name}: expected a torch.nn.Module, got a {type(made).__name__}.")
    return made


def parsed(arguments: Sequence[str]) -> tuple[list[Any], dict[str, Any]]:
    """Arguments of a call: those by place, and those by name.

    >>> parsed(["resnet18", "num_classes=10"])
    (['resnet18'], {'num_classes': 10})
    """
    placed: list[Any] = []
    named: dict[str, Any] = {}
    for each in arguments:
        name, equals, value = each.partition("=")
        if equals and name.isidentifier():
            named[name] = _value(value)
        else:
            placed.append(_value(each))
    return placed, named


def _value(text: str) -> Any:
    import yaml  # comes with Lightning

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text

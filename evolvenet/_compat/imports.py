"""Code that runs when another package's module is imported, without importing it now.

A finder in front of `sys.meta_path` waits for the first import of one module, lets the ordinary finders look for it, and
only replaces `exec_module` of the loader that they return for this one module. The loader keeps its type and all its other
methods, and the finder leaves once the module is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from types import ModuleType


class ImportWatcher(MetaPathFinder):
    """Passes every import on; the first one of `module` is executed by `execute`.

    Args:
        module: full name of the module.
    """

    def __init__(self, module: str) -> None:
        self.module = module

    def execute(self, loader: SourceFileLoader, module: ModuleType) -> None:
        """Run the module as its own loader does."""
        loader.exec_module(module)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The ordinary spec, for the one module with a loader that calls `execute`."""
        if fullname != self.module:
            return None
        spec = self._ordinary(path, target)
        # Only this loader is known to be made anew for each module, so that patching it changes no other import.
        if spec is None or not isinstance(spec.loader, SourceFileLoader):
            return None
        vars(spec.loader)["exec_module"] = partial(self._execute, spec.loader)
        return spec

    def _ordinary(self, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
        """What the import system would have found without this finder."""
        others = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        found = (finder.find_spec(self.module, path, target) for finder in others)
        return next((spec for spec in found if spec is not None), None)

    def _execute(self, loader: SourceFileLoader, module: ModuleType) -> None:
        vars(loader).pop("exec_module", None)
        self.execute(loader, module)
        if self in sys.meta_path:
            sys.meta_path.remove(self)


class _Then(ImportWatcher):
    """Calls a function with the module once it is imported."""

    def __init__(self, module: str, then: Callable[[ModuleType], None]) -> None:
        super().__init__(module)
        self.then = then

    def execute(self, loader: SourceFileLoader, module: ModuleType) -> None:
        super().execute(loader, module)
        self.then(module)


def when_imported(name: str, then: Callable[[ModuleType], None]) -> None:
    """Call a function with a module: now if it is imported already, else as soon as it is.

    Args:
        name: full name of the module; nothing happens if it is never imported.
        then: what is called with it.

    >>> when_imported("json", lambda module: print(module.__name__))
    json
    """
    if name in sys.modules:
        then(sys.modules[name])
    else:
        sys.meta_path.insert(0, _Then(name, then))

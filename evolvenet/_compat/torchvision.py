"""Lets torchvision, and Lightning with it, be imported where its compiled operators cannot be loaded.

PyPI's torchvision is built against a CUDA torch. Beside a CPU-only torch its extension does not load, the operator
`nms` is never declared, and `import torchvision` ends in `RuntimeError: operator torchvision::nms does not exist`.
Torchmetrics imports torchvision and Lightning imports torchmetrics, so `import lightning` ends the same way. Declaring
the two missing operators is enough for everything but detection, whose functions then refuse with torchvision's own
text ("Couldn't load custom C++ ops").

Importing torchvision costs about a second, so nothing is tried when EvolveNet is imported, only when torchvision is
(`evolvenet._compat.imports`). The error itself is what is reacted to, so no knowledge of where an extension lies or when
it loads is needed, and a matching torchvision runs its own code alone.
"""

from __future__ import annotations

import logging
import sys
from importlib.machinery import SourceFileLoader
from types import ModuleType

import torch

from evolvenet._compat.imports import ImportWatcher

_PACKAGE = "torchvision"
_SYMPTOM = "operator torchvision::nms does not exist"
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
# A Library takes its declarations with it when it is collected.
_libraries: list[torch.library.Library] = []
_log = logging.getLogger("evolvenet")


class _Waiting(ImportWatcher):
    """Mends the missing operators in the first import of torchvision."""

    def __init__(self) -> None:
        super().__init__(_PACKAGE)

    def execute(self, loader: SourceFileLoader, module: ModuleType) -> None:
        """Run the package as its own loader does, a second time if the operators were what was missing."""
        fresh = dict(vars(module))
        try:
            loader.exec_module(module)
        except RuntimeError as error:
            if not str(error).startswith(_SYMPTOM):
                raise
            _forget(module, fresh)
            _declare()
            loader.exec_module(module)


def _forget(module: ModuleType, fresh: dict[str, object]) -> None:
    """Undo a half-done import: drop the submodules, give the package the names it started with."""
    for name in [name for name in sys.modules if name.startswith(f"{_PACKAGE}.")]:
        del sys.modules[name]
    vars(module).clear()
    vars(module).update(fresh)


def _declare() -> None:
    """Declare the operators that torchvision's Python code registers shapes for; calling them stays impossible."""
    library = torch.library.Library(_PACKAGE, "FRAGMENT")
    for schema in _SCHEMAS:
        library.define(schema)
    _libraries.append(library)
    _log.debug("torchvision's compiled operators do not load beside this torch: declared nms and qnms without code.")


def mend_torchvision() -> None:
    """Make a later `import torchvision` work where only its compiled operators are missing.

    Does nothing where torchvision is imported already; calling it twice is the same as calling it once.

    >>> mend_torchvision()
    >>> import torchvision
    """
    if _PACKAGE in sys.modules or any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Waiting())

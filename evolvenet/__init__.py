"""How wide should each layer be? EvolveNet prunes and grows a network's widths while it trains."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from evolvenet._torchvision import mend_torchvision

mend_torchvision()

from evolvenet.allocation import allocate  # noqa: E402  torchvision must be mended before anything imports it
from evolvenet.blocks import block_spectra  # noqa: E402
from evolvenet.budget import Budget  # noqa: E402
from evolvenet.errors import (  # noqa: E402
    EvolveNetError,
    IndexMapError,
    MissingPackageError,
    OptimizerStateError,
    PolicyError,
    RecordError,
    ResizeError,
    SpectrumError,
    TraceError,
    UnsupportedStrategyError,
)
from evolvenet.evolver import Evolver  # noqa: E402
from evolvenet.front import Front  # noqa: E402
from evolvenet.graph import Tie, Width, WidthGraph  # noqa: E402
from evolvenet.index_map import IndexMap  # noqa: E402
from evolvenet.measure import spectra  # noqa: E402
from evolvenet.outputs import output_spectra  # noqa: E402
from evolvenet.policy import Measure, Policy, Proposal, Threshold  # noqa: E402
from evolvenet.price import Price  # noqa: E402
from evolvenet.record import Event, History, WidthChange, load  # noqa: E402
from evolvenet.resize import grow, prune, resize  # noqa: E402
from evolvenet.tolerance import Tolerance  # noqa: E402
from evolvenet.trace import trace  # noqa: E402

if TYPE_CHECKING:
    from evolvenet import huggingface as huggingface
    from evolvenet.callback import WidthEvolution

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "Event",
    "EvolveNetError",
    "Evolver",
    "Front",
    "History",
    "IndexMap",
    "IndexMapError",
    "Measure",
    "MissingPackageError",
    "OptimizerStateError",
    "Policy",
    "PolicyError",
    "Price",
    "Proposal",
    "RecordError",
    "ResizeError",
    "SpectrumError",
    "Threshold",
    "Tie",
    "Tolerance",
    "TraceError",
    "UnsupportedStrategyError",
    "Width",
    "WidthChange",
    "WidthEvolution",
    "WidthGraph",
    "allocate",
    "block_spectra",
    "grow",
    "load",
    "output_spectra",
    "prune",
    "resize",
    "spectra",
    "trace",
]


def __getattr__(name: str) -> Any:
    """Lightning and transformers take seconds to import and may be missing: only when they are asked for."""
    if name == "WidthEvolution":
        return import_module("evolvenet.callback").WidthEvolution
    if name == "huggingface":
        return import_module("evolvenet.huggingface")
    raise AttributeError(f"module 'evolvenet' has no attribute {name!r}")


def __dir__() -> list[str]:
    """What is there, and what comes when it is asked for; `huggingface` may need a package that is not installed."""
    return sorted({*globals(), *__all__})

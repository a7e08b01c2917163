"""How wide should each layer be? EvolveNet prunes and grows a network's widths while it trains."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from evolvenet._compat.imports import when_imported
from evolvenet._compat.torchvision import mend_torchvision
from evolvenet._compat.wrapping import SAVING

mend_torchvision()  # before anything imports torchvision

from evolvenet.engine.compression import Compression  # noqa: E402
from evolvenet.engine.ddp_wrapper import renew_ddp  # noqa: E402
from evolvenet.engine.depth import remove_blocks  # noqa: E402
from evolvenet.engine.evolver import Evolver  # noqa: E402
from evolvenet.engine.functional import grow, prune, resize  # noqa: E402
from evolvenet.engine.history import Event, History, WidthChange  # noqa: E402
from evolvenet.engine.reporting import register_writer  # noqa: E402
from evolvenet.engine.saving import load, save  # noqa: E402
from evolvenet.engine.sharding import whole_parameters  # noqa: E402
from evolvenet.engine.width_table import widths  # noqa: E402
from evolvenet.errors import (  # noqa: E402
    DistillationError,
    EvolveNetError,
    FactorizationError,
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
from evolvenet.graph.index_map import IndexMap  # noqa: E402
from evolvenet.graph.width_graph import Tie, Width, WidthGraph  # noqa: E402
from evolvenet.lowrank import attention as _attention  # noqa: E402, F401  both register how checkpoints are factorized
from evolvenet.lowrank import layers as _layers  # noqa: E402, F401
from evolvenet.measurement.output_spectra import output_spectra  # noqa: E402
from evolvenet.measurement.residual_spectra import block_spectra  # noqa: E402
from evolvenet.measurement.width_spectra import spectra  # noqa: E402
from evolvenet.measurement.width_statistics import WidthStatistics  # noqa: E402
from evolvenet.policies.base import Policy, Proposal  # noqa: E402
from evolvenet.policies.budget import Budget  # noqa: E402
from evolvenet.policies.front import Front  # noqa: E402
from evolvenet.policies.price import Price  # noqa: E402
from evolvenet.policies.threshold import Threshold  # noqa: E402
from evolvenet.policies.tolerance import Tolerance  # noqa: E402
from evolvenet.pruning.allocation import allocate  # noqa: E402
from evolvenet.pruning.distillation import Polish, polish  # noqa: E402
from evolvenet.surgery.state_parts import register_made_later  # noqa: E402
from evolvenet.tracing.trace import trace  # noqa: E402

if TYPE_CHECKING:
    from evolvenet import transformers as transformers
    from evolvenet.engine.compress import compress
    from evolvenet.lightning.callback import WidthEvolution
    from evolvenet.lowrank.factorize import factorize
    from evolvenet.lowrank.merge import merge

Measure = WidthStatistics
"""The public name that `WidthStatistics` had first."""

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "Compression",
    "DistillationError",
    "Event",
    "EvolveNetError",
    "Evolver",
    "FactorizationError",
    "Front",
    "History",
    "IndexMap",
    "IndexMapError",
    "Measure",
    "MissingPackageError",
    "OptimizerStateError",
    "Policy",
    "PolicyError",
    "Polish",
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
    "WidthStatistics",
    "allocate",
    "block_spectra",
    "compress",
    "factorize",
    "grow",
    "load",
    "merge",
    "output_spectra",
    "polish",
    "prune",
    "remove_blocks",
    "renew_ddp",
    "resize",
    "save",
    "spectra",
    "trace",
    "whole_parameters",
    "widths",
]


# The package of the calls needs transformers, which whoever reads such a file may not have imported yet.
register_made_later("alibi_heads", "evolvenet.transformers.number_alibi_heads(model)")
register_made_later("position_channels", "evolvenet.transformers.number_position_channels(model)")

# Matplotlib may not be installed, and takes long to import.
register_writer(
    lambda *given, **named: import_module("evolvenet.report").write_report(*given, **named),
    lambda history: import_module("evolvenet.report").network_figure(history),
)

# Lightning may never be imported, and its modules are not needed before.
for _name in SAVING:
    when_imported(_name, lambda saving: import_module("evolvenet.lightning.from_checkpoint").wrap_loading(saving))


def __getattr__(name: str) -> Any:
    """What takes long to import or may be missing is imported on first access."""
    if name == "WidthEvolution":
        return import_module("evolvenet.lightning.callback").WidthEvolution
    if name in ("factorize", "merge"):
        return getattr(import_module(f"evolvenet.lowrank.{name}"), name)
    if name == "compress":
        return import_module("evolvenet.engine.compress").compress
    if name == "transformers":
        return import_module("evolvenet.transformers")
    raise AttributeError(f"module 'evolvenet' has no attribute {name!r}")


def __dir__() -> list[str]:
    """What is there, and what comes when it is asked for; `transformers` may need a package that is not installed."""
    return sorted({*globals(), *__all__})

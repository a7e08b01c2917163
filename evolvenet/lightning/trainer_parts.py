"""Lightning's strategies, precisions and loops, as far as a change of widths depends on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy, Strategy
from lightning.pytorch.strategies.single_xla import SingleDeviceXLAStrategy

from evolvenet._compat.lightning import communication_state, forget_static_graph
from evolvenet.engine.ddp_wrapper import forget_buckets
from evolvenet.errors import PolicyError, UnsupportedStrategyError

STRATEGIES = (SingleDeviceStrategy, SingleDeviceXLAStrategy, DDPStrategy, ModelParallelStrategy)
"""Strategies under which every process holds whole parameters, or gathers them for an event. Their subclasses may not."""


def check_strategy(strategy: Strategy) -> None:
    """Check that the strategy keeps whole parameters on every process, or can gather them.

    Raises:
        UnsupportedStrategyError: for any other.
    """
    if type(strategy) not in STRATEGIES:
        raise UnsupportedStrategyError(
            f"WidthEvolution changes the shapes of whole parameters: expected a strategy out of "
            f"{', '.join(each.__name__ for each in STRATEGIES)}, got {type(strategy).__name__}, which may keep parts of them "
            'or copies elsewhere that would not change. Take strategy="ddp", or devices=1. A model that has to be sharded can be '
            "trained so afterwards: save it (evolvenet.save), load it into a freshly built one (evolvenet.load), and shard that."
        )


def rebuild_ddp(strategy: Strategy, pl_module: LightningModule) -> None:
    """Make DDP's wrapper anew: its hooks and buckets are those of the parameters' old shapes."""
    if isinstance(strategy, DDPStrategy):
        strategy.model = pl_module
        forget_buckets(communication_state(strategy))
        strategy.configure_ddp()
        forget_static_graph(strategy)


def default_dtype(trainer: Trainer) -> AbstractContextManager[Any]:
    """A context in which tensors that the forward creates have training's dtype ("64-true"), without autocast."""
    plugin = trainer.precision_plugin
    return nullcontext() if isinstance(plugin, MixedPrecision) else plugin.forward_context()


@contextmanager
def shown_in_progress_bar(trainer: Trainer, values: Callable[[], Mapping[str, str]]) -> Iterator[None]:
    """Within the body the progress bar, if there is one, shows some values more.

    `LightningModule.log` takes numbers only, which a bar displays as "1.93e+5" or "193057.000".

    Args:
        trainer: whose bar it is.
        values: {name: text}.
    """
    bar = trainer.progress_bar_callback
    if bar is None:
        yield
        return
    before = bar.get_metrics

    def get_metrics(*args: Any, **kwargs: Any) -> dict[str, Any]:
        return {**before(*args, **kwargs), **values()}

    bar.get_metrics = get_metrics  # type: ignore[method-assign]
    try:
        yield
    finally:
        if vars(bar).get("get_metrics") is get_metrics:
            del bar.get_metrics


def metric_of(trainer: Trainer, name: str) -> float:
    """A metric that was logged in the validation that just ended.

    Raises:
        PolicyError: if there is none of that name.
    """
    known = trainer.callback_metrics
    if name not in known:
        raise PolicyError(
            f"Expected the validation to log {name!r}, by which cuts are judged, got {', '.join(sorted(known)) or 'nothing'}. "
            f"Log it with self.log({name!r}, ...) in validation_step, or name another metric."
        )
    return float(known[name])

"""`report`: an evolver's, or a callback's, record of a run as a page. What writes pages is registered from above."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from evolvenet.engine.history import History
from evolvenet.errors import EvolveNetError

_writers: list[Callable[..., Path]] = []
_drawings: list[Callable[[History], Any]] = []


def register_writer(writer: Callable[..., Path], drawing: Callable[[History], Any]) -> None:
    """Let `report` call a function with the arguments of `evolvenet.report.write_report`, and loggers one that draws a network.

    The package `report` draws with an optional library, and lies above this one, which must not import it.

    Args:
        writer: writes a page.
        drawing: history → figure, or None where the optional library is not installed.
    """
    _writers[:], _drawings[:] = [writer], [drawing]


def network_figure(history: History) -> Any:
    """Matplotlib's figure of the network before and after, see `evolvenet.report.draw_network`; None without matplotlib."""
    return _drawings[0](history)


class Reported:
    """Adds `report` to what has a `policy` and a `history`."""

    policy: Any

    def report(
        self,
        directory: str | Path,
        title: str = "Widths over a run",
        metrics: Mapping[str, Sequence[tuple[int, float]]] | None = None,
        facts: Mapping[str, str] | None = None,
        baselines: Mapping[str, float] | None = None,
        seconds: float | None = None,
    ) -> Path:
        """Write `report.html`: one self-contained page with all that is known of the run, to be sent as it is.

        The network before and after, costs and metrics with the events marked, spectra, every decision with its reason, the
        predicted and the measured change of the outputs, wall clock, and how it was made: command, policy, versions, commit,
        machine. It can be called at any time, during a run and after it.

        Args:
            directory: created if it does not exist.
            title: heading of the page.
            metrics: curves, name → (training step, value) pairs, besides those that the callback of a trainer has kept.
            facts: further lines of the table of sizes, name → text, such as a test accuracy.
            baselines: name of a metric → its value for the network that the run started with, drawn as a line. Without it, the
                last value from before the first change is.
            seconds: of the whole run, training included, where the callback of a trainer does not know it.

        Returns:
            The path of the page.

        Raises:
            EvolveNetError: before anything was traced. A `ReportError` if matplotlib is not installed.
        """
        history = self._reported_history()
        if history is None:
            raise EvolveNetError(
                f"Report: expected {type(self).__name__} to have traced a network, got none so far. Call it after training has "
                "begun."
            )
        curves, known = self._reported_run()
        threshold = getattr(self.policy, "prune", None)
        return _writers[0](
            history,
            directory,
            title,
            {**curves, **(metrics or {})},
            facts,
            baselines=baselines,
            settings={"policy": repr(self.policy), **self._reported_settings()},
            threshold=threshold if isinstance(threshold, float) else None,
            seconds=known if seconds is None else seconds,
        )

    def _reported_history(self) -> History | None:
        return getattr(self, "history", None)

    def _reported_run(self) -> tuple[Mapping[str, Sequence[tuple[int, float]]], float | None]:
        """The metrics that are known, and the seconds of the run."""
        return {}, None

    def _reported_settings(self) -> Mapping[str, str]:
        return {}

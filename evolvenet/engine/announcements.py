"""What a run reports through `logging.getLogger("evolvenet")`: one line an event, and a table at the end.

One process reports. Whoever wants less sets the logger's level: `logging.getLogger("evolvenet").setLevel("WARNING")`.
"""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

from evolvenet.engine.distributed import process_group
from evolvenet.engine.history import Event
from evolvenet.engine.run_checks import missed, warn
from evolvenet.graph.width_graph import WidthGraph

if TYPE_CHECKING:
    from evolvenet.engine.evolver import Evolver

log = logging.getLogger("evolvenet")


class ConsoleHandler(logging.Handler):
    """Writes messages of rank 0 to stderr, above running progress bars, where the root logger has no handler for them."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one message."""
        if logging.getLogger().handlers or process_group().rank:
            return
        # Takes as long to import as all the rest of this module.
        from tqdm import tqdm

        level = f"{record.levelname.lower()}: " if record.levelno > logging.INFO else ""
        tqdm.write(f"{record.name}: {level}{self.format(record)}", file=sys.stderr)


def show_messages() -> None:
    """Let messages of level INFO appear on stderr, as Lightning's own do, unless the application has set this logger up.

    The root logger stays as it is: where it has handlers, they alone write the messages.
    """
    if log.level == logging.NOTSET:
        log.setLevel(logging.INFO)
    if not log.handlers:
        log.addHandler(ConsoleHandler())


def announce_start(graph: WidthGraph) -> None:
    """Log how much of a network can change."""
    if process_group().rank:
        return
    can, share = len(graph.resizable), f"{graph.coverage:.1%}".replace("%", " %")
    widths = "1 width that can change holds" if can == 1 else f"{can} widths that can change hold"
    log.info("%s %s of the %s parameters; %d frozen", widths, share, f"{graph.parameters:,}", len(graph.reasons))


def announce(event: Event) -> None:
    """Log an event in one line at level INFO, and each changed width with its reason at DEBUG.

    A skipped event has its warning already.
    """
    if process_group().rank:
        return
    if event.skipped is None:
        log.info("%s", line(event))
    for change in event.changes:
        log.debug("step %d: %s %d → %d: %s", event.step, change.width, change.before, change.after, change.reason)


def line(event: Event) -> str:
    """An event in one line.

    >>> from evolvenet.engine.history import WidthChange
    >>> change = WidthChange("fc1", 256, 100, "100 directions carry 99 % of the energy")
    >>> line(Event(124, (change,), {"fc1": 100}, 193_057, 120_300, 120_000, 0.42))
    'step 124: 193,057 → 120,300 parameters, 1 width, 0.4 s'
    >>> line(Event(248, (), {"fc1": 100}, 120_300, 120_300, 120_000, 0.3))
    'step 248: 120,300 parameters, no width changed, 0.3 s'
    >>> line(Event(300, (), {"fc1": 100}, 120_300, 90_300, 80_000, 0.3, removed_blocks=("layers.3",)))
    'step 300: 120,300 → 90,300 parameters, 0 widths, removed layers.3, 0.3 s'
    """
    count = len({change.width for change in event.changes})
    seconds = f"{event.seconds:.1f} s" if event.seconds >= 0.1 else f"{event.seconds:.2f} s"
    for word, blocks in (("removed", event.removed_blocks), ("restored", event.restored_blocks)):
        seconds = f"{word} {', '.join(blocks)}, {seconds}" if blocks else seconds
    if not (count or event.removed_blocks or event.restored_blocks):
        return f"step {event.step}: {event.parameters:,} parameters, no width changed, {seconds}"
    widths = "1 width" if count == 1 else f"{count} widths"
    return f"step {event.step}: {event.parameters_before:,} → {event.parameters:,} parameters, {widths}, {seconds}"


def announce_end(evolver: Evolver | None, before: int = 0) -> None:
    """Log the table of a run that has ended, and warn if no event took place in it, or if the policy has missed its aim.

    Args:
        evolver: of the run; None if there was nothing to trace in it.
        before: events of the history that took place before this run.
    """
    if evolver is None or process_group().rank:
        return
    log.info("widths at the end of the run:\n%s", evolver.history)
    if len(evolver.history.events) == before:
        warn(
            "No event took place in this run: it ended before the first one was due and measured. Take a smaller "
            "every_n_epochs, every_n_steps or start_step, a larger stop, or a longer run."
        )
    warn(missed(evolver))


def short_number(number: float) -> str:
    """A count in at most five characters, for a progress bar.

    >>> [short_number(count) for count in (950, 1_234, 120_300, 999_950, 2_096_970, 7e9)]
    ['950', '1.23k', '120k', '1M', '2.1M', '7B']
    """
    unit, *larger = "", "k", "M", "B"
    # What is rounded to three digits is below the next unit.
    while number >= 999.5 and larger:
        number, unit = number / 1000, larger.pop(0)
    return f"{number:.3g}{unit}"

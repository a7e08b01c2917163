"""What the callbacks of all trainers have in common: their arguments, an evolver, and the time of its next event."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from evolvenet.engine.event_timer import EventTimer
from evolvenet.engine.evolver import Evolver
from evolvenet.engine.history import History
from evolvenet.engine.reporting import Reported
from evolvenet.engine.run_curves import RunCurves
from evolvenet.errors import PolicyError
from evolvenet.execution.chosen_outputs import Outputs
from evolvenet.graph.restriction import Patterns, Restriction
from evolvenet.growth.plan import NewUnits
from evolvenet.measurement.calibration import LEAST
from evolvenet.policies.base import Policy, judged_metric
from evolvenet.policies.schedule import Schedule


@dataclass(eq=False, repr=False)
class EvolutionCallback(Reported):
    """Changes widths at the times of a schedule. Subclasses call the evolver from a trainer's hooks.

    Args:
        policy: proposes sizes, for example `evolvenet.Threshold`, or one of your own (see `evolvenet.Policy`).
        every_n_epochs: an event at the start of every n-th epoch; the default, with n = 1, if neither is given.
        every_n_steps: or an event every n optimizer steps.
        start_step: no event before this optimizer step.
        stop: share of the run's optimizer steps, 0 … 1, after which widths stay and the network settles.
        example_inputs: what the model is called with, if the first training batch should not be waited for.
        calibration_batches: how many training batches an event measures on; None for as many as the widest width needs, at most
            a tenth of an epoch's (`evolvenet.measurement.calibration`).
        seed: of the new units' random directions.
        network: submodules by name or `fnmatch` pattern, one or several: a width that one of them does not produce alone keeps
            its size. None for no such limit.
        fixed: names or patterns of widths, or of modules that produce them: they keep their size.
        multiple: sizes change to multiples of so many channels alone, whatever the policy.
        outputs: which outputs of the network count, as for `evolvenet.trace`: those that predictions use. In training the loss
            decides which widths may change; this is for a network that is traced by itself, on `example_inputs` or because its
            training step cannot be.
        new_units: how they start, see the `method` of `evolvenet.grow`; "gradmax" and "tiny" need the loss that the training step
            returns. Where it does not run beside training they are "orthogonal", with a warning at the start of the run.
        update: whether the weights around new units then move so that the loss of the event's batches falls, see
            `evolvenet.grow`; needs the loss as well, and moves only what the optimizers hold. The function changes then. Without
            a loss nothing moves, with the same warning.

    Raises:
        PolicyError: for values out of range, an unknown `new_units`, a policy without a method `propose`, or, before training
            starts or on its first batch, a name that matches nothing.
    """

    policy: Policy
    every_n_epochs: int | None = None
    every_n_steps: int | None = None
    start_step: int = 0
    stop: float = 0.75
    example_inputs: Any = None
    calibration_batches: int | None = None
    seed: int = 0
    network: Patterns | None = None
    fixed: Patterns = ()
    multiple: int = 1
    outputs: Outputs | None = None
    new_units: str = "orthogonal"
    update: bool = False

    def __post_init__(self) -> None:
        if self.calibration_batches is not None and self.calibration_batches < 1:
            raise PolicyError(
                f"{type(self).__name__}: expected calibration_batches of 1 or more, got {self.calibration_batches}."
            )
        self._judged_metric = judged_metric(self.policy)
        self._new_units = NewUnits(self.new_units, self.update)
        self.schedule = Schedule(self.every_n_epochs, self.every_n_steps, self.start_step, self.stop)
        self.restriction = Restriction(self.network, self.fixed, self.multiple)
        self.evolver: Evolver | None = None
        self._timer = EventTimer(self.schedule)
        self._resumed: dict[str, Any] | None = None
        self._recorder: Any = None
        self.curves = RunCurves()

    @property
    def history(self) -> History | None:
        """The run's events, None before the model is traced."""
        return self.evolver.history if self.evolver else None

    def _reported_run(self) -> tuple[Mapping[str, list[tuple[int, float]]], float | None]:
        return self.curves.read(), self.curves.seconds or None

    def _reported_settings(self) -> dict[str, str]:
        left_out = ("policy", "example_inputs")
        given = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in left_out}
        defaults = {each.name: each.default for each in fields(self)}
        return {name: str(value) for name, value in given.items() if name == "seed" or value != defaults[name]}

    @property
    def _most_batches(self) -> int:
        """How many batches are recorded for an event."""
        return (self.evolver.calibration_batches if self.evolver else self.calibration_batches) or LEAST

    def _stop_recording(self) -> None:
        if self._recorder is not None:
            self._recorder.close()
        self._recorder = None

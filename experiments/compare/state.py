"""What the optimizer's state is worth after a width change: `python -m experiments.compare.state --data DIR`, or `make compare`.

One network is trained, changed once, and trained on twice from there: with the state that the maps carried, and with
fresh optimizers. Both see the same batches. A control does the same where nothing was changed.
"""

from __future__ import annotations

import evolvenet  # noqa: F401  isort: skip  # before torchvision, which it patches

import argparse
import math
import time
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import mean, stdev

import torch
from scipy import stats

from experiments.compare.state_runs import (
    BATCH,
    CALIBRATION,
    EVENTS,
    GROWN,
    KEPT,
    STATES,
    SUBJECTS,
    Batches,
    Outcome,
    Ratios,
    Subject,
    outcomes,
)
from experiments.pages import add_data, add_seeds, machine_line, markdown, write_whole

BOUND = 1.5
"""The goal for the largest update of new units, in mean updates of survivors."""


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % confidence interval of the mean, by Student's t.

    >>> low, high = interval([1.0, 2.0, 3.0])
    >>> round(low, 2), round(high, 2)
    (-0.48, 4.48)
    """
    reach = float(stats.t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return mean(values) - reach, mean(values) + reach


def verdict(values: Sequence[float]) -> str:
    """Whether differences of losses are below 0, above 0, or not significantly different from 0.

    >>> verdict([-1.0, -1.1, -0.9]), verdict([1.0, -1.0, 0.5]), verdict([0.1, 0.1, 0.11])
    ('better', 'no difference', 'worse')
    """
    low, high = interval(values)
    return "better" if high < 0 else "worse" if low > 0 else "no difference"


Run = tuple[Subject, float, list[dict[str, Outcome]]]
"""A subject, its learning rate, and for each seed the outcome of each event."""


def loss_lines(runs: Sequence[Run]) -> list[str]:
    """The table of losses, one line an event."""
    head = [
        "optimizer",
        "network",
        "learning rate",
        "event",
        "loss, carried",
        "loss, reset",
        "carried − reset",
        "carried is",
    ]
    head += ["less the control's", "less the control's, carried is"]
    rows = []
    for subject, rate, seeds in runs:
        control = [found[EVENTS[0]].difference for found in seeds]
        for event in EVENTS:
            carried, reset = ([found[event].losses[state] for found in seeds] for state in STATES)
            apart = [found[event].difference for found in seeds]
            extra = [one - other for one, other in zip(apart, control, strict=True)]
            cells = [subject.optimizer, subject.network, f"{rate:g}", event, f"{mean(carried):.4f}"]
            cells += [f"{mean(reset):.4f}", signed(apart), verdict(apart)]
            cells += ["", ""] if event == EVENTS[0] else [signed(extra), verdict(extra)]
            rows.append(cells)
    return markdown(head, rows, text=(0, 1, 3, 7, 9))


def signed(values: Sequence[float]) -> str:
    """Mean ± standard deviation of differences, with a sign."""
    return f"{mean(values):+.4f} ± {stdev(values):.4f}"


RATIO_COLUMNS = tuple(product(("weights", "vectors"), ("new units", "survivors", "one new unit", "one survivor")))


def ratio_lines(runs: Sequence[Run]) -> list[str]:
    """The table of updates after the growth, one line a state."""
    heads = [f"{kind}: {who}" for kind, who in RATIO_COLUMNS]
    rows = []
    for subject, rate, seeds in runs:
        for state in STATES:
            found = [each["growth"].ratios[state] for each in seeds]
            cells = [subject.optimizer, subject.network, f"{rate:g}", state]
            cells += [f"{largest(found, column):.2f}" for column in RATIO_COLUMNS]
            cells.append(f"{max(mean(steps) for ratios in found for steps in ratios.steps.values()):.2f}")
            rows.append(cells)
    head = ["optimizer", "network", "learning rate", "state", *heads, "new units, mean over steps"]
    return markdown(head, rows, text=(0, 1, 3))


def largest(found: Sequence[Ratios], column: tuple[str, str]) -> float:
    """The largest ratio of a column over several runs."""
    return max(ratios.largest.get(column, 0.0) for ratios in found)


def goal_lines(runs: Sequence[Run]) -> list[str]:
    """Whether the goals were reached, in a sentence each."""
    worse = _worse(runs, less_control=False)
    carried = [found["growth"].ratios["carried"] for _, _, seeds in runs for found in seeds]
    most = {f"{kind}, {who}": f"{largest(carried, (kind, who)):.2f}" for kind, who in RATIO_COLUMNS}
    met = {kind: largest(carried, (kind, "new units")) <= BOUND for kind in ("weights", "vectors")}
    return [
        f"- Carried never worse than reset: {f'no, worse for {worse}' if worse else 'yes'}.",
        "- Beside the control, where nothing was changed, the change took something from the carried state's advantage: "
        f"{_worse(runs, less_control=True) or 'nowhere'}.",
        f"- Carried, the mean update of the new units is at most {BOUND} times the survivors': in weights "
        f"{'yes' if met['weights'] else 'no'} (largest {most['weights, new units']}), in vectors "
        f"{'yes' if met['vectors'] else 'no'} (largest {most['vectors, new units']}; as many survivors reach "
        f"{most['vectors, survivors']}). One new unit alone: {most['weights, one new unit']} and "
        f"{most['vectors, one new unit']}, where one survivor reaches {most['weights, one survivor']} and "
        f"{most['vectors, one survivor']}.",
    ]


def _worse(runs: Sequence[Run], less_control: bool) -> str:
    """The cases in which the carried state did worse, empty for none."""
    found = []
    for subject, rate, seeds in runs:
        control = [each[EVENTS[0]].difference * less_control for each in seeds]
        for event in EVENTS[1:]:
            apart = [each[event].difference - other for each, other in zip(seeds, control, strict=True)]
            if verdict(apart) == "worse":
                found.append(f"{subject.optimizer} at {rate:g} after the {event} ({signed(apart)})")
    return "; ".join(found)


ABOUT = """\
- **network**: MNIST's training images averaged to 14 × 14, batches of {batch}. ResNet: `experiments.models.resnet.ResNet`,
  widths 16, 32, 64, one block a stage, hidden 64. dense: 196-128-128-10. `torch.optim.Muon` takes matrices alone, no
  convolutions, so it trains the dense network, with AdamW at a fifth of its learning rate for the biases. Learning rates
  are constant.
- **event**, after {before} steps. cut: `evolvenet.prune` to {kept:.0%} of every width, reconstructed on {calibration} batches.
  growth: orthogonal, to {grown:.0%}. no change: the control.
- **loss**: mean training loss of the {after} steps after the event. **carried**: the optimizers went through the maps.
  **reset**: fresh optimizers with the same settings, from the same weights, on the same batches.
- Differences are paired by seed, n = {seeds}, mean ± standard deviation. **better**, **worse**: 0 lies outside the 95 %
  confidence interval of the mean (Student's t).
- A reset alone changes the loss. Without their momentum SGD and Muon take smaller steps for a while, which lowers a loss that
  the noise of the batches holds up; fresh AdamW takes larger steps. The control shows by how much; **less the control's** is
  what the change of widths adds. After a cut the gradients of the units that are left grow, since they are trained for the
  removed ones too. AdamW's carried second moments are too small for them at first; after a cut
  `evolvenet.surgery.optimizer_state.compile_state` therefore makes AdamW discount them sooner.
"""

ABOUT_RATIOS = """\
Largest ratios of mean |update| to that of all survivors of the same tensor, over the {after} steps after the growth, all tensors,
axes and seeds. An update is what a step adds, decoupled weight decay left out. **new units**: all of one axis (rows or
columns) of a tensor. **survivors**: in groups of as many. **one**: single units. **mean over steps**: of the new units of the
tensor and axis where it is largest. In a vector (a bias, a norm's scale) a new unit is a single number, and the few of one tensor
stray as far from the mean as the same number of survivors do; no starting value of the state could stop that.
"""


def write(path: Path, runs: Sequence[Run], command: str, about: Mapping[str, object], seconds: float) -> None:
    """Write the page."""
    lines = [
        "# Optimizer state: carried through the maps against reset",
        "",
        f"Written by `{command}` {machine_line()}, in {seconds:.0f} s of processor time.",
        "",
        *goal_lines(runs),
        "",
        *ABOUT.format(**about).splitlines(),
        "",
        *loss_lines(runs),
        "",
        "## Updates of new units",
        "",
        *ABOUT_RATIOS.format(**about).splitlines(),
        "",
        *ratio_lines(runs),
    ]
    write_whole(path, "\n".join(lines) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, change, train on, and write the page."""
    options = _options(arguments)
    start = time.process_time()
    batches = Batches(options.data)
    runs: list[Run] = []
    for subject in SUBJECTS:
        for rate in subject.rates:
            found = [
                outcomes(subject, rate, seed, batches, options.before, options.after) for seed in range(options.seeds)
            ]
            runs.append((subject, rate, found))
            print(*loss_lines(runs[-1:])[2:], *ratio_lines(runs[-1:])[2:], sep="\n", flush=True)
    about = {"batch": BATCH, "kept": KEPT, "grown": GROWN, "calibration": CALIBRATION, **vars(options)}
    numbers = " ".join(f"--{name} {getattr(options, name)}" for name in ("seeds", "before", "after"))
    command = f"OMP_NUM_THREADS={torch.get_num_threads()} python -m experiments.compare.state --data DIR {numbers}"
    write(options.out, runs, command, about, time.process_time() - start)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m experiments.compare.state", description=__doc__)
    add_data(parser)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"), help="page to write")
    add_seeds(parser, default=10)
    parser.add_argument("--before", type=int, default=300, help="steps before the event (default %(default)s)")
    parser.add_argument("--after", type=int, default=100, help="steps after it (default %(default)s)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()

"""What the optimizer's state is worth across W → B·A: `python -m experiments.compare.factor_state --data DIR`, or `make compare`.

One dense network is trained, factorized once, and trained on from there with each starting state of the factors, on the same
batches.
"""

from __future__ import annotations

import evolvenet  # isort: skip  # before torchvision, which it patches

import argparse
import copy
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Literal

import torch
from torch import nn
from torch.optim import Optimizer

from experiments.compare.state import signed, verdict
from experiments.compare.state_runs import BATCH, CALIBRATION, NETWORKS, Batches, adamw, sgd, train
from experiments.pages import add_data, add_seeds, machine_line, markdown, write_whole

STATES: tuple[Literal["fresh", "projected", "kronecker"], ...] = ("fresh", "projected", "kronecker")
RANKS = (8, 32)
SUBJECTS: tuple[tuple[str, Callable[[nn.Module, float], list[Optimizer]], float], ...] = (
    ("SGD, momentum", sgd, 0.01),
    ("SGD, momentum", sgd, 0.05),
    ("AdamW", adamw, 5e-4),
    ("AdamW", adamw, 2e-3),
)
WINDOW = 20
"""Steps after the factorization whose mean loss is reported apart."""

Losses = Mapping[str, Sequence[float]]
"""{state: the loss of each step after the factorization}."""


def losses(
    make: Callable[[nn.Module, float], list[Optimizer]],
    rate: float,
    seed: int,
    batches: Batches,
    before: int,
    after: int,
) -> dict[int, Losses]:
    """Train one network, then factorize copies of it: by rank, the losses with each state."""
    torch.manual_seed(seed)
    model = NETWORKS["dense"]()
    optimizers = make(model, rate)
    train(model, optimizers, batches(3 * seed, before))
    images = [images for images, _ in batches(3 * seed + 1, CALIBRATION)]
    found: dict[int, Losses] = {}
    for rank in RANKS:
        of_states = {}
        for state in STATES:
            factorized, own = copy.deepcopy((model, optimizers))
            evolvenet.factorize(factorized, {"1": rank, "3": rank}, batches=images, optimizers=own, state=state)
            of_states[state] = train(factorized, own, batches(3 * seed + 2, after))
        found[rank] = of_states
    return found


Row = tuple[str, float, int, Sequence[Losses]]
"""Optimizer, learning rate, rank, and the losses of each seed."""


def lines(rows: Sequence[Row]) -> list[str]:
    """The table, one line a state and rank; differences from fresh are paired by seed."""
    head = ["optimizer", "learning rate", "rank", "state", f"loss, first {WINDOW} steps", "less fresh's", "is"]
    head += ["loss, all steps", "less fresh's", "is"]
    cells = []
    for optimizer, rate, rank, seeds in rows:
        for state in STATES:
            cells.append([optimizer, f"{rate:g}", str(rank), state])
            for end in (WINDOW, None):
                own, fresh = ([mean(each[key][:end]) for each in seeds] for key in (state, "fresh"))
                apart = [one - other for one, other in zip(own, fresh, strict=True)]
                cells[-1] += [f"{mean(own):.4f}"]
                cells[-1] += ["", ""] if state == "fresh" else [signed(apart), verdict(apart)]
    return markdown(head, cells, text=(0, 3, 6, 9))


def summary(rows: Sequence[Row]) -> list[str]:
    """In how many cases each state did better or worse than fresh state, in a sentence each."""
    found = []
    for state in STATES[1:]:
        for steps, end in ((f"the first {WINDOW} steps", WINDOW), ("all steps", None)):
            verdicts = [
                verdict([mean(each[state][:end]) - mean(each["fresh"][:end]) for each in seeds]) for *_, seeds in rows
            ]
            counts = ", ".join(f"{verdicts.count(each)} {each}" for each in ("better", "no difference", "worse"))
            found.append(f"- {state} against fresh, {len(rows)} cases, over {steps}: {counts}.")
    return found


ABOUT = """\
- **network**: dense, 196-128-128-10, on MNIST's training images averaged to 14 × 14, batches of {batch}, constant learning
  rates. After {before} steps `evolvenet.factorize` gives both hidden layers the rank, fitted on {calibration} batches.
- **loss**: mean training loss of the first {window} and of all {after} steps after the factorization.
- **state** of the factors in the optimizer (`factorize(…, state=…)`). fresh: none, step count 0. projected: first moments by the
  chain rule, second ones by the squared entries of the same maps, the step count kept. kronecker: likewise, from the
  second moments' sums over rows and columns. SGD has no second moments: both are then the same. The biases and the
  last layer keep their state in every case.
- Differences from fresh are paired by seed, n = {seeds}, mean ± standard deviation. **better**, **worse**: 0 lies outside the
  95 % confidence interval of the mean (Student's t), for each line by itself.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, factorize, train on, and write the page."""
    options = _options(arguments)
    start = time.process_time()
    batches = Batches(options.data)
    rows: list[Row] = []
    for optimizer, make, rate in SUBJECTS:
        seeds = [losses(make, rate, seed, batches, options.before, options.after) for seed in range(options.seeds)]
        rows += [(optimizer, rate, rank, [each[rank] for each in seeds]) for rank in RANKS]
        print(*lines(rows[-len(RANKS) :])[2:], sep="\n", flush=True)
    about = {"batch": BATCH, "calibration": CALIBRATION, "window": WINDOW, **vars(options)}
    numbers = " ".join(f"--{name} {getattr(options, name)}" for name in ("seeds", "before", "after"))
    command = (
        f"OMP_NUM_THREADS={torch.get_num_threads()} python -m experiments.compare.factor_state --data DIR {numbers}"
    )
    made = f"Written by `{command}` {machine_line()}, in {time.process_time() - start:.0f} s of processor time."
    page = ["# Optimizer state across W → B·A", "", made, "", *summary(rows), ""]
    page += [*ABOUT.format(**about).splitlines(), "", *lines(rows)]
    write_whole(options.out, "\n".join(page) + "\n")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m experiments.compare.factor_state", description=__doc__)
    add_data(parser)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"), help="page to write")
    add_seeds(parser, default=10)
    parser.add_argument("--before", type=int, default=300, help="steps before the factorization (default %(default)s)")
    parser.add_argument("--after", type=int, default=100, help="steps after it (default %(default)s)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()

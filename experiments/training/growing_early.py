"""Narrow starts that grow early and are cut late, beside the wide network: `python -m experiments.training.growing_early`.

A network starts narrow. A `Front` of two budgets makes it wider in the first part of the run and cuts it in the second. Beside
it: the wide network from the first step to the last, the same for half as many steps, the narrow one, and the widths that the
growing run ended with, from the first step. Measured: validation accuracy against processor time of training steps and events,
and test accuracy once, at the end. Writes the page `experiments/training/growing_early.md`.
"""

from __future__ import annotations

import evolvenet  # isort: skip  # before torchvision, which it patches

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.nn import functional

from experiments.data.images import BatchLoader, MnistData, Split
from experiments.pages import add_data, cell, commit, machine_line, markdown, span, write_whole

HELD_OUT = 5000
"""Training images, the last ones, for validation."""
WIDE, HALF, NARROW, GROWN, FINAL = "wide", "wide, half the steps", "narrow", "grown", "final widths"
TITLES = {
    WIDE: "wide from the beginning",
    HALF: "the same for half as many steps",
    NARROW: "narrow, never grown",
    GROWN: "**narrow, grows early, is cut late**",
    FINAL: "the widths that it ends with, from the beginning",
}


def dense(sizes: Sequence[int]) -> nn.Module:
    """784-a-b-10 with ReLU."""
    a, b = sizes
    return nn.Sequential(nn.Flatten(), nn.Linear(784, a), nn.ReLU(), nn.Linear(a, b), nn.ReLU(), nn.Linear(b, 10))


@dataclass(frozen=True)
class Plan:
    """A network, and how long and in which way it is trained.

    Args:
        build: widths → network, weights from torch's global random state.
        narrow: widths of the growing start.
        wide: widths of the network that it is to reach.
        most: parameters to which it grows.
        last: parameters at the end.
        steps: optimizer steps of the wide and of the narrow network.
        grown_steps: of the growing run, and of the widths that it ends with.
        spans: of growing and of being cut, in any unit.
        until: share of each span at which its budget holds.
        rate: largest learning rate of the one cycle; of AdamW.
        grown_rate: of the growing run, and of the widths that it ends with.
        batch: images a training batch.
        events: how often widths may change.
        watches: how often the validation accuracy is taken.
    """

    build: Callable[[Sequence[int]], nn.Module]
    narrow: Sequence[int]
    wide: Sequence[int]
    most: int
    last: int
    steps: int
    grown_steps: int
    spans: tuple[float, float] = (0.7, 0.3)
    until: tuple[float, float] = (0.2, 0.3)
    rate: float = 3e-3
    grown_rate: float = 3e-3
    batch: int = 128
    events: int = 20
    watches: int = 20

    @property
    def policy(self) -> evolvenet.Front:
        """Growth without a test, at most to twice a width at once, then cuts alone."""
        up = evolvenet.Budget(params=self.most, by=self.until[0], growth=1.0, saturated=0.0, certain=0.0)
        down = evolvenet.Budget(params=self.last, by=self.until[1], growth=0.0)
        return evolvenet.Front(points=[up, down], spans=self.spans)


PLANS = {
    "dense": Plan(dense, (32, 32), (512, 512), most=118_282, last=100_000, steps=2000, grown_steps=3600),
}
"""By name."""


@dataclass
class Run:
    """One run.

    Args:
        curve: (step, processor seconds of training and events until then, validation accuracy).
        test: accuracy at the end.
        sizes: widths at the end.
        parameters: (step, parameters) at the start and after each change.
        event_seconds: processor time of all events.
    """

    curve: list[tuple[int, float, float]] = field(default_factory=list)
    test: float = 0.0
    sizes: dict[str, int] = field(default_factory=dict)
    parameters: list[tuple[int, int]] = field(default_factory=list)
    event_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        """Processor time of the whole run, without watching."""
        return self.curve[-1][1]

    def reaches(self, accuracy: float) -> float | None:
        """Processor seconds until the validation accuracy is first reached; None for never."""
        return next((seconds for _, seconds, found in self.curve if found >= accuracy), None)


@dataclass(frozen=True)
class Data:
    """MNIST, normalised, in three parts.

    Args:
        train: images and labels, without the held out ones.
        validation: images `[N, 1, 28, 28]` and labels.
        test: likewise.
    """

    train: Split
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, train: Split, test: Split, held_out: int) -> Data:
        """The last training images are held out."""
        kept = Split(train.images[:-held_out], train.labels[:-held_out])
        validation = normalised(train.images[-held_out:]), train.labels[-held_out:]
        return cls(kept, validation, (normalised(test.images), test.labels))

    def batches(self, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Training batches without end."""
        loader = BatchLoader(self.train, size, lambda images, _: normalised(images), shuffle=True, seed=seed)
        epoch = 0
        while True:
            loader.set_epoch(epoch)
            yield from loader
            epoch += 1


def normalised(images: Tensor) -> Tensor:
    """Images uint8 → float with MNIST's mean and deviation."""
    return (images.float() / 255 - 0.1307) / 0.3081


@torch.no_grad()
def accuracy(model: nn.Module, part: tuple[Tensor, Tensor]) -> float:
    """Share of right answers, 0 … 1."""
    images, labels = part
    model.eval()
    return float(torch.cat([model(each).argmax(1) for each in images.split(200)]).eq(labels).double().mean())


def trained(model: nn.Module, plan: Plan, data: Data, seed: int, policy: evolvenet.Front | None = None) -> Run:
    """Train a network, with its widths changed by the policy if there is one.

    Args:
        model: is trained in place.
        plan: how.
        data: on what.
        seed: of the order of the images.
        policy: of the events; None for none.
    """
    run, seconds = Run(), 0.0
    optimizer, batches = (
        torch.optim.AdamW(model.parameters(), lr=plan.rate, weight_decay=0.02),
        data.batches(plan.batch, seed),
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, plan.rate, total_steps=plan.steps)
    begin = time.process_time()
    evolver = policy and evolvenet.Evolver(
        model, optimizer, policy, data.validation[0][:2], seed=seed, new_units="paired"
    )
    seconds += time.process_time() - begin
    run.parameters.append((0, sum(each.numel() for each in model.parameters())))
    for step in range(1, plan.steps + 1):
        begin = time.process_time()
        model.train()
        images, labels = next(batches)
        optimizer.zero_grad()
        functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        schedule.step()
        if evolver is not None:
            seconds += time.process_time() - begin
            begin = time.process_time()
            evolver.observe(images)
            if step % max(1, plan.steps // plan.events) == 0 and step < plan.steps:
                event = evolver.step(at=step, progress=step / plan.steps)
                if event.changes:
                    run.parameters.append((step, sum(each.numel() for each in model.parameters())))
            run.event_seconds += time.process_time() - begin
        seconds += time.process_time() - begin
        if step % max(1, plan.steps // plan.watches) == 0 or step == plan.steps:
            run.curve.append((step, seconds, accuracy(model, data.validation)))
    run.test = accuracy(model, data.test)
    graph = evolver.graph if evolver is not None else None
    run.sizes = dict(graph.sizes) if graph is not None else {}
    return run


def renewed(model: nn.Module, seed: int) -> nn.Module:
    """New weights in the widths that a network has; every layer of these networks has `reset_parameters`."""
    torch.manual_seed(seed)
    for module in model.modules():
        restart: Callable[[], None] | None = getattr(module, "reset_parameters", None)
        if restart is not None:
            restart()
    return model


def runs(plan: Plan, data: Data, seed: int, rows: Sequence[str]) -> Iterator[tuple[str, Run]]:
    """One run of each row that is asked for; the final widths come with the growing run."""
    for row in rows:
        torch.manual_seed(seed)
        model = plan.build(plan.wide if row in (WIDE, HALF) else plan.narrow)
        of = replace(plan, steps=plan.grown_steps, rate=plan.grown_rate) if row == GROWN else plan
        of = replace(plan, steps=plan.steps // 2) if row == HALF else of
        yield row, trained(model, of, data, seed, plan.policy if row == GROWN else None)
        if row == GROWN:
            yield FINAL, trained(renewed(model, seed), of, data, seed)


def table(found: Mapping[str, Sequence[Run]]) -> list[str]:
    """One line a row, mean ± standard deviation (of a sample) over the seeds.

    Times are shares of the wide network's whole run with the same seed; the accuracy to be reached is its last one.
    """
    rows = []
    for row in (each for each in TITLES if each in found):
        each = list(zip(found[row], found[WIDE], strict=True))
        reached = [run.reaches(wide.curve[-1][2]) for run, wide in each]
        shares = [
            "–" if at is None else f"{at / wide.seconds:.2f}" for at, (_, wide) in zip(reached, each, strict=True)
        ]
        ends = span([f"{size:,}" for size in sorted(run.parameters[-1][1] for run, _ in each)])
        rows.append(
            [
                TITLES[row],
                ends,
                cell([run.curve[-1][2] for run, _ in each]),
                cell([run.test for run, _ in each]),
                f"{fmean(run.seconds / wide.seconds for run, wide in each):.2f}",
                " ".join(shares),
            ]
        )
    head = [
        "network",
        "parameters at the end",
        "validation, %",
        "test, %",
        "whole run",
        "until the wide one's accuracy",
    ]
    return markdown(head, rows, text=(0, 5))


EXPLANATION = f"""\
MNIST without augmentation, AdamW in one cycle of its rate. {HELD_OUT:,} training images are held out for validation, by
which settings were chosen; the test split is looked at once, at the end of each run. **Whole run**: processor time of training
steps and events, as a share of the wide network's. **Until the wide one's accuracy**: the same until the first validation (of
twenty in a run) that is no worse than the wide network's last one with the same seed; of each seed, – for never."""


def section(name: str, plan: Plan, found: Mapping[str, Sequence[Run]]) -> list[str]:
    """The part of the page on one network."""
    wide = found[WIDE]
    way = (
        " → ".join(f"{parameters:,} ({step})" for step, parameters in found[GROWN][0].parameters)
        if GROWN in found
        else ""
    )
    events = fmean(run.event_seconds / run.seconds for run in found[GROWN]) if GROWN in found else 0.0
    return [
        f"## {name}",
        "",
        f"Widths {tuple(plan.narrow)} and {tuple(plan.wide)}, {plan.steps:,} steps of {plan.batch} images, rate {plan.rate:g} "
        f"(growing: {plan.grown_steps:,}, {plan.grown_rate:g}), "
        f"{len(wide)} seeds; the wide run takes {fmean(run.seconds for run in wide):.0f} CPU s. Policy: `{plan.policy}`, "
        f"{plan.events} events. Parameters (step) of the first seed: {way}. Events take {events:.0%} of the growing run.".replace(
            "%", " %", 1
        ),
        "",
        *table(found),
        "",
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all and write the page."""
    parser = argparse.ArgumentParser(prog="python -m experiments.training.growing_early", description=__doc__)
    add_data(parser)
    parser.add_argument("--only", nargs="+", choices=tuple(PLANS), default=tuple(PLANS), help="networks")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default %(default)s)")
    parser.add_argument("--rows", nargs="+", choices=(WIDE, HALF, NARROW, GROWN), default=(WIDE, HALF, NARROW, GROWN))
    parser.add_argument("--page", type=Path, default=Path(__file__).with_suffix(".md"), help="page to write")
    options = parser.parse_args(arguments)
    made = (
        f"Written by `python -m experiments.training.growing_early --seeds {options.seeds}` {machine_line()}, at git "
    )
    lines = [
        "# Starting narrow: grown early, cut late",
        "",
        f"{made}{commit()}, {torch.get_num_threads()} thread(s).",
        "",
        EXPLANATION,
        "",
    ]
    data = Data.of(*MnistData(root=options.data).read(), HELD_OUT)
    for name in options.only:
        found: dict[str, list[Run]] = {}
        for seed in range(options.seeds):
            for row, run in runs(PLANS[name], data, seed, options.rows):
                found.setdefault(row, []).append(run)
                print(f"{name} seed {seed} {row}: {run.curve[-1]}, test {run.test:.2%}, {run.parameters}", flush=True)
        lines += section(name, PLANS[name], found)
    write_whole(options.page, "\n".join(lines).rstrip() + "\n")
    print(f"page: {options.page}")


if __name__ == "__main__":
    main()

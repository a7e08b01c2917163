"""What one event costs beside training: each stage as a share of an epoch and of 100 training steps.

What is measured: an event that cuts every width of the model by a tenth (what a run does between two epochs; the
classes have none), its stages each by itself: statistics (forward passes that gather second moments), spectra,
selection (pivoted Cholesky, and the refit of consumers that are not fitted to their outputs), reconstruction (two forward
passes, and the sequential fits; where it takes the samples of the first batch, the first pass is that of the statistics),
surgery (with AdamW's state), checks (what must hold afterwards, with a forward pass before and one after). The unit is a
training step (forward, backward, AdamW) of the same model on batches of the same size, timed in turns with the stages; each
figure is the median of `--rounds` rounds, and ± half the distance between the quartiles. An epoch is 60,000 images. Seconds
are those of the processor that the process itself took: it does not matter what else runs.

    python -m experiments.bench.event --out experiments/bench/event.md
"""

from __future__ import annotations

import argparse
import copy
import shlex
import statistics as numbers
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import evolvenet  # isort: skip  before torchvision
import torch
import torchvision
from torch import Tensor, nn

from evolvenet.engine.event_data import KEPT
from evolvenet.engine.functional import commit
from evolvenet.engine.invariants import ModelReference, validate
from evolvenet.measurement.activation_moments import collect
from evolvenet.measurement.width_spectra import measure
from evolvenet.pruning.reconstruction import fit_to_targets
from evolvenet.pruning.reconstruction_batch import TRAINING_LIMITS
from evolvenet.pruning.recording import record, record_beside, recording_of
from evolvenet.pruning.selection import plan_prune
from experiments.models.resnet import ResNet
from experiments.pages import machine_line, markdown, write_whole

EPOCH = 60_000
CUT = 0.9
STAGES = ("statistics", "spectra", "selection", "reconstruction", "surgery", "checks")


@dataclass(frozen=True)
class Subject:
    """A model to measure.

    Args:
        make: the model.
        shape: of one image.
        batch: images a training step.
        classes: of the labels.
        observed: batches that an event measures on.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int
    classes: int
    observed: int


SUBJECTS = {
    "MNIST ResNet, 2.4 M": Subject(lambda: ResNet(1, 10, (32, 96, 256), stem_stride=2), (1, 28, 28), 256, 10, 2),
    "MNIST ResNet, 0.4 M": Subject(
        lambda: ResNet(1, 10, (24, 48, 96), stem_stride=2, hidden=64), (1, 28, 28), 256, 10, 2
    ),
    "resnet50": Subject(lambda: torchvision.models.resnet50(), (3, 224, 224), 16, 1000, 2),
    "vit_b_16": Subject(lambda: torchvision.models.vit_b_16(), (3, 224, 224), 16, 1000, 2),
}


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds, and the call's result."""
    began = time.process_time()
    result = call()
    return time.process_time() - began, result


def training_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor, labels: Tensor) -> None:
    """Forward, backward, update."""
    model.train()
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(batch), labels).backward()
    optimizer.step()


def one_round(subject: Subject, model: nn.Module, graph: evolvenet.WidthGraph, seed: int) -> dict[str, float]:
    """CPU seconds of each stage and of a training step, on a copy of the model."""
    generator = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    batches = [torch.randn(subject.batch, *subject.shape, generator=generator) for _ in range(subject.observed)]
    labels = torch.randint(subject.classes, (subject.batch,), generator=generator)
    training_step(model, optimizer, batches[0], labels)
    found: dict[str, float] = {}
    steps = [timed(lambda: training_step(model, optimizer, batches[0], labels))[0] for _ in range(2)]
    outputs = record_beside(model, graph, batches, TRAINING_LIMITS, KEPT)
    found["statistics"], gathered = timed(lambda: collect(model, graph, batches, beside=outputs))
    found["spectra"], _ = timed(lambda: measure(model, graph, gathered))
    sizes = {w.name: max(w.smallest, int(CUT * w.size)) for w in graph.resizable}
    recording_seconds, recording = timed(
        lambda: (
            record(model, graph, list(sizes), batches, TRAINING_LIMITS)
            if outputs is None
            else recording_of(outputs, graph, list(sizes), batches, TRAINING_LIMITS)
        )
    )
    assert recording is not None
    found["selection"], surgery = timed(lambda: plan_prune(model, graph, sizes, gathered, without=recording.fitted))
    fit_seconds, surgery = timed(lambda: fit_to_targets(model, graph, surgery, recording))
    found["reconstruction"] = recording_seconds + fit_seconds
    steps += [timed(lambda: training_step(model, optimizer, batches[0], labels))[0] for _ in range(2)]
    before_seconds, before = timed(lambda: ModelReference.of(model, batches[0][:2]))
    found["surgery"], after = timed(lambda: commit(model, surgery, optimizer))
    after_seconds, _ = timed(lambda: validate(model, after, [optimizer], batches[0][:2], before))
    found["checks"] = before_seconds + after_seconds
    found["step"] = numbers.median(steps)
    return found


def table(subject: Subject, rounds: list[dict[str, float]]) -> list[str]:
    """Lines of Markdown: each stage in training steps, as a share of 100 steps and of an epoch."""
    epoch, rows = EPOCH / subject.batch, []
    for stage in (*STAGES, "the whole event"):
        names = STAGES if stage not in STAGES else (stage,)
        ratios = sorted(sum(each[name] for name in names) / each["step"] for each in rounds)
        middle = numbers.median(ratios)
        low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
        spread = (high - low) / 2
        rows.append([stage, f"{middle:.2f} ± {spread:.2f}", f"{middle:.1f} %", f"{100 * middle / epoch:.2f} %"])
    return markdown(["stage", "training steps", "of 100 steps", "of an epoch"], rows)


def main(arguments: list[str]) -> None:
    """Measure the subjects and write the page."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.bench.event",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=list(SUBJECTS), help="subjects, by name")
    parser.add_argument("--out", type=Path, help="a Markdown file; without it the page is printed")
    options = parser.parse_args(arguments)
    lines = ["# What one event costs", "", (__doc__ or "").split("\n\n", 1)[1].rsplit("\n\n", 1)[0], ""]
    command = " ".join(["python -m experiments.bench.event", *map(shlex.quote, arguments)])
    lines += [f"`{command}`: {options.rounds} rounds (seeds 0 …), random images, {machine_line()}", ""]
    lines += [
        f"Threads of PyTorch: {torch.get_num_threads()}. Goal: an event costs at most 1 % of an epoch, and 5 training steps.",
        "",
    ]
    for name in options.only:
        subject = SUBJECTS[name]
        torch.manual_seed(0)
        model = subject.make()
        graph = evolvenet.trace(model, torch.zeros(1, *subject.shape))
        rounds = [one_round(subject, model, graph, seed) for seed in range(options.rounds)]
        count = subject.batch * subject.observed
        lines += [f"## {name}", "", f"Batches of {subject.batch}, {count} images measured on.", ""]
        lines += [*table(subject, rounds), ""]
        print("\n".join(lines[-len(STAGES) - 5 :]), file=sys.stderr, flush=True)
    page = "\n".join(lines)
    if options.out:
        write_whole(options.out, page)
    else:
        print(page)


if __name__ == "__main__":
    main(sys.argv[1:])

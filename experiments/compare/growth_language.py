"""What a growth at a third of a training is worth, by how new units start: a character LLaMA whose feed-forward or stream grows.

    python -m experiments.compare.growth_language

Every run has the same text, sequences, steps and learning-rate schedule. The worth of a growth is the share of the gap between
the small and the large network, both trained from scratch, that it closes.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import evolvenet
from evolvenet.surgery.norm_expansion import COLUMNS
from experiments.compare.language_networks import FULL, Setting, Text, build, drawn, loss_of, mean_loss, windows
from experiments.pages import commit, machine_line, write_whole

SETTING = dataclasses.replace(
    FULL, layers=2, width=48, heads=4, context=64, batch=8, steps=300, judged=256, seeds=(0, 1)
)
AT = 1 / 3
"""Share of the steps after which the network grows."""
FFN, STREAM = (48, 192), (24, 48)
"""Units of each feed-forward layer, and of the stream, before and after."""

CALIBRATION = 8, 32
"""Batches, and training sequences in each, for starts that use the loss."""

Pairs = Sequence[tuple[Any, Tensor]]
"""(inputs, characters) of each batch."""

Start = Callable[[Any, evolvenet.WidthGraph, dict[str, int], torch.optim.Optimizer, Pairs], None]
"""(model, its widths, {width: new size}, optimizer, batches for starts that use the loss): grows the model."""


def grown(
    method: str = "orthogonal",
    *,
    columns: float | None = None,
    fresh: bool = False,
    zero_up: bool = False,
    update: bool = False,
) -> Start:
    """A growth by `evolvenet.grow`, with changes to what its new units start with.

    Args:
        method: of `grow`.
        columns: norm of new columns of a stream, in mean norms of the present ones; None for that of `grow`.
        fresh: whether second moments of the optimizer start at 0 for new units instead of the mean of the others.
        zero_up: whether new units get 0 from `up_proj` and random columns, instead of random rows and columns of 0.
        update: whether the weights around the new units move so that the loss falls.
    """

    def grow(
        model: Any,
        graph: evolvenet.WidthGraph,
        sizes: dict[str, int],
        optimizer: torch.optim.Optimizer,
        pairs: Pairs,
    ) -> None:
        before = {name: graph.widths[name] for name in sizes}
        data: dict[str, Any] = {"batches": pairs, "loss": next_character_loss, "update": True} if update else {}
        after = evolvenet.grow(model, graph, sizes, method, optimizers=optimizer, **data)
        for name, width in before.items():
            for tie in after.widths[name].ties:
                parameter: Tensor = model.get_parameter(tie.tensor)
                new = (tie.dim, width.size, after.widths[name].size - width.size)
                with torch.no_grad():
                    part = parameter.narrow(*new)
                    if zero_up and tie.role == "consumes":
                        old = parameter.narrow(tie.dim, 0, width.size)
                        part.copy_(torch.randn_like(part) * old.std())
                    elif zero_up and "up_proj" in tie.tensor:
                        part.zero_()
                    elif columns is not None and tie.role == "consumes":
                        part.mul_(columns / COLUMNS)
                    if fresh and parameter in optimizer.state:
                        optimizer.state[parameter]["exp_avg_sq"].narrow(*new).zero_()

    return grow


STARTS: dict[str, tuple[str, Start | None, bool]] = {
    "orthogonal rows, columns of 0": ("FFN", grown(), False),
    "paired (equal rows, opposite columns)": ("FFN", grown("paired"), False),
    "paired, second moments of 0": ("FFN", grown("paired", fresh=True), False),
    "paired, learning rate warmed up again": ("FFN", grown("paired"), True),
    "paired, update (changes the function)": ("FFN", grown("paired", update=True), False),
    "tiny, update (changes the function)": ("FFN", grown("tiny", update=True), False),
    "0 from up_proj, random columns": ("FFN", grown(zero_up=True), False),
    "zeros, random columns of 0.3 times the mean norm": ("stream", grown(columns=0.3), False),
    "zeros, random columns of the mean norm": ("stream", grown(columns=1.0), False),
    "the same, second moments of 0": ("stream", grown(columns=1.0, fresh=True), False),
    "zeros, random columns of 2 times the mean norm (now the default)": ("stream", grown(columns=2.0), False),
    "zeros, random columns of 4 times the mean norm": ("stream", grown(columns=4.0), False),
}
"""Kind of units, how they start, and whether the learning rate rises from 0 in the tenth of the steps that follow."""


def next_character_loss(output: Any, sequences: Tensor) -> Tensor:
    """Mean cross-entropy of each character but the first, in nats."""
    return functional.cross_entropy(output.logits[:, :-1].flatten(0, 1).float(), sequences[:, 1:].flatten())


def calibration(text: Text, setting: Setting, seed: int) -> Pairs:
    """Batches of training sequences."""
    count, size = CALIBRATION
    generator = torch.Generator().manual_seed(1000 + seed)
    drawn_parts = [drawn(text.train, setting.context, size, generator) for _ in range(count)]
    return [({"input_ids": part}, part) for part in drawn_parts]


def network(kind: str, large: bool, setting: Setting) -> nn.Module:
    """A LLaMA with the feed-forward layers or the stream of one of the two sizes."""
    model: Any = build("llama", setting)
    config = model.config
    config.head_dim = setting.width // setting.heads
    config.hidden_size = STREAM[large] if kind == "stream" else setting.width
    config.intermediate_size = FFN[large] if kind == "FFN" else 3 * setting.width
    return type(model)(config)


@cache
def traced(kind: str, setting: Setting) -> evolvenet.WidthGraph:
    """The widths of the small network."""
    return evolvenet.trace(network(kind, False, setting), {"input_ids": torch.zeros(1, 8, dtype=torch.int64)})


def trained(kind: str, large: bool, start: Start | None, warm: bool, seed: int, text: Text, setting: Setting) -> float:
    """The test loss of one network that has been trained, and has grown on the way if there is a start."""
    torch.manual_seed(seed)
    model, generator = network(kind, large, setting), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting.rate, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, setting.rate, total_steps=setting.steps + 1, pct_start=0.1
    )
    at, span = round(AT * setting.steps), setting.steps // 10
    for step in range(setting.steps):
        if step == at and start is not None:
            graph = traced(kind, setting)
            size, pairs = (FFN if kind == "FFN" else STREAM)[1], calibration(text, setting, seed)
            start(model, graph, {width.name: size for width in graph.resizable if width.kind == kind}, optimizer, pairs)
        model.train()
        optimizer.zero_grad()
        loss_of(model, drawn(text.train, setting.context, setting.batch, generator)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] *= min(1.0, (step - at + 1) / span) if warm and step >= at else 1.0
        optimizer.step()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        schedule.step()
    return mean_loss(model, windows(text.test, setting.context, setting.judged))


def table(found: dict[tuple[str, str], list[float]]) -> str:
    """The rows of all runs, each with the share of the gap that it closes."""
    rows = [
        "| what grows | new units | test loss of each seed | mean | share of the gap |",
        "| --- | --- | --- | ---: | ---: |",
    ]
    for (kind, name), losses in found.items():
        small, large = (
            statistics.mean(found[kind, end]) for end in ("none: small throughout", "none: large throughout")
        )
        mean = statistics.mean(losses)
        each = ", ".join(f"{loss:.3f}" for loss in losses)
        rows.append(f"| {kind} | {name} | {each} | {mean:.3f} | {(small - mean) / (small - large):.0%} |")
    return "\n".join(rows)


def runs(text: Text, setting: Setting) -> dict[tuple[str, str], list[float]]:
    """The losses of all runs."""
    found: dict[tuple[str, str], list[float]] = {}
    for kind in ("FFN", "stream"):
        for name, large in (("none: small throughout", False), ("none: large throughout", True)):
            found[kind, name] = [trained(kind, large, None, False, seed, text, setting) for seed in setting.seeds]
            print(kind, name, found[kind, name], flush=True)
        for name, (of, start, warm) in STARTS.items():
            if of == kind:
                found[kind, name] = [trained(kind, False, start, warm, seed, text, setting) for seed in setting.seeds]
                print(kind, name, found[kind, name], flush=True)
    return found


def main() -> None:
    """Train, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, default=Path("results/language.txt"))
    parser.add_argument("--page", type=Path, default=Path(__file__).with_suffix(".md"))
    options = parser.parse_args()
    options.text.parent.mkdir(parents=True, exist_ok=True)
    text = Text.read(options.text)
    found = runs(text, SETTING)
    write_whole(options.page, page(table(found)))


def page(rows: str) -> str:
    """The page, without what follows from it."""
    return f"""# Growing a character LLaMA: what a growth is worth

Written by `python -m experiments.compare.growth_language` {machine_line()}, package at {commit()}.

{SETTING.layers} layers, context {SETTING.context}, batches of {SETTING.batch}, {SETTING.steps} steps of AdamW with one cycle
of the learning rate up to {SETTING.rate}; text as in `make compare-language`; seeds {SETTING.seeds}. At a third of the
steps all feed-forward layers grow from {FFN[0]} to {FFN[1]} units (stream of {SETTING.width}), or the stream from
{STREAM[0]} to {STREAM[1]}. Mean cross-entropy on {SETTING.judged} test sequences, in nats. The share of the gap is between
the networks that are small and large from the first step to the last.

{rows}
"""


if __name__ == "__main__":
    main()

"""Ranks beside widths in training: `python -m experiments.training.lowrank --data DIR`, or `make compare-lowrank`.

A dense network is trained on MNIST while a `Budget` shrinks it to a share of its parameters, once with widths alone and
once with ranks as well. The start, the order of the images and the times of the events are the same for both. Each result is
one line of a file, so that a run can be stopped and resumed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch.nn import functional

from evolvenet import Budget, Evolver
from evolvenet.lowrank.layers import FactoredLayer
from experiments.compare.lowrank_networks import tasks
from experiments.compare.networks import TaskData
from experiments.data.images import BatchLoader
from experiments.pages import add_data, commit, machine_line, markdown, write_whole

SHARES = (0.05, 0.15)
EPOCHS, BATCH, EVERY, RATE = 3, 128, 60, 1e-3
PAGE = Path(__file__).with_suffix(".md")


def run(data: TaskData, seed: int, share: float, lowrank: bool, epochs: int = EPOCHS) -> dict[str, Any]:
    """Train one network to a share of its parameters; its accuracy on the test images, %, and what it has become."""
    torch.manual_seed(seed)
    model = data.task.build()
    start = sum(parameter.numel() for parameter in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    loader = BatchLoader(data.train, BATCH, data.task.augmented, shuffle=True, seed=seed)
    total = epochs * len(loader)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=total, pct_start=0.1)
    policy = Budget(params=share * start, by=0.6, lowrank=lowrank)
    evolver = Evolver(model, optimizer, policy, data.example, seed=seed)
    done = 0
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        for images, labels in loader:
            optimizer.zero_grad()
            functional.cross_entropy(model.train()(images), labels).backward()
            optimizer.step()
            schedule.step()
            done += 1
            if EVERY - done % EVERY <= 4:
                evolver.observe(images)
            if done % EVERY == 0 and done < 0.75 * total:
                evolver.step(progress=done / total)
                evolver.forget()
    return {
        "seed": seed,
        "share": share,
        "lowrank": lowrank,
        "accuracy": 100 * data.accuracy(model),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "start": start,
        "sizes": evolver.graph.sizes,
        "chains": sum(isinstance(module, FactoredLayer) for module in model.modules()),
    }


def page(results: list[dict[str, Any]]) -> str:
    """The result page."""
    head = ["parameters left", "widths alone", "widths and ranks", "difference", "seeds"]
    rows: list[list[str]] = []
    for share in sorted({each["share"] for each in results}):
        found = {
            lowrank: {
                each["seed"]: each["accuracy"]
                for each in results
                if (each["share"], each["lowrank"]) == (share, lowrank)
            }
            for lowrank in (False, True)
        }
        seeds = sorted(set(found[False]) & set(found[True]))
        apart = [found[True][seed] - found[False][seed] for seed in seeds]
        columns = [_deviation([found[lowrank][seed] for seed in seeds]) for lowrank in (False, True)]
        rows.append([f"{share:.0%}", *columns, _deviation(apart, "+"), str(len(seeds))])
    counts = [each["chains"] for each in results if each["lowrank"]]
    return "\n".join(
        [
            "# Ranks beside widths, in training",
            "",
            f"Written by `python -m experiments.training.lowrank` {machine_line()}, git {commit()}.",
            "",
            f"A dense network of {results[0]['start']:,} parameters (`mnist_dense`) is trained on MNIST for {EPOCHS} epochs "
            f"(AdamW, batches of {BATCH}, one cycle up to {RATE:g}) while `Budget(params=…, by=0.6)` makes it smaller, at an "
            f"event every {EVERY} steps, with `lowrank=True` or without. Accuracy on the 10,000 test images, %, mean ± standard "
            "deviation of a sample over the seeds; the difference is that of pairs of one seed.",
            "",
            *markdown(head, rows),
            "",
            f"With ranks, {min(counts)} to {max(counts)} of its 4 layers have ended as chains of two.",
            "",
        ]
    )


def _deviation(values: list[float], sign: str = "") -> str:
    return f"{mean(values):{sign}.2f} ± {stdev(values) if len(values) > 1 else 0.0:.2f}"


def main() -> None:
    """Run what is missing, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_data(parser)
    parser.add_argument("--out", type=Path, default=Path("outputs/training-lowrank.jsonl"))
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--shares", type=float, nargs="+", default=list(SHARES))
    parser.add_argument("--task", default="mnist_dense")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    given = parser.parse_args()
    results = [json.loads(line) for line in given.out.read_text("utf-8").splitlines()] if given.out.exists() else []
    known = {(each["seed"], each["share"], each["lowrank"]) for each in results}
    data = TaskData.open(tasks()[given.task], given.data)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    for seed in given.seeds:
        for share in given.shares:
            for lowrank in (False, True):
                if (seed, share, lowrank) not in known:
                    results.append(run(data, seed, share, lowrank, given.epochs))
                    print(results[-1], flush=True)
                    with given.out.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(results[-1]) + "\n")
    write_whole(given.page, page(results))


if __name__ == "__main__":
    main()

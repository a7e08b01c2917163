"""Steps and seconds from a trained network to a small one nearly as good: `python -m experiments.compare.time_to_accuracy`.

A network of a tenth of the parameters is made by `evolvenet.allocate` and `evolvenet.prune`, by `evolvenet.polish` too or not,
and trained on; or its widths are trained from new weights. All are tried with cycles of the learning rate of several lengths,
the short ones first, until the accuracy that is watched is within a point of the uncut network's. Each result is one small
JSON file, so a run can be stopped and resumed. The page `experiments/compare/time_to_accuracy.md` is written from those files;
`make compare-time` does all.
"""

from __future__ import annotations

import evolvenet  # isort: skip  # before torchvision, which it patches

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from experiments.compare import peers
from experiments.compare.copies import copied
from experiments.compare.time_to_accuracy_subjects import WAYS, Subject, subject
from experiments.compare.time_to_accuracy_table import write_page
from experiments.pages import add_data, commit, state, write_whole

OWN, EQUAL = "own", "equal"
"""Widths by `evolvenet.allocate`, and the same share of each width."""
CUT, POLISHED, SCRATCH = "cut", "polished", "scratch"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing and write the page."""
    options = _options(arguments)
    # Once, at the start: the sources may change during the run, which uses the modules loaded then.
    options.made_of = {"state": state(), "commit": commit(), "threads": torch.get_num_threads()}
    for name in options.only:
        for seed in options.seeds:
            study = Study(subject(name, seed, options.data, options.trained, options.tiny), options)
            for kept in options.kept:
                for widths in options.widths:
                    for line in study.run(kept, widths):
                        print(f"{name} seed {seed} {kept} % {widths} widths: {line}", flush=True)
    write_page(options.page, options.cache)
    print(f"page: {options.page}")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m experiments.compare.time_to_accuracy", description=__doc__)
    add_data(parser)
    default = ("mnist", "cifar10", "gpt2")
    parser.add_argument("--only", nargs="+", choices=tuple(WAYS), default=default, help="tasks")
    parser.add_argument("--seeds", nargs="+", type=int, default=(0,), help="of the networks")
    parser.add_argument("--kept", nargs="+", type=int, default=(10,), help="percent of the parameters that stay")
    parser.add_argument("--widths", nargs="+", choices=(OWN, EQUAL), default=(OWN, EQUAL))
    parser.add_argument("--starts", nargs="+", choices=(CUT, POLISHED, SCRATCH), default=(CUT, POLISHED, SCRATCH))
    parser.add_argument("--longest", type=int, help="steps of the longest cycle (default: each task's own)")
    parser.add_argument("--tiny", action="store_true", help="a language model of two layers, for trials")
    parser.add_argument("--keep-old", action="store_true", help="keep results of an older state of the package")
    parser.add_argument("--trained", type=Path, default=Path("outputs/compare"), help="folder of the uncut networks")
    parser.add_argument("--cache", type=Path, default=Path("outputs/time_to_accuracy"), help="folder of the results")
    parser.add_argument("--page", type=Path, default=Path(__file__).with_suffix(".md"), help="page to write")
    return parser.parse_args(arguments)


class Study:
    """One trained network, made small in several ways.

    Args:
        of: the network with its task.
        options: of the command line.
    """

    def __init__(self, of: Subject, options: argparse.Namespace) -> None:
        self.subject, self.options = of, options
        with cpu_seconds() as traced:
            self.graph = evolvenet.trace(of.model, of.example, of.outputs, heads=of.heads)
        self.trace_seconds = traced()
        self.uncut = of.accuracy(of.model, "watched")

    def run(self, kept: int, widths: str) -> Iterator[str]:
        """Make the network small and train it, from both starts; results that are there are not made again."""
        folder = self.options.cache / self.subject.name / f"seed{self.subject.seed}"
        made = self._cut(kept, widths, folder)
        yield f"{made['parameters']:,} parameters, cut in {made['seconds']} CPU s"
        ways = self.subject.ways
        longest = self.options.longest or max(ways.lengths)
        for start in self.options.starts:
            path = folder / f"{kept}-{widths}-{start}.json"
            weights = folder / f"{kept}-{widths}.pt"
            found = read(path, made) or {**made, "start": start, "climbs": []}
            if start == POLISHED:
                weights = folder / f"{kept}-{widths}-polished.pt"
                if "polish_steps" not in found or not weights.exists():
                    found |= self.polished(found, folder / f"{kept}-{widths}.pt", weights)
            tried = {(climb["steps"], climb["rate"]) for climb in found["climbs"]}
            for steps in (length for length in ways.lengths if length <= longest):
                if any(str(ways.margins[0]) in climb["crossed"] for climb in found["climbs"]):
                    break
                for rate in promising(found["climbs"], ways.scratch if start == SCRATCH else ways.cut):
                    if (steps, rate) not in tried:
                        model = self.scratch(made["sizes"]) if start == SCRATCH else self.cut(made["sizes"], weights)
                        found["climbs"].append(self.climb(model, steps, rate, ways.warm[start == SCRATCH]))
                        write_whole(path, json.dumps(found, indent=1))
                        yield f"{start}: {_line(found['climbs'][-1])}"

    def _cut(self, kept: int, widths: str, folder: Path) -> dict[str, Any]:
        """What is known of the cut network, which lies in the folder then."""
        path, weights = folder / f"{kept}-{widths}.json", folder / f"{kept}-{widths}.pt"
        made_of = {"weights": self.subject.weights}
        found = read(path, made_of)
        if found and weights.exists() and (self.options.keep_old or found["state"] == self.options.made_of["state"]):
            return found
        for old in folder.glob(f"{kept}-{widths}-*"):
            old.unlink()
        torch.manual_seed(self.subject.seed)
        model, batches, target = (
            copied(self.subject.model),
            self.subject.calibration(),
            round(self.graph.parameters * kept / 100),
        )
        begin = time.perf_counter()
        with cpu_seconds() as allocated:
            if widths == OWN:
                sizes = dict(evolvenet.allocate(model, self.graph, target, batches, loss=self.subject.measure))
            else:
                sizes = peers.equal_sizes(self.graph, target)
        with cpu_seconds() as pruned:
            graph = evolvenet.prune(model, self.graph, sizes, batches=batches)
        seconds = {"trace": self.trace_seconds, "allocate": allocated(), "prune": pruned()}
        found = {
            "task": self.subject.name,
            "seed": self.subject.seed,
            "kept": kept,
            "widths": widths,
            **made_of,
            **self.options.made_of,
            "uncut": {"watched": self.uncut, "judged": self.subject.accuracy(self.subject.model, "judged")},
            "uncut_parameters": self.graph.parameters,
            "parameters": graph.parameters,
            "sizes": graph.sizes,
            "seconds": {name: round(each, 2) for name, each in seconds.items()},
            "wall": round(time.perf_counter() - begin, 2),
        }
        write_whole(path, json.dumps(found, indent=1))
        torch.save(model.state_dict(), weights)
        return found

    def cut(self, sizes: dict[str, int], weights: Path) -> nn.Module:
        """The cut network, from the file of its weights."""
        model = self.narrowed(copied(self.subject.model), sizes)
        model.load_state_dict(torch.load(weights, weights_only=True))
        return model

    def polished(self, made: dict[str, Any], cut: Path, weights: Path) -> dict[str, Any]:
        """Polish the cut network, write its weights to a file, and say what it took."""
        model = self.cut(made["sizes"], cut)
        with cpu_seconds() as spent:
            done = self.subject.polish(model)
        torch.save(model.state_dict(), weights)
        return {"polish_steps": done.steps, "seconds": {**made["seconds"], "polish": round(spent(), 2)}}

    def scratch(self, sizes: dict[str, int]) -> nn.Module:
        """New weights in the given widths."""
        torch.manual_seed(self.subject.seed + 100)
        model = self.narrowed(self.subject.fresh(), sizes)
        if not self.subject.heads:
            # Scaled for the widths as they are now. The language model's do not depend on them.
            for module in model.modules():
                restart: Callable[[], None] | None = getattr(module, "reset_parameters", None)
                if restart is not None:
                    restart()
        return model

    def narrowed(self, model: nn.Module, sizes: dict[str, int]) -> nn.Module:
        """The model with the first units of each width alone."""
        widths = self.graph.widths
        kept = {name: evolvenet.IndexMap.keep(range(size), size=widths[name].size) for name, size in sizes.items()}
        evolvenet.resize(model, self.graph, kept)
        return model

    def climb(self, model: nn.Module, steps: int, rate: float, warm: float) -> dict[str, Any]:
        """Train until the accuracy that is watched is within the least margin, or for all the steps.

        Args:
            model: is trained in place.
            steps: of the whole cycle.
            rate: the largest learning rate.
            warm: share of the steps in which it rises.

        Returns:
            "curve", the watched accuracy by step; "crossed", by margin: step, CPU seconds of the training steps until then and
            accuracy on the judged part.
        """
        of, seconds = self.subject, 0.0
        of.begin(model)
        optimizer, batches = of.optimizer(model, rate), of.training(of.seed + 100)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=warm)
        every, curve, crossed = max(1, steps // of.ways.watches), [], {}
        for step in range(steps + 1):
            if step % every == 0 or step == steps:
                curve.append((step, of.accuracy(model, "watched")))
                for margin in of.ways.margins:
                    if str(margin) not in crossed and curve[-1][1] >= self.uncut - margin / 100:
                        judged = of.accuracy(model, "judged")
                        crossed[str(margin)] = {"step": step, "seconds": round(seconds, 2), "judged": judged}
            if str(of.ways.margins[0]) in crossed or step == steps:
                break
            with cpu_seconds() as trained:
                model.train()
                optimizer.zero_grad()
                of.loss(model, next(batches)).backward()
                of.clip(model)
                optimizer.step()
                schedule.step()
            seconds += trained()
        done = curve[-1][0]
        each = round(seconds / done, 5) if done else None
        return {"steps": steps, "rate": rate, "seconds_a_step": each, "curve": curve, "crossed": crossed}


def promising(climbs: Sequence[dict[str, Any]], rates: Sequence[float]) -> Sequence[float]:
    """All rates for the two shortest cycles; for longer ones that alone which was best in the second.

    >>> tried = [{"steps": steps, "rate": rate, "curve": [(0, rate * steps)]} for steps in (10, 20) for rate in (0.1, 0.01)]
    >>> promising(tried[:2], (0.1, 0.01)), promising(tried, (0.1, 0.01))
    ((0.1, 0.01), (0.1,))
    """
    lengths = sorted({climb["steps"] for climb in climbs})
    second = [climb for climb in climbs if len(lengths) > 1 and climb["steps"] == lengths[1]]
    if len(second) < len(rates):
        return rates
    return (max(second, key=lambda climb: max(accuracy for _, accuracy in climb["curve"]))["rate"],)


@contextmanager
def cpu_seconds() -> Iterator[Callable[[], float]]:
    """Processor time of this process within the block, from a function that is called afterwards."""
    begin, spent = time.process_time(), [0.0]
    yield lambda: spent[0]
    spent[0] = time.process_time() - begin


def read(path: Path, made_of: dict[str, Any]) -> dict[str, Any] | None:
    """A result, if it is there and of the same trained network, cut by the same code where that is given."""
    if not path.exists():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    same = all(found.get(name) == made_of[name] for name in ("weights", "state") if name in made_of)
    return found if same else None


def _line(climb: dict[str, Any]) -> str:
    reached = (
        ", ".join(f"−{margin} at {each['step']}" for margin, each in climb["crossed"].items()) or "nothing reached"
    )
    best = max(accuracy for _, accuracy in climb["curve"])
    return f"cycle of {climb['steps']} steps at {climb['rate']}: best {best:.2%}; {reached}"


if __name__ == "__main__":
    main()

"""After a sweep (`python train.py -m ...`): one table of all its runs, best first, and pictures of their sizes and accuracies."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from statistics import fmean
from typing import Any

from hydra.experimental.callback import Callback
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from omegaconf import DictConfig

from evolvenet.cli.runs import points_of, runs_below
from evolvenet.report.front import draw_front
from experiments.pages import cell, markdown, span
from experiments.training.fronts import fronts_table
from experiments.training.jobs import FAILURE, RESULT


class SweepTable(Callback):
    """Writes `sweep.md`, `sweep.png` and `front.png` beside the runs' directories, and prints the table."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Called by Hydra once, after the last run.

        Raises:
            SystemExit: with status 1 if every run has failed, so that a script that started the sweep stops.
        """
        directory = Path(config.hydra.sweep.dir)
        print(f"\n{tabulate(directory)}", flush=True)
        if any(directory.rglob(FAILURE)) and not any(directory.rglob(RESULT)):
            raise SystemExit(1)


def tabulate(directory: Path) -> str:
    """Write the table and the pictures of all runs below a folder into it; returns the table, and where they are.

    Args:
        directory: of a sweep, or of several.
    """
    if not _runs(directory):
        return f"no run below {directory} has ended with a result{_failures(directory)}"
    table = sweep_table(directory) + seeds_table(directory) + _front(directory)
    (directory / "sweep.md").write_text(table, encoding="utf-8")
    draw_sweep(directory).savefig(directory / "sweep.png", dpi=120)
    draw_front(points_of([directory])).savefig(directory / "front.png", dpi=140)
    places = f"table: {directory / 'sweep.md'}\npictures: {directory / 'sweep.png'}, {directory / 'front.png'}"
    return f"{table}{_failures(directory)}\n{places}"


def _failures(directory: Path) -> str:
    """A line for each run that ended with an error and has no result."""
    failed = [path for path in sorted(directory.rglob(FAILURE)) if not (path.parent / RESULT).is_file()]
    lines = [f"failed: {path.parent.relative_to(directory)}: {_last_line(path)}" for path in failed]
    return "".join(f"\n{line}" for line in lines) + ("\n" if lines else "")


def _last_line(path: Path) -> str:
    return next(iter(path.read_text(encoding="utf-8").strip().splitlines()[::-1]), "")


def _front(directory: Path) -> str:
    """Mean and deviation at each point if all runs are one front with several seeds, else an empty string."""
    groups = list(_groups(directory).values())
    if len(groups) == 1 and len(groups[0]) > 1 and all(result["front"] for result in groups[0]):
        return "\n" + fronts_table(groups[0])
    return ""


def draw_sweep(directory: Path) -> Figure:
    """Parameters against optimizer steps, on a log scale, a line for each run under a sweep's directory; seeds share a colour."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    panel = figure.subplots()
    for place, (settings, results) in enumerate(_groups(directory).items()):
        counts = sorted(result["end"]["parameters"] for result in results)
        label = f"{settings}: {span([f'{count:,}' for count in counts])} parameters, test {_tests(results)} %"
        for result in results:
            events = [result["history"]["initial"], *result["history"]["events"]]
            steps = [*(event["step"] for event in events), result["steps"]]
            sizes = [*(event["parameters"] for event in events), events[-1]["parameters"]]
            panel.step(steps, sizes, where="post", color=f"C{place}", label=label, lw=1.5 if len(results) == 1 else 1)
            label = None
    panel.set_yscale("log")
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    panel.set_xlabel("optimizer step")
    panel.set_ylabel("parameters")
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, fontsize="small")
    return figure


def sweep_table(directory: Path) -> str:
    """The results under a sweep's directory as a Markdown table, the highest validation accuracy first."""
    head = ["run", "settings", "parameters", "MACs", "validation", "test", "seconds"]
    rows = [_row(name, own, result) for name, own, result in _runs(directory)]
    return "\n".join(markdown(head, rows, text=(0, 1))) + "\n"


def seeds_table(directory: Path) -> str:
    """Mean ± standard deviation (of a sample) over the seeds of each setting, as Markdown; empty if no setting has two."""
    groups = _groups(directory)
    if all(len(results) == 1 for results in groups.values()):
        return ""
    rows = []
    for settings, results in groups.items():
        counts = [result["end"]["parameters"] for result in results]
        each = " ".join(
            f"{count:,}: {100 * result['test_acc']:.2f}" for count, result in zip(counts, results, strict=True)
        )
        validation = cell([result["val_acc"] for result in results if result["val_acc"] is not None])
        rows.append([settings, f"{fmean(counts):,.0f}", validation, _tests(results), each])
    head = ["settings", "parameters", "validation, %", "test, %", "of each seed"]
    return "\n" + "\n".join(markdown(head, rows, text=(0, 4))) + "\n"


def _tests(results: Sequence[Mapping[str, Any]]) -> str:
    return cell([result["test_acc"] for result in results])


def _groups(directory: Path) -> dict[str, list[dict[str, Any]]]:
    """The results of each setting, in the order of their seeds; overrides that all runs share are left out of its name."""
    found: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for name, own, result in _runs(directory):
        words = own.split(" ")
        seeds = [word for word in words if re.fullmatch(r"seed=\d+", word)]
        settings = " ".join(word for word in words if word not in seeds)
        seed = int(seeds[0].removeprefix("seed=")) if seeds else 0
        found.setdefault(settings or ("all" if seeds else name), []).append((seed, result))
    return {settings: [result for _, result in sorted(runs, key=itemgetter(0))] for settings, runs in found.items()}


def _runs(directory: Path) -> list[tuple[str, str, dict[str, Any]]]:
    """For each run its folder's name, the overrides that not all runs share, and its result; best validation first."""
    runs = [(run.name, run.settings, run.result) for run in runs_below([directory])]
    return sorted(runs, key=lambda run: (-(run[2]["val_acc"] or 0.0), len(run[0]), run[0]))


def _row(name: str, settings: str, result: Mapping[str, Any]) -> list[str]:
    return [
        name,
        settings,
        f"{result['end']['parameters']:,}",
        f"{result['end']['macs']:,}",
        f"{result['val_acc']:.2%}" if result["val_acc"] is not None else "",
        f"{result['test_acc']:.2%}",
        f"{result['seconds']:.0f}",
    ]

"""After a sweep (`python train.py -m ...`): one table of all its runs, best first, and a picture of their sizes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from omegaconf import DictConfig, OmegaConf

from experiments.fronts import fronts_table


class SweepTable(Callback):
    """Writes `sweep.md` and `sweep.png` beside the runs' directories, and prints the table."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Called by Hydra once, after the last run."""
        directory = Path(config.hydra.sweep.dir)
        table = sweep_table(directory) + _front(directory)
        (directory / "sweep.md").write_text(table, encoding="utf-8")
        draw_sweep(directory).savefig(directory / "sweep.png", dpi=120)
        print(f"\n{table}\ntable: {directory / 'sweep.md'}\npicture: {directory / 'sweep.png'}")


def _front(directory: Path) -> str:
    """Mean and deviation at each point, where all runs are one front with several seeds; else nothing."""
    runs = _runs(directory)
    seeds = {own.removeprefix("seed="): result for _, own, result in runs}
    if len(seeds) > 1 and all(map(str.isdigit, seeds)) and all(result["front"] for result in seeds.values()):
        return "\n" + fronts_table([seeds[seed] for seed in sorted(seeds, key=int)])
    return ""


def draw_sweep(directory: Path) -> Figure:
    """Parameters against optimizer steps, on a log scale, a line for each run under a sweep's directory."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    panel = figure.subplots()
    for name, own, result in _runs(directory):
        events = [result["history"]["initial"], *result["history"]["events"]]
        steps = [*(event["step"] for event in events), result["steps"]]
        sizes = [*(event["parameters"] for event in events), events[-1]["parameters"]]
        label = f"{own or name}: {sizes[-1]:,} parameters, test {result['test_acc']:.2%}"
        panel.step(steps, sizes, where="post", label=label)
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
    lines = [
        "| run | settings | parameters | MACs | validation | test | seconds |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [_row(name, own, result) for name, own, result in _runs(directory)]
    return "\n".join(lines) + "\n"


def _runs(directory: Path) -> list[tuple[str, str, dict[str, Any]]]:
    """Of each run its folder's name, the settings that not all have, and its result; the best validation accuracy first."""
    runs = [(path.parent, json.loads(path.read_text(encoding="utf-8"))) for path in directory.glob("*/result.json")]
    runs.sort(key=lambda run: -(run[1]["val_acc"] or 0.0))
    settings = {folder: _overrides(folder) for folder, _ in runs}
    shared = set.intersection(*map(set, settings.values())) if len(runs) > 1 else set()
    own = {folder: " ".join(each for each in settings[folder] if each not in shared) for folder in settings}
    return [(folder.name, own[folder], result) for folder, result in runs]


def _overrides(folder: Path) -> list[str]:
    return [str(override) for override in OmegaConf.load(folder / ".hydra" / "overrides.yaml")]


def _row(name: str, settings: str, result: Mapping[str, Any]) -> str:
    cells = [
        name,
        settings,
        f"{result['end']['parameters']:,}",
        f"{result['end']['macs']:,}",
        f"{result['val_acc']:.2%}" if result["val_acc"] is not None else "",
        f"{result['test_acc']:.2%}",
        f"{result['seconds']:.0f}",
    ]
    return f"| {' | '.join(cells)} |"

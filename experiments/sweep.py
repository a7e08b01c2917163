"""After a sweep (`python train.py -m ...`): one table of all its runs, best first."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf


class SweepTable(Callback):
    """Writes `sweep.md` beside the runs' directories and prints it."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Called by Hydra once, after the last run."""
        directory = Path(config.hydra.sweep.dir)
        table = sweep_table(directory)
        (directory / "sweep.md").write_text(table, encoding="utf-8")
        print(f"\n{table}\ntable: {directory / 'sweep.md'}")


def sweep_table(directory: Path) -> str:
    """The results under a sweep's directory as a Markdown table, the highest validation accuracy first."""
    runs = [(path.parent, json.loads(path.read_text(encoding="utf-8"))) for path in directory.glob("*/result.json")]
    runs.sort(key=lambda run: -(run[1]["val_acc"] or 0.0))
    settings = {folder: _overrides(folder) for folder, _ in runs}
    shared = set.intersection(*map(set, settings.values())) if len(runs) > 1 else set()
    lines = [
        "| run | settings | parameters | MACs | validation | test | seconds |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for folder, result in runs:
        own = " ".join(setting for setting in settings[folder] if setting not in shared)
        lines.append(_row(folder.name, own, result))
    return "\n".join(lines) + "\n"


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

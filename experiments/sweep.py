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
    lines = [
        "| run | settings | parameters | MACs | validation | test | seconds |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [_row(folder, result) for folder, result in runs]
    return "\n".join(lines) + "\n"


def _row(folder: Path, result: Mapping[str, Any]) -> str:
    overrides = OmegaConf.load(folder / ".hydra" / "overrides.yaml")
    cells = [
        folder.name,
        " ".join(str(override) for override in overrides),
        f"{result['end']['parameters']:,}",
        f"{result['end']['macs']:,}",
        f"{result['val_acc']:.2%}" if result["val_acc"] is not None else "",
        f"{result['test_acc']:.2%}",
        f"{result['seconds']:.0f}",
    ]
    return f"| {' | '.join(cells)} |"

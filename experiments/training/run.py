"""One experiment from start to end: fit, one test on the test split, the result file, the report."""

from __future__ import annotations

import json
import logging
import time
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import DictConfig
from rich.console import Console
from torch import Tensor, nn

from evolvenet.engine.history import Event, History
from evolvenet.engine.saving import load
from evolvenet.errors import RecordError
from evolvenet.lightning.callback import WidthEvolution
from evolvenet.measurement.cost import macs
from evolvenet.report import summary_table
from evolvenet.report.facts import run_facts
from evolvenet.report.run_result import front_table, result_facts, write_result
from experiments.data.images import ImageData
from experiments.training.classifier import Classifier
from experiments.training.compression import Compression, compression_lines, compression_table
from experiments.training.jobs import (
    RESULT,
    check_types,
    finished,
    in_sweep,
    objectives,
    own_tracked_run,
    readable_errors,
    remember_failure,
    remember_settings,
    resume_command,
    stopped_run,
)
from experiments.training.points import Points, tested
from experiments.training.progress import Progress
from experiments.training.recorded_config import recorded_config

log = logging.getLogger(__name__)

# Each of these is right in general and does not matter here.
_KNOWN_WARNINGS = (
    "The number of training batches .* is smaller than the logging interval",  # short trial runs
    "Checkpoint directory .* exists and is not empty",  # Hydra's configuration is there, and in a resumed run its results
    "GPU available but not used",  # trainer.accelerator=cpu is a choice
    ".*isinstance\\(treespec, LeafSpec\\)",  # Lightning's own use of a torch function
)


class Curve(lightning.Callback):
    """Validation accuracy over the run, as (optimizer step, share of correct predictions)."""

    def __init__(self) -> None:
        self.points: list[tuple[int, float]] = []

    def state_dict(self) -> dict[str, Any]:
        """The values so far, for a resumed run."""
        return {"points": list(self.points)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the values."""
        self.points = [(step, accuracy) for step, accuracy in state_dict["points"]]

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Append one value."""
        self.points.append((trainer.global_step, float(trainer.callback_metrics["val/acc"])))


class Clock(lightning.Callback):
    """Seconds of training, those before a run was stopped included."""

    def __init__(self) -> None:
        self._before, self._began = 0.0, time.perf_counter()

    @property
    def seconds(self) -> float:
        """So far."""
        return self._before + time.perf_counter() - self._began

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Start."""
        self._began = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        """The seconds so far."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Count on from those."""
        self._before = state_dict["seconds"]


def run_config(config: DictConfig) -> Any:
    """Build what a configuration names, and `run` it; ends with one line on an error.

    In a sweep, a run that fails ends by itself, with its line, and one that has ended before with the same settings is skipped.

    Args:
        config: of `conf/train.yaml`.

    Returns:
        The last validation accuracy, with the number of parameters where a sweeper has two directions; NaN of a failed run.

    Raises:
        SystemExit: see `readable_errors`; not in a sweep.
    """
    if in_sweep() and (found := finished(config)) is not None:
        log.info("finished before, skipped: %s", config.output)
        return objectives(found)
    try:
        return objectives(_run_config(config))
    except SystemExit as ended:
        if not in_sweep() or not isinstance(ended.code, str):
            raise
        remember_failure(Path(config.output), ended.code)
        log.error("%s (run %s)", ended.code, config.output)
        return objectives({"val_acc": float("nan"), "end": {"parameters": float("nan")}})


def _run_config(config: DictConfig) -> dict[str, Any]:
    # Alone, an error of the code keeps its traceback; in a sweep it is written into the folder, and the others run on.
    with readable_errors(Path(config.output) if in_sweep() else None), own_tracked_run():
        check_types(config)
        callbacks = instantiate(config.callbacks)
        return run(
            config,
            data=instantiate(config.data),
            classifier=instantiate(config.classifier),
            trainer=instantiate(config.trainer),
            evolution=instantiate(config.evolve),
            points=instantiate(config.points),
            callbacks=[each for each in callbacks.values() if each is not None],
            compression=instantiate(config.compression),
        )


def run(
    config: DictConfig,
    data: ImageData,
    classifier: Classifier,
    trainer: Any,
    evolution: WidthEvolution | None = None,
    points: Points | None = None,
    callbacks: Sequence[lightning.Callback] = (),
    compression: Compression | None = None,
) -> dict[str, Any]:
    """Train, test once, and leave `result.json`, `report.html` and `last.ckpt` in `config.output`.

    `last.ckpt` is written after every epoch. With `config.resume` set to it, or to a point's checkpoint, training continues as
    if it had not stopped; the time in the result is that of all parts. `auto` is the latest run of the same settings that was
    stopped. Ctrl-C prints the command that goes on.

    Args:
        config: what the other arguments were built from; kept in the result file.
        data: the data set.
        classifier: the LightningModule.
        trainer: callbacks → Trainer.
        evolution: the callback that changes the widths, None for fixed widths.
        points: the callback that saves the points of a front, None for a run with a single result.
        callbacks: further callbacks.
        compression: compares the trained network with compressed copies of it, None for none.

    Returns:
        What `result.json` holds.

    Raises:
        RecordError: if `config.resume` is no file, or the checkpoint of another network.
    """
    resumed = _resumed(config)
    for message in _KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message)
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    data.prepare_data()
    data.setup()
    start = _size(classifier.model, data.example)
    remember_settings(config)
    curve, clock = Curve(), Clock()
    latest = ModelCheckpoint(output, "last", save_on_train_epoch_end=True, enable_version_counter=False)
    fitting = trainer(callbacks=[Progress(), curve, clock, *callbacks, *filter(None, (points, evolution)), latest])
    _fit(fitting, classifier, data, config, resumed)
    measured: dict[str, Any] = {"seconds": clock.seconds, "steps": fitting.global_step}
    fitting.save_checkpoint(output / "last.ckpt")  # again: a policy may take its last cut back when training ends
    test = partial(_tested, fitting, classifier, data)
    front = tested(points.found, lambda path: test(_saved(classifier.model, config, path))) if points else []
    measured["test_acc"] = front[-1]["test_acc"] if front else test(classifier.model)
    history = (evolution and evolution.history) or _unchanged(start)
    ends = {"start": start, "end": _size(classifier.model, data.example)}
    result: dict[str, Any] = {**_result(config, ends, measured, curve, history), "front": front}
    result["threshold"] = getattr(evolution and evolution.policy, "prune", None)
    if compression:
        result["compression"] = compression(classifier.model, data)
    (output / RESULT).write_text(json.dumps(result, indent=1), encoding="utf-8")
    _present(result, history, output)
    return result


def _fit(
    fitting: lightning.Trainer, classifier: Classifier, data: ImageData, config: DictConfig, resumed: str | None
) -> None:
    for logger in fitting.loggers:
        logger.log_hyperparams(recorded_config(config, published=True))
    try:
        fitting.fit(classifier, datamodule=data, ckpt_path=resumed, weights_only=True)
    except (SystemExit, KeyboardInterrupt):  # the first is what Lightning makes of Ctrl-C in its loops
        if (command := resume_command(Path(config.output))) is not None:
            log.info("stopped; to go on: %s", command)
        raise


def _resumed(config: DictConfig) -> str | None:
    """The checkpoint with which a run goes on, None for a new one."""
    if config.resume == "auto":
        found = stopped_run(config, [folder for name in ("outputs", "multirun") if (folder := Path(name)).is_dir()])
        log.info(
            "resume=auto: %s", f"going on with {found}" if found else "no stopped run of these settings, so a new one"
        )
        return None if found is None else str(found)
    if config.resume and not Path(config.resume).is_file():
        raise RecordError(
            f"Resume: expected a run's last.ckpt or a point of it, or auto, got {config.resume}, where there is no file."
        )
    return config.resume


def _tested(fitting: lightning.Trainer, classifier: Classifier, data: ImageData, model: nn.Module) -> float:
    """The accuracy of a network on the test split."""
    present, classifier.model = classifier.model, model
    try:
        return fitting.test(classifier, datamodule=data, verbose=False)[0]["test/acc"]
    finally:
        classifier.model = present


def _saved(like: nn.Module, config: DictConfig, path: str) -> nn.Module:
    """The network of a checkpoint: built from the configuration, then resized to the checkpoint's widths and loaded."""
    classifier = instantiate(config.classifier)
    load(classifier, path)
    return classifier.model.to(next(like.parameters()).device)


def _result(
    config: DictConfig, ends: Mapping[str, Any], measured: Mapping[str, float], curve: Curve, history: History
) -> dict[str, Any]:
    last = [history.initial, *history.events][-1]
    return {
        "title": config.title,
        **ends,
        "sizes": {"start": history.initial.sizes, "end": last.sizes},
        "val_acc": curve.points[-1][1] if curve.points else None,
        **measured,
        "curve": curve.points,
        "history": history.to_dict(),
        "made": run_facts(),
        "config": recorded_config(config, published=True),
    }


def _present(result: Mapping[str, Any], history: History, output: Path) -> None:
    front, rows = result["front"], result.get("compression", {}).get("rows", [])
    report = write_result(result, output)
    Console().print(summary_table(history, result["title"], result_facts(result)))
    if front:
        Console().print(front_table(front))
    if rows:
        Console().print(compression_table(rows))
        (output / "compression.md").write_text("\n".join(compression_lines([result["compression"]])), encoding="utf-8")
    print(f"report: {report}")


def _size(model: nn.Module, example: Tensor) -> dict[str, int]:
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "macs": macs(model, example),
    }


def _unchanged(start: Mapping[str, int]) -> History:
    count = start["parameters"]
    snapshot = Event(
        step=0, changes=(), sizes={}, parameters_before=count, parameters=count, macs=start["macs"], seconds=0.0,
        skipped=None,
    )  # fmt: skip
    return History(initial=snapshot, events=[])

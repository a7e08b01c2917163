"""What surrounds a run of `train.py`: settings of the wrong type, a sweep's finished and failed runs, stopped runs."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shlex
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from evolvenet.cli.runs import RESULT, UNRELATED
from evolvenet.errors import EvolveNetError
from experiments.training.recorded_config import recorded_config

log = logging.getLogger("evolvenet")

FAILURE = "error.txt"
"""The whole traceback of a run that failed, in its folder."""
LAST = "last.ckpt"
TRAINER_NUMBERS = (
    "max_epochs", "max_steps", "limit_train_batches", "limit_val_batches", "limit_test_batches", "gradient_clip_val",
    "log_every_n_steps", "num_sanity_val_steps",
)  # fmt: skip
"""Arguments of Lightning's Trainer that are numbers alone: of `devices` it also takes texts, such as auto and "0,1"."""


class SettingsError(EvolveNetError):
    """A setting has another type than its default."""


def plain_words(arguments: Sequence[str]) -> list[str]:
    """A command line as Hydra takes it: `experiment=x` as `+experiment=x`, `model=timm:x` as `model=timm model.name=x`.

    >>> plain_words(["train.py", "experiment=digits_both", "model=torchvision:resnet18"])
    ['train.py', '+experiment=digits_both', 'model=torchvision', 'model.name=resnet18']
    """
    found: list[str] = []
    for word in arguments:
        library, colon, name = word.removeprefix("model=").partition(":")
        if word.startswith("experiment="):
            found.append(f"+{word}")
        elif word.startswith("model=") and colon and library in ("torchvision", "timm"):
            found += [f"model={library}", f"model.name={name}"]
        else:
            found.append(word)
    return found


def unknown_name(arguments: Sequence[str], folder: Path) -> str | None:
    """What is wrong with the first word that names no configuration of its group, with the nearest names; None if all do.

    Words that are more than names (lists, functions of a sweep) are left to Hydra, and all where other folders are searched.

    Args:
        arguments: as Hydra takes them.
        folder: with a folder for each group.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as conf:
    ...     Path(conf, "experiment").mkdir()
    ...     Path(conf, "experiment", "digits_both.yaml").touch()
    ...     unknown_name(["+experiment=digit_both"], Path(conf))
    "experiment: expected the name of a file in conf/experiment, got 'digit_both'. Nearest: digits_both."
    """
    if any(word.startswith(("--config", "-c", "hydra.searchpath")) for word in arguments):
        return None
    for word in arguments:
        group, equals, names = word.lstrip("+").partition("=")
        if not equals or not re.fullmatch(r"\w+", group) or not re.fullmatch(r"[\w./,-]+", names):
            continue
        known = sorted(
            path.relative_to(folder / group).with_suffix("").as_posix() for path in (folder / group).rglob("*.yaml")
        )
        for name in names.split(",") if known else ():
            if name.removesuffix(".yaml") not in (*known, "null"):
                nearest = get_close_matches(name, known, n=3, cutoff=0.5) or known
                return f"{group}: expected the name of a file in conf/{group}, got {name!r}. Nearest: {', '.join(nearest)}."
    return None


@contextlib.contextmanager
def readable_errors(output: Path | None = None) -> Iterator[None]:
    """End with one line instead of a traceback.

    Errors that a user can mend are shown as they are: those of EvolveNet, of Lightning's and Hydra's settings, of a full disk.
    Of any other error the line names the file with the whole traceback; without a folder it is raised as it is.
    `HYDRA_FULL_ERROR=1` shows all tracebacks.

    Args:
        output: folder of the run, None before there is one.

    Raises:
        SystemExit: in place of what was raised.
    """
    try:
        yield
    except Exception as error:
        if os.environ.get("HYDRA_FULL_ERROR"):
            raise
        known = _known(error)
        if known is None and output is None:
            raise
        raise SystemExit(f"error: {known or _written(error, output)}") from None


@contextlib.contextmanager
def own_tracked_run() -> Iterator[None]:
    """End the run of Weights & Biases that has begun in the body, if any: in a sweep, the next would be written into it."""
    before, code = getattr(sys.modules.get("wandb"), "run", None), 1
    try:
        yield
        code = 0
    finally:
        wandb = sys.modules.get("wandb")
        if wandb is not None and wandb.run is not None and wandb.run is not before:
            try:
                wandb.finish(exit_code=code)
            except Exception as problem:  # noqa: BLE001  a run that has ended keeps its result, a failed one its error
                log.warning("The run of Weights & Biases was not ended: %s: %s", type(problem).__name__, problem)


def remember_failure(output: Path, line: str) -> None:
    """Write why a run failed into its folder, below the traceback that may be there."""
    with contextlib.suppress(OSError):
        output.mkdir(parents=True, exist_ok=True)
        with (output / FAILURE).open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")


def _known(error: BaseException) -> str | None:
    """The line of an error that a user can mend, None for others."""
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    for cause in causes:
        if isinstance(cause, EvolveNetError):
            return str(cause)
        if type(cause).__name__ == "MisconfigurationException":
            return f"Trainer: {_one_line(cause)}"
        if isinstance(cause, OSError) and cause.errno == 28:
            return (
                f"{cause.filename or 'The output folder'}: the disk is full. Free some space, then resume=auto goes on."
            )
    if isinstance(error, (InstantiationException, OmegaConfBaseException, HydraException)):
        return _one_line(causes[-1]) + (f" ({_one_line(error)})" if causes[-1] is not error else "")
    return None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _written(error: BaseException, output: Path | None) -> str:
    """The line of an unknown error, after its traceback was written."""
    assert output is not None
    text = f"{type(error).__name__}: {_one_line(error)}"
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / FAILURE).write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    except OSError:
        return f"{text}. HYDRA_FULL_ERROR=1 shows where."
    return f"{text}. Where it came from: {output / FAILURE}"


def check_types(config: DictConfig) -> None:
    """Compare the settings of the command line with their defaults.

    Args:
        config: as Hydra composed it.

    Raises:
        SettingsError: if one is a text where the default is a number; those of `trainer` that may be both, Lightning checks.
    """
    if not HydraConfig.initialized():
        return
    own = HydraConfig.get()
    groups = set(own.runtime.choices)
    chosen = [word for word in own.overrides.task if word.lstrip("+").partition("=")[0] in groups]
    try:
        defaults = compose(own.job.config_name or "train", chosen)
    except (HydraException, OmegaConfBaseException):
        return
    for word in own.overrides.task:
        name, _, given = word.lstrip("+~").partition("=")
        if name.startswith("trainer.") and name.removeprefix("trainer.") not in TRAINER_NUMBERS:
            continue
        default, value = (_number_or_text(each, name) for each in (defaults, config))
        if isinstance(default, (int, float)) and isinstance(value, str):
            kind = "true or false" if isinstance(default, bool) else "a number"
            raise SettingsError(f"{name}: expected {kind}, such as {default}, got {given!r}.")


def _number_or_text(config: DictConfig, name: str) -> Any:
    try:
        return OmegaConf.select(config, name)
    except OmegaConfBaseException:
        return None


def in_sweep() -> bool:
    """Whether this run is one of a sweep, `-m`."""
    return HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN


def objectives(result: Mapping[str, Any]) -> Any:
    """What a sweeper gets of a result: the validation accuracy; with the parameters where it asks for two directions."""
    accuracy = float(result["val_acc"] or 0.0)
    directions = HydraConfig.get().sweeper.get("direction") if HydraConfig.initialized() else None
    return (accuracy, float(result["end"]["parameters"])) if isinstance(directions, (list, ListConfig)) else accuracy


def finished(config: DictConfig) -> dict[str, Any] | None:
    """The result that is in a run's folder already, None if there is none of the same settings."""
    try:
        result = json.loads((Path(config.output) / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    same = _comparable(_config_of(Path(config.output))) == _comparable(recorded_config(config))
    return result if same else None


def _comparable(config: Any) -> Any:
    """A recorded configuration without what does not change a result, and without the folder's name wherever it occurs."""
    if not isinstance(config, dict):
        return None
    text = json.dumps({name: value for name, value in config.items() if name not in UNRELATED}, sort_keys=True)
    return text.replace(str(config.get("output")), "OUTPUT")


def stopped_run(config: DictConfig, roots: Sequence[Path]) -> Path | None:
    """The checkpoint of the latest run of the same settings that has not ended; None if there is none.

    Args:
        config: of the new run.
        roots: folders below which runs are searched; that of the run itself comes first.
    """
    wanted = _comparable(recorded_config(config))
    found: dict[Path, float] = {}
    for root in (Path(config.output), *roots):
        for path in [root / LAST] if root == Path(config.output) else root.rglob(LAST):
            folder = path.parent
            if path.is_file() and not (folder / RESULT).exists() and _comparable(_config_of(folder)) == wanted:
                found[path] = path.stat().st_mtime
    return max(found, key=lambda path: found[path], default=None)


def _config_of(folder: Path) -> Any:
    try:
        return json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def remember_settings(config: DictConfig) -> None:
    """Write a run's settings into its folder, by which `resume=auto` knows it again; errors of an earlier try go."""
    (Path(config.output) / FAILURE).unlink(missing_ok=True)
    (Path(config.output) / "settings.json").write_text(json.dumps(recorded_config(config)), encoding="utf-8")


def resume_command(output: Path) -> str | None:
    """What to type to go on with a run that was stopped, or with its sweep; None where nothing was saved yet."""
    if not (output / LAST).is_file():
        return None
    words = [word for word in sys.argv[1:] if not word.startswith(("resume=", "hydra.sweep.dir="))]
    more = [f"resume={output / LAST}"]
    if in_sweep():
        # One checkpoint would be resumed by every run of the sweep. In the same folder, finished runs are skipped, and each
        # other one finds its own checkpoint.
        more = [f"hydra.sweep.dir={HydraConfig.get().sweep.dir}", "resume=auto"]
    return shlex.join(["python", sys.argv[0], *words, *more])

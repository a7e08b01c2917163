"""What an event sends to loggers: numbers to all; spectra and a drawing of the network where these can be shown."""

import json
from pathlib import Path

import matplotlib.image
import pytest
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger

import evolvenet
from tests.helpers.runs import Batches, fresh, trainer


def run(tmp_path, logger):
    evolution = evolvenet.WidthEvolution(
        evolvenet.Threshold(prune=0.5, start=0.0), every_n_steps=4, calibration_batches=2
    )
    trainer(tmp_path, [evolution], max_epochs=2, logger=logger).fit(fresh(), Batches())
    assert evolution.history is not None
    return evolution.history


def test_tensorboard_gets_spectra_and_the_network_at_every_event(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="run", version=0)
    history = run(tmp_path, logger)
    found = EventAccumulator(
        str(tmp_path / "run" / "version_0"), size_guidance={"images": 0, "histograms": 0, "scalars": 0}
    )
    found.Reload()
    tags = found.Tags()
    changed = [event for event in history.events if event.changes]
    assert len(changed) >= 2
    assert tags["images"] == ["evolve/network"]
    assert [image.step for image in found.Images("evolve/network")] == [event.step for event in changed]
    assert set(tags["histograms"]) == {"evolve/spectrum/net.0", "evolve/spectrum/net.4"}
    spectra = found.Histograms("evolve/spectrum/net.0")
    assert [each.step for each in spectra] == [event.step for event in history.events if event.spectra]
    assert spectra[0].histogram_value.num == len(history.events[0].spectra["net.0"])
    assert {"evolve/size/net.0", "evolve/parameters", "evolve/measured_change"} <= set(tags["scalars"])


def test_without_matplotlib_there_is_no_drawing_and_no_failure(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    run(tmp_path, TensorBoardLogger(tmp_path, name="run", version=0))
    found = EventAccumulator(str(tmp_path / "run" / "version_0"))
    found.Reload()
    assert found.Tags()["images"] == []
    assert found.Tags()["histograms"]


def test_wandb_gets_spectra_and_the_network_at_every_event_without_a_network_or_an_account(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")  # Lightning's logger writes to this variable
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, project="evolvenet", offline=True)
    try:
        history = run(tmp_path, logger)
        assert logger.experiment.offline
        found = dict(logger.experiment.summary)
    finally:
        logger.experiment.finish()
    last = history.events[-1]
    assert found["evolve/size/net.0"] == last.sizes["net.0"]
    assert found["evolve/parameters"] == last.parameters
    spectrum = next(event.spectra["net.0"] for event in reversed(history.events) if event.spectra)
    histogram = found["evolve/spectrum/net.0"]
    assert histogram["_type"] == "histogram"
    assert sum(histogram["values"]) == len(spectrum)
    drawings = sorted(Path(logger.experiment.dir).rglob("media/images/evolve/network_*.png"))
    assert len(drawings) == sum(bool(event.changes) for event in history.events) >= 2
    assert_drawn(drawings[-1])


def test_mlflow_gets_spectra_and_the_network_at_every_event_without_a_server(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # MLflow writes to this variable
    logger = MLFlowLogger(
        "evolvenet", tracking_uri=f"sqlite:///{tmp_path}/mlflow.db", artifact_location=f"file:{tmp_path}/artifacts"
    )
    history = run(tmp_path, logger)
    client, name = logger.experiment, logger.run_id
    sizes = sorted((each.step, each.value) for each in client.get_metric_history(name, "evolve/size/net.0"))
    assert [size for _, size in sizes] == [event.sizes["net.0"] for event in [history.initial, *history.events]]
    assert [step for step, _ in sizes[1:]] == [event.step for event in history.events]
    changed = [event.step for event in history.events if event.changes]
    drawings = [each.path for each in client.list_artifacts(name, "evolve/network")]
    assert drawings == [f"evolve/network/step_{step:08}.png" for step in changed]
    assert_drawn(client.download_artifacts(name, drawings[-1], str(tmp_path)))
    measured = [event for event in history.events if event.spectra]
    files = [each.path for each in client.list_artifacts(name, "evolve/spectra")]
    assert files == [f"evolve/spectra/step_{event.step:08}.json" for event in measured]
    spectra = json.loads(Path(client.download_artifacts(name, files[0], str(tmp_path))).read_text("utf-8"))
    assert {width: len(found) for width, found in spectra.items()} == {
        width: len(energies) for width, energies in measured[0].spectra.items()
    }
    energies = measured[0].spectra["net.0"]
    assert [10**found for found in spectra["net.0"]] == pytest.approx(list(energies), rel=2e-3)


def assert_drawn(path):
    """The image is no blank one."""
    pixels = matplotlib.image.imread(path)
    assert min(pixels.shape[:2]) > 50
    assert pixels.std() > 0.05


def test_other_loggers_get_the_numbers(tmp_path):
    history = run(tmp_path, CSVLogger(tmp_path, name="run", version=0))
    text = (tmp_path / "run" / "version_0" / "metrics.csv").read_text("utf-8")
    for name in history.initial.sizes:
        assert f"evolve/size/{name}" in text
    assert str(history.latest.parameters) in text


class Refusing(CSVLogger):
    """Takes no name with a dot, as some services do."""

    def log_metrics(self, metrics, step=None):
        if any("net." in name for name in metrics):
            raise ValueError("no dots in names")
        super().log_metrics(metrics, step)


def test_a_logger_that_refuses_a_name_does_not_end_the_run(tmp_path, caplog):
    history = run(tmp_path, Refusing(tmp_path, name="run", version=0))
    assert history.latest.sizes["net.0"] < 16
    assert "is not in the Refusing: ValueError: no dots in names" in caplog.text

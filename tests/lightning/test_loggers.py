"""What an event sends to loggers: numbers to all, spectra and a drawing of the network to TensorBoard."""

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

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

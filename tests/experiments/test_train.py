"""Every experiment in `conf/experiment`, run through what `train.py` does, on a few batches."""

import logging
import sys

import lightning
import pytest
import torch
from hydra.utils import instantiate

import evolvenet
from evolvenet.engine.history import History
from experiments.data.span_augment import SpanAugment
from experiments.training import classifier, points
from experiments.training.classifier import Classifier
from experiments.training.jobs import readable_errors
from tests.helpers.experiments import configuration, train, write_numbered
from tests.helpers.paths import CONF

# What evolving runs are compared with, and low rank after training: no widths change. Each is run by a test of its own.
CONTROLS = ("_scratch", "_uniform", "_torch_pruning", "_lenet")
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml") if not path.stem.endswith(CONTROLS))
UNPADDED = ["model.width=8", "model.inside=[12,12]"]
SMALL = {
    "mnist_resnet": UNPADDED,
    "mnist_short": UNPADDED,
    "mnist_both": UNPADDED,
    "cifar_resnet": ["model.widths=[4,6,8]"],
}
LEAST = {"cifar_resnet": 500_000, "digits_both": 250_000, "digits_frequency": 250_000, "digits_both_threshold": 250_000}
TINY = [
    "trainer.max_epochs=2",
    "trainer.limit_train_batches=2",
    "trainer.accelerator=cpu",
    "trainer.log_every_n_steps=1",
]
EAGER = ["evolve.every_n_steps=1", "evolve.start_step=1", "evolve.stop=1.0"]


@pytest.fixture
def data(tmp_path):
    """Made-up mnist.npz and cifar10.npz, and the overrides that use them."""
    write_numbered(tmp_path / "mnist.npz", (28, 28))
    write_numbered(tmp_path / "cifar10.npz", (32, 32, 3))
    return [f"data.root={tmp_path}", "data.batch_size=12", "data.val_size=10"]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_runs_and_leaves_its_results(tmp_path, data, experiment, capsys):
    widths = SMALL.get(experiment, ["model.widths=[8,12,16]"])
    # The digits are in scikit-learn's wheel, and are 64 numbers each.
    given = ["data.batch_size=64"] if experiment.startswith("digits") else data
    result = train(tmp_path, [f"+experiment={experiment}", *widths, *given, *TINY, *EAGER])
    events = History.from_dict(result["history"]).events
    assert result["steps"] == 4
    assert len(events) == 2
    assert all(event.skipped is None for event in events)
    assert 0 <= result["test_acc"] <= 1
    assert len(result["curve"]) == 2
    assert result["end"]["parameters"] == events[-1].parameters
    assert result["end"]["macs"] == events[-1].macs
    assert result["sizes"]["end"] == events[-1].sizes
    assert result["config"]["evolve"]["policy"]["_target_"].startswith("evolvenet.")
    written = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"result.json", "report.html", "history.png", "last.ckpt"} <= written
    assert str(tmp_path / "run" / "report.html") in capsys.readouterr().out


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_builds_at_full_size(experiment):
    config = configuration(f"+experiment={experiment}")
    model = instantiate(config.classifier).model
    assert sum(parameter.numel() for parameter in model.parameters()) >= LEAST.get(experiment, 2_000_000)
    assert isinstance(instantiate(config.evolve), evolvenet.WidthEvolution)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_can_run_without_evolving(experiment):
    """`evolve=none` is the control of every one of them; an experiment that sets `evolve.…` itself would bring it back."""
    assert configuration(f"+experiment={experiment}", "evolve=none").evolve is None


def test_digits_learn_while_widths_change(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    caplog.set_level(logging.DEBUG, "evolvenet")
    small = ["model.widths=[12,12,12]", "trainer.max_epochs=3", "trainer.accelerator=cpu", "evolve.every_n_steps=20"]
    result = train(tmp_path, [*small, "evolve.start_step=20", "evolve.policy.prune=0.02"])
    assert result["test_acc"] > 0.3
    assert result["val_acc"] > 0.3
    changed = [change for event in result["history"]["events"] for change in event["changes"]]
    lines = [record.getMessage() for record in caplog.records if record.name == "evolvenet"]
    assert changed
    for change in changed:
        assert any(f"{change['width']} {change['before']} → {change['after']}" in line for line in lines)
    epochs = [record.getMessage() for record in caplog.records if record.name == "experiments.training.progress"]
    assert len(epochs) == 3
    assert "val acc" in epochs[-1]
    assert f"parameters {result['end']['parameters']:,}" in epochs[-1]


def test_the_saved_model_is_the_evolved_one(tmp_path):
    overrides = ["model.widths=[16,16,16]", *TINY, *EAGER]
    result = train(tmp_path, overrides)
    model = instantiate(configuration(*overrides).model)
    evolvenet.load(model, tmp_path / "run" / "last.ckpt")
    assert sum(parameter.numel() for parameter in model.parameters()) == result["end"]["parameters"]
    assert model(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


def test_without_the_callback_widths_stay(tmp_path):
    result = train(tmp_path, ["evolve=none", "model.widths=[8,8,8]", "optimizer=sgd", *TINY])
    assert result["start"] == result["end"]
    assert result["history"]["events"] == []


def reload_and_measure(config, path):
    """Parameters and test accuracy of the network in a point's checkpoint."""
    split, model = instantiate(config["data"]), evolvenet.load(instantiate(config["model"]), path).eval()
    split.setup()
    right = torch.cat([model(images).argmax(1) == labels for images, labels in split.test_dataloader()])
    return sum(parameter.numel() for parameter in model.parameters()), float(right.float().mean())


def test_a_front_is_saved_tested_and_shown_point_by_point(tmp_path, data, capsys, monkeypatch):
    taught, shapes, seen = [], [], []
    honest = lightning.Trainer.test

    def looked(self, module, **options):
        seen.append(sum(parameter.numel() for parameter in module.model.parameters()))
        return honest(self, module, **options)

    monkeypatch.setattr(lightning.Trainer, "test", looked)
    monkeypatch.setattr(points, "teacher", lambda model: taught.append(sum(p.numel() for p in model.parameters())))
    monkeypatch.setattr(classifier, "Cycles", lambda *args: shapes.append(args) or (lambda step: 1.0))
    spans = ["trainer.max_epochs=5", "spans=[1,1,1,1,1]"]
    result = train(tmp_path, ["+experiment=mnist_resnet", *SMALL["mnist_resnet"], *data, *TINY, *EAGER, *spans])
    front = result["front"]
    assert [point["epoch"] for point in front] == [1, 2, 3, 4, 5]
    assert all(0 <= point["test_acc"] <= 1 for point in front)
    assert front[-1]["parameters"] == result["end"]["parameters"]
    assert front[-1]["test_acc"] == result["test_acc"]
    assert front[-1]["parameters"] <= 1_500
    for point in front:
        expected = point["parameters"], pytest.approx(point["test_acc"])
        assert reload_and_measure(result["config"], point["path"]) == expected
    assert seen == [point["parameters"] for point in front], "each network is looked at once"
    assert taught[0] == front[0]["parameters"], "the network of the first span is the teacher"
    assert [args[1] for args in shapes] == [[1, 1, 1, 1, 1]], "the learning rate has a cycle for each span"
    assert "The front" in capsys.readouterr().out
    # And the control of one of its points.
    few = ["trainer.max_epochs=1", "trainer.limit_train_batches=2", "model.model.width=8", "model.model.inside=[12,12]"]
    control = train(
        tmp_path / "control", ["+experiment=mnist_scratch", f"model.checkpoint={front[2]['path']}", *data, *few]
    )
    assert control["start"]["parameters"] == control["end"]["parameters"] == front[2]["parameters"]
    assert "<h2>The front</h2>" in (tmp_path / "run" / "report.html").read_text()


def timeless(front):
    """A front's points without their times and paths."""
    return [{key: value for key, value in point.items() if key not in ("seconds", "path")} for point in front]


STOPPED = [
    ("mnist_resnet", "0-*.ckpt", 4),
    ("cifar_resnet", "last.ckpt", 3),
    pytest.param("mnist_resnet", "last.ckpt", 3, marks=pytest.mark.long),
]
"""An experiment, from which checkpoint it is resumed, and the epochs that are left."""


@pytest.mark.parametrize(("experiment", "kept", "left"), STOPPED)
def test_a_front_that_was_stopped_goes_on_where_it_was(tmp_path, data, experiment, kept, left, monkeypatch):
    """The same points, weights and curve as without the stop; the teacher was a network of other widths."""
    # Over 40 lines: a run, one that is stopped, one that goes on, and all that has to be equal in them.
    spans = {"mnist_resnet": "spans=[1,1,1,1,1]", "cifar_resnet": "spans=[1,2,2]"}[experiment]
    more = {
        "mnist_resnet": ["points.teachers=[null,0,0,1,2]", "classifier.soft=0.5", "model.silu=true"],
        "cifar_resnet": ["cycles=[3,2]"],
    }[experiment]
    cut = "evolve.policy.points.1={_target_:evolvenet.Budget,params:900,by:0.1,growth:0}"
    overrides = [
        f"+experiment={experiment}", *SMALL[experiment], *data, *TINY, *EAGER, "trainer.max_epochs=5", spans, *more, cut,
    ]  # fmt: skip
    lightning.seed_everything(0)
    whole = train(tmp_path / "whole", overrides)
    honest, teachers = Classifier.training_step, []

    def failing(self, batch, index):
        if self.current_epoch == 2:
            raise RuntimeError("power cut")
        return honest(self, batch, index)

    def watched(self, batch, index):
        teachers.append(self.teacher)
        return honest(self, batch, index)

    lightning.seed_everything(0)
    monkeypatch.setattr(Classifier, "training_step", failing)
    with pytest.raises(RuntimeError, match="power cut"):
        train(tmp_path / "cut", overrides)
    monkeypatch.setattr(Classifier, "training_step", watched)
    lightning.seed_everything(1)  # the start network is another one, until the checkpoint is read
    [path] = (tmp_path / "cut" / "run").glob(kept)
    resumed = train(tmp_path / "cut", [*overrides, f"resume={path}"])
    assert len(teachers) == 2 * left, "batches of the epochs that were left"
    assert None not in teachers, "the teacher is there from the first batch on"
    assert timeless(whole["front"]) == timeless(resumed["front"])
    for event in (event for one in (whole, resumed) for event in one["history"]["events"]):
        assert event["skipped"] is None, "the teacher is not taken for a replica"
    assert [point["seconds"] for point in resumed["front"]] == sorted(point["seconds"] for point in resumed["front"])
    assert resumed["curve"] == whole["curve"]
    ends = [torch.load(tmp_path / name / "run" / "last.ckpt", weights_only=True) for name in ("whole", "cut")]
    for name, value in ends[0]["state_dict"].items():
        assert torch.equal(value, ends[1]["state_dict"][name]), name


def test_a_missing_checkpoint_to_resume_ends_with_one_line(tmp_path):
    with pytest.raises(SystemExit, match=r"error: Resume: expected .* got /nowhere/last\.ckpt"):
        train(tmp_path, ["resume=/nowhere/last.ckpt", *TINY])


def test_an_experiments_own_callbacks_take_part(tmp_path, data, monkeypatch):
    epochs = []
    monkeypatch.setattr(
        SpanAugment, "on_train_epoch_start", lambda self, trainer, _: epochs.append(trainer.current_epoch)
    )
    train(tmp_path, ["+experiment=mnist_resnet", *UNPADDED, *data, *TINY])
    assert epochs == [0, 1]


def test_uniform_widths_by_hand_are_trained_as_they_are(tmp_path, data):
    result = train(tmp_path, ["+experiment=mnist_uniform", *data, *TINY])
    assert result["start"] == result["end"]
    assert 4_900 <= result["end"]["parameters"] <= 5_000
    assert len(set(map(str, [result["config"]["model"]["width"], *result["config"]["model"]["inside"]]))) == 1
    assert result["history"]["events"] == result["front"] == []


def test_a_terminal_gets_a_bar_with_epoch_accuracy_and_parameters(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    result = train(tmp_path, ["evolve=none", "model.widths=[8,8,8]", *TINY])
    shown = capsys.readouterr().out
    assert "epoch 2/2: 100%" in shown
    assert f"val acc={result['val_acc']:.4f}, parameters={result['end']['parameters']:,}" in shown


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evolve.policy.prune=1.5"], "prune"),
        (["evolve.policy.cooldown=2"], "cooldown"),
        (["evolve.every_n_steps=0"], "every_n_steps"),
        (["data.batch_size=99999"], "batch size"),
        (["data.val_size=0"], "val_size"),
    ],
)
def test_bad_settings_end_with_one_line(tmp_path, overrides, message):
    with pytest.raises(SystemExit) as caught:
        train(tmp_path, [*overrides, "model.widths=[4,4,4]", *TINY])
    assert str(caught.value).startswith("error: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError), readable_errors():
        _ = 1 / 0

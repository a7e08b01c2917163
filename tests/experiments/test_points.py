"""The points of a front: saved at the end of each span, each tested once, the first one the teacher of the others."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from evolvenet.report.front import draw_errors
from evolvenet.report.run_result import front_table
from experiments.training.classifier import Classifier, Cycles
from experiments.training.points import Points, PointsError, frozen, span_ends, teacher

POINT = {
    "parameters": 5000,
    "macs": 70_000,
    "epoch": 3,
    "seconds": 90.0,
    "val_acc": 0.99,
    "path": "",
    "test_acc": 0.985,
}


@pytest.mark.parametrize(("epochs", "ends"), [(10, [2, 6, 10]), (5, [1, 3, 5]), (20, [4, 12, 20])])
def test_spans_end_with_the_nearest_epoch(epochs: int, ends: list[int]) -> None:
    assert span_ends([1, 2, 2], epochs) == ends


def test_a_teacher_does_not_change_with_the_network() -> None:
    model, x = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), torch.randn(8, 4)
    model.train()
    expected = model.eval()(x)
    model.train()
    outputs = teacher(frozen(model))
    nn.init.zeros_(model.get_parameter("0.weight"))
    assert torch.equal(outputs(x), expected)
    assert not outputs(x).requires_grad
    assert model.training


def test_the_distillation_loss_has_its_weight() -> None:
    model = nn.Linear(4, 3)
    classifier = Classifier(model, torch.optim.SGD, classes=3, soft=0.25, temperature=2.0)
    classifier.log = lambda *args, **options: None  # type: ignore[method-assign,assignment]
    x, y = torch.randn(8, 4), torch.randint(0, 3, (8,))
    hard = nn.functional.cross_entropy(model(x), y)
    assert torch.equal(classifier.training_step((x, y), 0), hard)
    other = nn.Linear(4, 3)
    classifier.teacher = teacher(other)
    logs = [(each(x) / 2).log_softmax(1) for each in (model, other)]
    soft = (logs[1].exp() * (logs[1] - logs[0])).sum(1).mean() * 4
    torch.testing.assert_close(classifier.training_step((x, y), 0), 0.75 * hard + 0.25 * soft)
    assert "teacher" not in str(list(classifier.state_dict()))


def test_each_span_has_its_teacher_and_those_that_are_done_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Points, "_save", lambda *args: None)
    points, x, expected, taught, kept = Points([1] * 4, "", [None, 0, 1, 0]), torch.randn(5, 4), [], [], []
    classifier = Classifier(nn.Linear(4, 3), torch.optim.SGD, classes=3)
    for epoch in range(4):
        now: Any = SimpleNamespace(current_epoch=epoch, max_epochs=4)
        points.on_train_epoch_start(now, classifier)
        taught.append(None if classifier.teacher is None else classifier.teacher(x))
        nn.init.normal_(classifier.model.get_parameter("weight"))
        expected.append(classifier.model(x))
        points.on_train_epoch_end(now, classifier)
        kept.append(list(points.state_dict()["teachers"]))
    assert taught[0] is None
    for got, place in zip(taught[1:], (0, 1, 0), strict=True):
        torch.testing.assert_close(got, expected[place])
    assert kept == [[0], [0, 1], [0, 1], [0]], "a checkpoint holds the teachers that are left"


@pytest.mark.parametrize("teachers", [[None, 0], [None, 1, 0], [0, 0, 0], [None, -1, 0]])
def test_a_teacher_is_of_an_earlier_span(teachers: list[int | None]) -> None:
    with pytest.raises(PointsError, match="each of 3 spans"):
        Points([1, 1, 1], "", teachers)


def test_a_teacher_that_no_checkpoint_holds_is_read_from_its_point(tmp_path: Path) -> None:
    classifier, other = (Classifier(nn.Linear(4, 3), torch.optim.SGD, classes=3) for _ in range(2))
    path = tmp_path / "0-15.ckpt"
    resumed = {"found": [{**POINT, "epoch": 1, "path": str(path)}], "seconds": 0.0, "teachers": {}}
    points, now = Points([1, 1], tmp_path, [None, 0]), SimpleNamespace(current_epoch=1, max_epochs=2)
    points.load_state_dict(resumed)
    with pytest.raises(PointsError, match=r"there is no .*0-15\.ckpt"):
        points.on_train_start(now, classifier)  # type: ignore[arg-type]
    torch.save({"state_dict": other.state_dict()}, path)
    points.on_train_start(now, classifier)  # type: ignore[arg-type]
    points.on_train_epoch_start(now, classifier)  # type: ignore[arg-type]
    assert classifier.teacher is not None
    x = torch.randn(5, 4)
    torch.testing.assert_close(classifier.teacher(x), other(x))


def test_the_one_teacher_of_an_older_checkpoint_is_the_network_of_the_first_span(tmp_path: Path) -> None:
    classifier, other = (Classifier(nn.Linear(4, 3), torch.optim.SGD, classes=3) for _ in range(2))
    points, now = Points([1, 1], tmp_path), SimpleNamespace(current_epoch=1, max_epochs=2)
    points.load_state_dict({"found": [], "seconds": 0.0, "teacher": other.model.state_dict()})
    points.on_train_start(now, classifier)  # type: ignore[arg-type]
    points.on_train_epoch_start(now, classifier)  # type: ignore[arg-type]
    assert classifier.teacher is not None
    x = torch.randn(5, 4)
    torch.testing.assert_close(classifier.teacher(x), other(x))
    points.load_state_dict({"found": [], "seconds": 0.0, "teacher": None})
    assert not points._resumed


def test_a_resumed_front_of_few_epochs_has_no_teacher_where_the_whole_run_has_none(tmp_path: Path) -> None:
    """The first of four spans has no epoch of two, and the point after the first epoch is that of the second one."""
    classifier = Classifier(nn.Linear(4, 3), torch.optim.SGD, classes=3)
    points, now = Points([1, 1, 1, 1], tmp_path), SimpleNamespace(current_epoch=1, max_epochs=2)
    points.load_state_dict({"found": [{**POINT, "epoch": 1}], "seconds": 0.0, "teachers": {}})
    points.on_train_start(now, classifier)  # type: ignore[arg-type]
    points.on_train_epoch_start(now, classifier)  # type: ignore[arg-type]
    assert classifier.teacher is None


def test_each_cycle_rises_and_falls() -> None:
    cycles = Cycles(steps=400, lengths=(1, 3), warmup=0.1)
    values = [cycles(step) for step in range(401)]
    assert max(values) == pytest.approx(1, abs=1e-5)
    for begin, top, end in ((0, 10, 99), (100, 130, 399)):
        assert values[begin] == pytest.approx(0.04)
        assert values[top] == pytest.approx(1, abs=1e-5)
        assert values[end] < 1e-4
        assert all(one > two for one, two in zip(values[top:end], values[top + 1 : end + 1], strict=True))


def test_the_table_and_the_picture_show_every_point() -> None:
    points: list[dict[str, Any]] = [POINT, {**POINT, "parameters": 700, "test_acc": 0.97}]
    table = front_table(points)
    assert table.row_count == 2
    assert list(table.columns[4].cells) == ["150", "300"]
    panel = draw_errors(points).axes[0]
    assert [line.get_xdata().tolist() for line in panel.lines] == [[5000, 700]] * 2  # type: ignore[union-attr]
    assert [text.get_text() for text in panel.texts] == ["5,000, 98.50%", "700, 97.00%"]

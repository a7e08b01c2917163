"""The comparison of carried and reset optimizer state: a short run, and what it measures with."""

from __future__ import annotations

import evolvenet  # noqa: F401  isort: skip  # its mend comes before torchvision

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from experiments.compare import state as compare_state
from experiments.compare.state import BOUND, goal_lines, main, verdict
from experiments.compare.state_runs import (
    EVENTS,
    STATES,
    SUBJECTS,
    Batches,
    Outcome,
    Ratios,
    adamw,
    change,
    muon,
    outcomes,
    train,
)
from tests.helpers.experiments import write_random


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with random images in place of MNIST's."""
    return write_random(tmp_path_factory.mktemp("data"), 100)


def test_the_page_has_a_line_for_every_optimizer_rate_event_and_state(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subjects = replace(SUBJECTS[0], rates=(0.05,)), replace(SUBJECTS[1], network="dense", rates=(0.01, 0.003))
    monkeypatch.setattr(compare_state, "SUBJECTS", subjects)
    page = tmp_path / "page.md"
    main(["--data", str(data), "--out", str(page), "--seeds", "2", "--before", "2", "--after", "2"])
    lines = [line.split(" | ") for line in page.read_text("utf-8").splitlines() if line.startswith("| ")]
    cases = [(subject, f"{rate:g}") for subject in subjects for rate in subject.rates]
    wanted = [[f"| {subject.optimizer}", subject.network, rate, event] for subject, rate in cases for event in EVENTS]
    wanted += [[f"| {subject.optimizer}", subject.network, rate, state] for subject, rate in cases for state in STATES]
    assert [cells[:4] for cells in lines if cells[0] != "| optimizer" and not cells[0].startswith("| ---")] == wanted
    assert "{" not in page.read_text("utf-8")


def test_one_seed_has_no_deviation(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--data", str(data), "--out", "page.md", "--seeds", "1"])
    assert "--seeds: expected 2 or more, for a standard deviation, got 1" in capsys.readouterr().err


def test_carried_without_a_change_is_training_uninterrupted(data: Path) -> None:
    batches = Batches(data)
    subject = replace(SUBJECTS[1], network="dense")
    found = outcomes(subject, 1e-3, seed=1, batches=batches, before=3, after=4)
    torch.manual_seed(1)
    model = compare_state_network()
    optimizers = adamw(model, 1e-3)
    train(model, optimizers, batches(3, 3))
    losses = train(model, optimizers, batches(5, 4))
    assert found["no change"].losses["carried"] == pytest.approx(sum(losses) / 4, rel=1e-6)
    assert found["no change"].losses["reset"] != pytest.approx(sum(losses) / 4, rel=1e-6)
    assert not found["cut"].ratios["carried"].steps, "only a growth has new units"


def compare_state_network() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(196, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )


@pytest.mark.parametrize("make", [adamw, *([muon] if hasattr(torch.optim, "Muon") else [])])
@pytest.mark.parametrize(("event", "units"), [("no change", 128), ("cut", 90), ("growth", 160)])
def test_an_event_changes_every_width_and_the_state_of_every_optimizer(
    data: Path, make: Callable[[nn.Module, float], list[Optimizer]], event: str, units: int
) -> None:
    model = compare_state_network()
    optimizers = make(model, 1e-3)
    batches = Batches(data)
    train(model, optimizers, batches(0, 2))
    change(event, model, optimizers, batches, seed=1)
    assert model.get_parameter("3.weight").shape == (units, units)
    states = [optimizer.state[p] for p in model.parameters() for optimizer in optimizers if p in optimizer.state]
    for parameter, state in zip(model.parameters(), states, strict=True):
        entry = state["momentum_buffer" if make is muon and parameter.ndim == 2 else "exp_avg"]
        assert entry.shape == parameter.shape


def test_batches_are_the_same_for_the_same_seed(data: Path) -> None:
    batches = Batches(data)
    (images, labels), (again, _), (other, _) = (next(batches(seed, 1)) for seed in (3, 3, 4))
    assert images.shape == (64, 1, 14, 14)
    assert labels.shape == (64,)
    assert torch.equal(images, again)
    assert not torch.equal(images, other)


def test_ratios_are_of_new_unit_rows_and_columns_to_all_survivors() -> None:
    ratios = Ratios({"w": torch.Size([2, 2]), "b": torch.Size([2]), "same": torch.Size([3])})
    weight = torch.tensor([[1.0, -1.0, 6.0], [-1.0, 1.0, 0.0], [2.0, 2.0, -2.0]])
    ratios.note({"w": weight, "b": torch.tensor([1.0, -3.0, 4.0]), "same": torch.ones(3)})
    ratios.note({"w": weight / 2, "b": torch.tensor([2.0, 2.0, 0.0]), "same": torch.ones(3)})
    assert ratios.steps == {("w", 0): [2.0, 2.0], ("w", 1): pytest.approx([8 / 3, 8 / 3]), ("b", 0): [2.0, 0.0]}
    assert ratios.largest["weights", "new units"] == pytest.approx(8 / 3)
    assert ratios.largest["weights", "survivors"] == pytest.approx(8 / 3)
    assert ratios.largest["vectors", "one survivor"] == 1.5


def test_weight_decay_is_no_update() -> None:
    model = nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    seen = []

    class Watch(Ratios):
        def note(self, updates) -> None:
            seen.append({name: update.clone() for name, update in updates.items()})

    batch = torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64)
    train(model, [optimizer], iter([batch]), Watch({}))
    torch.testing.assert_close(seen[0]["weight"], torch.zeros(3, 2), rtol=0, atol=1e-7)
    torch.testing.assert_close(seen[0]["bias"].abs(), torch.full((3,), 0.1), rtol=1e-4, atol=0)


def run(*differences: float, ratio: float) -> compare_state.Run:
    """A run with these differences after every event and this largest ratio of everything."""
    columns: dict[tuple[str, str], float] = {column: ratio for column in compare_state.RATIO_COLUMNS}  # noqa: C420
    ratios: dict[str, Ratios] = {state: Ratios({}, columns, {("w", 0): [ratio]}) for state in STATES}
    losses = [{"carried": 1 + apart, "reset": 1.0} for apart in differences]
    made: list[dict[str, Outcome]] = [{event: Outcome(each, ratios) for event in EVENTS} for each in losses]
    return SUBJECTS[0], 0.1, made


def test_goals_are_judged_by_what_was_measured() -> None:
    good = goal_lines([run(-0.1, -0.11, -0.09, ratio=BOUND)])
    assert good[0].endswith("reset: yes.")
    assert good[1].endswith("advantage: nowhere.")
    assert "in weights yes (largest 1.50), in vectors yes" in good[2]
    bad = goal_lines([run(-0.1, 0.1, 0.0, ratio=1.0), run(0.1, 0.11, 0.09, ratio=1.6)])
    where = "SGD, momentum at 0.1 after the {} (+0.1000 ± 0.0100)"
    assert bad[0].endswith(f"no, worse for {where.format('cut')}; {where.format('growth')}.")
    assert bad[1].endswith("advantage: nowhere."), "the control did as badly"
    assert "in weights no (largest 1.60), in vectors no" in bad[2]


def test_a_control_that_does_well_shows_what_the_change_costs() -> None:
    subject, rate, seeds = run(0.0, 0.01, -0.01, ratio=1.0)
    _, _, control = run(-0.1, -0.1, -0.1, ratio=1.0)
    made = [{**found, "no change": other["no change"]} for found, other in zip(seeds, control, strict=True)]
    lines = goal_lines([(subject, rate, made)])
    assert lines[0].endswith("yes.")
    assert "advantage: SGD, momentum at 0.1 after the cut (+0.1000 ± 0.0100);" in lines[1]


def test_equal_differences_leave_no_doubt() -> None:
    assert verdict([0.0, 0.0, 0.0]) == "no difference"
    assert verdict([-0.5, -0.5, -0.5]) == "better"

"""Each command as it is typed, and what is wrong with what was typed as one line."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import evolvenet
from evolvenet.cli.app import app, main
from evolvenet.cli.objects import build
from evolvenet.cli.runs import points_of, runs_below
from evolvenet.measurement.cost import parameters
from tests.helpers.pages import shape
from tests.helpers.paths import ROOT

FILE = """
import torch
from torch import nn


def network(width=32, bias=True):
    return nn.Sequential(nn.Linear(8, width, bias), nn.ReLU(), nn.Linear(width, 16), nn.ReLU(), nn.Linear(16, 3))


def batches():
    torch.manual_seed(1)
    return [(torch.randn(32, 8), torch.zeros(32)) for _ in range(6)]


class Samples:
    def __len__(self):
        return 96

    def __getitem__(self, index):
        if index >= 96:
            raise IndexError
        return torch.full((8,), float(index)), index


samples = Samples()
number = 3
"""


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a factory in the present folder."""
    (tmp_path / "mine.py").write_text(FILE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    return "mine.py:network"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Type a command; returns its exit status, output and errors."""

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["evolvenet", *words])
        status: Any = 0
        try:
            main()
        except SystemExit as ended:
            status = ended.code
        out, err = capsys.readouterr()
        return status or 0, out, err

    return run


def test_inspect_lists_widths_spectra_and_reasons(net: str, run: Any) -> None:
    status, out, _ = run("inspect", net, "--input", "1,8")
    assert status == 0
    assert "867 parameters" in out
    assert "99.7% of the parameters" in out
    assert "█" in out
    assert "is the model's output" in out


def test_inspect_as_json_is_what_the_library_finds(net: str, run: Any) -> None:
    status, out, _ = run("inspect", net, "--arg", "width=5", "--input", "1,8", "--json")
    found = json.loads(out)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 3))
    graph = evolvenet.trace(model, torch.zeros(1, 8))
    spectra = evolvenet.spectra(model, graph)
    assert status == 0
    assert {w["name"]: w["size"] for w in found["widths"] if w["frozen"] is None} == graph.sizes
    assert found["parameters"] == graph.parameters
    for width in found["widths"]:
        if width["frozen"] is None:
            own = spectra[width["name"]]
            torch.testing.assert_close(torch.tensor(width["spectrum"], dtype=torch.float64), own / own.max())


@pytest.mark.parametrize("data", ["mine:batches", "mine:samples", "x.npy", "two.npz", "x.pt"])
def test_compress_writes_a_file_that_load_reads(net: str, run: Any, data: str, tmp_path: Path) -> None:
    samples = np.random.default_rng(0).normal(size=(200, 8)).astype(np.float32)
    np.save(tmp_path / "x.npy", samples)
    np.savez(tmp_path / "two.npz", y=np.zeros(200), x=samples)
    torch.save(torch.from_numpy(samples), tmp_path / "x.pt")
    words = ("--input", "1,8", "--data", data, "--parameters", "50%", "--out", "small.pt", "--batch-size", "32")
    status, out, err = run("compress", net, *words, "--no-lowrank", "--steps", "4", "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert found["polished"]["kept"] or found["polished"]["steps"] >= 3  # one for each rate that is given up
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3))
    assert found["before"] == parameters(model)
    evolvenet.load(model, tmp_path / "small.pt")
    assert parameters(model) == found["after"] <= found["before"] / 2
    status, out, _ = run("inspect", net, "--input", "1,8", "--checkpoint", "small.pt", "--json")
    assert json.loads(out)["parameters"] == found["after"]


def test_diff_names_widths_and_parameters(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    graph = evolvenet.trace(model, torch.zeros(1, 4))
    evolvenet.save(model, "wide.pt", torch.zeros(1, 4))
    torch.save(model.state_dict(), "bare.pt")
    evolvenet.prune(model, graph, {"0": 3})
    evolvenet.save(model, "narrow.safetensors")
    before, after = 8 * 4 + 8 + 64 + 8 + 18, parameters(model)
    status, out, _ = run("diff", "wide.pt", "narrow.safetensors", "--json")
    assert status == 0
    assert json.loads(out) == {"what": "widths", "changes": {"0": [8, 3]}, "same": 1, "entries": [before, after]}
    _, out, _ = run("diff", "bare.pt", "narrow.safetensors", "--json")
    assert json.loads(out)["changes"] == {
        "0.weight": [[8, 4], [3, 4]],
        "0.bias": [[8], [3]],
        "2.weight": [[8, 8], [8, 3]],
    }
    _, out, _ = run("diff", "wide.pt", "narrow.safetensors")
    assert "÷ 2.7" in out
    _, out, _ = run("diff", "wide.pt", "wide.pt")
    assert "2 widths the same" in out


def test_diff_shows_the_paths_of_files_of_one_name_as_they_are(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    for place, size in enumerate((3, 4)):
        (tmp_path / f"run[{place}]").mkdir()
        torch.save(nn.Linear(size, 2).state_dict(), tmp_path / f"run[{place}]" / "a.pt")
    _, out, _ = run("diff", "run[0]/a.pt", "run[1]/a.pt")
    assert "run[0]/a.pt   run[1]/a.pt" in out


def result(parameters: int, val: float, test: float) -> dict[str, Any]:
    """What a run of train.py leaves, as far as it is read."""
    history = evolvenet.History(evolvenet.Event(0, (), {"hidden": 8}, 900, 900, 800, 0.0), [])
    return {
        "title": "a run", "end": {"parameters": parameters, "macs": 10}, "val_acc": val, "test_acc": test, "front": [],
        "history": history.to_dict(), "curve": [(1, 0.5), (2, val)],
    }  # fmt: skip


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Four finished runs and one that broke off."""
    for name, found in {
        "small": result(100, 0.90, 0.89),
        "worse": result(200, 0.85, 0.99),
        "large": result(300, 0.97, 0.96),
        "same": result(300, 0.96, 0.97),
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(json.dumps(found), encoding="utf-8")
    (tmp_path / "broken").mkdir()
    return tmp_path


def test_the_front_is_chosen_by_validation_accuracy_and_size(runs: Path, run: Any) -> None:
    status, out, _ = run("front", str(runs), "--json", "--picture", str(runs / "front.png"))
    assert status == 0
    assert [(point["run"], point["front"]) for point in json.loads(out)] == [
        ("small", True), ("worse", False), ("large", True), ("same", False),
    ]  # fmt: skip
    assert (runs / "front.png").stat().st_size > 5_000


def test_a_front_may_be_drawn_by_runs_named_one_by_one(runs: Path, run: Any) -> None:
    status, out, _ = run("front", str(runs / "small"), str(runs / "worse"))
    assert status == 0
    assert "● small" in " ".join(out.split())


def test_runs_are_named_by_the_overrides_that_not_all_share_and_fronts_give_every_point(runs: Path, run: Any) -> None:
    for name in ("small", "worse", "large"):
        (runs / name / ".hydra").mkdir()
        words = json.dumps(["model=x", f"lr={name}", *["resume=auto"] * (name == "small")])
        (runs / name / ".hydra" / "overrides.yaml").write_text(words, encoding="utf-8")
    points = [{"parameters": count, "macs": 1, "val_acc": 0.9, "test_acc": 0.9} for count in (40, 300)]
    (runs / "large" / "result.json").write_text(
        json.dumps({**result(300, 0.9, 0.9), "front": points}), encoding="utf-8"
    )
    found = points_of([runs / "small", runs / "worse", runs / "large"])
    assert [(point["run"], point["parameters"]) for point in found] == [
        ("lr=large", 40), ("lr=small", 100), ("lr=worse", 200), ("lr=large", 300),
    ]  # fmt: skip
    # A run without recorded overrides has its folder's path.
    assert {point["run"] for point in points_of([runs])} == {
        "same", "model=x lr=large", "model=x lr=small", "model=x lr=worse",
    }  # fmt: skip
    assert {point["run"] for point in points_of([runs / "same", runs / "large"])} == {"same", "model=x lr=large"}
    assert [point["run"] for point in points_of([runs / "small"])] == ["small"]
    # Of a sweep of which one run alone has a result, the others tell what was swept.
    for name in ("small", "worse"):
        shutil.copytree(runs / name / ".hydra", runs / "sweep" / name / ".hydra")
    shutil.copy(runs / "small" / "result.json", runs / "sweep" / "small")
    assert [run.settings for run in runs_below([runs / "sweep"])] == ["lr=small"]
    shutil.rmtree(runs / "sweep")
    words = json.dumps(["lr=small", "+logger={api_key: s3cret, project: x}", "+token=s3cret"])
    (runs / "small" / ".hydra" / "overrides.yaml").write_text(words, encoding="utf-8")
    names = {point["run"] for point in points_of([runs / "small", runs / "worse"])}
    assert names == {"lr=small +logger={api_key: ***, project: x} +token=***", "model=x lr=worse"}


def test_the_page_of_a_front_is_written_anew_with_all_that_it_had(runs: Path, run: Any) -> None:
    point = {"parameters": 5000, "macs": 1, "val_acc": 0.9, "test_acc": 0.91, "epoch": 1, "seconds": 60.0}
    row = {"network": "Tucker", "state": "+ epoch", "accuracy": 0.77, "parameters": 321}
    whole = {
        **result(700, 0.9, 0.92), "front": [point, {**point, "parameters": 700}], "seconds": 61.0, "steps": 1234,
        "compression": {"rows": [row]}, "config": {"z": 1, "a": "ü"},
    }  # fmt: skip
    (runs / "small" / "result.json").write_text(json.dumps(whole), encoding="utf-8")
    status, out, _ = run("report", str(runs / "small"))
    page = (runs / "small" / "report.html").read_text(encoding="utf-8")
    assert status == 0
    for text in (
        "The front",
        "test accuracy at 5,000",
        "91.00%",
        "61 s for 1,234 steps",
        "77.00% with 321",
        "z: 1\na: ü",
    ):
        assert text in page, text
    assert "errors of 10,000" in out


def test_report_writes_the_page_of_a_run(runs: Path, run: Any) -> None:
    status, out, _ = run("report", str(runs / "small"))
    assert status == 0
    assert "89.00%" in out
    assert "a run" in (runs / "small" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("inspect", "mine.py:network"), "--input: expected a shape"),
        (("inspect", "mine.py:network", "--input", "1,x"), "--input 1,x: expected a shape"),
        (("inspect", "mine.py:network", "--input", "1,8:int7"), "--input 1,8:int7: expected a shape"),
        (("inspect", "mine.py:network", "--input", "1,9"), "The model does not run on the example inputs"),
        (("inspect", "mine.py:none", "--input", "1,8"), "expected 'none' in mine.py"),
        (("inspect", "mine.py:number"), "expected a class, a function or a network, got a int"),
        (("inspect", "no_such_module:x"), "got no module 'no_such_module'"),
        (("inspect", "nothing"), "got no colon"),
        (("inspect", "mine.py:network", "--arg", "depth=3"), "got TypeError"),
        (("inspect", "mine.py:network", "--input", "1,8", "--checkpoint", "none.pt"), "there is no file none.pt"),
        (("diff", "none.pt", "none.pt"), "there is no file none.pt"),
        (("report", "."), "which has no result.json|got one without result.json"),
        (("front", "."), "got no result.json there"),
        (("front", ".", "--picture", "a.xyz"), "--picture a.xyz: expected a name that ends in .png, .svg, .pdf"),
        (("front", ".", "--picture", "none/a.png"), "--picture none/a.png: expected a folder none"),
        (("inspect", "mine.py:network", "--input", "1,8", "--batch-size", "64", "--key", "x"), "--data with --batch-size, --key"),
        (("compress", "mine.py:network", "--input", "1,8", "--data", "mine:batches", "--out", "a.pt"), "got none"),
        (
            ("compress", "no:thing", "--data", "no:thing", "--parameters", "9%", "--out", "none/a.pt"),
            "--out none/a.pt: expected a folder none, got none there",
        ),
        (
            ("compress", "no:thing", "--data", "no:thing", "--parameters", "0.5", "--out", "a.pt"),
            "--parameters 0.5: expected a number from 1 on. For a share, type 50%",
        ),
        (("compress", "no:thing", "--data", "no:thing", "--latency", "3MB", "--out", "a.pt"), "--latency 3MB: expected"),
        (
            ("compress", "mine.py:network", "--input", "1,8", "--data", "mine:batches", "--parameters", "9%", "--out", "a.x"),
            "--out a.x: expected a name that ends in",
        ),
        (
            ("compress", "mine.py:network", "--input", "1,8", "--data", "mine:batches", "--parameters", "x", "--out", "a.pt"),
            "--parameters x: expected a share or a number",
        ),
        (
            ("compress", "mine.py:network", "--input", "1,8", "--data", "b.npy", "--parameters", "9%", "--out", "a.pt"),
            "Say what to multiply by: --scale",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(net: str, run: Any, tmp_path: Path, words: Any, expected: str) -> None:
    np.save(tmp_path / "b.npy", np.zeros((10, 8), dtype=np.uint8))
    status, out, err = run(*words)
    assert status == 1
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert any(each in err for each in expected.split("|")), err
    assert not (tmp_path / "a.pt").exists()


def test_every_command_and_option_has_help(run: Any) -> None:
    for command in app.registered_commands:
        assert command.callback is not None
        status, out, _ = run(command.callback.__name__, "--help")
        assert status == 0
        assert (command.callback.__doc__ or "").split(",")[0].split(".")[0] in " ".join(out.split())


def test_the_module_is_the_command() -> None:
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "evolvenet", "diff", "no.pt", "no.pt"], capture_output=True, text=True
    )
    assert ran.returncode == 1
    assert ran.stderr.strip().splitlines()[-1] == "error: there is no file no.pt"


def bars(printed: str) -> list[str]:
    """The words of a print without its numbers and the heights of its bars."""
    return shape(re.sub("[▁▂▃▄▅▆▇█]", "█", printed))


def test_the_page_of_the_command_line_shows_what_is_printed(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("COLUMNS", "120")
    (tmp_path / "net.py").write_text(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0], encoding="utf-8")
    torch.manual_seed(0)
    evolvenet.save(build("net.py:network"), "wide.pt", torch.zeros(1, 32))
    shown = [
        block
        for part in re.findall(r"```console\n(.*?)```", page, re.DOTALL)
        for block in part.split("$ evolvenet ")[1:]
    ]
    for block in shown:
        command, _, printed = block.partition("\n")
        status, out, err = run(*command.split())
        assert (status, err) == (0, "")
        # Digits and bars depend on the machine; their places do not.
        assert not printed or bars(out) == bars(printed)

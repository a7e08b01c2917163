"""The comparison of language models on tiny networks: results out, kept, resumed; the peers' parts compute the same function."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from experiments.compare import language as compare
from experiments.compare import language_peers as peers
from experiments.compare.copies import copied
from experiments.compare.language_methods import METHODS
from experiments.compare.language_networks import KINDS, TINY, Text, build, gathered, windows
from experiments.compare.language_table import goals

PROSE = "".join(
    f"The {number * number} quick foxes jump over {number} lazy dogs, and sleep.\n\n" for number in range(2000)
)
RUN = ("ffn", "tp_ffn", "svd_llm", "slicegpt", "tp_llm", "bare", "ranks")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where one run has left its results and its page."""
    path = tmp_path_factory.mktemp("language")
    (path / "text.txt").write_text(PROSE, encoding="utf-8")
    run(path)
    return path


def run(path: Path, *more: str) -> None:
    chosen = ["--tiny", "--only", "gpt2", "--levels", "30", "--methods", *RUN, *more]
    compare.main([*chosen, "--text", str(path / "text.txt"), "--cache", str(path), "--page", str(path / "page.md")])


def test_a_run_leaves_results_within_the_limit_and_a_page_that_shows_them(folder: Path) -> None:
    page = (folder / "page.md").read_text("utf-8")
    for name in RUN:
        record = json.loads((folder / f"gpt2/seed0/30-{name}.json").read_text("utf-8"))
        assert record["parameters"] <= 0.7
        assert f"| {METHODS[name].label} | {record['test']:+.4f} |" in page
        assert f"| {METHODS[name].label} | {record['after']:+.4f} |" in page


def test_a_second_run_resumes_and_other_code_is_run_again_but_not_the_peers(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def times() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in folder.glob("gpt2/seed0/*")}

    before = times()
    run(folder)
    assert times() == before
    monkeypatch.setattr(compare, "state", lambda: "later")
    run(folder, "--one-shot", "--methods", "ranks", "svd_llm")
    assert {name for name, time in times().items() if time != before[name]} == {"30-ranks.json"}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_what_the_peers_prepare_computes_the_same_function(kind: str) -> None:
    torch.manual_seed(0)
    model, names = build(kind, TINY).eval(), peers.NAMES[kind]
    for tensor in model.parameters():
        tensor.add_(0.2 * torch.randn_like(tensor))
    batches = [{"input_ids": torch.randint(0, 97, (4, 32))} for _ in range(2)]
    before = model(**batches[0]).logits
    dense = peers.with_dense_layers(copied(model))
    folded = peers.without_norm_weights(copied(dense), names)
    rotated = peers.slicegpt(copied(dense), kind, batches, target=10**9)
    for changed in (dense, folded, rotated):
        torch.testing.assert_close(changed(**batches[0]).logits, before, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_whitened_factors_are_the_best_for_the_outputs() -> None:
    torch.manual_seed(0)
    layer, inputs = nn.Linear(12, 10).double(), torch.randn(500, 12, dtype=torch.float64) @ torch.randn(12, 12).double()
    found = peers.factors(layer, inputs.T @ inputs, 3)
    lost = (found(inputs) - layer(inputs)).square().sum()
    tail = torch.linalg.svdvals(inputs @ layer.weight.T)[3:].square().sum()
    torch.testing.assert_close(lost, tail)


def test_parts_of_the_text_share_no_piece_and_windows_cover_it() -> None:
    text = Text.of("".join(chr(32 + number // 4096 % 90) for number in range(4096 * 40)))
    parts = [set(part.tolist()) for part in (text.train, text.validation, text.test)]
    assert [len(part) for part in parts] == [36, 2, 2]
    assert len(set.union(*parts)) == 40
    assert windows(torch.arange(1000), 9, 5)[:, 0].tolist() == [0, 250, 500, 740, 990]


def test_the_gathered_text_has_the_documentation_once() -> None:
    paragraphs = gathered().split("\n\n")
    assert len(paragraphs) == len(set(paragraphs)) > 1000


def test_goals_take_the_best_of_ours_by_validation_and_the_best_other_by_test() -> None:
    def row(validation: float, test: float) -> dict[int, dict[str, float]]:
        return {0: {"validation": validation, "test": test}}

    results = {(30, "ffn"): row(0.02, 0.01), (30, "both"): row(0.01, 0.017), (30, "svd_llm"): row(0.0, 0.03)}
    first, second = goals({"llama": ({}, results)})
    assert ("+0.0170" in first[1], first[2]) == (True, "met")
    assert ("+0.0300" in second[1], second[2]) == (True, "**missed**")

"""Language models cut and polished, on a tiny network: results out, kept, shown with their goals."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from experiments.compare import language_polish as compare
from experiments.compare.language_networks import TINY, build
from experiments.compare.language_polish_table import goals
from experiments.pages import BY_HAND

PROSE = "".join(f"The {number * number} quick foxes jump over {number} lazy dogs.\n\n" for number in range(500))


def test_a_run_leaves_results_and_a_page_and_a_second_one_keeps_them(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(PROSE, encoding="utf-8")
    chosen = ["--tiny", "--only", "gpt2", "--levels", "30", "--methods", "svd_llm", "--polish-steps", "50"]
    chosen += ["--cache", str(tmp_path), "--page", str(tmp_path / "page.md")]
    compare.main(chosen)
    path = tmp_path / "gpt2/seed0/30-svd_llm.json"
    record = json.loads(path.read_text("utf-8"))
    assert record["parameters"] <= 0.7
    assert record["polish_after"] < record["polish_before"]
    # Of 32 sequences 28 are not held out, and for each of these the network writes some.
    assert record["samples"] == 32 + 28 * compare.WRITTEN
    page = (tmp_path / "page.md").read_text("utf-8")
    for what in ("cut", "polished"):
        assert f"| {record[what]['test']:+.4f} |" in page
    made = path.stat().st_mtime_ns
    (tmp_path / "page.md").write_text("\n".join(["# Old", BY_HAND[0], "So it is.", BY_HAND[1], "Old end"]), "utf-8")
    compare.main(chosen)
    assert path.stat().st_mtime_ns == made
    again = (tmp_path / "page.md").read_text("utf-8").splitlines()
    assert [line for line in again if line not in page.splitlines()] == [BY_HAND[0], "So it is.", BY_HAND[1]]


def test_what_a_network_writes_begins_as_the_text_does_and_is_its_own() -> None:
    torch.manual_seed(0)
    model, given = build("llama", TINY).eval(), torch.randint(0, 97, (4, 32))
    found = compare.written(model, given)
    assert found.shape == given.shape
    assert torch.equal(found[:, : compare.PROMPT], given[:, : compare.PROMPT])
    assert not torch.equal(found, given)


def test_goals_take_the_best_of_ours_by_validation_and_the_best_other_by_test() -> None:
    def row(validation: float, test: float) -> dict[int, dict[str, dict[str, float]]]:
        return {0: {"polished": {"validation": validation, "test": test}}}

    results = {(30, "ffn"): row(0.02, 0.01), (30, "widths"): row(0.01, 0.017), (30, "svd_llm"): row(0.0, 0.03)}
    first, second = goals({"llama": ({}, results)})
    assert ("+0.0170" in first[1], first[2]) == (True, "met")
    assert ("+0.0300" in second[1], second[2]) == (True, "**missed**")


def test_methods_that_were_not_run_with_all_seeds_do_not_count_for_a_goal() -> None:
    def rows(*tests: float) -> dict[int, dict[str, dict[str, float]]]:
        return {seed: {"polished": {"validation": test, "test": test}} for seed, test in enumerate(tests)}

    results = {(30, "ffn"): rows(0.0), (30, "both"): rows(0.01, 0.03), (30, "svd_llm"): rows(0.05, 0.01)}
    results[30, "slicegpt"] = rows(0.001)
    first, second = goals({"llama": ({}, results)})
    assert ("+0.0200" in first[1], "+0.0300" in second[1]) == (True, True)
    (missing,) = goals({"llama": ({}, {(30, "both"): rows(0.01), (30, "svd_llm"): rows(0.05, 0.01)})})
    assert missing[1] == "not run with all seeds"

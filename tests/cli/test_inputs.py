"""Samples of a file or a function become batches: multiplied, as many as asked for, without labels."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from evolvenet.cli.errors import CommandError
from evolvenet.cli.inputs import batches, example_inputs

LABELLED = """
import torch

x, y, labels = torch.ones(4, 3), torch.ones(4, 5), torch.zeros(4)
pairs = [(x, labels)] * 5
triples = [(x, y, labels)] * 5
named = [{"x": x, "y": y, "labels": labels}] * 5
"""
X, Y = torch.zeros(1, 3), torch.zeros(1, 5)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "labelled.py").write_text(LABELLED, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "labelled", raising=False)


def taken(data: str, inputs: Any, **options: Any) -> list[Any]:
    return batches(data, inputs, **{"samples": 100, "size": 4, "scale": None, "key": None, **options})


@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_numbers_of_a_file_are_multiplied_by_the_scale(kind: Any) -> None:
    np.save("x.npy", np.arange(30, dtype=kind).reshape(10, 3))
    found = torch.cat(taken("x.npy", X, scale=0.5))
    assert torch.equal(found, torch.arange(30.0).view(10, 3) / 2)


def test_of_a_file_as_many_samples_are_taken_as_asked_for_in_batches_of_the_size() -> None:
    np.save("x.npy", np.ones((10, 3), np.float32))
    assert [len(batch) for batch in taken("x.npy", X, samples=7)] == [4, 3]
    assert len(taken("labelled:pairs", X, samples=7)) == 2, "whole batches until there are enough"


def test_the_key_names_the_samples_even_where_another_name_is_looked_for_first() -> None:
    np.savez("many.npz", x=np.zeros((4, 3), np.float32), other=np.ones((4, 3), np.float32))
    assert [float(taken("many.npz", X, key=key)[0].mean()) for key in (None, "other")] == [0, 1]


@pytest.mark.parametrize(
    ("name", "inputs", "shapes"),
    [
        ("pairs", X, [(4, 3)]),
        ("triples", (X, Y), [(4, 3), (4, 5)]),
        ("named", {"x": X, "y": Y}, {"x": (4, 3), "y": (4, 5)}),
    ],
)
def test_labels_behind_the_inputs_are_dropped(name: str, inputs: Any, shapes: Any) -> None:
    for batch in taken(f"labelled:{name}", inputs):
        if isinstance(batch, dict):
            assert {name: tuple(each.shape) for name, each in batch.items()} == shapes
        else:
            assert [tuple(each.shape) for each in ([batch] if isinstance(batch, Tensor) else batch)] == shapes


def test_without_an_input_the_first_sample_of_a_file_is_one_unless_it_is_of_whole_numbers() -> None:
    samples = np.arange(30, dtype=np.float32).reshape(10, 3)
    np.savez("x.npz", labels=samples[:, 0], x=samples)
    np.save("words.npy", samples.astype(np.int64))
    model = torch.nn.Linear(3, 2)
    assert torch.equal(example_inputs(model, [], "x.npz"), torch.tensor([[0.0, 1.0, 2.0]]))
    assert example_inputs(model, ["1,3"], "x.npz").shape == (1, 3)
    for data in ("words.npy", "absent.npy", None):
        with pytest.raises(CommandError, match="--input"):
            example_inputs(model, [], data)

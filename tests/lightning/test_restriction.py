"""`network=`, `fixed=` and `multiple=` in a run of Lightning, by the names of the LightningModule."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from evolvenet import PolicyError, Proposal, WidthEvolution
from tests.helpers.runs import Batches, User, trainer


class Halve:
    def propose(self, context: Any) -> dict[str, Proposal]:
        return {name: Proposal(max(1, size // 2), "half") for name, size in context.graph.sizes.items()}


class Parts(User):
    """One child is the network; it has parts with names."""

    def __init__(self) -> None:
        super().__init__()
        layers = [("stem", nn.Linear(6, 20)), ("body", nn.Linear(20, 20)), ("neck", nn.Linear(20, 20))]
        self.net = nn.Sequential(OrderedDict([*layers, ("head", nn.Linear(20, 3))]))


class Called(Parts):
    """Its step calls the child, so widths go by the child's names."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])


def sizes(kind: type[Parts], folder: Path, **options: Any) -> list[int]:
    torch.manual_seed(0)
    module = kind()
    evolution = WidthEvolution(Halve(), every_n_steps=6, stop=1.0, **options)
    trainer(folder, [evolution], max_steps=12).fit(module, Batches(4))
    assert isinstance(module.net, nn.Sequential)
    return [layer.out_features for layer in module.net.children() if isinstance(layer, nn.Linear)]


@pytest.mark.parametrize("kind", [Parts, Called])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [10, 10, 10, 3]),
        ({"network": "net.body"}, [20, 10, 20, 3]),
        ({"fixed": ["net.st*", "net.neck"]}, [20, 10, 20, 3]),
        ({"network": ["net"], "fixed": "net.head"}, [10, 10, 10, 3]),
        ({"multiple": 8}, [16, 16, 16, 3]),
    ],
    ids=str,
)
def test_only_what_was_chosen_changes(
    kind: type[Parts], options: dict[str, Any], expected: list[int], tmp_path: Path
) -> None:
    assert sizes(kind, tmp_path, **options) == expected


def test_names_may_be_those_of_the_table_at_the_end(tmp_path: Path) -> None:
    assert sizes(Called, tmp_path, fixed=["stem"]) == [20, 10, 10, 3]


def test_a_misspelled_name_is_refused_before_training(tmp_path: Path) -> None:
    module = Parts()
    with pytest.raises(PolicyError, match=r"'net.bodi', which matches none. Like it are 'net.body'"):
        trainer(tmp_path, [WidthEvolution(Halve(), fixed="net.bodi")]).fit(module, Batches(4))
    assert module.trainer.global_step == 0


def test_another_choice_holds_for_the_rest_of_a_resumed_run(tmp_path: Path) -> None:
    first = Parts()
    run = trainer(tmp_path, [WidthEvolution(Halve(), every_n_steps=6, stop=1.0)], max_steps=12)
    run.fit(first, Batches(4))
    run.save_checkpoint(tmp_path / "last.ckpt")
    second = Parts()
    evolution = WidthEvolution(Halve(), every_n_steps=6, stop=1.0, fixed="net.stem")
    trainer(tmp_path, [evolution], max_steps=18, max_epochs=9).fit(second, Batches(4), ckpt_path=tmp_path / "last.ckpt")
    assert [layer.out_features for layer in second.net.children() if isinstance(layer, nn.Linear)] == [10, 5, 5, 3]
    assert evolution.history is not None
    assert evolution.history.frozen["net.stem"] == "fixed by the user: matches 'net.stem'"

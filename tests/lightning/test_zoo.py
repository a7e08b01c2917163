"""Modules of many kinds, fit for some steps with default arguments: what can be cut is cut, and no event fails."""

from __future__ import annotations

import evolvenet  # noqa: F401  isort: skip

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from evolvenet._compat.torch import tree_leaves
from evolvenet.lightning.step import without_effects
from tests.helpers.resuming import assert_same
from tests.helpers.zoo import ZOO
from tests.helpers.zoo.runs import Run, first_calls, fit, parameters, resumed

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*number of training batches")


@pytest.fixture(scope="module", params=ZOO)
def run(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The fit that all tests of one module look at."""
    return fit(ZOO[request.param], tmp_path_factory.mktemp("zoo"))


def test_each_network_is_cut_or_says_why_not(run: Run) -> None:
    entry, evolution = run.entry, run.evolution
    assert evolution.history is not None
    assert evolution.evolver is not None
    widths = evolution.evolver.graph.widths
    for width in widths.values():
        print(f"{width.name}: {evolution.history.initial.sizes.get(width.name)} → {width.size}; {width.frozen}")
    assert len(evolution.history.events) >= 2
    skipped = [event.skipped for event in evolution.history.events if event.skipped]
    assert all(reason.startswith(entry.skipped) for reason in skipped) if entry.skipped else not skipped
    assert bool(evolution.evolver.off) == bool(entry.skipped)
    assert [path for path in entry.cut if parameters(run.module, path) >= run.before[path]] == []
    assert [name for name, reason in entry.stays.items() if reason not in (widths[name].frozen or "")] == []
    assert entry.cut or entry.stays or entry.skipped


def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(run: Run) -> None:
    assert_same(resumed(run).state, run.state)


def test_what_is_left_exports_and_computes_the_same(run: Run) -> None:
    batch = next(iter(run.module.train_dataloader()))
    with first_calls(run.module) as calls, without_effects(run.module):
        run.module.train()
        run.module.training_step(*[batch, 1][: run.module.training_step.__code__.co_argcount - 1])
    run.module._trainer = None
    for path in [""] if "" in calls else calls:
        network, (args, kwargs) = run.module.get_submodule(path).eval(), calls[path]
        if run.entry.not_exported:
            with pytest.raises(Exception, match=run.entry.not_exported):
                torch.export.export(network, args, kwargs)
            continue
        random.seed(1)  # an export follows one of the ways that Python's random numbers lead
        exported = torch.export.export(network, args, kwargs).module()
        found = [_seeded(each, args, kwargs) for each in (exported, network)]
        assert found[0]
        torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def _seeded(network: nn.Module, args: Any, kwargs: Any) -> list[Tensor]:
    torch.manual_seed(1)
    random.seed(1)
    return [leaf for leaf in tree_leaves(network(*args, **kwargs)) if isinstance(leaf, Tensor)]

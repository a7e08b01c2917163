"""Modules of many kinds, fit for some steps with default arguments: what can be cut is cut, and no event fails."""

from __future__ import annotations

import evolvenet  # noqa: F401  isort: skip

import pytest

from tests.helpers.zoo import ZOO
from tests.helpers.zoo.runs import fit, parameters


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*number of training batches")
@pytest.mark.parametrize("name", ZOO)
def test_each_network_is_cut_or_says_why_not(name: str) -> None:
    entry = ZOO[name]
    module = entry.module()
    before = {path: parameters(module, path) for path in entry.cut}
    evolution = fit(module)
    assert evolution.history is not None
    assert evolution.evolver is not None
    for width in evolution.evolver.graph.widths.values():
        print(f"{width.name}: {evolution.history.initial.sizes.get(width.name)} → {width.size}; {width.frozen}")
    skipped = [event.skipped for event in evolution.history.events if event.skipped]
    assert [*skipped, evolution.evolver.off or ""][0].startswith(entry.skipped) if entry.skipped else not skipped
    assert bool(evolution.evolver.off) == bool(entry.skipped)
    assert len(evolution.history.events) >= 2
    assert [path for path in entry.cut if parameters(module, path) >= before[path]] == []
    for width, reason in entry.stays.items():
        assert reason in (evolution.evolver.graph.widths[width].frozen or "")
    assert entry.cut or entry.stays or entry.skipped

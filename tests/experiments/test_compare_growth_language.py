"""The page on what a growth is worth: its shares of the gap, and that every start but none keeps what a network computes."""

from __future__ import annotations

import pytest
import torch

from evolvenet.graph.width_graph import WidthGraph
from experiments.compare.growth_language import SETTING, STARTS, network, table, traced


def test_the_share_of_the_gap_is_between_the_two_networks_from_scratch() -> None:
    found = {
        ("FFN", "none: small throughout"): [2.0, 2.2],
        ("FFN", "none: large throughout"): [1.6, 1.8],
        ("FFN", "paired"): [1.9, 2.1],
    }
    assert "| FFN | paired | 1.900, 2.100 | 2.000 | 25% |" in table(found)


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in STARTS if "changes the function" not in name])
def test_every_start_keeps_the_outputs(name: str) -> None:
    kind, start, _ = STARTS[name]
    torch.manual_seed(0)
    model, words = network(kind, False, SETTING).eval(), torch.randint(90, (2, 16))
    graph: WidthGraph = traced(kind, SETTING)
    assert start is not None
    with torch.no_grad():
        before = model(input_ids=words).logits
    start(
        model,
        graph,
        {w.name: 2 * w.size for w in graph.resizable if w.kind == kind},
        torch.optim.AdamW(model.parameters()),
        [],
    )
    with torch.no_grad():
        assert torch.allclose(model(input_ids=words).logits, before, atol=1e-4)

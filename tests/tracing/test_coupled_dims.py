"""Which projections count as those of one attention, whose dimensions change together."""

from __future__ import annotations

import pytest

from evolvenet.graph.axes import CONSUMES, PRODUCES, Tie
from evolvenet.graph.coverage import other_order
from evolvenet.graph.width_graph import Width
from evolvenet.tracing.coupled_dims import _enclosing_module


@pytest.mark.parametrize(
    ("shuffled", "module"), [(None, "attn"), ("attn.in_proj", ""), ("attn.out.weight", "attn"), ("attn2.w", "attn")]
)
def test_a_fused_projection_holds_its_width_unless_its_own_tensor_has_another_order(
    shuffled: str | None, module: str
) -> None:
    ties = (
        Tie("attn.in_proj", 0, 0, 1, PRODUCES),
        Tie("attn.in_proj", 0, 8, 1, PRODUCES),
        Tie("attn.out.weight", 1, 0, 1, CONSUMES),
    )
    reason = None if shuffled is None else other_order(shuffled, 0)
    assert _enclosing_module(Width("attn", 8, frozen=reason, ties=ties)) == module

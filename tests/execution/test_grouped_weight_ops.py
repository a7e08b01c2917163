"""Products with one weight for each group of rows: a weight op for each, which costs, measurements and refits go by."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import evolvenet
from evolvenet.execution.isolation import op_by_op
from evolvenet.execution.weight_ops import WeightOp, WeightOpMode
from evolvenet.measurement.cost import uses
from evolvenet.tracing.trace import trace
from tests.helpers.networks.experts import Experts, Mixture

X = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("stored", ["out in", "in out"])
def test_each_expert_is_a_weight_op_of_its_rows(stored: str) -> None:
    torch.manual_seed(0)
    model = Experts(stored=stored)
    found: list[tuple[WeightOp, Tensor]] = []
    with torch.no_grad(), op_by_op(WeightOpMode(model, after=lambda op, out: found.append((op, out)))):
        model(X)
    stacked = [(op, out) for op, out in found if op.stacked]
    assert [op.tensor for op, _ in stacked] == ["up"] * 4 + ["down"] * 4
    for op, out in stacked:
        assert torch.allclose(op.columns(torch.arange(len(out)))[0] @ op.matrix()[0].mT, out, atol=1e-5)
    assert {(op.axis, op.output_axis) for op, _ in stacked} == {(2, 1) if stored == "out in" else (1, 2)}
    # Two of the four experts multiply each row.
    assert uses(model, X) == {"router.weight": 1.0, "up": 0.5, "down": 0.5}


@pytest.mark.parametrize("stored", ["out in", "in out"])
def test_experts_are_refitted_after_a_cut(stored: str) -> None:
    torch.manual_seed(0)
    model = Mixture(stored=stored)
    batches = [torch.randint(11, (8, 8)) for _ in range(4)]
    graph, bare = trace(model, batches[0]), copy.deepcopy(model)
    with torch.no_grad():
        for block in model.modules():
            if not isinstance(block, Experts):
                continue
            # Units that others predict: a bare cut of them loses what the refit gives back.
            for weight in (block.up, block.down):
                units = weight if (stored == "out in") == (weight is block.up) else weight.mT
                units[:, 8:16] = units[:, :8]
                if weight is block.up:
                    units[:, 32:40] = units[:, 24:32]
        bare.load_state_dict(model.state_dict())
        expected = torch.cat([model(batch) for batch in batches])
        sizes = {"blocks.0": 16, "blocks.1": 16}
        evolvenet.prune(model, graph, sizes, batches=batches)
        evolvenet.prune(bare, trace(bare, batches[0]), sizes)
        fitted, cut = (float((torch.cat([m(b) for b in batches]) - expected).norm()) for m in (model, bare))
    assert fitted < 0.01 * float(expected.norm()) < cut

"""The graph of a model with a chain is what a trace of that model finds, and the way back is the inverse."""

from __future__ import annotations

import pytest
from torch import nn

from evolvenet.graph.factors import TwoFactors, with_factors, without_factors
from evolvenet.lowrank.factorize import factorize
from evolvenet.lowrank.layers import FactoredLayer
from evolvenet.lowrank.merge import merge
from evolvenet.tracing.trace import trace
from tests.helpers.cases import CASES, Case, graph_of
from tests.helpers.low_rank import without_names

LAYERS = {nn.Linear: "svd", nn.Conv1d: "svd", nn.Conv2d: "spatial"}


def candidates(model: nn.Module) -> dict[str, str]:
    """{path: kind} of layers with a weight of their own, as far as they have no groups."""
    weights = [id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False)]
    return {
        path: "svd" if module.get_parameter("weight")[0, 0].numel() == 1 else LAYERS[type(module)]
        for path, module in model.named_modules()
        if type(module) in LAYERS
        and getattr(module, "groups", 1) == 1
        and weights.count(id(module.weight)) == 1
        and min(module.get_parameter("weight").shape[:2]) > 1
    }


@pytest.mark.parametrize("case", [case for case in CASES if case.name != "factorized"], ids=str)
def test_the_graph_with_factors_is_that_of_a_trace(case: Case) -> None:
    graph = graph_of(case)
    for path, kind in list(candidates(case.model()).items())[:3]:
        model = case.model()
        factorize(model, {path: 2}, {path: kind})
        chain = model.get_submodule(path)
        if f"{path}.weight" not in graph.shapes or not isinstance(chain, FactoredLayer):
            continue
        first, last = (tuple(factor.get_parameter("weight").shape) for factor in chain.factors)
        factors = TwoFactors(path, graph.shapes[f"{path}.weight"], first, last)
        found = with_factors(graph, factors)
        traced = trace(model, case.inputs())
        assert without_names(found) == without_names(traced), path
        assert without_names(without_factors(found, factors)) == without_names(graph)
        merge(model)
        assert without_names(trace(model, case.inputs())) == without_names(graph)

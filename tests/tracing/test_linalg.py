"""Linear algebra in a model's code, and convolutions over steps: units beside the matrices change, units along them do not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import evolvenet
from evolvenet.graph.index_map import IndexMap
from evolvenet.tracing.trace import trace
from tests.helpers.cases import distance, outputs
from tests.helpers.tracing import Between, Code, shuffle_and_widen

X = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _matrix(x: Tensor) -> Tensor:
    """`[6, 6]`, symmetric, with eigenvalues of one or more."""
    return x @ x.T + torch.eye(len(x), dtype=x.dtype)


def _small(h: Tensor) -> Tensor:
    """A matrix `[2, 2]` for each unit of each sample."""
    return h[..., None, None] * torch.ones(2, 2, dtype=h.dtype) + 3 * torch.eye(2, dtype=h.dtype)


BESIDE: dict[str, Code] = {
    "solve": lambda net, x, h: torch.linalg.solve(_matrix(x), h),
    "solve from the right": lambda net, x, h: torch.linalg.solve(_matrix(x), h.T, left=False).T,
    "triangular": lambda net, x, h: torch.linalg.solve_triangular(_matrix(x).tril(), h, upper=False),
    "batch of systems": lambda net, x, h: torch.linalg.solve(_small(h), x[:, :2, None].unsqueeze(1)).sum((-2, -1)),
    "det": lambda net, x, h: torch.linalg.det(_small(h)),
    "inverse": lambda net, x, h: torch.linalg.inv(_small(h)).sum((-2, -1)),
    "eigenvalues": lambda net, x, h: torch.linalg.eigvalsh(_small(h))[..., 1],
    "cholesky": lambda net, x, h: torch.linalg.cholesky(_small(h.sigmoid()))[..., 1, 0],
    "qr": lambda net, x, h: torch.linalg.qr(_small(h))[1].square().sum((-2, -1)),
    "exponential": lambda net, x, h: torch.linalg.matrix_exp(0.1 * _small(h))[..., 0, 1],
    "cross": lambda net, x, h: torch.linalg.cross(h[..., None] * x[:, None, :3], x[:, None, 1:4]).sum(-1),
}
ALONG: dict[str, Code] = {
    "solve": lambda net, x, h: torch.linalg.solve(_matrix(h.T), h.T).T,
    "qr": lambda net, x, h: torch.linalg.qr(h)[0] @ torch.linalg.qr(h)[1],
    "systems of data": lambda net, x, h: (
        torch.linalg.solve(
            _matrix(x).expand(8, 6, 6) * torch.arange(1.0, 9, dtype=x.dtype)[:, None, None], h.T[..., None]
        )[..., 0].T
    ),
    "triangular": lambda net, x, h: torch.linalg.solve_triangular(torch.eye(8, dtype=h.dtype), h.T, upper=False).T,
}


def between(code: Code) -> Between:
    torch.manual_seed(0)
    return Between(code).double()


@pytest.mark.parametrize("name", BESIDE)
def test_units_beside_the_matrices_change_exactly(name: str) -> None:
    model = between(BESIDE[name])
    graph = trace(model, X)
    assert graph.sizes == {"a": 8}
    shuffle_and_widen(model, graph, X)


@pytest.mark.parametrize("name", ALONG)
def test_units_along_a_matrix_or_beside_one_of_data_are_frozen(name: str) -> None:
    graph = trace(between(ALONG[name]), X)
    assert graph.sizes == {}
    assert " at tracing/test_linalg.py:" in str(graph.widths["a"].frozen)


class OverSteps(nn.Module):
    """Two convolutions over `[steps, batch, channels]`, as fairseq has them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(3, 5, 8))
        self.second = nn.Parameter(torch.randn(3, 8, 4))
        self.shift, self.last = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.conv_tbc(x, self.first, self.shift, 1).relu()
        return torch.conv_tbc(x, self.second, self.last, 1)


def test_the_channels_of_a_convolution_over_steps_change_exactly() -> None:
    torch.manual_seed(0)
    model, x = OverSteps().double(), torch.randn(6, 2, 5, dtype=torch.float64)
    graph = trace(model, x)
    assert graph.sizes == {"first": 8}
    assert {tie.role for tie in graph.widths["first"].ties} == {"produces", "consumes", "follows"}
    shuffle_and_widen(model, graph, x)
    model = OverSteps().double()
    with torch.no_grad():
        model.second[:, 3] = 0
    expected = outputs(model, x)
    evolvenet.resize(model, graph, {"first": IndexMap.keep([0, 1, 2, 4, 5, 6, 7], 8)})
    assert distance(outputs(model, x), expected) < 1e-12

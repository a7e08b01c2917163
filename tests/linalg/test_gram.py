"""Products of a matrix with itself, by blocks."""

from __future__ import annotations

import pytest
import torch

from evolvenet.linalg import gram as module
from evolvenet.linalg.gram import gram


@pytest.mark.parametrize("shape", [(5, 7), (3, 16), (2, 4, 19), (0, 8)])
def test_blocks_give_the_whole_product(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    monkeypatch.setattr(module, "FEWEST", 1)
    torch.testing.assert_close(gram(x), x.mT @ x)


@pytest.mark.parametrize("columns", [511, 512, 515, 1001])
def test_a_matrix_that_is_large_by_itself_gives_the_whole_product(columns: int) -> None:
    x = torch.randn(2, 3, columns, dtype=torch.float64)
    torch.testing.assert_close(gram(x), x.mT @ x)

"""Products of a matrix with itself."""

from __future__ import annotations

from torch import Tensor

BLOCKS = 8
"""Blocks of columns of a large matrix, whose products on and above the diagonal are computed."""
FEWEST = 512
"""Columns of which a matrix is large; fewer are multiplied at once."""


def gram(x: Tensor) -> Tensor:
    """xᵀ·x, `[..., columns, columns]`.

    For a large matrix on the CPU the blocks below the diagonal are copied from above it: little more than half of the
    multiplications. Other devices are faster with one product.

    Args:
        x: `[..., rows, columns]`.

    >>> import torch
    >>> gram(torch.tensor([[1.0, 2.0], [3.0, 4.0]])).tolist()
    [[10.0, 14.0], [14.0, 20.0]]
    """
    columns = x.shape[-1]
    if columns < FEWEST or x.device.type != "cpu":
        return x.mT @ x
    found = x.new_empty(*x.shape[:-2], columns, columns)
    size = -(-columns // BLOCKS)
    for start in range(0, columns, size):
        stop = min(start + size, columns)
        rows = x[..., start:stop].mT @ x[..., start:]
        found[..., start:stop, start:] = rows
        found[..., stop:, start:stop] = rows[..., stop - start :].mT
    return found

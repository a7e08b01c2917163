"""Connected components of units that are tied together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def connected(units: int, edges: Sequence[tuple[Tensor, Tensor]]) -> np.ndarray:
    """Number of the connected component of each of `units` ids, `[units]`.

    Args:
        units: number of ids.
        edges: pairs of equally long id tensors that are tied element by element.

    >>> connected(4, [(torch.tensor([0, 1]), torch.tensor([2, 1]))]).tolist()
    [0, 1, 0, 2]
    """
    # Imported here because it is most of what importing this package would cost.
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if not edges:
        return np.arange(units)
    rows = torch.cat([first for first, _ in edges]).numpy()
    columns = torch.cat([second for _, second in edges]).numpy()
    matrix = coo_array((np.ones(len(rows), np.int8), (rows, columns)), shape=(units, units))
    return connected_components(matrix, directed=False)[1]

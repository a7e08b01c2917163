"""How much data a reconstruction uses, and the batches as one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evolvenet._compat.torch import tree_flatten, tree_unflatten
from evolvenet.execution.inputs import first_samples
from evolvenet.execution.sampling import held_out, samples_in
from evolvenet.graph.width_graph import WidthGraph


@dataclass(frozen=True)
class ReconstructionLimits:
    """Bounds on the memory and the computation of a reconstruction.

    Args:
        samples: most samples of the batches that are used.
        entries: most numbers in the inputs that are used: all run in one pass, and a thousand photographs would not fit
            in memory.
        rows: most output positions (samples × positions) that one consumer is fitted on.
        multiplications: most multiplications for the Gram matrix of one consumer's inputs.
        rounds: fits after the first one of outputs that a rectifier takes, see `evolvenet.pruning.rectified`.
    """

    samples: int
    entries: int
    rows: int
    multiplications: float
    rounds: int = 0

    def rows_for(self, columns: int) -> int:
        """Output positions to fit a matrix of so many columns on.

        >>> TRAINING_LIMITS.rows_for(100), TRAINING_LIMITS.rows_for(2304)
        (2048, 465)
        """
        # [rows, rows] in the dual form takes rows² · columns, [columns, columns] in the primal one rows · columns².
        dual = int((self.multiplications / columns) ** 0.5)
        fitting = dual if dual < 2 * columns else int(self.multiplications / columns**2)
        return max(16, min(self.rows, fitting))


ONE_SHOT_LIMITS = ReconstructionLimits(samples=1024, entries=8_000_000, rows=8192, multiplications=4e10, rounds=3)
"""For a single cut: a thousand images were enough on MNIST, and after three rounds little is gained."""

LARGE_LIMITS = ReconstructionLimits(samples=1024, entries=8_000_000, rows=16_384, multiplications=1e12)
"""For a single cut of a large model: its layers have thousands of columns, and need more rows than that."""

LARGE = 50_000_000
"""Parameters above which a model is large."""


def is_large(graph: WidthGraph) -> bool:
    """Whether a model is so large that it is not copied or fitted twice, and that its moments are not kept."""
    return graph.parameters > LARGE


TRAINING_LIMITS = ReconstructionLimits(samples=256, entries=8_000_000, rows=2048, multiplications=5e8)
"""For the cuts of a training run: they are many, and training goes on after each."""


def concatenated(batches: Iterable[Any], limits: ReconstructionLimits) -> Any:
    """The batches as one, or the first alone where their leaves cannot be concatenated; cut to the limits."""
    listed = list(batches)
    if not listed:
        return None
    one = listed[0] if samples_in(listed[0]) >= _most(listed[0], limits) else joined(listed)
    return _limited(listed[0] if one is None else one, limits)


def is_first_alone(batches: Sequence[Any], limits: ReconstructionLimits) -> bool:
    """Whether `concatenated` gives the first batch, as it is.

    >>> [is_first_alone([torch.zeros(count, 3)] * 2, TRAINING_LIMITS) for count in (128, 256, 512)]
    [False, True, False]
    """
    if not batches:
        return False
    count, most = samples_in(batches[0]), _most(batches[0], limits)
    return count == most or (len(batches) == 1 and count < most)


def joined(listed: Sequence[Any]) -> Any:
    """The batches as one; None where their leaves are not all tensors with the samples on their first axis.

    >>> joined([{"x": torch.zeros(4, 2)}, {"x": torch.zeros(1, 2)}])["x"].shape, joined([{"x": torch.zeros(4, 2), "n": 3}])
    (torch.Size([5, 2]), None)
    """
    flat = [tree_flatten(batch) for batch in listed]
    leaves = [each[0] for each in flat]
    sizes = [{len(leaf) for leaf in each if isinstance(leaf, Tensor) and leaf.dim()} for each in leaves]
    alike = all(
        len(size) == 1 and len(each) == len(leaves[0]) and all(isinstance(leaf, Tensor) and leaf.dim() for leaf in each)
        for size, each in zip(sizes, leaves, strict=True)
    )
    shapes = [[leaf.shape[1:] for leaf in each] for each in leaves] if alike else []
    if not alike or any(shape != shapes[0] for shape in shapes):
        return None
    # A single batch stays the tensor that it is.
    whole = leaves[0] if len(leaves) == 1 else [torch.cat(parts) for parts in zip(*leaves, strict=True)]
    return tree_unflatten(whole, flat[0][1])


def held_out_of(batches: Sequence[Any], joined: Any) -> Tensor:
    """Which samples of the joined batches are held out, `[samples]` booleans, see `held_out`.

    Args:
        batches: each by itself.
        joined: from `concatenated`, which may have left out the last samples.
    """
    counts, rest = list[int](), samples_in(joined)
    for batch in batches:
        counts.append(min(rest, samples_in(batch)))
        rest -= counts[-1]
    return held_out([*counts, rest])


def _limited(batch: Any, limits: ReconstructionLimits) -> Any:
    """As many samples of the batch as the limits allow."""
    return first_samples(batch, _most(batch, limits))


def _most(batch: Any, limits: ReconstructionLimits) -> int:
    """As many samples as the limits allow, two at least."""
    sizes = [
        leaf[0].numel() for leaf in tree_flatten(batch)[0] if isinstance(leaf, Tensor) and leaf.dim() and len(leaf)
    ]
    return max(2, min(limits.samples, limits.entries // max([1, *sizes])))

"""What an axis of a tensor consists of: runs of places, and where a width occurs."""

from __future__ import annotations

from dataclasses import dataclass

PRODUCES = "produces"
CONSUMES = "consumes"
FOLLOWS = "follows"
MASKS = "masks"


@dataclass(frozen=True)
class Segment:
    """A run of one axis that holds every unit of one width, in order, `repeat` consecutive places each.

    `width` is None for a run of places that belong to no width (an axis that never carried units). `part` is the number of
    the part of the width, see `Width`.
    """

    width: str | None
    length: int
    repeat: int = 1
    part: int = 0


@dataclass(frozen=True)
class Tie:
    """One occurrence of a width: places `start … start + size · repeat − 1` of axis `dim` of a tensor.

    `role` is "produces" (an output axis of a weight: rows of a dense or conv weight), "consumes" (an input axis: columns) or
    "follows" (biases, norm parameters and buffers, depthwise kernels, embeddings added on), or "masks" (buffers that a weight
    is multiplied with). `part` is the number of the part of the width whose units these are, see `Width`.
    """

    tensor: str
    dim: int
    start: int
    repeat: int
    role: str
    part: int = 0

    @property
    def module(self) -> str:
        """Path of the module that owns the tensor, "" for the root."""
        return self.tensor.rpartition(".")[0]

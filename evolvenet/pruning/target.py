"""What a consumer is fitted to."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Target:
    """The outputs of one weight op in the uncut model, to which it is fitted in the cut one.

    Args:
        start: first row of the weight that takes part.
        length: number of rows.
        axis: the weight's axis of input units.
        bias: name and offset of its bias, or of the vector that takes the mean in its place.
        rows: numbers of the output positions that are compared.
        rows_on_host: the same on the CPU.
        positions: number of all output positions.
        inputs: number of all input positions.
        outputs: `[rows, out]`, of the sum that the op ends in if `summed`.
        summed: whether `outputs` are those of that sum.
        bias_sign: of a bias that an op of its own adds (1) or subtracts (−1), 0 for one of the same op; `outputs` are with it.
        is_mean: whether it is a running mean, sign −1, which is not subtracted from them.
        group: of a stack of weights, which of them it is; None for a weight of its own.
        rectified: whether the outputs, or the sum, go into nothing but a rectifier; None where nothing is known of that.
        floor: `[out]`, the outputs from which on the rectifier passes them on: below, or above where `slope` is negative, it puts
            out 0. None for a sum, of which that is known at the sum only.
        slope: `[out]`, by which the outputs are multiplied before the rectifier.
    """

    start: int
    length: int
    axis: int
    bias: tuple[str, int] | None
    rows: Tensor
    rows_on_host: Tensor
    positions: int
    inputs: int
    outputs: Tensor
    summed: bool = False
    bias_sign: int = 0
    is_mean: bool = False
    group: int | None = None
    rectified: bool | None = None
    floor: Tensor | None = None
    slope: Tensor | None = None

    @property
    def output_axis(self) -> int:
        """The weight's axis of output units."""
        return (1 if self.group is None else 3) - self.axis

    @property
    def share(self) -> int:
        """How many times the bias is in `outputs`."""
        return 0 if self.is_mean or self.bias is None else self.bias_sign or 1

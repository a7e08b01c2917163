"""How a width whose units a norm mixes gets new units without a change of what the network computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from evolvenet.graph.width_graph import Width

ZERO = "zero"
MEAN = "mean"
COPY = "copy"


@dataclass(frozen=True)
class ExactGrowth:
    """What new units of a width compute before the norms, see `evolvenet.surgery.norm_expansion`.

    Args:
        new_units: "zero"; "mean", the mean of the present units; or "copy", each present unit equally often, so that the size
            can only be multiplied by a whole number.
        norms: paths of the norms over the width, whose weights and eps are rescaled; () for "copy", where both stay.
    """

    new_units: str
    norms: tuple[str, ...] = ()


def united_growth(widths: Sequence[Width]) -> ExactGrowth | None:
    """The growth of widths that norms mix and that are one width from now on; None if they do not grow in the same way."""
    found = [width.exact_growth for width in widths]
    growths = [growth for growth in found if growth is not None]
    kinds = {growth.new_units for growth in growths}
    if len(growths) < len(found) or len(kinds) != 1:
        return None
    return ExactGrowth(kinds.pop(), tuple(dict.fromkeys(path for growth in growths for path in growth.norms)))

"""Whether a width can take a map of its units."""

from __future__ import annotations

from typing import TYPE_CHECKING

from evolvenet.errors import ResizeError
from evolvenet.graph.index_map import IndexMap

if TYPE_CHECKING:
    from evolvenet.graph.width_graph import Width


def check_map(width: Width, index_map: IndexMap) -> None:
    """Raise unless a map can be applied to a width.

    Raises:
        ResizeError: for a frozen width, a map made for another size or number of parts, or a size that it cannot take.
    """
    if width.frozen is not None:
        raise ResizeError(f"Width {width.name!r} is frozen and keeps its {width.size} units: {width.frozen}.")
    if index_map.size != width.size:
        raise ResizeError(
            f"Width {width.name!r} has {width.size} units, but its map starts from {index_map.size}. "
            "Make the map with size=graph.widths[name].size."
        )
    if index_map.parts and len(index_map.parts) != width.parts:
        raise ResizeError(
            f"Width {width.name!r} has {width.parts} parts, but its map names the units of {len(index_map.parts)}. "
            "Give IndexMap.of_parts as many sequences as it has parts, or the same units for all by IndexMap.keep."
        )
    if index_map.new_size < width.smallest:
        raise ResizeError(
            f"Width {width.name!r} needs {width.smallest} units or more, got a new size of {index_map.new_size}."
        )
    if index_map.new_size % width.multiple:
        raise ResizeError(
            f"Width {width.name!r} needs a multiple of {width.multiple} units, which an op that multiplies with it "
            f"requires, got a new size of {index_map.new_size}. Take {width.rounded(index_map.new_size)}."
        )

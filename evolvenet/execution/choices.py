"""What `topk` selects in one run of a model, selected again in another run with other weights.

A consumer can be fitted to its former outputs only if the same samples reach it: those that a router sent to an expert before
a cut are not those that it sends there afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

SELECTING = frozenset({torch.ops.aten.topk.default})

ENOUGH = 0.9
"""Share of the places that both runs have to select, or the second one selects by itself: its samples are others then.

With experts refitted to the samples of the first run at 0.88, outputs were up to 5 % worse than with experts as they were
cut; at 0.95 they were 10 to 20 % better.
"""


class Choices:
    """Records the places that `topk` returns; after `replay` it returns them again, with the values that are there now.

    Attributes:
        same: whether the last `topk` has returned recorded places, or recorded them.

    >>> choices = Choices()
    >>> choices.run(torch.ops.aten.topk.default, (Tensor([1.0, 3.0, 2.0]), 1), {})[1]
    tensor([1])
    >>> choices.replay()
    >>> choices.run(torch.ops.aten.topk.default, (Tensor([9.0, 4.0, 5.0]), 1), {})[1], choices.same
    (tensor([0]), False)
    """

    def __init__(self) -> None:
        self._recorded: list[tuple[torch.Size, Tensor]] = []
        self.same = True
        self._waiting: list[tuple[torch.Size, Tensor]] | None = None

    @property
    def none(self) -> bool:
        """Whether no router has chosen anything."""
        return not self._recorded

    def replay(self) -> None:
        """Return from here on what was recorded, in the same order."""
        self._waiting = list(self._recorded)

    def run(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run `topk`, or select as before; where the units that compete are others in number, it runs as it is."""
        source: Tensor = args[0]
        if self._waiting is None:
            out = func(*args, **kwargs)
            self._recorded.append((source.shape, out[1]))
            return out
        shape, places = self._waiting.pop(0) if self._waiting else (None, None)
        own = func(*args, **kwargs)
        self.same = False
        if places is None or shape != source.shape or places.shape != own[1].shape:
            return own
        dim = args[2] if len(args) > 2 else kwargs.get("dim", -1)
        both = (places.movedim(dim, -1).unsqueeze(-1) == own[1].movedim(dim, -1).unsqueeze(-2)).any(-1)
        self.same = float(both.float().mean()) >= ENOUGH
        return (source.gather(dim, places), places) if self.same else own

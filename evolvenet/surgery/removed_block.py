"""`RemovedBlock`: what stands in the place of a residual block, or of its branch, that carried nothing."""

# nn.Module's hooks have no full types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from evolvenet.surgery.module_replacement import BUILDERS, Record, Replacement, names_when_whole

KIND = "removed block"
PASSES, NOTHING = "passes", "nothing"
"""What is returned: the input (a block x + f(x) without its f), or zeros of its shape (f itself)."""


class RemovedBlock(Replacement):
    """Returns its input, or zeros of the input's shape. It has no parameters.

    Args:
        block: the module before it. A copy of it without values is kept, for checkpoints from before the removal.
        returns: `PASSES` or `NOTHING`.
        argument: place or name of the input among the arguments.
        outputs: how many the block returns in a tuple, of which all but the first are None; 0 where it returns a tensor.

    >>> RemovedBlock(nn.Linear(2, 2), NOTHING)(torch.ones(1, 2))
    tensor([[0., 0.]])
    """

    def __init__(self, block: nn.Module, returns: str, argument: int | str = 0, outputs: int = 0) -> None:
        super().__init__()
        self.returns, self.argument, self.outputs = returns, argument, outputs
        # In a tuple it is no submodule.
        self._block = (copy.deepcopy(block).to("meta"),)
        self._names = list(names_when_whole(block))
        self.training = block.training
        self.record_in_checkpoints()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The input, or zeros."""
        given: Tensor = args[self.argument] if isinstance(self.argument, int) else kwargs[self.argument]
        result = given if self.returns == PASSES else torch.zeros_like(given)
        return (result, *[None] * (self.outputs - 1)) if self.outputs else result

    def extra_repr(self) -> str:
        """What it returns."""
        return f"{type(self._block[0]).__name__}, returns {'its input' if self.returns == PASSES else 'zeros'}"

    def record(self) -> dict[str, Any]:
        """See `Replacement`."""
        return {
            "type": KIND, "whole": self._names, "returns": self.returns, "argument": self.argument, "outputs": self.outputs
        }  # fmt: skip

    def whole(self) -> nn.Module:
        """A block of the same shapes; its values are undefined."""
        return copy.deepcopy(self._block[0]).to_empty(device="cpu")


def _build(block: nn.Module, record: Record) -> nn.Module:
    returns, argument, outputs = (record[name] for name in ("returns", "argument", "outputs"))
    if returns not in (PASSES, NOTHING) or not isinstance(argument, (int, str)) or not isinstance(outputs, int):
        raise ValueError(
            f"expected what a removed block returns ({PASSES} or {NOTHING}), the name or place of its input and how many outputs "
            f"it had, got {returns!r}, {argument!r} and {outputs!r}"
        )
    return RemovedBlock(block, returns, argument, outputs)


BUILDERS[KIND] = _build

"""What must hold for optimizers after every event."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer

from evolvenet.surgery.optimizer_state import validate_state

REDUCED = {"row_var": -1, "col_var": -2}
"""Adafactor's factors hold one value for all of an axis."""


def check_fits(optimizers: Sequence[Optimizer]) -> None:
    """Every state tensor and every gradient has its parameter's shape, by a check of its own and by `validate_state`."""
    for optimizer in optimizers:
        validate_state(optimizer)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        assert len({id(parameter) for parameter in parameters}) == len(parameters)
        for parameter in parameters:
            assert parameter.grad is None or parameter.grad.shape == parameter.shape
            for key, entry in optimizer.state.get(parameter, {}).items():
                if isinstance(entry, Tensor) and entry.dim() == parameter.dim():
                    shape = [
                        1 if dim - parameter.dim() == REDUCED.get(key) else n for dim, n in enumerate(parameter.shape)
                    ]
                    assert list(entry.shape) == shape, key

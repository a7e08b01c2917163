"""Groups of optimizers that are put together again as they were before a cut."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from evolvenet.errors import OptimizerStateError
from evolvenet.surgery.optimizer_groups import group_names, restore_groups


def test_nothing_is_restored_where_another_optimizer_has_got_a_group() -> None:
    model = nn.Linear(2, 2)
    first, second = (torch.optim.SGD([each], lr=0.1) for each in (model.weight, model.bias))
    names = group_names(model, [first, second])
    first.param_groups[0]["params"].append(model.bias)
    second.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    with pytest.raises(OptimizerStateError, match="expected 1 groups"):
        restore_groups(model, [first, second], names, [])
    assert first.param_groups[0]["params"] == [model.weight, model.bias]

"""Trial factors of single layers with and without results that are kept from other trials."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from evolvenet.lowrank import sensitivity
from evolvenet.lowrank.fit import observe
from evolvenet.lowrank.plan import requested
from evolvenet.measurement.output_error import outputs_on
from tests.helpers.small_models import convnet


def test_losses_of_layers_are_the_same_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(convnet(), nn.ReLU(), nn.Linear(5, 9).double(), nn.Linear(9, 7).double())
    x = torch.randn(32, 3, 6, 6, dtype=torch.float64)
    requests = requested(model, None, "auto")
    seen = observe(model, [request.target for request in requests], [x])
    caches = list[sensitivity.OpCache]()

    class Counted(sensitivity.OpCache):
        def __init__(self) -> None:
            super().__init__()
            caches.append(self)

    monkeypatch.setattr(sensitivity, "OpCache", Counted)
    before = outputs_on(model, [x])
    found = sensitivity.output_losses(model, requests, seen, [x])
    assert caches[0].hits > 5
    monkeypatch.setattr(sensitivity, "OpCache", lambda: None)
    assert sensitivity.output_losses(model, requests, seen, [x]) == found
    assert torch.equal(outputs_on(model, [x])[0], before[0])

"""What surrounds a call of `trace` changes nothing about the graph, and is as before afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import combinations

import pytest
import torch
from torch import Tensor, nn

from evolvenet.errors import TraceError
from evolvenet.graph.serialization import to_state_dict
from evolvenet.tracing.trace import trace


class Upsampled(nn.Module):
    """With deterministic algorithms PyTorch resamples by an index; a state of zeros is made on the inputs' device."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3)
        self.cell, self.head = nn.GRUCell(6, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.interpolate(self.a(x), scale_factor=2, mode="bilinear")
        x = self.b(x).mean((2, 3))
        return self.head(self.cell(x, x.new_zeros(len(x), 5)))


class Derivative(nn.Module):
    """Its own gradient beside its output."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().clone().requires_grad_()
            y = self.b(self.a(x).tanh())
            return y, torch.autograd.grad(y.sum(), x, create_graph=True)[0]


class Positions(nn.Module):
    """Attention with positions that its code makes without naming a device."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(4, 12), nn.LayerNorm(12), nn.Linear(12, 3)
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x) + torch.arange(x.shape[1], dtype=x.dtype, device=x.device)[:, None]
        return self.head(self.norm(h + self.attention(h, h, h)[0]))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "upsampled": (Upsampled, (2, 3, 7, 7)),
    "derivative": (Derivative, (2, 4)),
    "positions": (Positions, (2, 5, 4)),
}


@contextmanager
def float64_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def meta_by_default() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


SURROUNDINGS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "float64": float64_by_default,
    "deterministic": deterministic,
    "anomalies": lambda: torch.autograd.detect_anomaly(check_nan=False),
    "meta": lambda: torch.device("meta"),
    "meta by default": meta_by_default,
}
CASES = [*([name] for name in SURROUNDINGS), *map(list, combinations(("autocast", "inference mode", "meta"), 2))]
CASES += [[name for name in SURROUNDINGS if name != "meta by default"]]


def state() -> tuple[object, ...]:
    return (
        torch.is_autocast_enabled("cpu"),
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.is_anomaly_enabled(),
        torch.zeros(1).device,
    )


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("names", CASES, ids=" and ".join)
@pytest.mark.parametrize("network", NETWORKS)
def test_the_graph_is_the_one_without(network: str, names: list[str]) -> None:
    make, shape = NETWORKS[network]
    model, inputs = make(), torch.randn(shape)
    expected = trace(model, inputs)
    assert expected.sizes
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(SURROUNDINGS[name]())
        before = state()
        found = trace(model, inputs)
        assert state() == before
    assert to_state_dict(found) == to_state_dict(expected)


def test_a_model_that_runs_under_autocast_alone_is_traced_under_it() -> None:
    class Half(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            if not torch.is_autocast_enabled("cpu"):
                raise RuntimeError("expected autocast")
            return super().forward(input.bfloat16())

    model, inputs = Half(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.zeros(1, 4)
    with pytest.raises(TraceError, match="does not run on the example inputs: RuntimeError: expected autocast"):
        trace(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert trace(model, inputs).sizes == {"0": 8}


def test_the_models_own_code_has_the_callers_default_device() -> None:
    devices: list[str] = []

    class Seen(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            devices.append(torch.zeros(1).device.type)
            return super().forward(input)

    model = Seen(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with torch.device("meta"):
        trace(model, torch.zeros(1, 4, device="cpu"))
    assert set(devices) == {"meta"}

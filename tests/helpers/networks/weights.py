"""One dense network, written in many ways: weights and biases of other names, layouts and ops."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Apply = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(input, weight, bias) → output."""

WAYS: dict[str, tuple[str, str, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], Apply]] = {
    "functional": ("w", "b", lambda w: w, lambda b: b, F.linear),
    "clip": ("proj", "shift", lambda w: w.T, lambda b: b, lambda x, w, b: x @ w + b),
    "names swapped": ("bias", "weight", lambda w: w.T, lambda b: b, lambda x, w, b: x @ w + b),
    "a weight named like a bias": ("unbiased", "offset", lambda w: w, lambda b: b, lambda x, w, b: x @ w.T + b),
    "a table": ("bias_table", "beta", lambda w: w.T, lambda b: b, lambda x, w, b: torch.addmm(b, x, w)),
    "einsum": ("kernel", "b", lambda w: w.T, lambda b: b, lambda x, w, b: torch.einsum("bi,io->bo", x, w) + b),
    "einsum, weight first": ("W", "b", lambda w: w, lambda b: b, lambda x, w, b: torch.einsum("oi,bi->bo", w, x) + b),
    "after a reshape": (
        "w",
        "b",
        lambda w: w,
        lambda b: b,
        lambda x, w, b: (x @ w.T).reshape(1, len(x), -1).add(b)[0],
    ),
    "in place": ("w", "b", lambda w: w, lambda b: b, lambda x, w, b: F.linear(x, w).add_(b)),
    "a bias of two axes": ("w", "b", lambda w: w, lambda b: b[None], lambda x, w, b: b + x @ w.T),
    "images": (
        "kernel",
        "b",
        lambda w: w[:, :, None, None],
        lambda b: b[None, :, None, None],
        lambda x, w, b: (F.conv2d(x[:, :, None, None], w) + b).flatten(1),
    ),
    "bias of images": (
        "kernel",
        "b",
        lambda w: w[:, :, None, None],
        lambda b: b,
        lambda x, w, b: (F.conv2d(x[:, :, None, None], w) + b.view(1, -1, 1, 1)).flatten(1),
    ),
    "a bias subtracted": ("w", "b", lambda w: w, lambda b: -b, lambda x, w, b: F.linear(x, w) - b),
    "subtracted in place": ("kernel", "b", lambda w: w.T, lambda b: -b[None], lambda x, w, b: (x @ w).sub_(b)),
    "subtracted in reverse": ("w", "b", lambda w: w, lambda b: -b, lambda x, w, b: torch.rsub(b, F.linear(x, w))),
    "subtracted from images": (
        "kernel",
        "b",
        lambda w: w[:, :, None, None],
        lambda b: -b[None, :, None, None],
        lambda x, w, b: (F.conv2d(x[:, :, None, None], w) - b).flatten(1),
    ),
    "subtracted from a bias": ("w", "b", lambda w: -w, lambda b: b, lambda x, w, b: b - F.linear(x, w)),
    "subtracted by rsub": ("w", "b", lambda w: -w, lambda b: b, lambda x, w, b: torch.rsub(F.linear(x, w), b)),
}
"""{name: (name of the weight, name of the bias, their layouts from `nn.Linear`'s, the op)}."""


class Dense(nn.Module):
    """A dense layer with the values of an `nn.Linear`, written in one of the ways."""

    def __init__(self, layer: nn.Linear, way: str) -> None:
        super().__init__()
        self.way = way
        self.weight_name, self.bias_name, weight, bias, _ = WAYS[way]
        self.register_parameter(self.weight_name, nn.Parameter(weight(layer.weight.detach()).clone().contiguous()))
        self.register_parameter(self.bias_name, nn.Parameter(bias(layer.bias.detach()).clone().contiguous()))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (self.get_parameter(name) for name in (self.weight_name, self.bias_name))
        return WAYS[self.way][-1](x, weight, bias)


class TwoInOne(nn.Module):
    """The same network with all weights in one module, beside one `nn.Linear`."""

    def __init__(self, linear: nn.Sequential) -> None:
        super().__init__()
        first, second, third = (layer for layer in linear if isinstance(layer, nn.Linear))
        self.w1, self.b1 = nn.Parameter(first.weight.detach().T.clone()), nn.Parameter(first.bias.detach().clone())
        self.w2, self.b2 = nn.Parameter(second.weight.detach().clone()), nn.Parameter(second.bias.detach().clone())
        self.out = third

    def forward(self, x: Tensor) -> Tensor:
        x = (x @ self.w1 + self.b1).sigmoid()
        return self.out(F.linear(x, self.w2, self.b2).tanh())


def linear_network(hidden: int = 16, further: int = 12) -> nn.Sequential:
    """The network in `nn.Linear`, float64: 6 inputs, two hidden widths, 3 outputs; the same numbers each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = (nn.Linear(6, hidden), nn.Sigmoid(), nn.Linear(hidden, further), nn.Tanh(), nn.Linear(further, 3))
        return nn.Sequential(*layers).double()


def rewritten(way: str, hidden: int = 16, further: int = 12) -> nn.Module:
    """The same network in one of the ways, or "one module"."""
    linear = linear_network(hidden, further)
    if way == "one module":
        return TwoInOne(linear)
    return nn.Sequential(*(Dense(layer, way) if isinstance(layer, nn.Linear) else layer for layer in linear))

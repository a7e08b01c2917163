"""Optimizers as people write them: with copies of the weights, with other optimizers inside, with tensors in odd places."""

# nn.Module types its children and attributes loosely, and optimizers are written here as people write them.
# pyright: reportIncompatibleMethodOverride=false
from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer

Parameters = Iterable[Tensor]


class Master(Optimizer):
    """Steps on a copy of each parameter in its state, as optimizers for bfloat16 do."""

    def __init__(self, params: Parameters, lr: float = 0.05, dtype: torch.dtype = torch.float64) -> None:
        super().__init__(params, {"lr": lr})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                copy = self.state[p].setdefault("copy", p.detach().to(self.dtype, copy=True))
                copy.sub_(p.grad.to(self.dtype), alpha=group["lr"])
                p.copy_(copy)


class ScheduleFree(Optimizer):
    """Schedule-free SGD (Defazio and others, 2024): `z` takes the steps, the parameters lie between it and its average."""

    def __init__(self, params: Parameters, lr: float = 0.1, beta: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "k": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            share = 1 / (group["k"] + 1)
            for y in group["params"]:
                z = self.state[y].setdefault("z", y.detach().clone())
                y.lerp_(z, share).add_(y.grad, alpha=group["lr"] * (group["beta"] * (1 - share) - 1))
                z.sub_(y.grad, alpha=group["lr"])
            group["k"] += 1


class Averaging(SGD):
    """SGD with momentum, with a moving average of the weights in its state, which shrinks the weights towards it."""

    def __init__(self, params: Parameters, lr: float = 0.05) -> None:
        super().__init__(params, lr=lr, momentum=0.9)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                average = self.state[p].setdefault("weight_average", p.detach().clone())
                average.lerp_(p, 0.1)
                p.lerp_(average, 0.01)


class Sam(Optimizer):
    """Sharpness-aware minimisation as in davda54/sam: another optimizer inside, that shares its groups."""

    def __init__(self, params: Parameters, lr: float = 0.05, rho: float = 0.05) -> None:
        super().__init__(params, {"lr": lr, "rho": rho})
        self.base_optimizer = SGD(self.param_groups, lr=lr, momentum=0.9)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> None:
        closure()
        every = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in every]).norm()
        for p in every:
            self.state[p]["old_p"] = p.detach().clone()
            p.add_(p.grad, alpha=self.defaults["rho"] / float(norm + 1e-12))
        closure()
        for p in every:
            p.copy_(self.state[p]["old_p"])
        self.base_optimizer.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.base_optimizer.param_groups = self.param_groups


class Lookahead(Optimizer):
    """Lookahead (Zhang and others, 2019) around another optimizer, with the slow weights in a state of its own."""

    def __init__(self, params: Parameters, lr: float = 0.01) -> None:
        self.optimizer = Adam(params, lr=lr)
        self.defaults, self.param_groups = self.optimizer.defaults, self.optimizer.param_groups
        self.state: Any = defaultdict(dict)
        self.fast_state = self.optimizer.state
        self.count = 0
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = {}, {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.optimizer.step()
        self.count += 1
        for group in self.param_groups:
            for p in group["params"]:
                slow = self.state[p].setdefault("slow", p.detach().clone())
                if self.count % 2 == 0:
                    p.copy_(slow.lerp_(p, 0.5))


class LookaheadLists(Lookahead):
    """The same with the slow weights in lists by group, as in lonePatient/lookahead_pytorch."""

    def __init__(self, params: Parameters, lr: float = 0.01) -> None:
        super().__init__(params, lr)
        self.slow_weights = [[p.detach().clone() for p in group["params"]] for group in self.param_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.optimizer.step()
        self.count += 1
        for group, slow_weights in zip(self.param_groups, self.slow_weights, strict=True):
            for p, slow in zip(group["params"], slow_weights, strict=True):
                if self.count % 2 == 0:
                    p.copy_(slow.lerp_(p, 0.5))


class Adahessian(Optimizer):
    """With its estimate of the Hessian's diagonal on the parameter, as in torch_optimizer's Adahessian."""

    def __init__(self, params: Parameters, lr: float = 0.05) -> None:
        super().__init__(params, {"lr": lr})
        for group in self.param_groups:
            for p in group["params"]:
                p.hess, p.hess_step = 0.0, 0  # type: ignore[attr-defined]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.hess = p.hess * 0.9 + 0.1 * p.grad.abs()
                p.hess_step += 1
                p.sub_(p.grad / (p.hess + 0.1), alpha=group["lr"])


class OuterMasters(Optimizer):
    """Holds copies of the parameters in a list, on which an inner Adam steps, as apex's FP16_Optimizer."""

    def __init__(self, params: Parameters, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr})
        own = [p for group in self.param_groups for p in group["params"]]
        self.masters = [p.detach().double().clone().requires_grad_() for p in own]
        self.inner = Adam(self.masters, lr=lr)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        own = [p for group in self.param_groups for p in group["params"]]
        for p, master in zip(own, self.masters, strict=True):
            master.grad = p.grad.to(master.dtype)
        self.inner.step()
        for p, master in zip(own, self.masters, strict=True):
            p.copy_(master)


class Flat(Optimizer):
    """Momenta of all parameters in one flat tensor."""

    def __init__(self, params: Parameters, lr: float = 0.05) -> None:
        super().__init__(params, {"lr": lr})
        self.momentum = torch.cat([p.detach().reshape(-1) for p in self.param_groups[0]["params"]]).zero_()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        start = 0
        for p in self.param_groups[0]["params"]:
            part = self.momentum[start : start + p.numel()].view_as(p)
            start += p.numel()
            p.sub_(part.mul_(0.9).add_(p.grad), alpha=self.defaults["lr"])


class ByParameter(Optimizer):
    """Momenta in a dict by the parameter's id, and by its place in a list of dicts."""

    def __init__(self, params: Parameters, lr: float = 0.05) -> None:
        super().__init__(params, {"lr": lr})
        own = [p for group in self.param_groups for p in group["params"]]
        self.fast = {id(p): torch.zeros_like(p) for p in own}
        self.slow = [{"m": torch.zeros_like(p), "steps": torch.zeros(())} for p in own]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        own = [p for group in self.param_groups for p in group["params"]]
        for p, kept in zip(own, self.slow, strict=True):
            self.fast[id(p)].mul_(0.5).add_(p.grad)
            kept["m"].mul_(0.9).add_(p.grad)
            kept["steps"] += 1
            p.sub_(self.fast[id(p)] + kept["m"], alpha=self.defaults["lr"])


WRAPPING: dict[str, Callable[[Parameters], Optimizer]] = {
    "master": Master,
    "schedule-free": ScheduleFree,
    "averaging": Averaging,
    "sam": Sam,
    "lookahead": Lookahead,
    "lookahead lists": LookaheadLists,
    "adahessian": Adahessian,
    "outer masters": OuterMasters,
    "flat": Flat,
    "by parameter": ByParameter,
}


class Curvatures(SGD):
    """Statistics by module, as KFAC has: nothing says how they follow a change of widths."""

    def __init__(self, model: torch.nn.Module, lr: float = 0.05) -> None:
        super().__init__(model.parameters(), lr=lr)
        self.factors = {module: torch.eye(8) for module in model.modules()}


class Unordered(SGD):
    """A list of tensors of the parameters' shapes in another order."""

    def __init__(self, params: Parameters, lr: float = 0.05) -> None:
        super().__init__(params, lr=lr)
        self.buffers = [torch.zeros_like(p) for p in reversed(self.param_groups[0]["params"])]


class Filled(Optimizer):
    """Makes its state when it is built, and nowhere else."""

    def __init__(self, params: Parameters, lr: float = 0.05) -> None:
        super().__init__(params, {"lr": lr})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {"steps": 0, "m": torch.zeros_like(p), "anchor": p.detach().clone()}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["steps"] += 1
                p.sub_(state["m"].mul_(0.9).add_(p.grad) / state["steps"] ** 0.5, alpha=group["lr"])
                p.lerp_(state["anchor"], 0.01)


class Listed(Optimizer):
    """Has its parameters in a list, a set and a dict of its own, beside those of its groups."""

    def __init__(self, params: Parameters, lr: float = 0.05) -> None:
        super().__init__(params, {"lr": lr})
        self.own = [p for group in self.param_groups for p in group["params"]]
        self.matrices = {id(p) for p in self.own if p.dim() > 1}
        self.pairs = [[p, {"m": torch.zeros_like(p)}] for p in self.own]
        self.rates = dict.fromkeys(self.own, 1)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        assert {id(p) for p in self.own if p.dim() > 1} == self.matrices
        for p, (same, kept) in zip(self.own, self.pairs, strict=True):
            assert p is same
            p.sub_(kept["m"].mul_(0.9).add_(p.grad), alpha=self.defaults["lr"] * self.rates[p])


class Tuples(SGD):
    """Momenta in a tuple, which cannot get other entries."""

    def __init__(self, params: Parameters, lr: float = 0.05) -> None:
        super().__init__(params, lr=lr)
        self.momenta = tuple(torch.zeros_like(p) for p in self.param_groups[0]["params"])


class Lone(SGD):
    """A tensor of one parameter's shape by itself, for the only parameter that it holds."""

    def __init__(self, model: Any, lr: float = 0.05) -> None:
        super().__init__([model[2].weight], lr=lr)
        self.momentum = torch.zeros_like(model[2].weight)


class ByName(SGD):
    """Momenta in a dict by the parameters' names, which its groups have."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        named = list(params)
        super().__init__(named, lr=lr)
        self.momenta = {name: torch.zeros_like(p) for name, p in named}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for name, p in zip(group["param_names"], group["params"], strict=True):
                p.sub_(self.momenta[name].mul_(0.9).add_(p.grad), alpha=group["lr"])

"""Which modules are norms over units, with the names of what is rescaled when they get more units.

`norm_of` is registered per type. A type that is not registered, or that computes in another way than the registered type it is
derived from, is compared with both formulas, on random numbers: the RMS and layer norms that models define themselves
(`LlamaRMSNorm`, `T5LayerNorm`, `GemmaRMSNorm`, `LayerNorm2d`, …) are found that way.

To register a norm of your own, a function of its units divided by their deviation or root mean square::

    @evolvenet.surgery.norms.norm_of.register
    def _(module: MyNorm):
        return evolvenet.surgery.norms.Norm("mean", weight="gain", bias=None, eps="epsilon")
"""

# nn.Module's tables have no full types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from functools import singledispatch

import torch
from torch import Tensor, nn

from evolvenet._compat.torch import own_tensors, shallow_copy
from evolvenet.graph.exact_growth import MEAN, ZERO
from evolvenet.graph.width_graph import Width

PROBES = 7
"""Units of the norm on random numbers that is compared with the formulas."""


@dataclass(frozen=True)
class Norm:
    """A norm over units.

    Args:
        new_units: what a new unit has to be for a rescaling to keep the norm's outputs: "zero" under an RMS norm, "mean" (that
            of the other units) under a layer norm.
        weight: name of the parameter that scales each unit.
        bias: name of the parameter that is added to each unit; None without one.
        eps: name of the number that is added to the mean square or the variance; None stands in it for the machine's epsilon.
        offset: what is added to the weight before it scales (Gemma: 1).
    """

    new_units: str
    weight: str = "weight"
    bias: str | None = None
    eps: str = "eps"
    offset: float = 0.0


@singledispatch
def norm_of(module: nn.Module) -> Norm | None:
    """What is rescaled in a norm with more units; None if the module is no norm over units, or has no weight.

    >>> norm_of(nn.LayerNorm(4)), norm_of(nn.Linear(4, 4))
    (Norm(new_units='mean', weight='weight', bias='bias', eps='eps', offset=0.0), None)
    """
    return _compared(module)


@norm_of.register
def _(module: nn.LayerNorm) -> Norm | None:
    if type(module).forward is not nn.LayerNorm.forward:
        return norm_of.dispatch(object)(module)
    own = own_tensors(module)
    return Norm(MEAN, bias="bias" if "bias" in own else None) if "weight" in own else None


@norm_of.register
def _(module: nn.RMSNorm) -> Norm | None:
    if type(module).forward is not nn.RMSNorm.forward:
        return norm_of.dispatch(object)(module)
    return Norm(ZERO) if "weight" in own_tensors(module) else None


def norms_over(model: nn.Module, width: Width) -> dict[str, Norm]:
    """The norms that are rescaled when a width grows, by path."""
    paths = () if width.exact_growth is None else width.exact_growth.norms
    found = {path: norm_of(model.get_submodule(path)) for path in paths}
    return {path: norm for path, norm in found.items() if norm is not None}


def eps_numbers(model: nn.Module, width: Width) -> list[tuple[str, str]]:
    """(module path, name) of the eps of each norm that is rescaled when a width grows."""
    return [(path, norm.eps) for path, norm in norms_over(model, width).items()]


@singledispatch
def query_rows(module: nn.Module) -> dict[str, int]:
    """The tensors of an attention of which the first rows make its queries: {name: one in how many rows}.

    For modules that tie the size of their heads to the stream's: with it, the root changes by which they divide the products
    of queries and keys.

    >>> query_rows(nn.MultiheadAttention(4, 2))
    {'in_proj_weight': 3, 'in_proj_bias': 3}
    """
    return {}


@query_rows.register
def _(module: nn.MultiheadAttention) -> dict[str, int]:
    packed = "in_proj_weight" in own_tensors(module)
    return {"in_proj_weight" if packed else "q_proj_weight": 3 if packed else 1, "in_proj_bias": 3}


def _compared(module: nn.Module) -> Norm | None:
    """The norm whose formula gives what the module computes, with random weights and an eps of 0.5."""
    own = own_tensors(module)
    names = list(own)
    numbers = [name for name, value in vars(module).items() if isinstance(value, float) and "eps" in name]
    vectors = len(names) in (1, 2) and all(tensor.dim() == 1 for tensor in own.values())
    if not vectors or len(numbers) != 1 or next(module.children(), None) is not None:
        return None
    generator = torch.Generator("cpu").manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

    values = {name: drawn(PROBES) for name in names}
    probe = shallow_copy(module)
    vars(probe).update(_parameters={name: nn.Parameter(values[name]) for name in names})
    vars(probe).update(
        {numbers[0]: 0.5} | ({"normalized_shape": (PROBES,)} if hasattr(module, "normalized_shape") else {})
    )
    images = drawn(3, PROBES, 2, 2)
    # Units last, then, of images, first.
    for inputs, dim in ((drawn(3, PROBES), -1), (images.movedim(1, -1), -1), (images, 1)):
        with torch.no_grad(), suppress(Exception):
            outputs = type(module).forward(probe, inputs).movedim(dim, -1)
            for norm in _possible(names, numbers[0]):
                expected = _formula(norm, values, inputs.movedim(dim, -1))
                if outputs.shape == expected.shape and torch.allclose(outputs, expected, atol=1e-4):
                    return norm
    return None


def _possible(names: list[str], eps: str) -> list[Norm]:
    weight, bias = names[0], names[1] if len(names) > 1 else None
    return [Norm(kind, weight, bias, eps, offset) for kind in (ZERO, MEAN) for offset in (0.0, 1.0)]


def _formula(norm: Norm, values: dict[str, Tensor], inputs: Tensor) -> Tensor:
    centred = inputs - inputs.mean(-1, keepdim=True) if norm.new_units == MEAN else inputs
    normed = centred * (centred.square().mean(-1, keepdim=True) + 0.5).rsqrt()
    return normed * (values[norm.weight] + norm.offset) + (0.0 if norm.bias is None else values[norm.bias])

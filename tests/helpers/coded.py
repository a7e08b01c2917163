"""Networks of a few layers and code between them: one for each op, or way of writing, that the tracing knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from evolvenet.tracing.trace import trace
from tests.helpers.cases import FLOAT
from tests.helpers.tracing import shuffle_and_widen


class Coded(nn.Module):
    """Modules, parameters and buffers by name, and a function that runs them."""

    def __init__(self, code: Callable[..., Any], tensors: Mapping[str, nn.Module | Tensor], **numbers: int) -> None:
        super().__init__()
        self.code = code
        for name, value in tensors.items():
            if isinstance(value, nn.Module | nn.Parameter):
                setattr(self, name, value)
            else:
                self.register_buffer(name, value)
        for name, number in numbers.items():
            setattr(self, name, number)

    def forward(self, *inputs: Tensor) -> Any:
        return self.code(self, *inputs)


@dataclass(frozen=True, eq=False)
class CodedCase:
    """A network with the widths that a trace finds in it.

    Args:
        code: gets the network and its inputs.
        tensors: makes its modules, parameters and buffers.
        inputs: what it is called with.
        sizes: its resizable widths.
        mixed: those of them of which an op mixes the units.
        frozen: other widths → a part of the reason.
        numbers: attributes of the network.
    """

    code: Callable[..., Any]
    tensors: Callable[[], Mapping[str, nn.Module | Tensor]]
    inputs: tuple[Tensor, ...]
    sizes: Mapping[str, int]
    mixed: frozenset[str] = frozenset()
    frozen: Mapping[str, str] = field(default_factory=dict)
    numbers: Mapping[str, int] = field(default_factory=dict)

    def model(self) -> Coded:
        """The network in float64 and eval mode."""
        torch.manual_seed(0)
        return Coded(self.code, self.tensors(), **self.numbers).double().eval()

    def check(self) -> None:
        """Its widths are those listed, and permuting them and adding units leaves the outputs as they are."""
        model = self.model()
        inputs = tuple(each.to(FLOAT) if each.is_floating_point() else each for each in self.inputs)
        graph = trace(model, inputs)
        assert graph.sizes == self.sizes, str(graph)
        assert {width.name for width in graph.resizable if width.mixed} == self.mixed
        for name, reason in self.frozen.items():
            assert reason in (graph.widths[name].frozen or ""), graph.widths[name].frozen
        shuffle_and_widen(model, graph, inputs)


class CodedCases(dict[str, CodedCase]):
    """Cases by name, filled by decorating their code."""

    def add(
        self,
        name: str,
        tensors: Callable[[], Mapping[str, nn.Module | Tensor]],
        *inputs: Tensor,
        sizes: Mapping[str, int],
        **more: Any,
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """A decorator that adds the case of a function."""

        def added(code: Callable[..., Any]) -> Callable[..., Any]:
            self[name] = CodedCase(code, tensors, inputs, sizes, **more)
            return code

        return added

"""Gradients that a model's own code computes: forces, residuals of differential equations, gradient penalties."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from evolvenet._compat.torch import AUTOGRAD_ENGINE, tree_leaves

OnGradients = Callable[[Sequence[Tensor], Sequence[Tensor | None], Sequence[Tensor], Sequence[Tensor | None]], None]
"""Takes the tensors that are differentiated, the gradients given for them, the tensors with respect to which, the result."""


class GradientsNeededError(RuntimeError):
    """The model's code differentiates what it has computed: it has to run with autograd on."""


@contextmanager
def own_gradients(on_gradients: OnGradients = lambda *tensors: None) -> Iterator[None]:
    """Calls back after each gradient that code in the body computes by `torch.autograd.grad`, under whatever name.

    Args:
        on_gradients: called with the tensors of each such computation.

    Raises:
        GradientsNeededError: in the body, for a tensor that was computed while autograd was off.

    >>> x, shapes = torch.ones(3, requires_grad=True), []
    >>> with own_gradients(lambda outputs, given, inputs, found: shapes.append(found[0].shape)):
    ...     _ = torch.autograd.grad(x.square().sum(), x)
    >>> shapes
    [torch.Size([3])]
    """
    engine = getattr(torch.autograd, AUTOGRAD_ENGINE)

    def watched(outputs: Any, given: Any, retain: bool, create: bool, inputs: Any, *rest: Any, **options: Any) -> Any:
        differentiated = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
        if not any(each.requires_grad for each in differentiated):
            raise GradientsNeededError("The model's code differentiates a tensor that autograd has not recorded.")
        found = engine(outputs, given, retain, create, inputs, *rest, **options)
        if not options.get("accumulate_grad", True):
            on_gradients(differentiated, tuple(given), tuple(inputs), tuple(found))
        return found

    with patch.object(torch.autograd, AUTOGRAD_ENGINE, watched):
        yield

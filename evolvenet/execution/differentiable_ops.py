"""Weight ops of a run with autograd: the gradients at their outputs, and the same products with other weights."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from evolvenet.execution.residual_sums import OnBias, ResidualSumMode
from evolvenet.execution.weight_ops import WeightOp

OnGradient = Callable[[Tensor], None]
"""Takes the gradient of a weight op's output, in the shape of the output."""


@dataclass(frozen=True, eq=False)
class Product:
    """A weight op that can be run again, recorded by autograd, with other weights.

    Args:
        op: the weight op.
        run: the op with its arguments.
    """

    op: WeightOp
    run: partial[Tensor]

    def outputs(self, weight: Tensor, bias: Tensor | None, *, detached: bool = False) -> Tensor:
        """The product of the same inputs with another weight, plus a bias; `[rows, out]`, of a convolution `[N, out, space…]`.

        Args:
            weight: `[out, in, k…]`.
            bias: `[out]`, or None.
            detached: whether the inputs count as constants.
        """
        if self.op.geometry is not None:
            x, _, _, *settings = self.run.args
            return self.run.func(x.detach() if detached else x, weight, bias, *settings)
        x, right = self.run.args[-2:]
        rows = right.mT if self.op.weight_first else x
        rows = (rows.detach() if detached else rows).reshape(-1, rows.shape[-1]) @ weight.mT
        return rows if bias is None else rows + bias


class ProductMode(ResidualSumMode):
    """A mode for a run with autograd on, which keeps the products with some weights.

    Args:
        model: see `ResidualSumMode`.
        names: of the weights.
        on_product: called with each of their weight ops and its output; may return what is to be called with the gradient of the
            output in every backward pass.
        on_bias: see `ResidualSumMode`.

    Attributes:
        products: those of the weights, in the order of execution.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Collection[str],
        on_product: Callable[[WeightOp, Tensor], OnGradient | None] = lambda op, out: None,
        on_bias: OnBias | None = None,
    ) -> None:
        super().__init__(model, on_bias=on_bias)
        self.names, self.on_product = names, on_product
        self.products: list[Product] = []
        self._unwatched: tuple[Tensor, OnGradient] | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the op."""
        self._watch()
        return super().__torch_dispatch__(func, types, args, kwargs)

    def __exit__(self, *error: Any) -> None:
        self._watch()
        super().__exit__(*error)

    def on_output(self, op: WeightOp, out: Tensor, recompute: partial[Tensor]) -> None:
        """Keep the product."""
        super().on_output(op, out, recompute)
        if op.tensor in self.names:
            self.products.append(Product(op, recompute))
            on_gradient = self.on_product(op, out)
            self._unwatched = None if on_gradient is None else (out, on_gradient)

    def _watch(self) -> None:
        """Register the hook on the last output: autograd knows it by now, and no op has written to it yet."""
        if self._unwatched is not None:
            out, on_gradient = self._unwatched
            self._unwatched = None
            if out.requires_grad:
                out.register_hook(on_gradient)

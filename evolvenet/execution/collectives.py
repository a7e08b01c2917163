"""Code that exchanges tensors between processes, run where the others do not take part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import distributed

from evolvenet._compat.torch import TorchDispatchMode
from evolvenet.errors import CollectiveError

NAMESPACES = frozenset({"c10d", "_c10d_functional", "_c10d_functional_autograd"})
"""Of the operations to which `torch.distributed`'s functions come down."""


class _Refusing(TorchDispatchMode):
    """Raises before an exchange between processes begins."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.namespace in NAMESPACES:
            raise CollectiveError(
                f"Expected code that one process can run by itself, got {func}, in which all {distributed.get_world_size()} take "
                "part: traces and measurements run the model or the loss on rank 0 alone, where it would wait forever. Compute "
                "what is measured from the rank's own tensors, for example where torch.is_grad_enabled() is False."
            )
        return func(*args, **(kwargs or {}))


@contextmanager
def without_collectives() -> Iterator[None]:
    """Code that would wait for other processes raises instead; nothing is done in a run of one process.

    Raises:
        CollectiveError: in the body, at the first exchange.
    """
    several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    if not several:
        yield
        return
    with _Refusing():
        yield

"""Several processes that train one model: rank 0 decides, and all ranks do the same, or none does anything."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, distributed, nn

from evolvenet._compat.torch import tree_leaves, tree_map_only
from evolvenet.errors import EvolveNetError, RankMismatchError
from evolvenet.execution.inputs import first_samples
from evolvenet.execution.sampling import samples_in
from evolvenet.graph.index_map import IndexMap
from evolvenet.graph.width_graph import WidthGraph
from evolvenet.surgery.basis_change import BasisChange
from evolvenet.surgery.resize_model import Surgery, compile_surgery, with_values

Answer = TypeVar("Answer")


class ProcessGroup(Protocol):
    """The processes that train one model; every method is a collective, called on all ranks at once."""

    @property
    def rank(self) -> int:
        """This process's number, from 0."""
        ...

    @property
    def size(self) -> int:
        """The number of processes."""
        ...

    def all_gather(self, value: Any) -> list[Any]:
        """The values of all ranks, by rank, on every rank."""
        ...

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, by rank, on rank 0; an empty list elsewhere."""
        ...


class SingleProcess:
    """A group of one process.

    >>> SingleProcess().all_gather("here")
    ['here']
    """

    rank = 0
    size = 1

    def all_gather(self, value: Any) -> list[Any]:
        """The value."""
        return [value]

    def broadcast(self, value: Any) -> Any:
        """The value."""
        return value

    def gather(self, value: Any) -> list[Any]:
        """The value."""
        return [value]


class TorchDistributed:
    """All processes of torch.distributed's default group, whatever its backend."""

    @property
    def rank(self) -> int:
        """This process's number, from 0."""
        return distributed.get_rank()

    @property
    def size(self) -> int:
        """The number of processes."""
        return distributed.get_world_size()

    def all_gather(self, value: Any) -> list[Any]:
        """The values of all ranks, by rank, on every rank."""
        found: list[Any] = [None] * self.size
        distributed.all_gather_object(found, value)
        return found

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value."""
        box = [value if self.rank == 0 else None]
        distributed.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, by rank, on rank 0; an empty list elsewhere."""
        found: list[Any] | None = [None] * self.size if self.rank == 0 else None
        distributed.gather_object(value, found, dst=0)
        return found or []


def process_group() -> ProcessGroup:
    """torch.distributed's default group, if it is initialized with more than one process, else a group of this one."""
    running = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    return TorchDistributed() if running else SingleProcess()


def run_on_rank_0(group: ProcessGroup, decide: Callable[[], Answer]) -> Answer:
    """Call a function on rank 0 and broadcast its result; where it raises, all ranks raise.

    Raises:
        EvolveNetError: on the other ranks, with rank 0's message. Rank 0 raises the original exception.
    """
    failure: Exception | None = None
    answer: Any = None
    if group.rank == 0:
        try:
            answer = decide()
        except Exception as error:  # noqa: BLE001  the other ranks wait for the broadcast, whatever went wrong
            failure = error
    if group.size > 1:
        answer, message = group.broadcast((answer, None if failure is None else _message(failure)))
        if failure is None and message is not None:
            raise EvolveNetError(f"rank 0: {message}")
    if failure is not None:
        raise failure
    return answer


def run_on_all_ranks(group: ProcessGroup, act: Callable[[], Answer]) -> Answer:
    """Call a function on every rank and return this rank's result; where it raises on one, all ranks raise.

    Raises:
        EvolveNetError: with the message of the first rank that failed, on those that did not. A rank that failed raises
            the original exception.
    """
    failure: Exception | None = None
    answer: Any = None
    try:
        answer = act()
    except Exception as error:  # noqa: BLE001  the other ranks must raise too, whatever it is
        failure = error
    messages = group.all_gather(None if failure is None else _message(failure))
    if failure is not None:
        raise failure
    for rank, message in enumerate(messages):
        if message is not None:
            raise EvolveNetError(f"rank {rank}: {message}")
    return answer


def _message(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def check_agreement(group: ProcessGroup, what: str, value: str) -> None:
    """Raise unless every rank has the same value.

    Args:
        group: the processes.
        what: what the value is, for the error.
        value: this rank's value.

    Raises:
        RankMismatchError: on every rank, with the value of each.
    """
    values = group.all_gather(value)
    if len(set(values)) == 1:
        return
    listed = "; ".join(f"rank {rank}: {each}" for rank, each in enumerate(values))
    raise RankMismatchError(
        f"Expected the same {what} on all {len(values)} processes, got {listed}. They would train different networks from "
        "here on, so the run stops. Build the model and the callback alike on every rank (no rank-dependent arguments or "
        "weights), or resume all ranks from one checkpoint."
    )


def fingerprint(model: nn.Module) -> str:
    """Twelve hex digits that change with any parameter's name, shape or bits."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def gather_batches(group: ProcessGroup, batches: Sequence[Any]) -> list[Any]:
    """Gather a share of every rank's batches on rank 0, together about as many samples as one rank has.

    Moving a few hundred inputs is far less than reducing a second moment for every weight, and what one rank computes
    from them is the same for all to the last bit.

    Args:
        group: the processes.
        batches: this rank's batches.

    Returns:
        On rank 0 the batches of all ranks, on the device of its own; an empty list elsewhere.
    """
    if group.size == 1:
        return list(batches)

    def share() -> list[Any]:
        shares = [first_samples(batch, -(-samples_in(batch) // group.size)) for batch in batches]
        return tree_map_only(Tensor, lambda tensor: tensor.cpu(), shares)

    def placed() -> list[Any]:
        devices = [leaf.device for leaf in tree_leaves(list(batches)) if isinstance(leaf, Tensor)]
        all_batches = [batch for rank in found for batch in rank]
        return tree_map_only(Tensor, lambda tensor: tensor.to(devices[0]), all_batches) if devices else all_batches

    # Where memory runs out on one rank, all of them give up.
    found = group.gather(run_on_all_ranks(group, share))
    return run_on_all_ranks(group, placed)


def broadcast_surgery(
    group: ProcessGroup, model: nn.Module, graph: WidthGraph, decide: Callable[[], Surgery]
) -> Surgery:
    """Call `decide` on rank 0 and return its surgery for this rank's model: the same maps, changes of basis and values.

    Raises:
        EvolveNetError: on the other ranks, if `decide` raises.
    """
    if group.size == 1:
        return decide()
    made: list[Surgery] = []

    def plain() -> tuple[Mapping[str, Any], Mapping[str, BasisChange], Mapping[str, Tensor]]:
        made.append(decide())
        maps = {name: (index_map.indices, index_map.size) for name, index_map in made[0].maps.items()}
        return maps, made[0].bases, {change.name: change.value.cpu() for change in made[0].changes}

    maps, bases, values = run_on_rank_0(group, plain)

    def own() -> Surgery:
        if made:
            return made[0]
        surgery = compile_surgery(model, graph, {name: IndexMap.of(*entry) for name, entry in maps.items()}, bases)
        return with_values(model, surgery, values)

    return run_on_all_ranks(group, own)

"""Several processes that train one model: rank 0 decides, and all ranks do the same, or none does anything."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, distributed, nn

from evolvenet._compat.torch import tree_map_only
from evolvenet.errors import RankMismatchError, error_of_rank
from evolvenet.execution.inputs import first_samples, to_device_of
from evolvenet.execution.sampling import samples_in
from evolvenet.graph.index_map import IndexMap
from evolvenet.graph.width_graph import WidthGraph
from evolvenet.linalg.host_transfers import to_host
from evolvenet.surgery.basis_change import BasisChange
from evolvenet.surgery.resize_model import Surgery, compile_surgery, with_values

Answer = TypeVar("Answer")
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""{bytes of a number: the integers that are as long}."""
_WORDS = 2**22
"""Numbers of a tensor that are summed up at a time, of which each takes 8 bytes."""


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
            raise error_of_rank(0, message)
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
            raise error_of_rank(rank, message)
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
    """Twelve hex digits that change with any parameter's name, shape or bits. Computed on the device, with one transfer."""
    parameters = dict(model.named_parameters())
    digest = hashlib.sha256()
    for (name, parameter), checksum in zip(
        parameters.items(), to_host([_checksum(each) for each in parameters.values()]), strict=True
    ):
        digest.update(f"{name}{tuple(parameter.shape)} {parameter.dtype} {int(checksum)}".encode())
    return digest.hexdigest()[:12]


def _checksum(tensor: Tensor) -> Tensor:
    """A sum of a tensor's bits modulo 2^64, each word times an odd number of its place; it changes if one word does."""
    values = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    words = values.contiguous().flatten().view(_INTEGERS[values.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for number, part in enumerate(words.split(_WORDS)):
        places = torch.arange(number * _WORDS, number * _WORDS + len(part), device=words.device)
        # The mixing of Steele, Lea and Flood's SplitMix64 (2014), cut to one round.
        mixed = places * -0x61C8864680B583EB
        mixed = (mixed ^ (mixed >> 30)) * -0x40A7B892E31B1A47
        total = total + (part.to(torch.int64) * (mixed | 1)).sum()
    return total


def share_of(batch: Any, ranks: int) -> Any:
    """The first samples of a batch that a rank keeps for an event: those of all ranks together are about one batch.

    >>> share_of(torch.arange(5), ranks=2)
    tensor([0, 1, 2])
    """
    if ranks == 1:
        return batch
    # Clones: a view would keep the whole batch in memory, and in checkpoints.
    return tree_map_only(Tensor, torch.clone, first_samples(batch, -(-samples_in(batch) // ranks)))


def gather_batches(group: ProcessGroup, batches: Sequence[Any], example: Any = None) -> list[Any]:
    """Gather every rank's share of batches (`share_of`) on rank 0.

    Moving a few hundred inputs is far less than reducing a second moment for every weight, and what one rank computes
    from them is the same for all to the last bit.

    Args:
        group: the processes.
        batches: this rank's shares; one rank may have none.
        example: inputs that lie on this rank's device.

    Returns:
        On rank 0 the batches of all ranks, on the device of `example`; an empty list elsewhere.
    """
    if group.size == 1:
        return list(batches)

    def sent() -> list[Any]:
        return tree_map_only(Tensor, lambda tensor: tensor.cpu(), list(batches))

    def placed() -> list[Any]:
        return to_device_of([batch for rank in found for batch in rank], list(batches) if example is None else example)

    # Where memory runs out on one rank, all of them give up.
    found = group.gather(run_on_all_ranks(group, sent))
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

    def plain() -> tuple[Mapping[str, Any], Mapping[str, BasisChange], Mapping[str, Tensor], bool]:
        made.append(decide())
        maps = {name: (index_map.indices, index_map.size, index_map.parts) for name, index_map in made[0].maps.items()}
        values = {change.name: change.value.cpu() for change in made[0].changes}
        return maps, made[0].bases, values, made[0].updated

    maps, bases, values, updated = run_on_rank_0(group, plain)

    def own() -> Surgery:
        if made:
            return made[0]
        surgery = compile_surgery(model, graph, {name: IndexMap(*entry) for name, entry in maps.items()}, bases)
        return replace(with_values(model, surgery, values), updated=updated)

    return run_on_all_ranks(group, own)

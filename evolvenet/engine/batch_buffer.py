"""The training batches that an event measures on, with the loss's gradients at the model's outputs."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from torch import Tensor

from evolvenet._compat.torch import tree_map_only
from evolvenet.engine.distributed import ProcessGroup, gather_batches, share_of
from evolvenet.execution.inputs import copied, is_plain, to_device_of
from evolvenet.execution.step import Step, batch_of
from evolvenet.graph.plain_data import check_types


class BatchBuffer:
    """The last batches, each with the gradients of the loss at the model's outputs, as far as they are known.

    Args:
        example_inputs: what the model is called with; of a longer tuple (inputs, targets) as many entries are taken.
        most: how many batches are kept.

    >>> buffer = BatchBuffer(example_inputs=Tensor([[1.0]]), most=2)
    >>> buffer.add((Tensor([[2.0]]), "its target"))
    >>> buffer.batches, buffer.gradients
    ([(tensor([[2.]]),)], [()])
    """

    def __init__(self, example_inputs: Any, most: int) -> None:
        self.example = example_inputs
        self._inputs = len(example_inputs) if isinstance(example_inputs, (tuple, list)) else None
        self._kept: deque[tuple[Any, tuple[Tensor | None, ...]]] = deque(maxlen=most)

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def batches(self) -> list[Any]:
        """The model's inputs."""
        return [self._as_inputs(batch) for batch, _ in self._kept]

    @property
    def gradients(self) -> list[tuple[Tensor | None, ...]]:
        """Of each batch, the gradients at the model's outputs; () where none are known."""
        return [gradients for _, gradients in self._kept]

    def keep(self, most: int) -> None:
        """Keep so many batches from now on."""
        if most != self._kept.maxlen:
            self._kept = deque(self._kept, maxlen=most)

    def add(self, batch: Any, gradients: Sequence[Tensor | None] = (), copy: bool = True, ranks: int = 1) -> None:
        """Append a batch, and drop the oldest one beyond `most`.

        Args:
            batch: the model's inputs, or those of its step.
            gradients: see `gradients`.
            copy: False for a batch and gradients whose memory nobody writes to any more.
            ranks: the number of processes; of several, this one's share of the batch is kept alone.
        """
        if isinstance(self.example, Step):
            batch = batch.batch if isinstance(batch, Step) else batch
        elif isinstance(batch, (tuple, list)) and not isinstance(self.example, dict):
            batch = tuple(batch[: self._inputs or 1])
        pair = (share_of(batch, ranks), tuple(share_of(gradients, ranks)))
        # A share is a copy.
        self._kept.append(copied(pair) if copy and ranks == 1 else pair)

    def _as_inputs(self, batch: Any) -> Any:
        """What `run_model` takes: a kept batch of a step has no function, so that it can be sent and saved."""
        return Step(self.example.function, batch) if isinstance(self.example, Step) else batch

    def clear(self) -> None:
        """Drop all batches."""
        self._kept.clear()

    def gather(self, group: ProcessGroup) -> tuple[list[Any], list[Sequence[Tensor | None]]]:
        """All ranks' batches and their gradients on rank 0, see `gather_batches`."""
        example = batch_of(self.example)
        batches = gather_batches(group, [batch for batch, _ in self._kept], example)
        return [self._as_inputs(batch) for batch in batches], gather_batches(group, self.gradients, example)

    def state_dict(self) -> dict[str, list[Any]]:
        """The batches that a `weights_only` checkpoint may hold."""
        kept = [pair for pair in self._kept if is_plain(pair[0])]
        return {"batches": [batch for batch, _ in kept], "gradients": [list(gradients) for _, gradients in kept]}

    def gathered_state_dict(self, group: ProcessGroup) -> list[dict[str, list[Any]]]:
        """What `state_dict` returns on every rank, by rank; an empty list elsewhere than on rank 0. All ranks call it."""
        return group.gather(tree_map_only(Tensor, lambda tensor: tensor.cpu(), self.state_dict()))

    def load_state_dict(self, state: Mapping[str, Any], group: ProcessGroup) -> None:
        """Restore what `state_dict` returned; where it holds no gradients, none are known.

        Args:
            state: with an entry "ranks", from `gathered_state_dict`, this rank gets what it had. Of a run with more processes
                each rank of the present one gets what several had.
            group: the processes of the present run.
        """
        self._kept.clear()
        for each in (state["ranks"] or [state])[group.rank :: group.size] if "ranks" in state else [state]:
            pairs = zip_longest(each["batches"], each.get("gradients", ())[: len(each["batches"])], fillvalue=())
            for batch, found in pairs:
                gradients = tuple(found)
                check_types(gradients, tuple[Tensor | None, ...], "gradients")
                self._kept.append(to_device_of((batch, gradients), self.example))

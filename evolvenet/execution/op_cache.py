"""Ops of a model that are repeated on the same data return what they returned before.

Trials run a model on one batch again and again, each time with other values in a few of its tensors. Every op before the first
one that these values reach computes what it computed before. `OpCache` keeps the results of such ops. The model's own code runs
in full each time: what is skipped is the computation of single ops, those whose arguments are known to be the same.

What is known is followed by storage. A storage has a key: the name of a model's tensor, the place of an input among the inputs,
or the op that wrote it with the keys of that op's arguments. Two storages of one key hold the same numbers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from evolvenet._compat.torch import OpOverload, TorchDispatchMode, schema_of, tree_leaves
from evolvenet.execution.residual_sums import NORMS
from evolvenet.graph.naming import named_tensors

MEMORY = 2**30
"""Most bytes of results that a cache holds; later results are computed each time."""

SMALL = 2**20
"""Most bytes of a tensor that is made of nothing, by `arange` say, and is known by its op."""

Key = tuple[Any, ...]
PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
"""Types of arguments that are no tensors, of which an op's result depends on the value alone."""


class OpCache:
    """Results of the ops of one model, for runs of it that differ in the values of some of its tensors.

    It is not for runs with autograd on: a result would belong to the graph of an earlier run.

    Args:
        memory: most bytes of results that are kept.

    Attributes:
        hits: number of ops that were not computed.

    >>> model, x, cache = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), torch.ones(1, 2), OpCache()
    >>> for changed in ((), ("1.weight",)):
    ...     with torch.no_grad(), cache.on(model, x, changed):
    ...         _ = model(x)
    >>> cache.hits
    1
    """

    def __init__(self, memory: int = MEMORY) -> None:
        self.hits, self.memory = 0, memory
        self._results: dict[int, tuple[Tensor, ...]] = {}
        # Keys by number: nested in each other they would be as large as the network is deep.
        self._numbers: dict[Key, int] = {}
        self._inputs: list[Tensor | None] = []
        self._written: set[str] = set()

    @contextmanager
    def on(self, model: nn.Module, batch: Any, changed: Collection[str], *, copies: bool = False) -> Iterator[None]:
        """Ops inside return former results where all of their arguments are known to be the same.

        Args:
            model: is run inside on the batch, without gradients.
            batch: the inputs. Nothing outside may write to them between runs.
            changed: names of the model's tensors that have other values than in other runs.
            copies: whether the model holds copies of its tensors, to which the run may write. A write to one of the model's own
                tensors makes it unknown in later runs.
        """
        tensors, _, _ = named_tensors(model)
        names = {name: place for name, tensor in tensors.items() if (place := _place(tensor)) is not None}
        # Several tensors may lie in one storage: slices of one that was loaded, say. Copies of them lie in storages of their own.
        sharing: dict[int, list[str]] = {}
        for name, place in names.items():
            sharing.setdefault(place, []).append(name)
        known = {
            place: self.number(("tensor", *each)) for place, each in sharing.items() if not self._written & {*each}
        }
        for name in changed:
            known.pop(names.get(name, 0), None)
        for leaf in tree_leaves(batch):
            if isinstance(leaf, Tensor) and (place := _place(leaf)) is not None:
                known[place] = self.number(("input", self._input(leaf)))
        mode = _CacheMode(self, known)
        try:
            with mode:
                yield
        finally:
            self._written |= {name for name, place in names.items() if place in mode.written and not copies}
            # Under another number the next time.
            self._inputs = [None if leaf is None or _place(leaf) in mode.written else leaf for leaf in self._inputs]

    def _input(self, leaf: Tensor) -> int:
        """The number of an input. They are kept, so that no other one takes the place of one in memory."""
        for number, each in enumerate(self._inputs):
            if each is not None and _place(each) == _place(leaf):
                return number
        self._inputs.append(leaf)
        return len(self._inputs) - 1

    def number(self, key: Key) -> int:
        """The number of a key."""
        return self._numbers.setdefault(key, len(self._numbers))

    def results(self, number: int | None) -> tuple[Tensor, ...] | None:
        """The results of the op whose key has that number, if they are kept."""
        return None if number is None else self._results.get(number)

    def replace(self, number: int, results: tuple[Tensor, ...]) -> None:
        """Keep others of the same values in their place."""
        self._results[number] = results

    def keep(self, number: int, results: tuple[Tensor, ...]) -> bool:
        """Keep the results of an op, if there is room."""
        size = sum(result.nbytes for result in results)
        if size > self.memory:
            return False
        self.memory -= size
        self._results[number] = results
        return True


class _CacheMode(TorchDispatchMode):
    """One run with a cache.

    Args:
        cache: of the model.
        known: {place of a storage: number of its key} of the tensors and the inputs.

    Attributes:
        written: places of the storages that the run has written to.
    """

    def __init__(self, cache: OpCache, known: dict[int, int]) -> None:
        super().__init__()
        self.cache, self.known = cache, known
        self.written: set[int] = set()
        self._given: dict[int, int] = {}
        # What is known stays in memory until the end of the run, so that nothing else takes its place there.
        self._alive: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the op, unless its results are known."""
        kwargs = kwargs or {}
        if not isinstance(func, OpOverload) or func.is_view:
            return func(*args, **kwargs)
        if targets := _targets(func, args, kwargs):
            return self._run_writing(targets, func, args, kwargs)
        number = self._number(func, args, kwargs)
        if number is not None and (kept := self.cache.results(number)) is not None:
            return self._again(number, kept, func)
        out = func(*args, **kwargs)
        self._add(number, out, [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)])
        return out

    def _again(self, number: int, kept: tuple[Tensor, ...], func: Any) -> Any:
        """The results of an op that is not computed."""
        self.cache.hits += 1
        # Handed out twice in a run, one tensor would be two of the model's: a write to one must not reach the other.
        if number in self._given.values():
            kept = tuple(result.clone() for result in kept)
        self._know(number, kept)
        return kept[0] if len(schema_of(func).returns) == 1 else kept

    def _know(self, number: int, results: tuple[Tensor, ...]) -> None:
        self._alive.extend(results)
        for place_of, result in enumerate(results):
            if (place := _place(result)) is not None:
                self.known[place] = self.cache.number(("result", number, place_of))
                self._given[place] = number

    def _add(self, number: int | None, out: Any, inputs: Sequence[Tensor]) -> None:
        """Keep the results of an op that was computed."""
        results = (out,) if isinstance(out, Tensor) else tuple(out) if isinstance(out, tuple) else ()
        tensors = [each for each in tree_leaves(out) if isinstance(each, Tensor)]
        places = [place for each in tensors if (place := _place(each)) is not None]
        if {*places} & {_place(each) for each in inputs}:
            # What an op returns of its own arguments is known as these are.
            return
        for place in places:
            self.known.pop(place, None)
            self._given.pop(place, None)
        whole = all(_is_plain(each) and each.numel() in (0, _capacity(each)) for each in tensors)
        if number is None or not whole or not tensors or len(tensors) != len(results) or len({*places}) != len(places):
            return
        # Without a tensor among the arguments an op costs nothing to repeat.
        if self.cache.keep(number, results) if inputs else sum(each.nbytes for each in results) <= SMALL:
            self._know(number, results)

    def _run_writing(self, targets: Sequence[Tensor], func: Any, args: Any, kwargs: Any) -> Any:
        """Run an op that writes to some of its arguments: to a copy of a result that is kept, which is then known by this op."""
        number = self._number(func, args, kwargs)
        places = [place for each in targets if (place := _place(each)) is not None]
        for place in places:
            given = self._given.pop(place, None)
            if given is not None and (kept := self.cache.results(given)) is not None:
                self._alive.extend(kept)
                copied = tuple(each.clone() if _place(each) == place else each for each in kept)
                self.cache.replace(given, copied)
        out = func(*args, **kwargs)
        for place in places:
            self.written.add(place)
            self.known.pop(place, None)
        if number is not None and len(places) == 1 and len(targets) == 1:
            self.known[places[0]] = self.cache.number(("written", number))
        return out

    def _number(self, func: Any, args: Any, kwargs: Any) -> int | None:
        """Of the op with its arguments; None where one of these is not known, or the op draws random numbers."""
        if torch.Tag.nondeterministic_seeded in func.tags:
            return None
        try:
            return self.cache.number(
                (func, self._of(args), *((name, self._of(kwargs[name])) for name in sorted(kwargs)))
            )
        except _UnknownError:
            return None

    def _of(self, value: Any) -> Key:
        """What an argument is known by."""
        if isinstance(value, Tensor):
            if not _is_plain(value):
                raise _UnknownError
            layout = (value.dtype, value.device, value.shape, value.stride(), value.storage_offset())
            layout = (*layout, value.is_conj(), value.is_neg())
            if not value.numel():
                return layout
            number = self.known.get(_place(value) or 0)
            if number is None:
                raise _UnknownError
            return (number, *layout)
        if isinstance(value, (tuple, list)):
            return tuple(self._of(each) for each in value)
        if type(value) not in PLAIN:
            raise _UnknownError
        # Equal numbers of different types are different arguments, and so are 0.0 and -0.0.
        return (type(value), repr(value) if isinstance(value, (float, complex)) else value)


def _targets(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The arguments that an op writes to. A batch norm in training writes to its running statistics, which its schema hides."""
    if func in NORMS:
        return [each for each in args[3:5] if args[5] and isinstance(each, Tensor)]
    schema = schema_of(func)
    if not schema.is_mutable:
        return []
    return [
        each
        for number, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
        for each in tree_leaves(args[number] if number < len(args) else kwargs.get(argument.name))
        if isinstance(each, Tensor)
    ]


class _UnknownError(Exception):
    """An argument that is not known to be the same as in another run."""


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and not tensor.is_quantized


def _place(tensor: Tensor) -> int | None:
    """The address of a tensor's storage; None where it has none."""
    if not _is_plain(tensor) or tensor.is_meta:
        return None
    return tensor.untyped_storage().data_ptr() or None


def _capacity(tensor: Tensor) -> int:
    """Entries of its type that a tensor's storage holds."""
    return tensor.untyped_storage().nbytes() // tensor.element_size()

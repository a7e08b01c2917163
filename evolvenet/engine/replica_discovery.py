"""Finds replicas of the trained network in the user's own module: momentum teachers, target networks, averages of weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from evolvenet._compat.torch import child_table, shallow_copy
from evolvenet.engine.replica_widths import frozen_tensors, tensors_that_ran, united
from evolvenet.errors import SkippedEvent, TraceError
from evolvenet.graph.naming import named_tensors
from evolvenet.graph.serialization import from_state_dict, to_state_dict
from evolvenet.graph.width_graph import WidthGraph
from evolvenet.linalg.precision import in_float64
from evolvenet.tracing.untrained import freeze_unchanged, freeze_untrained, untrained_parameters


@dataclass(frozen=True, eq=False)
class Replica:
    """A module that may be a copy of another one.

    Args:
        name: where it is, for a person.
        module: the copy.
        sources: {path in the network: module} of what it may be a copy of.
    """

    name: str
    module: nn.Module
    sources: Mapping[str, nn.Module]


class ReplicaDiscovery:
    """Finds the modules that are copies of parts of a network, and which of them change widths with it.

    A copy is of the same type, has the same names and shapes, and is not trained. One whose weights have moved since the
    start follows its source (an average, a target network). While they have not, it is not known whether they will: a frozen
    reference must keep its widths, an average must not.

    A copy that did not run in the trace goes through each surgery by itself. One that did, beside its source, has widths that
    are united with the source's, see `replica_widths`.

    Args:
        places: {name: module}, searched with all submodules before training starts.
        declared: {name of the copy: name of its source} as given by the user: no other module is taken for a copy.
        optimizers: gives those that train, as they are when it is called.

    Raises:
        TraceError: if a name in `declared` is of no module.
    """

    def __init__(
        self,
        places: Mapping[str, nn.Module],
        declared: Mapping[str, str] | None = None,
        optimizers: Callable[[], Iterable[Optimizer]] = tuple,
    ) -> None:
        self.declared, self._optimizers = declared, optimizers
        self.moved: dict[str, str] = {}
        """{name of the copy: path of its source in the network} of those that follow."""
        self.united: dict[str, str] = {}
        """{name of the copy: name of its source} of those whose widths are the source's."""
        self._modules = {name: module for place, outer in places.items() for name, module in _named(place, outer)}
        for name in (name for pair in (declared or {}).items() for name in pair):
            if name not in self._modules:
                raise TraceError(
                    f"WidthEvolution(copies=...): expected names of modules, got {name!r}. None is called so."
                )
        kinds: dict[Any, list[str]] = {}
        for name, module in self._modules.items():
            if (kind := _signature(module)) is not None:
                kinds.setdefault(kind, []).append(name)
        self._groups = [names for names in kinds.values() if len(names) > 1]
        self._start = {name: _digest(self._modules[name]) for names in self._groups for name in names}

    def state_dict(self) -> dict[str, Any]:
        """Digests of the weights at the start of the run, and the copies known to follow."""
        return {"start": dict(self._start), "moved": dict(self.moved), "united": dict(self.united)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._start.update(state.get("start", {}))
        self.moved, self.united = dict(state.get("moved", {})), dict(state.get("united", {}))

    def settled(self, network: nn.Module, graph: WidthGraph) -> WidthGraph:
        """The graph of the network without copies that did not run; those that did have the widths of their sources.

        Of modules that are not trained, all others keep their widths.
        """
        inside = _paths(network)
        copies = [id(replica.module) for replica in self._replicas(network, graph)]
        graph = _without(graph, [inside[copy] for copy in copies if copy in inside])
        self.united = {}
        for name, sources in self._running(network, graph):
            if len(sources) == 1:
                self.united[name] = sources[0]
                graph = united(graph, inside[id(self._modules[name])], inside[id(self._modules[sources[0]])])
            else:
                graph = self._kept(network, graph, name, sources)
        held = {id(p) for optimizer in self._optimizers() for group in optimizer.param_groups for p in group["params"]}
        untrained = untrained_parameters(network, held)
        follow = tuple(f"{inside[id(self._modules[name])]}." for name in self.united)
        return freeze_untrained(graph, {k: v for k, v in untrained.items() if not (follow and k.startswith(follow))})

    def reviewed(self, network: nn.Module, graph: WidthGraph) -> WidthGraph:
        """The graph after what training has shown since: copies that did not begin as such, modules that no step changes.

        Both keep their widths, a copy's source its own as well.
        """
        for name, sources in self._running(network, graph):
            graph = self._kept(network, graph, name, sources)
        return freeze_unchanged(graph, network, _with_state(self._optimizers()))

    def _kept(self, network: nn.Module, graph: WidthGraph, name: str, sources: Sequence[str]) -> WidthGraph:
        """The graph in which a copy and what it may follow keep their widths."""
        inside = _paths(network)
        starts = tuple(f"{inside[id(self._modules[each])]}." for each in (name, *sources))
        reason = (
            f"{name}, which is not trained, has moved and may follow it: WidthEvolution(copies={{{name!r}: {sources[0]!r}}}) "
            "if it does"
        )
        return frozen_tensors(graph, [tensor for tensor in graph.layouts if tensor.startswith(starts)], reason)

    def models_to_update(self, network: nn.Module, graph: WidthGraph) -> list[nn.Module]:
        """Models with the network's tensor names that must go through its change, each with replicas in place of their sources.

        Raises:
            SkippedEvent: if it is not known whether a copy follows, or which of several modules it is a copy of.
        """
        found: list[tuple[str, nn.Module]] = []
        for name, source in self.united.items() if self.declared is None else ():
            if _digest(self._modules[name]) == self._start[name]:
                raise _unsettled(name, source)
        for replica in self._replicas(network, graph):
            if (path := self._followed(replica)) is not None:
                self.moved[replica.name] = path
                found.append((path, replica.module))
        return _stand_ins(network, found)

    def pairs(self, network: nn.Module, graph: WidthGraph) -> dict[str, str]:
        """{name of what may be a copy: name of a module of its type and shapes that runs}."""
        return {
            replica.name: self._name(next(iter(replica.sources.values()))) for replica in self._replicas(network, graph)
        }

    def _followed(self, replica: Replica) -> str | None:
        """Path of what the replica follows, None if it is no copy."""
        if self.declared is not None:
            return next(iter(replica.sources))
        if self.moved.get(replica.name) in replica.sources:
            return self.moved[replica.name]
        names = {path: self._name(source) for path, source in replica.sources.items()}
        equal = [path for path, name in names.items() if self._start[name] == self._start[replica.name]]
        if _digest(replica.module) == self._start[replica.name]:
            if not equal:
                return None
            raise _unsettled(replica.name, names[equal[0]])
        paths = equal if len(equal) == 1 else list(replica.sources)
        if len(paths) > 1:
            raise SkippedEvent(
                f"{replica.name} is not trained and has moved: expected one module that it follows, got "
                f"{', '.join(names.values())}, which are all of its type and shapes. Say which: WidthEvolution(copies="
                f"{{{replica.name!r}: ...}})."
            )
        return paths[0]

    def _replicas(self, network: nn.Module, graph: WidthGraph) -> Iterator[Replica]:
        """Outermost modules that did not run, are not trained, and have the shape of one whose widths can change."""
        resizable, state = _resizable_ids(network, graph), _with_state(self._optimizers())
        tensors, _, _ = named_tensors(network)
        ran = {id(tensors[name]) for name in tensors_that_ran(graph)}
        inside = _paths(network)
        taken: list[str] = []
        for name, module in self._modules.items():
            kind = _signature(module)
            if kind is None or any(name.startswith(f"{outer}.") for outer in taken) or _is_traced(module, ran):
                continue
            # Trained: an expert, say, that the few traced samples did not reach, and others did.
            if (self.declared is not None and name not in self.declared) or _is_trained(module, state):
                continue
            others = self._alike(name) if self.declared is None else [self.declared[name]]
            sources = {
                inside[id(source)]: source
                for source in (self._modules[other] for other in others)
                if id(source) in inside and _signature(source) == kind and _is_traced(source, resizable)
            }
            if sources and self._may_be_copy(name, others):
                taken.append(name)
                yield Replica(name, module, sources)

    def _may_be_copy(self, name: str, others: Iterable[str]) -> bool:
        """Whether there is a sign of it: not a layer that has not run so far, of the shape of another one."""
        module = self._modules[name]
        if self.declared is not None or not any(parameter.requires_grad for parameter in module.parameters()):
            return True
        start = self._start[name]
        return any(self._start[other] == start for other in others) or _digest(module) != start

    def _running(self, network: nn.Module, graph: WidthGraph) -> Iterator[tuple[str, list[str]]]:
        """Outermost copies that run in the network, are not trained and not known so far, with what they may follow."""
        tensors, _, _ = named_tensors(network)
        ran = {id(tensors[name]) for name in tensors_that_ran(graph)}
        inside, state = {id(module) for module in network.modules()}, _with_state(self._optimizers())
        taken = list(self.united)
        for name in self._modules:
            if any(name == known or name.startswith(f"{known}.") for known in taken) or not self._runs(
                name, inside, ran
            ):
                continue
            alike = self._alike(name) if self.declared is None else [n for k, n in self.declared.items() if k == name]
            sources = [
                other for other in alike if self._may_follow(name, other, state) and self._runs(other, inside, ran)
            ]
            if self.declared is None and sources:
                equal = [other for other in sources if self._start[other] == self._start[name]]
                has_moved = _digest(self._modules[name]) != self._start[name]
                sources = equal if len(equal) == 1 else sources if has_moved else []
            if sources:
                taken.append(name)
                yield name, sources

    def _runs(self, name: str, inside: set[int], ran: set[int]) -> bool:
        module = self._modules[name]
        return id(module) in inside and any(id(parameter) in ran for parameter in module.parameters())

    def _may_follow(self, name: str, other: str, state: set[int]) -> bool:
        """Whether the one is not trained and the other is, and they have the same shapes."""
        copy, source = self._modules[name], self._modules[other]
        if _signature(copy) is None or _signature(copy) != _signature(source):
            return False
        if not any(parameter.requires_grad for parameter in copy.parameters()):
            return any(parameter.requires_grad for parameter in source.parameters())
        return _is_trained(source, state) and not _is_trained(copy, state)

    def _alike(self, name: str) -> list[str]:
        return next((names for names in self._groups if name in names), [])

    def _name(self, module: nn.Module) -> str:
        return next(name for name, known in self._modules.items() if known is module)


def _named(place: str, outer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, module in outer.named_modules():
        yield ".".join(filter(None, (place, path))), module


def _signature(module: nn.Module) -> Any:
    """Type and parameter shapes, which copies share; None for modules without a matrix, which resemble others by chance."""
    shapes = tuple((name, tuple(parameter.shape)) for name, parameter in module.named_parameters())
    return (type(module), shapes) if any(len(shape) > 1 for _, shape in shapes) else None


def _resizable_ids(network: nn.Module, graph: WidthGraph) -> set[int]:
    """Ids of the tensors with a width that can change."""
    tensors, _, _ = named_tensors(network)
    return {id(tensors[tie.tensor]) for width in graph.resizable for tie in width.ties}


def _is_traced(module: nn.Module, found: set[int]) -> bool:
    return any(id(parameter) in found for parameter in module.parameters())


def _paths(network: nn.Module) -> dict[int, str]:
    """Path of every module in a network by its id."""
    return {id(module): path for path, module in network.named_modules()}


def _with_state(optimizers: Iterable[Optimizer]) -> set[int]:
    """Ids of the parameters that an optimizer has stepped, of those optimizers that keep a state."""
    return {id(parameter) for optimizer in optimizers for parameter, entry in optimizer.state.items() if entry}


def _is_trained(module: nn.Module, state: set[int]) -> bool:
    return any(parameter.grad is not None or id(parameter) in state for parameter in module.parameters())


def _unsettled(name: str, source: str) -> SkippedEvent:
    return SkippedEvent(
        f"{name} began as a copy of {source}, is not trained and has not moved so far: expected to know whether it follows (an "
        f"average, a target network) or stays (a reference). Say so: WidthEvolution(copies={{{name!r}: {source!r}}}) if it "
        "follows, copies={} if not."
    )


def _digest(module: nn.Module) -> str:
    """A hash of up to some 64 entries of every parameter: it changes when the weights move, and is cheap for large models."""
    digest = sha256()
    for parameter in module.parameters():
        flat = parameter.detach().flatten()
        chosen = in_float64(flat[:: max(1, len(flat) // 64)], "cpu")
        digest.update(chosen.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _without(graph: WidthGraph, paths: list[str]) -> WidthGraph:
    """The graph without the tensors of some modules."""
    if not paths:
        return graph
    starts = tuple(f"{path}." for path in paths)
    plain = to_state_dict(graph)
    for table in ("layouts", "shapes", "aliases"):
        plain[table] = {name: entry for name, entry in plain[table].items() if not name.startswith(starts)}
    plain["trainable"] = [name for name in plain["trainable"] if not name.startswith(starts)]
    plain["roles"] = [entry for entry in plain["roles"] if not entry[0].startswith(starts)]
    held = {part[0] for axes in plain["layouts"].values() for _, parts in axes for part in parts}
    plain["widths"] = [entry for entry in plain["widths"] if entry["name"] in held]
    return from_state_dict(plain)


def _stand_ins(network: nn.Module, copies: list[tuple[str, nn.Module]]) -> list[nn.Module]:
    """As few models as can be, each with at most one copy in every place."""
    found: list[dict[str, nn.Module | None]] = []
    for path, copy in copies:
        free = next((each for each in found if not any(_overlap(path, other) for other in each)), None)
        if free is None:
            found.append(free := {})
        free[path] = copy
    inside = _paths(network)
    for parts in found:
        # A copy stands in one place only: its first name would be another one else.
        homes = [inside[id(copy)] for copy in parts.values() if id(copy) in inside]
        parts.update({home: None for home in homes if not any(_overlap(home, path) for path in parts)})
    return [_stand_in(network, parts) for parts in found]


def _overlap(one: str, other: str) -> bool:
    return not one or not other or f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def _stand_in(network: nn.Module, parts: Mapping[str, nn.Module | None]) -> Any:
    """The network with other modules in some places; all else is the network's own."""
    if "" in parts:
        return parts[""]
    made = shallow_copy(network)
    for head in {path.partition(".")[0] for path in parts}:
        below = {path.partition(".")[2]: part for path, part in parts.items() if path.partition(".")[0] == head}
        child_table(made)[head] = _stand_in(network.get_submodule(head), below)
    return made

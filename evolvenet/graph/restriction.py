"""Which widths of a graph a run may change, and to which sizes: as pure functions of the graph."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from evolvenet.errors import PolicyError
from evolvenet.graph.width_graph import Width, WidthGraph, Widths

Patterns = str | Sequence[str]
"""One name or several, as `fnmatch` reads them: `*` for any characters, also dots."""


@dataclass(frozen=True)
class Restriction:
    """The widths that a run may change, and the sizes that it may give them.

    Args:
        network: submodules; a width that one of them does not produce alone keeps its size. None for no such limit.
        fixed: widths that keep their size, by name, or by a module that produces them.
        multiple: of which the channels of every width are to be a multiple, see `with_multiple`.

    Raises:
        PolicyError: for a multiple below 1, or names that are no strings.

    >>> Restriction(network="backbone", fixed=["backbone.stem*"], multiple=8).patterns
    ('backbone', 'backbone.stem*')
    """

    network: Patterns | None = None
    fixed: Patterns = ()
    multiple: int = 1

    def __post_init__(self) -> None:
        # What they are annotated as is what is to be checked.
        given: Any = self
        if not isinstance(given.multiple, int) or isinstance(given.multiple, bool) or given.multiple < 1:
            raise PolicyError(f"Expected multiple to be an integer of 1 or more, got {self.multiple!r}.")
        for name, value in (("network", given.network), ("fixed", given.fixed)):
            each: tuple[Any, ...] = as_tuple(value)
            if not all(isinstance(pattern, str) and pattern for pattern in each):
                raise PolicyError(
                    f'Expected {name} to be a name or several, for example {name}="encoder.*", got {value!r}.'
                )

    @property
    def patterns(self) -> tuple[str, ...]:
        """All names and patterns."""
        return (*as_tuple(self.network), *as_tuple(self.fixed))

    def check(self, modules: Iterable[str], graph: WidthGraph | None = None, path: str = "") -> None:
        """Check that every pattern matches a module or a width.

        Args:
            modules: the paths of all modules.
            graph: the widths; None where they are not known yet: a pattern may then match what follows any dot.
            path: of the graph's model among the modules.

        Raises:
            PolicyError: naming a pattern that matches nothing, and names like it.
        """
        names = {name: None for name in modules if name}
        if graph is None:
            names |= {name[place + 1 :]: None for name in names for place, sign in enumerate(name) if sign == "."}
        else:
            inside = [f"{path}." if path else "", *([""] if path else [])]
            names |= {before + width: None for before in inside for width in graph.widths}
            names |= {name.removeprefix(f"{path}."): None for name in names} if path else {}
        for pattern in self.patterns:
            # Of several widths that one module produces, "#2" names the second.
            alone = pattern if graph is not None else pattern.partition("#")[0]
            if not any(fnmatchcase(name, alone) for name in names):
                like = get_close_matches(pattern, names, n=3, cutoff=0.5) or list(names)[:5]
                raise PolicyError(
                    f"Expected the name of a module or of a width, or a pattern of such names, got {pattern!r}, which matches "
                    f"none. Like it are {', '.join(map(repr, like)) or 'none'}; print(evolvenet.trace(model, inputs)) lists all."
                )

    def permits(self, module: str, path: str = "") -> bool:
        """Whether a module may change, by its path in a model that lies at `path` in the module whose names are used.

        >>> restriction = Restriction(network="backbone", fixed="stem")
        >>> [restriction.permits(module) for module in ("backbone.fc", "backbone.stem", "stem", "head")]
        [True, True, False, False]
        """
        if any(_matches(module, pattern, path) for pattern in as_tuple(self.fixed)):
            return False
        return self.network is None or any(_matches(module, pattern, path) for pattern in as_tuple(self.network))

    def apply(self, graph: WidthGraph, path: str = "") -> WidthGraph:
        """The graph under this restriction.

        Args:
            graph: as traced.
            path: of its model in the module whose names the patterns may use.
        """
        return with_multiple(freeze(graph, self.network, self.fixed, path), self.multiple)


def fixed_names(restriction: Restriction, path: str, graph: WidthGraph) -> list[str]:
    """The modules and widths that a restriction excludes, one by one, by their names in a graph's model.

    Args:
        restriction: by patterns.
        path: of the model in the module whose names the patterns may use.
        graph: of the model.
    """
    modules = dict.fromkeys(name.rpartition(".")[0] for name in graph.shapes)
    widths = [width.name for width in graph.widths.values() if (width.frozen or "").startswith(FIXED)]
    return [*(name for name in modules if name and not restriction.permits(name, path)), *widths]


def freeze(graph: WidthGraph, network: Patterns | None = None, fixed: Patterns = (), path: str = "") -> WidthGraph:
    """The graph in which widths keep their size that a user does not want changed.

    Args:
        graph: as traced.
        network: submodules; every width is frozen that is produced outside of them, if only in part. None for no such limit.
        fixed: names of widths, or of modules that produce them.
        path: of the graph's model in a larger module, if there is one: names may be given from there on, too.

    Returns:
        The graph. Widths that were frozen before have their reasons from then.

    >>> import torch
    >>> from evolvenet import trace
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 6), torch.nn.Linear(6, 2))
    >>> frozen = freeze(trace(model, torch.zeros(1, 4)), fixed="0")
    >>> frozen.widths["0"].frozen, frozen.sizes
    ("fixed by the user: matches '0'", {'1': 6})
    """
    if network is None and not as_tuple(fixed):
        return graph
    widths = {name: _frozen(width, network, as_tuple(fixed), path) for name, width in graph.widths.items()}
    return replace(graph, widths=Widths(widths))


def with_multiple(graph: WidthGraph, multiple: int) -> WidthGraph:
    """The graph whose widths take only sizes with a multiple of so many channels, see `Width.step`.

    A unit may be several channels: a group of a grouped convolution, or one channel of every attention head. Then as few
    units as have a multiple of `multiple` channels in every weight that produces them are one step.

    >>> import torch
    >>> from evolvenet import trace
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 1), torch.nn.Conv2d(32, 32, 1, groups=8), torch.nn.Conv2d(32, 2, 1))
    >>> graph = with_multiple(trace(model, torch.zeros(1, 3, 4, 4)), 8)
    >>> [(width.name, width.size, width.step) for width in graph.resizable]
    [('0', 8, 2)]
    """
    widths = {name: replace(width, step=_step(width, multiple)) for name, width in graph.widths.items()}
    return replace(graph, widths=Widths(widths))


FIXED = "fixed by the user"
"""How the reason of a width begins that a restriction excludes."""


def as_tuple(patterns: Patterns | None) -> tuple[str, ...]:
    """One name, several or none, as a tuple."""
    if patterns is None:
        return ()
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def _frozen(width: Width, network: Patterns | None, fixed: Sequence[str], path: str) -> Width:
    if width.frozen is not None:
        return width
    modules = {tie.module for tie in width.producers} or {tie.module for tie in width.ties}
    for pattern in fixed:
        if any(_matches(name, pattern, path) for name in {width.name, *modules}):
            return replace(width, frozen=f"{FIXED}: matches {pattern!r}", patches=())
    chosen = as_tuple(network)
    if network is not None and not all(any(_matches(name, each, path) for each in chosen) for name in modules):
        named = " or ".join(map(repr, chosen))
        return replace(width, frozen=f"{FIXED}: lies outside of network {named}", patches=())
    return width


def _matches(name: str, pattern: str, path: str) -> bool:
    """Whether a module is one of those that a pattern names, or lies in one."""
    whole = f"{path}.{name}".strip(".")
    return any(fnmatchcase(each, form) for each in (name, whole) for form in (pattern, f"{pattern}.*"))


def _step(width: Width, multiple: int) -> int:
    """The units of which a multiple has a multiple of so many channels on every axis that produces them, and fits the width."""
    channels: dict[tuple[str, int], int] = {}
    for tie in width.producers:
        place = (tie.tensor, tie.dim)
        channels[place] = channels.get(place, 0) + tie.repeat
    return math.lcm(width.multiple, *(multiple // math.gcd(multiple, each) for each in channels.values() or (1,)))

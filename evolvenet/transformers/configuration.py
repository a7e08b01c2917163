"""The configuration that builds a model of the widths that one has, where there is such a configuration.

Nothing is known here of families and the names of their fields. Numbers of the configuration are changed in proportion to
the sizes that differ, the model is built without data, and what brings the shapes nearer is kept. Several configurations may
give the same shapes (fewer heads, or smaller ones), so the weights decide: with them, the model that is built has to compute
the same outputs.
"""

from __future__ import annotations

import copy
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from evolvenet.measurement.output_error import outputs_on
from evolvenet.surgery.module_replacement import replacements
from evolvenet.surgery.width_record import shapes_of
from evolvenet.transformers.norm_eps import has_eps_of, with_eps_of

log = logging.getLogger("evolvenet")

BUILDS = 300
"""Most configurations that are tried."""
ROUNDING = 8
"""Most units in the last place by which outputs may differ in the mean: sums in another order."""
OFTEN_DERIVED = ("head_dim",)
"""Fields that many configurations leave out, to be computed from others: they may have to stay when those change."""
_NO_SIZE = re.compile(r"token_id|_ids?$|layer|depth|position|dropout|prob|eps|std|theta")
_MAY_BE_SIZE = re.compile(r"dim|size|inner|ffn|width|channels|heads")

Way = tuple[str | int, ...]
"""How a number of a configuration is reached: names of fields, and places in lists."""
Shapes = Mapping[str, tuple[int, ...]]


def builds(model: PreTrainedModel, config: Any, shapes: Shapes) -> bool:
    """Whether a configuration builds a model of certain shapes.

    Args:
        model: its class counts.
        config: of that class.
        shapes: {name: shape} of all parameters and buffers.
    """
    return _distance(shapes, shapes_of_built(type(model), config)) == 0


def equal_configuration(model: PreTrainedModel, state: Mapping[str, Any], shapes: Shapes, inputs: Any) -> Any:
    """A configuration with which the model's class builds a model of the same widths and outputs.

    Args:
        model: whose widths have changed; its own configuration is the one that is changed in a copy.
        state: its state dict, by the names that the model will have that is built.
        shapes: {name: shape} of its parameters and buffers, by these names.
        inputs: of the model, to compare outputs; None if there are none, and no configuration is found then.

    Returns:
        The configuration; None if none is found: layers of several widths, for example, or sizes that no field says.
    """
    if inputs is None or not all(each.in_configuration for each in replacements(model).values()):
        return None
    if not _alike_as_before(shapes_of_built(type(model), model.config), shapes):
        return None
    return _Search(model, state, shapes, inputs).run()


@dataclass
class _Search:
    """Depth first, the change first that brings the shapes nearest."""

    model: PreTrainedModel
    state: Mapping[str, Any]
    wanted: Shapes
    inputs: Any
    left: int = BUILDS
    seen: set[str] = field(default_factory=set[str])

    def run(self) -> Any:
        plain, pinned = (with_eps_of(self.model, self.model.config) for _ in range(2))
        for name in OFTEN_DERIVED:
            _pin(self.model, pinned, name)
        for config in (plain, pinned):
            found = self._from(config, self._distance(config))
            if found is not None and has_eps_of(self.model, found):
                return found
        return None

    def _from(self, config: Any, distance: float) -> Any:
        if distance == 0:
            return config if _same_outputs(self.model, self.state, config, self.inputs) else None
        nearer: list[tuple[float, int, Any]] = []
        built = shapes_of_built(type(self.model), config)
        for number, values in enumerate(_candidates(config, _changes(built, self.wanted))):
            other = _with(config, values)
            key = str(other and other.to_dict())
            if other is None or key in self.seen or self.left <= 0:
                continue
            self.seen.add(key)
            if (new := self._distance(other)) < distance:
                nearer.append((new, number, other))
        for new, _, other in sorted(nearer, key=lambda entry: entry[:2]):
            if (found := self._from(other, new)) is not None:
                return found
        return None

    def _distance(self, config: Any) -> float:
        self.left -= 1
        return _distance(self.wanted, shapes_of_built(type(self.model), config))


def shapes_of_built(
    kind: type[PreTrainedModel], config: Any, change: Callable[[PreTrainedModel], object] = lambda _: None
) -> Shapes:
    """The shapes of a model with that configuration; none if it cannot be built.

    Args:
        kind: of the model.
        config: is left as it is.
        change: what is done to the model that is built, without values, before its shapes are read.
    """
    try:
        with torch.device("meta"):
            built = kind(copy.deepcopy(config))
            change(built)
            return shapes_of(built)
    except Exception as error:  # noqa: BLE001  a configuration that does not work is an answer
        log.debug("No model has this configuration: %s", error)
        return {}


def _alike_as_before(built: Shapes, wanted: Shapes) -> bool:
    """Whether tensors that differ in nothing but the numbers in their names are of one shape still, if they were."""
    groups: dict[tuple[str, tuple[int, ...]], set[tuple[int, ...]]] = {}
    for name, shape in built.items():
        groups.setdefault((re.sub(r"\d+", "#", name), shape), set()).add(wanted.get(name, shape))
    return all(len(shapes) == 1 for shapes in groups.values())


def _distance(wanted: Shapes, built: Shapes) -> float:
    """How far shapes are from others, 0 if they are the same, infinite if widths are not all that differs."""
    if wanted.keys() != built.keys() or any(len(wanted[name]) != len(shape) for name, shape in built.items()):
        return math.inf
    pairs = [pair for name, shape in built.items() for pair in zip(shape, wanted[name], strict=True)]
    return sum(abs(math.log((one + 1e-9) / (other + 1e-9))) for one, other in pairs if one != other)


def _changes(built: Shapes, wanted: Shapes) -> list[tuple[int, int]]:
    """The (size, other size) that differ, those first that differ most often."""
    pairs = [
        pair
        for name, shape in built.items()
        for pair in zip(shape, wanted.get(name, shape), strict=True)
        if pair[0] != pair[1] and 0 not in pair
    ]
    return sorted(set(pairs), key=lambda pair: (-pairs.count(pair), pair))


def _candidates(config: Any, changes: list[tuple[int, int]]) -> Iterator[dict[Way, int | float]]:
    """Other values of one number: in proportion to a size that differs, or that size. Also of all that were that size."""
    for way, value in _numbers(config):
        name = next(str(step) for step in reversed(way) if isinstance(step, str))
        for old, new in changes:
            if value is None:
                if _MAY_BE_SIZE.search(name):
                    yield {way: new}
            elif isinstance(value, int) and value * new % old == 0:
                yield {way: value * new // old}
            elif "ratio" in name:
                yield {way: value * new / old}
    for old, new in changes:
        if len(alike := [way for way, value in _numbers(config) if value == old]) > 1:
            yield dict.fromkeys(alike, new)


def _numbers(value: Any, way: Way = ()) -> Iterator[tuple[Way, int | float | None]]:
    """The numbers of a configuration that may be sizes, those of configurations within it as well."""
    if isinstance(value, PretrainedConfig):
        for name, entry in vars(value).items():
            if not name.startswith("_") and not _NO_SIZE.search(name):
                yield from _numbers(entry, (*way, name))
    elif isinstance(value, list | tuple) and len(value) <= 16:
        for place, entry in enumerate(value):
            yield from _numbers(entry, (*way, place))
    elif value is None or (isinstance(value, int | float) and not isinstance(value, bool) and value > 0):
        yield way, value


def _with(config: Any, values: Mapping[Way, float]) -> Any:
    """A copy of a configuration with other numbers in it; None if it does not take them."""
    changed = copy.deepcopy(config)
    try:
        for way, number in values.items():
            _set(changed, way, number)
    except Exception as error:  # noqa: BLE001  each configuration checks its fields in its own way
        log.debug("The configuration does not take %s: %s", values, error)
        return None
    return changed


def _set(holder: Any, way: Way, number: Any) -> Any:
    """Exchange a number in place, or in a list, which is returned anew."""
    if not way:
        return number
    first, *rest = way
    if isinstance(first, int):
        entries = list(holder)
        entries[first] = _set(entries[first], tuple(rest), number)
        return type(holder)(entries)
    setattr(holder, first, _set(getattr(holder, first), tuple(rest), number))
    return holder


def _pin(model: nn.Module, config: Any, name: str) -> None:
    """Write a number that modules have computed into the configurations that they were built with, where it is left out."""
    configs = [value for value in (config, *vars(config).values()) if isinstance(value, PretrainedConfig)]
    found = {value for module in model.modules() if isinstance(value := vars(module).get(name), int)}
    for each in configs if len(found) == 1 else ():
        if getattr(each, name, None) is None:
            setattr(each, name, *found)


def _same_outputs(model: PreTrainedModel, state: Mapping[str, Any], config: Any, inputs: Any) -> bool:
    """Whether a model of that configuration computes the same with the model's weights."""
    try:
        if hasattr(config, "validate"):
            config.validate()
        kind: Any = type(model)
        other = kind.from_pretrained(
            None, config=copy.deepcopy(config), state_dict=dict(state), dtype=model.dtype
        ).to(model.device)  # fmt: skip
        ours, theirs = (outputs_on(each, [inputs], most=None) for each in (model, other))
    except Exception as error:  # noqa: BLE001  a configuration that does not work is an answer
        log.debug("A model of this configuration does not run: %s", error)
        return False
    least = ROUNDING * torch.finfo(model.dtype).eps
    return len(ours) == len(theirs) and all(
        one.shape == two.shape and bool((one - two).norm() <= least * one.norm())
        for one, two in zip(ours, theirs, strict=True)
    )

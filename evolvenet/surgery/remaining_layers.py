"""`RemainingLayers`: a list of layers from which whole layers were taken, since those that follow have a place in the cache.

Layers of the transformers library number themselves (`layer_idx`): each finds its keys and values in the cache by it, and the
configuration counts them. A layer that is taken out leaves no gap: the layers after it get the numbers before them, and the
configuration is brought up to date, so that plain `from_pretrained` builds the shorter model.
"""

# nn.Module.named_modules has no full type.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import nn

from evolvenet.graph.naming import and_above
from evolvenet.surgery.module_replacement import BUILDERS, Record, Replacement, names_when_whole

KIND = "remaining layers"
PLACE = "layer_idx"
"""The attribute by which modules of the transformers library find their entry of the cache."""
COUNTS = frozenset({"num_hidden_layers", "n_layer", "num_layers", "n_layers"})
"""Fields of the library's configurations: the number of layers."""
EACH_LAYER = re.compile(r"(?!mtp_).*_types|layers_block_type|no_rope_layers|.*_per_layer")
"""Names of its lists with an entry for each layer."""
SOME_LAYERS = re.compile(r".*_(layers|layer_ids|indices|indexes)")
"""Names of its lists of layers' numbers, which are not changed: no layer is taken out then."""
NO_LAYERS = re.compile(r"_.*|architectures|.*_token_ids?|.*_sizes?")
"""Names of its lists that have nothing to do with layers, however long they are."""


@dataclass(frozen=True, eq=False)
class LeftLayer:
    """A layer that was taken out.

    Args:
        layer: a copy without values, for checkpoints from before.
        names: of its tensors.
        entries: {field of the configuration: its entry there}, known once it was taken out of a model.
    """

    layer: nn.Module
    names: tuple[str, ...]
    entries: dict[str, Any]


class RemainingLayers(Replacement, nn.ModuleList):
    """A list of layers without some. It runs like the list before it; in state dicts it says which layers it lacks.

    Args:
        modules: the layers that stay.
        left: {place in the list as it was first: layer that was there}.

    >>> layers = RemainingLayers.without(nn.ModuleList(nn.Linear(2, size) for size in (3, 4, 5)), [1])
    >>> [layer.out_features for layer in layers], layers.record()["left"]
    ([3, 5], [1])
    >>> [layer.out_features for layer in layers.whole()]
    [3, 4, 5]
    """

    in_configuration = True

    def __init__(self, modules: Iterable[nn.Module] | None = None, left: Mapping[int, LeftLayer] | None = None) -> None:
        super().__init__(modules)
        self.left = dict(left or {})
        self.record_in_checkpoints()

    @classmethod
    def without(cls, layers: nn.ModuleList, places: Iterable[int]) -> RemainingLayers:
        """A list without some of its layers; the list itself and its layers are left as they are.

        Args:
            layers: plain, or without some already.
            places: in the list as it is now.
        """
        left = dict(layers.left) if isinstance(layers, RemainingLayers) else {}
        first, gone = first_places(len(layers), left), set(places)
        for place in gone:
            layer = layers[place]
            kept = copy.deepcopy(layer).to("meta")
            _renumber(kept, first[place] - place)
            left[first[place]] = LeftLayer(kept, names_when_whole(layer), {})
        return cls([layer for place, layer in enumerate(layers) if place not in gone], left)

    def record(self) -> dict[str, Any]:
        """See `Replacement`."""
        names = [f"{place}.{name}" for place, gone in self.left.items() for name in gone.names]
        for place, layer in zip(first_places(len(self), self.left), self, strict=True):
            names += [f"{place}.{name}" for name in names_when_whole(layer)]
        return {"type": KIND, "whole": names, "left": sorted(self.left), "first": len(self) + len(self.left)}

    def whole(self) -> nn.Module:
        """A list of all layers; the values of those that were taken out are undefined. The others are the same modules."""
        layers = dict(zip(first_places(len(self), self.left), self, strict=True))
        layers |= {place: copy.deepcopy(gone.layer).to_empty(device="cpu") for place, gone in self.left.items()}
        return nn.ModuleList([layers[place] for place in sorted(layers)])

    def has_come(self, model: nn.Module, before: nn.Module, undo: ExitStack) -> None:
        """Layers and configurations of a model count anew, now that this list stands in the place of another one."""
        assert isinstance(before, nn.ModuleList)
        known: Mapping[int, LeftLayer] = before.left if isinstance(before, RemainingLayers) else {}
        gone = [place for place, first in enumerate(first_places(len(before), known)) if first in self.left]
        firsts = first_places(len(before), known)
        _count(model, self, len(before), len(self), undo)
        for config in _configurations(model, self):
            for name, value in list(vars(config).items()):
                if _is_each(name, value, len(before)):
                    for place in gone:
                        self.left[firsts[place]].entries[name] = value[place]
                    kept = [entry for place, entry in enumerate(value) if place not in gone]
                    _set(config, name, type(value)(kept), undo)
        _number(before, self, undo)

    def has_gone(self, model: nn.Module, after: nn.Module, undo: ExitStack) -> None:
        """Layers and configurations of a model count as at first, now that the whole list is back."""
        assert isinstance(after, nn.ModuleList)
        if isinstance(after, RemainingLayers):
            # It counts from this list on.
            return
        _count(model, after, len(self), len(after), undo)
        for config in _configurations(model, after):
            for name, value in list(vars(config).items()):
                if _is_each(name, value, len(self)):
                    entries = dict(zip(first_places(len(self), self.left), value, strict=True))
                    entries |= {place: each.entries.get(name) for place, each in self.left.items()}
                    _set(config, name, type(value)([entries[place] for place in sorted(entries)]), undo)
        _number(self, after, undo)


def first_places(count: int, left: Iterable[int]) -> list[int]:
    """The place of each remaining layer in the list as it was first.

    >>> first_places(2, [1])
    [0, 2]
    """
    gone = set(left)
    return [place for place in range(count + len(gone)) if place not in gone]


def unclear_fields(model: nn.Module, layers: nn.ModuleList) -> list[str]:
    """Names of lists in the configuration of some layers that may depend on their number, in a way that is not known."""
    return sorted(
        name
        for config in _configurations(model, layers)
        for name, value in vars(config).items()
        if isinstance(value, list | tuple) and value and not _is_each(name, value, len(layers))
        if SOME_LAYERS.fullmatch(name) or (len(value) == len(layers) and not NO_LAYERS.fullmatch(name))
    )


def is_without(module: nn.Module, record: Record) -> bool:
    """Whether a list was built with as many layers as remain in the list of a record, by a configuration that counts them."""
    return (
        record["type"] == KIND
        and isinstance(module, nn.ModuleList)
        and not isinstance(module, Replacement)
        and len(module) == record["first"] - len(record["left"])
    )


def _is_each(name: str, value: Any, count: int) -> bool:
    return isinstance(value, list | tuple) and len(value) == count and EACH_LAYER.fullmatch(name) is not None


def _configurations(model: nn.Module, layers: nn.Module) -> Iterator[Any]:
    """Those that describe the layers of a list: of the nearest module above it that has one. Others have layers of their own."""
    yield from {id(configs[0]): configs[0] for _, configs in _all_above(model, layers) if configs}.values()


def _all_above(model: nn.Module, layers: nn.Module) -> Iterator[tuple[str, list[Any]]]:
    """(path of a list, different configurations of the modules above it, the nearest one first)."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for path in [path for path, module in modules.items() if module is layers]:
        configs = (getattr(modules[above], "config", None) for above in and_above(path))
        yield path, list({id(config): config for config in configs if config is not None}.values())


def _count(model: nn.Module, layers: nn.Module, before: int, now: int, undo: ExitStack) -> None:
    """Configurations count the layers of a list anew: the nearest one, and those above of which it may be a copy.

    T5's encoder and decoder have copies of the model's configuration, and count their layers as `num_layers` there. Above, the
    decoder's are `num_decoder_layers`: where a field has the name of a part on the path, it alone counts.
    """
    for path, configs in _all_above(model, layers):
        own = {each for part in path.split(".") for each in (f"{part}_layers", f"num_{part}_layers")}
        for config in configs:
            if type(config) is not type(configs[0]):
                continue
            named = own & vars(config).keys()
            copied = config is configs[0] and config is not configs[-1]
            if config is not configs[0] and not named and _copies(model, config) > 1:
                # It counts those of several parts with one number, and the others keep theirs.
                continue
            for name in COUNTS | named if copied or not named else named:
                if vars(config).get(name) == before:
                    _set(config, name, now, undo)


def _copies(model: nn.Module, config: Any) -> int:
    """How many parts right below the modules of a configuration have a copy of it, for whose layers it has no field."""
    return sum(
        type(own := getattr(child, "config", None)) is type(config)
        and own is not config
        and not {f"{name}_layers", f"num_{name}_layers"} & vars(config).keys()
        for above in model.modules()
        if getattr(above, "config", None) is config
        for name, child in above.named_children()
    )


def _number(before: nn.ModuleList, after: nn.ModuleList, undo: ExitStack) -> None:
    """Layers of both lists get numbers that have moved as far as they have."""
    now = {layer: place for place, layer in enumerate(after)}
    for place, layer in enumerate(before):
        if layer in now and now[layer] != place:
            _renumber(layer, now[layer] - place)
            undo.callback(_renumber, layer, place - now[layer])


def _renumber(layer: nn.Module, by: int) -> None:
    for module in layer.modules():
        number = getattr(module, PLACE, None)
        if isinstance(number, int):
            setattr(module, PLACE, number + by)


def _set(config: Any, name: str, value: Any, undo: ExitStack) -> None:
    undo.callback(vars(config).__setitem__, name, vars(config)[name])
    vars(config)[name] = value


def _build(module: nn.Module, record: Record) -> nn.Module:
    if not isinstance(module, nn.ModuleList):
        raise TypeError(f"expected a list of layers, got a {type(module).__name__}")
    if is_without(module, record):
        return module
    if len(module) != record["first"]:
        raise ValueError(f"expected {record['first']} layers, got {len(module)}")
    return RemainingLayers.without(module, record["left"])


BUILDERS[KIND] = _build

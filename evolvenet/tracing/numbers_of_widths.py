"""Which numbers in a model's own code may hold the size of a width.

Code such as `x.view(b, t, self.num_heads, self.head_dim)` has sizes in Python numbers, which have no labels. Names of sizes are
tried first, then any number of the right value; trials decide, and none is changed that they do not need.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import combinations

from torch import nn

from evolvenet.graph.naming import and_above
from evolvenet.graph.width_graph import Width
from evolvenet.surgery.numbers import attribute_of, numbers_in

PLAIN, SLICE, HEAD = "plain", "slice", "head"
"""Kinds of fixes: units as they are, those of one place in all heads tied, those of one head tied."""

_SIZES = """hidden_dim hidden_size hidden_channels embed_dim embedding_dim emb_dim d_model dim dims inner_dim all_head_size
split_size nf nx channels num_channels in_channels out_channels in_features out_features num_features features n_embd
d_inner intermediate_size ssm_state_size time_step_rank conv_dim mlp_dim width attn_dim normalized_shape qkv_dim kdim vdim
in_chs out_chs mid_chs expand_chs num_1x1_c latent_dim inplanes planes inner_size feature_dim n_state n_units output_size
input_size num_hiddens q_lora_rank kv_lora_rank num_experts num_local_experts n_experts n_routed_experts shape unflattened_size"""
_HEAD_SIZES = """head_dim attention_head_size key_value_proj_dim d_kv dim_head head_size dim_per_head d_head key_dim val_dim
head_width v_head_dim qk_nope_head_dim qk_head_dim kv_dim rotary_ndims rotary_dim"""
_HEAD_COUNTS = """num_heads n_heads num_attention_heads nhead heads n_head num_key_value_heads num_kv_heads n_kv_heads
n_groups num_group n_group"""
HEADS_OF_A_KEY = frozenset({"num_key_value_groups"})
"""Attribute names that hold how many heads of queries share each key."""
ATTRIBUTE_NAMES: Mapping[str, frozenset[str]] = {
    PLAIN: frozenset(_SIZES.split()),
    SLICE: frozenset(_SIZES.split() + _HEAD_SIZES.split()),
    HEAD: frozenset(_SIZES.split() + _HEAD_COUNTS.split()),
}
"""Attribute names that hold the size of a width, by the kind of fix: those are tried first, then those of any name."""
ANY_SIZE = frozenset().union(*ATTRIBUTE_NAMES.values())
SHAPES = frozenset({"shape", "unflattened_size"})
"""Those of which the first number is the size and the others are places: channels × rows × columns."""


def attributes_to_update(
    model: nn.Module,
    width: Width,
    kind: str,
    keys: frozenset[str] | None = None,
    counts: frozenset[int] = frozenset(),
    numbers: Callable[[nn.Module], Iterable[tuple[str, int]]] = numbers_in,
) -> tuple[tuple[str, str], ...]:
    """(module path, name) of the numbers that may hold a width's size, see `evolvenet.surgery.numbers`.

    They have a value of which it is a part: the number of units, or of places on an axis, or up to four times that. They
    lie on modules with tensors of the width, on those above, or on modules without tensors beside these.

    Args:
        model: the model.
        width: the width.
        kind: "plain", "slice" or "head": whose attributes of `ATTRIBUTE_NAMES` are taken.
        keys: take the numbers of these keys instead, whatever they are called, see `possible_keys`.
        counts: further values that follow it: numbers of heads of which a unit has several.
        numbers: `numbers_in`, or what it has found before.
    """
    totals: dict[tuple[str, int], int] = defaultdict(int)
    for tie in width.ties:
        totals[tie.tensor, tie.dim] += tie.repeat * width.size
    values = {width.size} | {total * k for total in totals.values() for k in (1, 2, 3, 4)}
    values |= _heads_of_queries(width) | _places_of_a_head(width) | counts
    found: list[tuple[str, str]] = []
    consuming = frozenset[str]() if keys is None else _only_consuming(width)
    for path in _paths(model, width):
        module = model.get_submodule(path)
        others = _other_lengths(model, path, totals) if keys is None else set()
        for name, value in numbers(module):
            if keys is None:
                chosen = name_of_size(module, name) in ATTRIBUTE_NAMES[kind]
            else:
                chosen = _key(model, consuming, path, name) in keys
            if chosen and value > 1 and value in values - others:
                found.append((path, name))
    return tuple(found)


def heads_of_one_key(model: nn.Module, width: Width) -> tuple[tuple[str, str], ...]:
    """(module path, name) of the numbers of heads that share a key, of a width that is all heads of queries with a single key.

    They follow the width whether the trace needs them or not: which way code of the transformers library repeats a key, by
    this number or inside the attention of torch, depends on whether there is a mask.
    """
    found = ((path, name) for path in _paths(model, width) for name in sorted(HEADS_OF_A_KEY))
    return tuple((path, name) for path, name in found if getattr(model.get_submodule(path), name, None) == width.size)


def _heads_of_queries(width: Width) -> set[int]:
    """Numbers of heads, where a unit is a head of keys with all heads of queries that share it."""
    repeats = {tie.repeat for tie in width.producers}
    return {width.size * (most // least) for most in repeats for least in repeats if most % least == 0}


def _places_of_a_head(width: Width) -> set[int]:
    """Numbers of places that a head may have, where a unit has unlike numbers of places in the parts of a head.

    The parts are as many on an axis as heads, times the parts of each.
    """
    parts: dict[tuple[str, int], list[int]] = defaultdict(list)
    for tie in width.ties:
        parts[tie.tensor, tie.dim].append(tie.repeat)
    found: set[int] = set()
    for repeats in parts.values():
        total, count = width.size * sum(repeats), len(repeats)
        if len(set(repeats)) > 1:
            found |= {total // heads for heads in range(2, count) if count % heads == total % heads == 0}
    return found


def possible_keys(model: nn.Module, width: Width, counts: frozenset[int]) -> list[str]:
    """Keys of all numbers that may hold a width's size, whatever they are called; those with a name of a size come first.

    A key names the same number in all modules of a type that produce the width's units, or that only consume them: the heads
    of the next layer may be as many by chance. The numbers of torch's layers with weights (`kernel_size`, `in_features`) are
    left out: which of them change is known.
    """
    own = [path for path in _paths(model, width) if not is_known(model.get_submodule(path))]
    consuming = _only_consuming(width)
    everything = frozenset(
        _key(model, consuming, path, name) for path in own for name, _ in numbers_in(model.get_submodule(path))
    )
    found: dict[str, int] = {}
    for path, name in attributes_to_update(model, width, PLAIN, everything, counts):
        if path in own:
            found[_key(model, consuming, path, name)] = _likeliness(model.get_submodule(path), name)
    return sorted(found, key=lambda key: found[key])


def _likeliness(module: nn.Module, name: str) -> int:
    """0 for a name of a size, 1 for such a field of a configuration ("config.num_attention_heads"), 2 for any other."""
    if name_of_size(module, name) in ANY_SIZE:
        return 0
    return 1 if name.rpartition(".")[2] in ANY_SIZE else 2


def _only_consuming(width: Width) -> frozenset[str]:
    """Paths of modules that hold consumers of a width and no producer."""
    made, used = (
        {path for tie in ties for path in and_above(tie.module)} for ties in (width.producers, width.consumers)
    )
    return frozenset(used - made)


def _key(model: nn.Module, only_consuming: frozenset[str], path: str, name: str) -> str:
    key = number_key(model.get_submodule(path), name)
    return f"{key} of a consumer" if path in only_consuming else key


def fewest_passing(keys: Sequence[str], failure: Callable[[frozenset[str]], str | None]) -> frozenset[str] | None:
    """A smallest set of numbers with which a width passes its trials, None if none is found.

    All are tried at once, then none and each alone, pairs, and all but one. Pairs of which each number alone leaves the
    failure as it is without any (the same error in the same line of code) are left out, and so is all but one if all
    together leave it. None of the numbers that are found can be left out.

    Args:
        keys: of the numbers, the most likely ones first.
        failure: what goes wrong if the numbers of these keys follow the width, None if nothing does.

    >>> def failure(keys):
    ...     return "too many steps" if "num_steps" in keys else None if "c" in keys else "wrong shape"
    >>> fewest_passing(["c", "splits[0]", "num_steps"], failure)
    frozenset({'c'})
    """
    failure = cache(failure)
    found = next((chosen for chosen in _candidates(keys, failure) if failure(chosen) is None), None)
    for key in keys:
        if found is not None and key in found and failure(found - {key}) is None:
            found -= {key}
    return found


def _candidates(keys: Sequence[str], failure: Callable[[frozenset[str]], str | None]) -> Iterator[frozenset[str]]:
    """The sets that `fewest_passing` tries, in order."""
    everything = frozenset(keys)
    alone = [frozenset((key,)) for key in keys]
    yield from (everything, frozenset(), *alone)
    without = failure(frozenset())
    matters = {key for key in keys if failure(frozenset((key,))) != without}
    yield from (frozenset(pair) for pair in combinations(keys, 2) if matters & set(pair))
    if failure(everything) != without:
        yield from (everything - {key} for key in keys)


def number_key(module: nn.Module, name: str) -> str:
    """What the same number has in common in all modules of a type.

    >>> number_key(nn.LayerNorm(8), "normalized_shape[0]")
    'LayerNorm.normalized_shape[0]'
    """
    return f"{type(module).__qualname__}.{name}"


def name_of_size(module: nn.Module, name: str) -> str:
    """The attribute of which a number is the size, "" if it is not: `8` or the 8 in `(8, 1, 1)`, of a shape in `(8, 4, 4)`.

    >>> norm = nn.LayerNorm((8, 4))
    >>> name_of_size(norm, "normalized_shape[0]"), name_of_size(norm, "normalized_shape[1]"), name_of_size(norm, "eps")
    ('', '', 'eps')
    """
    attribute = attribute_of(name)
    if name == attribute:
        return name
    value = getattr(module, attribute)
    if not isinstance(value, tuple):
        return ""
    longer = [place for place, entry in enumerate(value) if entry != 1]
    single = len(longer) == 1 or attribute in SHAPES
    return attribute if single and name == f"{attribute}[{longer[0]}]" else ""


def is_known(module: nn.Module) -> bool:
    """Whether a module is a layer of torch with weights: which of its numbers change is known by its type."""
    return type(module).__module__.startswith("torch.nn.") and _holds_tensors(module)


def _holds_tensors(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None or next(module.buffers(), None) is not None


def _paths(model: nn.Module, width: Width) -> list[str]:
    """Modules with tensors of a width, those above, and those without tensors beside them, with all that they hold."""
    above = dict.fromkeys(path for tie in width.ties for path in and_above(tie.module))
    beside = [
        ".".join(filter(None, (path, name, below)))
        for path in above
        for name, child in model.get_submodule(path).named_children()
        if not _holds_tensors(child)
        for below, _ in child.named_modules()
    ]
    return [*above, *sorted(beside)]


def _other_lengths(model: nn.Module, path: str, totals: Mapping[tuple[str, int], int]) -> set[int]:
    """Lengths of a module's axes that the width does not fill, except those of axes that it does fill."""
    filled, other = set(), set()
    for name, tensor in model.get_submodule(path).named_parameters(path, recurse=False):
        for dim, length in enumerate(tensor.shape):
            (filled if totals.get((name, dim)) == length else other).add(length)
    return other - filled

"""Search for the items that fail a trial, which can be run on any set of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def classes_of(items: Sequence[Item], key: Callable[[Item], object]) -> list[list[tuple[int, Item]]]:
    """Items with equal keys together, each with its number.

    >>> classes_of(["a", "bb", "c"], len)
    [[(0, 'a'), (2, 'c')], [(1, 'bb')]]
    """
    found: dict[object, list[tuple[int, Item]]] = {}
    for number, item in enumerate(items):
        found.setdefault(key(item), []).append((number, item))
    return list(found.values())


def bisect(
    classes: Sequence[Sequence[tuple[int, Item]]], trial: Callable[[Sequence[Item]], str | None]
) -> dict[int, str]:
    """{number of an item that fails: reason}, by bisection over classes, then within a class that fails.

    If the first member of a class fails alone, the whole class is taken to fail. Parts that only fail together are added
    one by one. Parts that pass may still fail together: the caller has to try that.

    >>> bisect([[(0, 3)], [(1, 4)], [(2, 5)]], lambda items: "is even" if 4 in items else None)
    {1: 'is even'}
    """
    items = [entry for members in classes for entry in members]
    reason = trial([item for _, item in items]) if items else None
    if reason is None:
        return {}
    if len(classes) == 1:
        if len(items) == 1 or trial([items[0][1]]) is not None:
            return {number: reason for number, _ in items}
        return bisect([[entry] for entry in items], trial)
    half = len(classes) // 2
    failed = {**bisect(classes[:half], trial), **bisect(classes[half:], trial)}
    if failed:
        return failed
    passed: list[Item] = []
    for members in classes:
        chosen = [item for _, item in members]
        reason = trial([*passed, *chosen])
        if reason is None:
            passed += chosen
        else:
            failed.update({number: reason for number, _ in members})
    return failed

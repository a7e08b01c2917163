"""What a network is called with: example inputs from shapes, and batches from a file or a function."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evolvenet._compat.torch import tree_flatten
from evolvenet.cli.errors import CommandError
from evolvenet.cli.objects import find
from evolvenet.execution.dummy_inputs import dummy_inputs
from evolvenet.surgery.checkpoint_file import read

INPUT = "expected a shape such as 1,3,224,224, or with a type such as 1,128:int64, or with a bound such as 1,128:int64:32000"
KEYS = ("x", "inputs", "images", "input_ids", "data")
"""Names under which a file's samples are looked for."""


def example_inputs(model: nn.Module, given: Sequence[str], data: str | None = None, key: str | None = None) -> Any:
    """Inputs to run a network on.

    Args:
        model: the network.
        given: `SHAPE`, `SHAPE:TYPE` or `SHAPE:TYPE:BOUND` for each argument, with `name=` before it for one by keyword.
            Numbers are drawn from a normal distribution, integers from 0 … BOUND − 1 (0 and 1 by default). Without any,
            `example_input_array` of a LightningModule, or inputs made up for a model of the transformers library; else the
            first sample of the data, if these are a file of floating-point numbers.
        data: see `batches`.
        key: of the samples in a file with several arrays.

    Raises:
        CommandError: if none are given and none can be made.

    >>> example_inputs(nn.Identity(), ["2,3", "1,4:int64:10"])[1].shape
    torch.Size([1, 4])
    """
    if given:
        made = [_tensor(each) for each in given]
        if all(name for name, _ in made):
            return dict(made)
        if any(name for name, _ in made):
            raise CommandError(f"--input: expected all inputs by name or none, got {', '.join(given)}.")
        return made[0][1] if len(made) == 1 else tuple(tensor for _, tensor in made)
    own = getattr(model, "example_input_array", None)
    found = own if own is not None else dummy_inputs(model)
    if found is None and data is not None and Path(data).is_file():
        first = _of_file(Path(data), key, None)[:1]
        # Whole numbers may be words, or pixels that the network takes as fractions.
        found = first if first.is_floating_point() else None
    if found is None:
        raise CommandError(f"--input: {INPUT}, got none, and a {type(model).__name__} does not say what it takes.")
    return found


def _tensor(given: str) -> tuple[str, Tensor]:
    name, equals, rest = given.rpartition("=")
    sizes, _, kind = rest.partition(":")
    kind, _, bound = kind.partition(":")
    try:
        shape = [int(size) for size in sizes.split(",")]
        most = int(bound) if bound else 2
    except ValueError:
        raise CommandError(f"--input {given}: {INPUT}.") from None
    dtype = getattr(torch, kind or "float32", None)
    if not isinstance(dtype, torch.dtype) or min(shape, default=0) < 1 or (equals and not name.isidentifier()):
        raise CommandError(f"--input {given}: {INPUT}.")
    random = torch.Generator().manual_seed(0)
    try:
        if dtype.is_floating_point or dtype.is_complex:
            return name, torch.randn(shape, generator=random, device="cpu").to(dtype)
        return name, torch.randint(most, shape, generator=random, device="cpu").to(dtype)
    except RuntimeError as error:  # torch has types without numbers of them
        raise CommandError(f"--input {given}: {INPUT}; got {error}.") from error


def batches(data: str, inputs: Any, *, samples: int, size: int, scale: float | None, key: str | None) -> list[Any]:
    """Batches of inputs, without labels.

    Args:
        data: a file of samples (.npy, .npz, .pt, .pth, .safetensors), the first axis over samples; or `module:name` of a
            data loader, a data set, an iterable of batches, or a function that returns one.
        inputs: example inputs: how many tensors a batch has, and their types.
        samples: most that are taken.
        size: of a batch.
        scale: by which numbers of a file are multiplied.
        key: of the samples in a file with several arrays.

    Raises:
        CommandError: if nothing there fits the inputs.
    """
    if ":" in data and not Path(data).exists():
        return list(_of_object(data, inputs, samples, size))
    example = _first(inputs)
    found = _scaled(_of_file(Path(data), key, example), example, scale, data)
    if found.shape[1:] != example.shape[1:]:
        raise CommandError(
            f"--data {data}: expected samples of shape {list(example.shape[1:])} as the example input has, got "
            f"{list(found.shape[1:])}."
        )
    return list(found[:samples].split(size))


def _first(inputs: Any) -> Tensor:
    leaves = [leaf for leaf in tree_flatten(inputs)[0] if isinstance(leaf, Tensor)]
    if len(leaves) != 1:
        raise CommandError(
            f"--data: expected a network with one input for samples from a file, got one with {len(leaves)}. Give module:name "
            "of something that yields batches."
        )
    return leaves[0]


def _of_file(path: Path, key: str | None, example: Tensor | None) -> Tensor:
    if not path.is_file():
        raise CommandError(f"--data {path}: expected a file, or module:name, got no such file.")
    if path.suffix in (".npy", ".npz"):
        import numpy as np

        try:
            found: Any = np.load(path, allow_pickle=False)
            found = dict(found) if path.suffix == ".npz" else found
        except Exception as error:
            raise CommandError(
                f"--data {path}: expected arrays of numbers, got {type(error).__name__}: {error}."
            ) from error
    else:
        found = read(path)
    if isinstance(found, dict):
        names = [key] if key else [name for name in (*KEYS, *found) if name in found]
        shape = None if example is None else tuple(example.shape[1:])
        fitting = (name for name in names if name in found and shape in (None, tuple(found[name].shape[1:])))
        name = next(fitting, names[0] if names else None)
        if name not in found:
            raise CommandError(f"--data {path}: expected an array {key!r}, got {', '.join(map(str, found)) or 'none'}.")
        found = found[name]
    return torch.as_tensor(found, device="cpu")


def _scaled(found: Tensor, example: Tensor, scale: float | None, data: str) -> Tensor:
    if example.is_floating_point() and not found.is_floating_point() and scale is None:
        raise CommandError(
            f"--data {data}: expected {example.dtype} as the network takes, got {found.dtype}, {int(found.min())} … "
            f"{int(found.max())}. Say what to multiply by: --scale {1 / 255:.5f} for bytes of images that were trained on as "
            "0 … 1, --scale 1 for numbers as they are."
        )
    return found.to(example.dtype) * (1 if scale is None else scale)


def _of_object(name: str, inputs: Any, samples: int, size: int) -> Iterator[Any]:
    found: Any = find(name)
    found = found() if callable(found) and not isinstance(found, Iterable) else found
    if hasattr(found, "__getitem__") and hasattr(found, "__len__") and not isinstance(found, (list, tuple)):
        from torch.utils.data import DataLoader

        found = DataLoader(found, batch_size=size)
    if not isinstance(found, Iterable):
        raise CommandError(f"--data {name}: expected batches or a data set, got a {type(found).__name__}.")
    taken = 0
    for batch in found:
        if taken >= samples:
            return
        own = _without_labels(batch, inputs)
        leaf = next((leaf for leaf in tree_flatten(own)[0] if isinstance(leaf, Tensor)), None)
        taken += size if leaf is None else len(leaf)
        yield own


def _without_labels(batch: Any, inputs: Any) -> Any:
    """As many entries of a batch as the network has arguments: labels come last."""
    if isinstance(inputs, dict) and isinstance(batch, dict):
        return {name: value for name, value in batch.items() if name in inputs}
    if not isinstance(batch, (list, tuple)) or isinstance(inputs, dict):
        return batch
    count = len(inputs) if isinstance(inputs, (list, tuple)) else 1
    own = tuple(itertools.islice(batch, count))
    return own if isinstance(inputs, (list, tuple)) else own[0]

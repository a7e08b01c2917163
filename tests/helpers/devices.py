"""The devices that the tests of `tests/devices` run on, with what a test must know of each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from tests.helpers.cases import Case

SAMPLES = 48
"""In a batch: the cases' own two are too few to fit on, and rounding alone would decide what is best."""


@dataclass(frozen=True)
class Device:
    """A device.

    Args:
        name: as in the test's id.
        place: where tensors go.
        dtype: the widest type of real numbers there.
        tolerance: by how much of its norm a result may differ from one that is equal but for rounding.
        exact: whether results are those of the CPU, and those of a second run, to the last bit.
    """

    name: str
    place: torch.device
    dtype: torch.dtype
    tolerance: float
    exact: bool = True

    def move(self, tree: Any) -> Any:
        """Tensors in any nesting, on the device and in its widest type."""

        def moved(tensor: Tensor) -> Tensor:
            return (tensor.to(self.dtype) if tensor.is_floating_point() else tensor).to(self.place)

        return tree_map_only(Tensor, moved, tree)

    def model(self, case: Case, seed: int = 0) -> nn.Module:
        """The case's model there."""
        model = case.model(seed).to(self.dtype)
        before = [dict(module.named_parameters(recurse=False)) for module in model.modules()]
        model.to(self.place)
        # On an accelerator beside torch's own a module's tensors become other objects, and tied ones come apart.
        moved: dict[int, nn.Parameter] = {}
        for module, own in zip(model.modules(), before, strict=True):
            for name, parameter in own.items():
                setattr(module, name, moved.setdefault(id(parameter), getattr(module, name)))
        return model

    def inputs(self, case: Case, seed: int = 1) -> Any:
        """The case's example inputs there."""
        return self.move(case.inputs(seed))

    def batches(self, case: Case) -> list[Any]:
        """Two batches of `SAMPLES` samples each, there."""
        large = replace(case, shapes=_with_samples(case.shapes))
        return [self.move(large.inputs(seed)) for seed in (1, 2)]

    def random_state(self) -> Tensor:
        """The state of the device's own generator."""
        return (torch if self.place.type == "cpu" else torch.get_device_module(self.place.type)).get_rng_state()

    def trainer(self) -> dict[str, Any]:
        """Options of a Lightning trainer that trains there."""
        if self.place.type != "pretend":
            return {"accelerator": "gpu" if self.place.type == "cuda" else "cpu", "devices": 1}
        from tests.helpers import pretend_device

        return {"accelerator": "auto", "strategy": pretend_device.strategy()}


@contextmanager
def device_named(name: str) -> Iterator[Device]:
    """A device by its name.

    Args:
        name: "cpu"; "cuda"; "pretend", the pretend accelerator; "pretend_mps", the same without float64, as MPS is.
    """
    if name == "cpu":
        yield Device(name, torch.device("cpu"), torch.float64, 1e-9)
    elif name == "cuda":
        yield Device(name, torch.device("cuda", 0), torch.float64, 1e-8, exact=False)
    else:
        # Imported here: where there is a GPU it is not to be registered.
        from tests.helpers import pretend_device

        without = name == "pretend_mps"
        pretend_device.float64(not without)
        pretend_device.in_use(True)
        try:
            dtype, tolerance = (torch.float32, 1e-4) if without else (torch.float64, 1e-9)
            yield Device(name, torch.device("pretend", 0), dtype, tolerance)
        finally:
            pretend_device.in_use(False)
            pretend_device.float64(True)


def _with_samples(shapes: Any) -> Any:
    """Shapes of inputs, each with `SAMPLES` on the first axis."""
    if isinstance(shapes, dict):
        return {name: (SAMPLES, *shape[1:]) for name, shape in shapes.items()}
    if isinstance(shapes[0], tuple):
        return tuple((SAMPLES, *shape[1:]) for shape in shapes)
    return (SAMPLES, *shapes[1:])

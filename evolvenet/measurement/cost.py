"""What widths cost: parameters, bytes, and multiply-accumulates of a forward pass."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from evolvenet._compat.torch import tree_flatten, tree_map_only, without_module_tracker
from evolvenet.errors import TraceError
from evolvenet.execution.isolation import isolated, op_by_op
from evolvenet.execution.step import run_model
from evolvenet.execution.weight_ops import WeightOp, WeightOpMode
from evolvenet.graph.index_map import IndexMap
from evolvenet.graph.naming import named_tensors
from evolvenet.graph.width_graph import WidthGraph
from evolvenet.surgery.resize_model import compile_surgery, install


def parameters(model: nn.Module) -> int:
    """Number of parameters, tied ones counted once.

    >>> parameters(nn.Linear(4, 3))
    15
    """
    return sum(parameter.numel() for parameter in model.parameters())


def size_in_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers in their own dtypes, tied ones counted once.

    >>> size_in_bytes(nn.Linear(4, 3).half())
    30
    """
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


def macs(model: nn.Module, example_inputs: Any, gradients: bool = False) -> int:
    """Multiply-accumulates of the matrix products and convolutions in one eval forward pass, per sample.

    Counted by torch's `FlopCounterMode` (which counts two operations each) on shadows without data, where the model's
    code allows that. The number of samples is the first axis of the first tensor among the inputs.

    Args:
        model: any module; it is left as it was.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments.
        gradients: whether the model runs with autograd on, see `WidthGraph.differentiates`; products in the backward passes
            that its own code runs count, too.

    Raises:
        TraceError: if the model does not run on the example inputs.

    >>> import torch
    >>> macs(nn.Linear(4, 3), torch.zeros(2, 4))
    12
    """
    first = next((leaf for leaf in tree_flatten(example_inputs)[0] if isinstance(leaf, Tensor) and leaf.dim()), None)
    samples = first.shape[0] if first is not None else 1
    failure: Exception | None = None
    for device in ("meta", None):
        counter = without_module_tracker(FlopCounterMode(display=False))
        try:
            with isolated(model, shadows=True, device=device, gradients=gradients), op_by_op(counter):
                run_model(model, tree_map_only(Tensor, lambda t: t.detach().clone(), example_inputs), device)
        except Exception as error:  # noqa: BLE001  the model's own code may raise anything
            failure = error
            continue
        return counter.get_total_flops() // 2 // samples
    raise TraceError(f"The model does not run on the example inputs: {type(failure).__name__}: {failure}.") from failure


@dataclass(frozen=True)
class Costs:
    """The cost of a network with other widths, without building it.

    Args:
        graph: the widths as they are.
        uses: {weight: multiplications of each of its entries for one sample}.
        sizes: {tensor: bytes an entry}, of parameters and buffers.
        rest: {kind: constant part}: multiply-accumulates without a weight, bytes of tensors without a width (counters), at
            the present widths.
        timed: {width: size} → seconds of a forward pass, measured.
    """

    graph: WidthGraph
    uses: Mapping[str, float]
    sizes: Mapping[str, int]
    rest: Mapping[str, float]
    timed: Callable[[Mapping[str, int]], float]

    @classmethod
    def of(cls, model: nn.Module, graph: WidthGraph, example_inputs: Any) -> Costs:
        """Measure a model.

        Args:
            model: is left as it was.
            graph: its widths.
            example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments.
        """
        tensors, _, _ = named_tensors(model)
        sizes = {name: tensors[name].element_size() for name in graph.shapes}
        own = graph.differentiates
        bare = cls(graph, uses(model, example_inputs, own), sizes, {}, partial(_timed, model, graph, example_inputs))
        now = {"macs": macs(model, example_inputs, own), "bytes": size_in_bytes(model)}
        return replace(bare, rest={kind: count - bare.at(kind, {}) for kind, count in now.items()})

    def at(self, kind: str, sizes: Mapping[str, int]) -> float:
        """Parameters ("params"), multiply-accumulates of weights a sample ("macs"), "bytes", or seconds ("latency").

        Args:
            kind: of cost.
            sizes: {width: size}; the others stay as they are.
        """
        if kind == "params":
            return self.graph.proposed_parameters(sizes)
        if kind == "macs":
            entries = self.graph.proposed_entries(sizes, self.uses)
            return self.rest.get(kind, 0) + sum(count * self.uses[name] for name, count in entries.items())
        if kind == "bytes":
            entries = self.graph.proposed_entries(sizes)
            return self.rest.get(kind, 0) + sum(count * self.sizes[name] for name, count in entries.items())
        assert kind == "latency"
        return self.timed(sizes)


def uses(model: nn.Module, example_inputs: Any, gradients: bool = False) -> dict[str, float]:
    """{weight: multiplications of each of its entries for one sample}, in dense products and convolutions.

    Products without a weight (of queries with keys) are not counted. With `gradients` the model runs with autograd on.

    >>> import torch
    >>> uses(nn.Conv2d(1, 2, 3), torch.zeros(2, 1, 5, 5))
    {'weight': 9.0}
    """
    first = next((leaf for leaf in tree_flatten(example_inputs)[0] if isinstance(leaf, Tensor) and leaf.dim()), None)
    samples = first.shape[0] if first is not None else 1
    found: dict[str, float] = {}

    def count(op: WeightOp) -> None:
        part = op.weight.numel() / tensors[op.tensor].numel()
        found[op.tensor] = found.get(op.tensor, 0.0) + part * op.uses_per_entry / samples

    tensors, _, _ = named_tensors(model)
    with isolated(model, shadows=True, gradients=gradients), op_by_op(WeightOpMode(model, before=count)):
        run_model(model, example_inputs)
    return found


def _timed(model: nn.Module, graph: WidthGraph, example_inputs: Any, sizes: Mapping[str, int]) -> float:
    """Seconds of a forward pass at some widths: the least of several, on a copy of the model."""
    maps = {}
    for name, size in sizes.items():
        width = graph.widths[name]
        if size != width.size:
            few, many = IndexMap.keep(range(min(size, width.size)), width.size), max(0, size - width.size)
            maps[width.name] = IndexMap.grow(width.size, many) if many else few
    trial = copy.deepcopy(model).eval()
    install(trial, compile_surgery(trial, graph, maps))
    return latency(trial, example_inputs, graph.differentiates)


def latency(model: nn.Module, example_inputs: Any, gradients: bool = False) -> float:
    """Seconds of an eval forward pass, the least of `TIMINGS` and more within `SPAN`, measured on this machine as it is.

    >>> latency(nn.Linear(4, 3), torch.zeros(2, 4)) > 0
    True
    """
    best, runs, started = math.inf, 0, time.perf_counter()
    with isolated(model, gradients=gradients):
        while runs < TIMINGS or time.perf_counter() - started < SPAN:
            best, runs = min(best, seconds(lambda: run_model(model, example_inputs))), runs + 1
    return best


def seconds(run: Callable[[], object]) -> float:
    """Wall-clock seconds of one call, with what it has started on a GPU.

    >>> seconds(lambda: None) >= 0
    True
    """
    started = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


SPAN = 0.2
"""Seconds of timing: a burst of other work is shorter, mostly."""

TIMINGS = 12
"""Forward passes of which the fastest counts: other load on the machine only makes one slower."""

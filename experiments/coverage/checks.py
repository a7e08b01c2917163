"""What `experiments.coverage.run` does to one model: trace, permute, grow, prune, and the same cut by Torch-Pruning.

The results of each stage are written before the next one begins, so they are kept if the model runs into the time limit.
"""

from __future__ import annotations

import importlib
import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import evolvenet
from evolvenet._compat.torch import TorchDispatchMode, tree_leaves
from evolvenet.execution.inputs import arguments
from evolvenet.graph.coverage import OUTPUT
from experiments.coverage.subjects import Subject

LARGEST_DOUBLE = 100_000_000
"""Models with more parameters than this are compared in float32: in float64 they do not fit beside their copies."""

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Largest relative difference of the output that counts as equal, by the coarsest type that the model computes in."""

SHARE_LEFT, GROWTH, BATCH = 0.7, 1.25, 2
INPUT_REASONS = ("reads data of a fixed size", "looks its rows up by data", "counts positions of a kernel")

Note = Callable[[str, Mapping[str, Any]], None]
"""Writes the results of a stage: (stage, its figures)."""


@dataclass
class ModelUnderTest:
    """One model, as the stages change it."""

    subject: Subject
    dtype: torch.dtype
    model: nn.Module
    graphs: list[evolvenet.WidthGraph] = field(default_factory=list)

    @property
    def original(self) -> evolvenet.WidthGraph:
        """The graph of the model as it was built."""
        return self.graphs[0]

    @property
    def graph(self) -> evolvenet.WidthGraph:
        """The graph of the model as it is now."""
        return self.graphs[-1]


def check_ours(subject: Subject, note: Note) -> torch.dtype:
    """All stages for EvolveNet, and the type in which they computed; of a stage that raises, the error is its result."""
    model = build(subject, torch.float32)
    count = sum(parameter.numel() for parameter in model.parameters())
    dtype = torch.float64 if count <= LARGEST_DOUBLE and _computes_in_double(subject) else torch.float32
    tested = ModelUnderTest(subject, dtype, cast(model, dtype))
    note("model", {"parameters": count, "dtype": str(dtype).removeprefix("torch.")})
    for stage in (trace, permute, grow, prune):
        attempt(stage.__name__, partial(stage, tested), note)
        if not tested.graphs:
            break
    return dtype


def check_torch_pruning(subject: Subject, note: Note) -> None:
    """One 30 % cut by Torch-Pruning without hints, the last layer kept; then forward and backward in train mode."""
    model = build(subject, torch.float32)
    attempt("cut", partial(_cut, subject, model), note)


def attempt(name: str, stage: Callable[[], Mapping[str, Any]], note: Note) -> None:
    """Run a stage, and note its figures and seconds, or what it raised."""
    note(name, {"began": True})
    begin = time.perf_counter()
    try:
        found = {"ok": True, **stage()}
    except Exception as error:  # noqa: BLE001  whatever a model or a library raises is a result of this table
        found = {"ok": False, "error": f"{type(error).__name__}: {_first_line(error)}"}
    note(name, {"seconds": round(time.perf_counter() - begin, 2), **found})


def build(subject: Subject, dtype: torch.dtype) -> nn.Module:
    """The subject's model, `randomised`."""
    return randomised(subject.make, dtype)


def randomised(make: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    """A model with random weights that no error can hide behind: norms as after some training, no scale or head at zero."""
    torch.manual_seed(0)
    model = cast(make(), dtype).eval()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if not tensor.is_floating_point():
                continue
            if name.endswith("running_var"):
                tensor.mul_(torch.empty_like(tensor).uniform_(0.8, 1.2))
            elif sum(size > 1 for size in tensor.shape) <= 1 and not name.endswith("num_batches_tracked"):
                tensor.add_(torch.empty_like(tensor).uniform_(-0.1, 0.1))
            elif isinstance(tensor, nn.Parameter) and not tensor.any():
                tensor.normal_(std=tensor[0].numel() ** -0.5)
    return model


def _computes_in_double(subject: Subject) -> bool:
    """Whether a model of the transformers library runs in float64; grouped products of experts do not."""
    if subject.family is None:
        return True
    try:
        outputs_of(build(subject, torch.float64), subject.inputs(1, torch.float64))
    except RuntimeError:
        return False
    return True


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model with real weights of this type; `nn.Module.to` would take the imaginary parts from complex ones."""
    return model.double() if dtype == torch.float64 else model.float()


def trace(tested: ModelUnderTest) -> dict[str, Any]:
    """Trace and verify: the share of parameters in resizable widths, and why the other widths are frozen."""
    inputs = tested.subject.inputs(1, tested.dtype)
    begin = time.process_time()
    graph = evolvenet.trace(tested.model, inputs)
    seconds = time.process_time() - begin
    if not graph.resizable:
        raise RuntimeError(f"no width can be resized; {len(graph.widths)} are frozen: {_reasons(tested, graph)[:1]}")
    tested.graphs.append(graph)
    return {
        "widths": len(graph.widths),
        "resizable": len(graph.resizable),
        "coverage": graph.coverage,
        "frozen": _reasons(tested, graph),
        "trace_seconds": round(seconds, 2),
    }


def _reasons(tested: ModelUnderTest, graph: evolvenet.WidthGraph) -> list[tuple[str, int, int]]:
    """(reason, number of widths, their parameters), the weightiest first, without the model's outputs and inputs."""
    sizes = {size for shape in tested.subject.shapes for size in shape} | set(tested.subject.tokens)
    found: dict[str, list[int]] = defaultdict(list)
    for width in graph.widths.values():
        reason = width.frozen
        is_input = reason is not None and width.size in sizes and any(text in reason for text in INPUT_REASONS)
        if reason is not None and reason != OUTPUT and not is_input:
            found[reason].append(width.parameters)
    rows = [(reason, len(counts), sum(counts)) for reason, counts in found.items()]
    return sorted(rows, key=lambda row: -row[2])


def permute(tested: ModelUnderTest) -> dict[str, Any]:
    """Permute the units of all widths at once, which must not change the output."""
    graph = tested.graph
    maps = {}
    for width in graph.resizable:
        maps[width.name] = evolvenet.IndexMap.of(torch.randperm(width.size).tolist(), width.size)

    def change() -> None:
        tested.graphs.append(evolvenet.resize(tested.model, graph, maps))

    return _compared(tested, change)


def grow(tested: ModelUnderTest) -> dict[str, Any]:
    """Grow every width that keeps the function by 25 % or a little more, then remove the new units: the output stays."""
    graph = tested.graph
    widths = [width for width in graph.resizable if width.mixed is None]
    # By unequal amounts: what is right by the difference or the ratio of two widths alone is found.
    sizes = {width.name: grown_size(width) + number % 3 * width.multiple for number, width in enumerate(widths)}
    left_out = len(graph.resizable) - len(sizes)
    if not sizes:
        return {"grown": 0, "left_out": left_out, "equal": True}

    def change() -> None:
        tested.graphs.append(evolvenet.grow(tested.model, graph, sizes))

    figures = _compared(tested, change)
    grown = {"grown": len(sizes), "left_out": left_out, "parameters": tested.graph.parameters}
    maps = {w.name: evolvenet.IndexMap.keep(range(w.size), sizes[w.name]) for w in widths}

    def change_back() -> None:
        tested.graphs.append(evolvenet.resize(tested.model, tested.graph, maps))

    back = _compared(tested, change_back)
    worst = max(figures, back, key=lambda each: each["difference"])
    return {**worst, "equal": figures["equal"] and back["equal"], **grown}


def grown_size(width: evolvenet.Width) -> int:
    """25 % more, rounded up to a size that it can have."""
    return -(-math.ceil(GROWTH * width.size) // width.multiple) * width.multiple


def pruned_size(width: evolvenet.Width) -> int:
    """30 % less, rounded to a size that it can have, never below the fewest units."""
    return min(width.size, width.rounded(round(SHARE_LEFT * width.size)))


def _compared(tested: ModelUnderTest, change: Callable[[], None]) -> dict[str, Any]:
    torch.manual_seed(1)
    inputs = tested.subject.inputs(BATCH, tested.dtype)
    with Coarsest(tested.dtype) as coarsest:
        before = outputs_of(tested.model.eval(), inputs)
    if all(torch.equal(leaf[0], leaf[1]) for leaf in before):
        raise RuntimeError("the output does not depend on the input, so it shows nothing")
    change()
    difference = distance(outputs_of(tested.model, inputs), before)
    equal = difference <= TOLERANCE[coarsest.dtype]
    return {"difference": difference, "equal": equal, "computes_in": str(coarsest.dtype).removeprefix("torch.")}


class Coarsest(TorchDispatchMode):
    """Finds the coarsest type that a model computes in: some norms compute in float32 for any input."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the op and note the type of its results."""
        out = func(*args, **(kwargs or {}))
        if any(leaf.dtype == torch.float32 for leaf in _tensors(out)):
            self.dtype = torch.float32
        return out


def prune(tested: ModelUnderTest) -> dict[str, Any]:
    """Prune every width of a fresh copy by 30 %, then run it in both modes, and backward."""
    graph = tested.original
    tested.model = build(tested.subject, tested.dtype)
    sizes = {width.name: pruned_size(width) for width in graph.resizable}
    after = evolvenet.prune(tested.model, graph, sizes)
    return {
        "parameters": after.parameters,
        "sizes_changed": len(sizes),
        **runs(tested.model, lambda: tested.subject.inputs(BATCH, tested.dtype)),
    }


def runs(model: nn.Module, make_inputs: Callable[[], Any]) -> dict[str, str]:
    """Forward in eval mode, in train mode, and backward: for each "yes" or what it raised."""
    inputs = make_inputs()
    loss: list[Tensor] = []

    def train() -> None:
        args, kwargs = arguments(inputs)
        floats = [leaf for leaf in _tensors(model.train()(*args, **kwargs)) if leaf.requires_grad]
        loss.append(torch.stack([leaf.square().mean() for leaf in floats]).sum())

    return {
        "eval": _outcome(lambda: outputs_of(model.eval(), inputs)),
        "train": _outcome(train),
        "backward": _outcome(lambda: loss[0].backward()) if loss else "not reached",
    }


def _outcome(action: Callable[[], object]) -> str:
    try:
        action()
    except Exception as error:  # noqa: BLE001  as above: a result of this table
        return f"{type(error).__name__}: {_first_line(error)}"
    return "yes"


def _cut(subject: Subject, model: nn.Module) -> dict[str, Any]:
    pruning: Any = importlib.import_module("torch_pruning")
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    layers = layers or [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    pruner = pruning.pruner.MagnitudePruner(
        model,
        subject.inputs(1, torch.float32),
        importance=pruning.importance.MagnitudeImportance(p=2),
        pruning_ratio=1 - SHARE_LEFT,
        ignored_layers=layers[-1:],
    )
    pruner.step()
    count = sum(parameter.numel() for parameter in model.parameters())
    return {"parameters": count, **runs(model, lambda: subject.inputs(BATCH, torch.float32))}


def outputs_of(model: nn.Module, inputs: Any) -> list[Tensor]:
    """Every tensor of the model's output, computed without gradients."""
    args, kwargs = arguments(inputs)
    with torch.no_grad():
        return [output.detach() for output in _tensors(model(*args, **kwargs))]


def _tensors(result: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


def distance(one: list[Tensor], two: list[Tensor]) -> float:
    """Largest relative difference between two outputs; infinite where they are not finite.

    Raises:
        ValueError: if the outputs' shapes differ.
    """
    if [a.shape for a in one] != [b.shape for b in two]:
        raise ValueError(f"the output's shape changed from {[b.shape for b in two]} to {[a.shape for a in one]}")
    found = [float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in zip(one, two, strict=True)]
    return max(value if math.isfinite(value) else math.inf for value in found)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no message"

"""`save` and `load`: a model's weights with its widths, out into a file and in again."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from evolvenet._compat.names_in_files import by_names_of_model
from evolvenet._compat.torch import state_dict_metadata
from evolvenet.errors import OutputNameError, RecordError, TraceError
from evolvenet.execution.chosen_outputs import Outputs
from evolvenet.execution.dummy_inputs import dummy_inputs
from evolvenet.graph.block_kinds import ATTENTION
from evolvenet.graph.plain_data import reading
from evolvenet.graph.sizes import sizes_from_shapes
from evolvenet.graph.width_graph import WidthGraph
from evolvenet.signals import deferred_signals
from evolvenet.surgery.checkpoint import find_record, load_state
from evolvenet.surgery.checkpoint_file import read, state_in, write
from evolvenet.surgery.module_handlers import attributes, shape_sources
from evolvenet.surgery.numbers import attribute_of
from evolvenet.surgery.resize_model import scaled_numbers
from evolvenet.surgery.state_parts import fit_file_replacements, own_names, own_part, tied_to
from evolvenet.surgery.width_record import RECORD_KEY, WidthRecord, record_of, remember, shapes_of
from evolvenet.tracing.findings import Findings
from evolvenet.tracing.trace import trace, trace_with_findings

log = logging.getLogger("evolvenet")

MAIN_OUTPUTS = (
    ("logits",),
    ("start_logits", "end_logits"),
    ("logits_per_image", "logits_per_text"),
    ("last_hidden_state",),
)
"""Outputs of a model of the transformers library for which it is used; the first that it has count."""


def save(model: nn.Module, path: str | Path, example_inputs: Any = None, outputs: Outputs | None = None) -> None:
    """Write a model's weights and its widths to a file.

    `load` builds the widths from it, and so does `load_from_checkpoint` from a `.ckpt`. Where all widths are already there,
    `load_state_dict` loads the state dict in it without EvolveNet. Optimizers are not saved: a run's own checkpoints are for
    that.

    Args:
        model: a network or a LightningModule, whose widths EvolveNet has changed, or not.
        path: its ending decides what is written: `.pt` and `.pth` a state dict; `.ckpt` a checkpoint like Lightning's, with
            a LightningModule's hyperparameters; `.safetensors` tensors without pickle, a tied one once.
        example_inputs: as `trace` takes them, for a model whose widths are not known in this process: one that was copied or
            unpickled. The file has no record of its widths otherwise.
        outputs: as for `trace`, with example inputs.

    Raises:
        RecordError: for another ending, or for what such a file cannot hold.
        MissingPackageError: if safetensors is needed and not installed.

    >>> import torch, evolvenet
    >>> from tempfile import TemporaryDirectory
    >>> build = lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> graph = evolvenet.prune(model := build(), evolvenet.trace(model, torch.zeros(1, 4)), {"0": 3})
    >>> with TemporaryDirectory() as folder:
    ...     save(model, f"{folder}/narrow.pt")
    ...     load(build(), f"{folder}/narrow.pt")[0]
    Linear(in_features=4, out_features=3, bias=True)
    """
    write(Path(path), model, state_with_record(model, example_inputs, outputs))


def state_with_record(
    model: nn.Module, example_inputs: Any = None, outputs: Outputs | None = None
) -> Mapping[str, Any]:
    """A model's state dict, with the record of its widths in its metadata if they are known.

    Args:
        model: any module.
        example_inputs: to trace it on if they are not; None to leave them unknown.
        outputs: as for `trace`.
    """
    state: Any = model.state_dict()
    record = record_of(model)
    # Modules may have been exchanged since (adapters merged into their layers): the record is of other names then.
    if record is not None and record.graph is not None and not set(record.graph.shapes) <= set(shapes_of(model)):
        record = None
    if record is None and example_inputs is not None:
        record = WidthRecord.of(model, trace(model, example_inputs, outputs))
        remember(model, record)
    own = state_dict_metadata(state).get("")
    if record is not None and own is not None:
        own.setdefault(RECORD_KEY, record.state_dict(model))
    return state


@deferred_signals("the load")
def load(
    model: nn.Module,
    path: str | Path,
    map_location: Any = "cpu",
    example_inputs: Any = None,
    outputs: Outputs | None = None,
    mmap: bool = False,
    heads: bool | None = None,
) -> nn.Module:
    """Reshape a freshly built model to a checkpoint's widths and load its weights, all or nothing.

    Layers that are factorized in the file are factorized here first. Otherwise only widths may differ between model and file.
    A file of a run, or of `save`, has a record of what is a width. In a bare state dict, an axis may differ where an earlier
    layer produces and a later one consumes that number of units; the number of classes or inputs may not. What cannot be
    told so is refused, unless `example_inputs` are given; so is a file of other widths where code that the forward pass
    runs uses numbers that may follow them, such as the size of attention heads.

    Args:
        model: the model as it is built, with any widths.
        path: a Lightning checkpoint; a state dict saved with `torch.save`, or a dict that holds one; a `.safetensors` file;
            or a folder of `save_pretrained`. A network inside a LightningModule is found under any name that it has there.
        map_location: as in `torch.load`.
        example_inputs: as `trace` takes them. With them, the model is traced to know its widths if the file has no record.
            The model's own numbers (`num_heads`) then follow, but not buffers that are not persistent. For models of the
            transformers library they are made up.
        outputs: as for `trace`, where the model is traced: those with which the widths of the file were changed. By default
            all, and for models of the transformers library those of the main head, see `MAIN_OUTPUTS`.
        mmap: whether the model's tensors on the CPU become parts of the mapped file, as in `torch.load`: nothing is copied,
            and what is not used is not read. Training on changes the memory, not the file; the file must not be
            written to while the model is in use (`save` writes another one in its place). A model that was built on the device
            "meta" then has no memory of its own.
        heads: as for `trace`, where the model is traced: what it was when the widths were changed. Half of the heads have the
            shapes of heads of half the size. By default what `trace` takes by default if it can have the shapes of the file,
            else whole heads of the model's size, else smaller heads; with a warning where that is not the only reading.

    Returns:
        The same model.

    Raises:
        RecordError: if the checkpoint is of another model (other classes, inputs, depth, layers, number types) or cannot be
            read; the message names what differs, and nothing has changed.
        FileNotFoundError: if there is no such file.

    >>> import torch
    >>> from tempfile import TemporaryDirectory
    >>> build = lambda width: nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2))
    >>> with TemporaryDirectory() as folder:
    ...     torch.save(build(3).state_dict(), f"{folder}/weights.pt")
    ...     load(build(8), f"{folder}/weights.pt")[0]
    Linear(in_features=4, out_features=3, bias=True)
    """
    path = Path(path)
    found = read(path, map_location, mmap)
    whole = _by_own_names(model, state_in(found, str(path)), path)
    undo = fit_file_replacements(model, whole, found, str(path))
    try:
        state, prefix = own_part(model, whole, str(path))
        # Only what the file holds is the file's fault: errors of the model's own code stay what they are.
        with reading(str(path)):
            record = find_record(found, prefix)
            known = WidthRecord.from_state_dict(record) if record is not None and "graph" in record else None
        graph = _traced(model, state, example_inputs, outputs, heads, path) if known is None else None
        load_state(model, state, record, graph, str(path), mmap)
    except BaseException as error:
        undo()
        if isinstance(error, RecordError) and path.is_dir() and hasattr(model, "main_input_name"):
            raise RecordError(
                f"{error} The transformers library may name tensors in its folders otherwise than the model does: "
                "evolvenet.transformers.from_pretrained(folder) loads those too."
            ) from error
        raise
    if known is None and graph is not None:
        known = WidthRecord.of(model, graph)
    if known is not None:
        remember(model, known)
    return model


def _by_own_names(model: nn.Module, state: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """The entries of a file; those that the transformers library names or divides otherwise than the model as the model has them.

    Raises:
        RecordError: if they cannot be put together.
    """
    if own_names(model) <= set(state) | tied_to(model, set(state)):
        return state
    try:
        renamed = by_names_of_model(model, state)
    except Exception as error:
        raise RecordError(
            f"{path}: expected tensors that the transformers library can rename or put together to those of a "
            f"{type(model).__name__}, got {type(error).__name__}: {error}"
        ) from error
    return state if renamed is None or not own_names(model) & set(renamed) else renamed


def _traced(
    model: nn.Module,
    state: Mapping[str, Any],
    example_inputs: Any,
    outputs: Outputs | None,
    heads: bool | None,
    path: Path,
) -> WidthGraph | None:
    """The widths of a model where no record tells them and there are inputs to trace it on: given ones, or made-up ones.

    Raises:
        RecordError: if a buffer's values are not known, or the model does not run on made-up inputs.
        TraceError: if it does not run on the given ones.
    """
    inputs = example_inputs
    if inputs is None and any(
        isinstance(there := state.get(name), Tensor) and there.shape != own.shape for name, own in _tensors(model)
    ):
        inputs = dummy_inputs(model)
    if inputs is None:
        return None
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items() if isinstance(tensor, Tensor)}
    try:
        graph = graph_of_shapes(model, inputs, outputs, shapes, heads)
    except TraceError as error:
        if example_inputs is not None:
            raise
        raise RecordError(
            f"{path} has no record of its widths, and other ones than this model, which could not be traced: {error} Call "
            "evolvenet.load(model, path, example_inputs=...), or save the file with evolvenet.save."
        ) from error
    refuse_unsaved_buffers(model, graph, state, path)
    return graph


def graph_of_shapes(
    model: nn.Module,
    inputs: Any,
    outputs: Outputs | None,
    shapes: Mapping[str, tuple[int, ...]],
    heads: bool | None = None,
) -> WidthGraph:
    """The widths that can have the shapes of a file, for files without a record.

    The widths by default if they can, else those with whole heads, else those with places of all heads; the default ones where
    none can. Half of the heads have the shapes of heads of half the size: where other widths than those that are returned have
    these shapes too, and the model's own numbers (`num_heads`) would be others with them, a warning says so.

    Args:
        model: as it is built.
        inputs: as for `trace`.
        outputs: as for `trace`; None for those of `trace_main_outputs`.
        shapes: {tensor name: shape} in the file.
        heads: as for `trace`; None for whatever can have the shapes.

    Raises:
        TraceError: as `trace`.
    """

    def fits(graph: WidthGraph) -> bool:
        return not sizes_from_shapes(graph, shapes)[1]

    if outputs is None:
        first, found = trace_main_outputs(model, inputs, heads)
    else:
        first, found = trace_with_findings(model, inputs, outputs, heads=heads)
    if heads is not None or (fits(first) and not _reaches_heads(first, shapes)):
        return first
    graphs: list[tuple[bool | None, WidthGraph]] = [(None, first)] if fits(first) else []
    for each in (True, False):
        try:
            graph, found = trace_with_findings(model, inputs, first.outputs, heads=each, known=found)
        except TraceError as error:
            # The widths by default may fit all the same.
            log.debug("trace(heads=%s) of a file's model", each, exc_info=error)
            continue
        graphs += [(each, graph)] if fits(graph) else []
    if not graphs:
        return first
    _warn_of_others(model, graphs, shapes)
    return graphs[0][1]


def _warn_of_others(
    model: nn.Module, graphs: Sequence[tuple[bool | None, WidthGraph]], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Say so if numbers of the model's own depend on which of several graphs, all of which fit, the file is read by."""
    (by, best), *others = graphs
    found = _own_numbers(model, best, shapes)
    for each, graph in others:
        differ = found.items() ^ _own_numbers(model, graph, shapes).items()
        if differ:
            path, name = min(differ)[0]
            log.warning(
                "The shapes in the file are those of whole heads that are gone, and those of smaller heads as well: %s of %s is "
                "%s with trace(heads=%s), as is assumed, another number with heads=%s. Give load(heads=...) what the model was "
                "traced with before it was cut, or write the file with evolvenet.save, which says it.",
                name, path or "the model", found.get((path, name), "as built"), by, each,
            )  # fmt: skip
            break


def _own_numbers(
    model: nn.Module, graph: WidthGraph, shapes: Mapping[str, tuple[int, ...]]
) -> dict[tuple[str, str], int]:
    """{(module path, name): value in the file} of the numbers that the shapes of the module's own tensors do not say."""
    found: dict[tuple[str, str], int] = {}
    for path, name, value in scaled_numbers(model, graph, shapes):
        module = model.get_submodule(path)
        own = {key: tuple(tensor.shape) for key, tensor in shape_sources(module).items()}
        if not own or attribute_of(name) not in attributes(module, own):
            found[path, name] = value
    return found


def _reaches_heads(graph: WidthGraph, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a width has changed that belongs to an attention, or whose units have several places on one axis (in each head)."""
    sizes, _ = sizes_from_shapes(graph, shapes)
    changed = [width for width in graph.widths.values() if sizes[width.name] != width.size]
    axes = [Counter((tie.tensor, tie.dim) for tie in width.ties) for width in changed]
    return any(width.kind == ATTENTION for width in changed) or any(max(each.values(), default=0) > 1 for each in axes)


def trace_main_outputs(model: nn.Module, inputs: Any, heads: bool | None = None) -> tuple[WidthGraph, Findings]:
    """The widths of a model as far as its main outputs fix them, see `MAIN_OUTPUTS`; all outputs count if it has none of these.

    For files without a record: fewer outputs fix fewer widths, so that whatever outputs counted when the widths were changed,
    they can have the sizes of the file.

    Args:
        model: any module; of one that is not of the transformers library all outputs count.
        inputs: as for `trace`.
        heads: as for `trace`.

    Returns:
        The graph, and what the trace has found.

    Raises:
        TraceError: as `trace`.
    """
    for names in MAIN_OUTPUTS if hasattr(model, "main_input_name") else ():
        try:
            return trace_with_findings(model, inputs, names, heads=heads)
        except OutputNameError:
            continue
    return trace_with_findings(model, inputs, heads=heads)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def refuse_unsaved_buffers(model: nn.Module, graph: WidthGraph, state: Mapping[str, Any], path: Path) -> None:
    """Raise for a buffer that follows a width of another size and is in no state dict: its values there are not known.

    Args:
        model: as it is built.
        graph: its widths.
        state: entries of the file, under the model's names.
        path: of the file, for the message.

    Raises:
        RecordError: naming the buffer.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items() if isinstance(tensor, Tensor)}
    sizes, _ = sizes_from_shapes(graph, shapes)
    saved = {name for name, _ in model.named_parameters(remove_duplicate=False)} | set(model.state_dict())
    for width in graph.resizable:
        for tie in width.ties if sizes[width.name] != width.size else ():
            if tie.tensor not in saved:
                raise RecordError(
                    f"{path} has width {width.name!r} of {sizes[width.name]} units, expected {width.size}: the buffer "
                    f"{tie.tensor} follows it, and is not persistent, so the file does not hold its values. Save the model "
                    "with evolvenet.save where it was changed."
                )

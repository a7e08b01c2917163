"""New units of widths that a norm mixes, such as residual streams, such that the network computes the same function.

A norm divides by a statistic of all its units, so a new unit changes the outputs of the others. It does not if its value keeps
the statistic up to a factor that is known. With d units x₁ … x_d before, D after, mean μ and variance σ² of the d units:

- RMS norm, `x · w / √(mean x² + eps)`: new units are 0. The mean square is that of before times d/D. With eps · d/D the
  denominator is √(d/D) times that of before, and w · √(d/D) makes up for it. The new units' outputs are 0.
- Layer norm, `(x − μ) · w / √(σ² + eps) + b`: new units are μ. The mean stays μ, and the variance, to which new units add
  nothing, is σ² · d/D. With eps · d/D and w · √(d/D) the d outputs stay. The new units' outputs are their b, which is 0.
- Any norm, if D is m·d: every unit is there m times, so mean, mean square and variance stay, and so do w and eps.

For the first, what is added to the stream writes 0 to the new units. For the second it writes the mean of what it writes to the
others: a new row of an embedding or a projection, and a new entry of a bias, is the mean of those that are there. This is
right where the stream is a sum: embeddings, positions and branches, each added without a factor per unit. It is not where each
unit goes through a function of its own (layer scale, depthwise kernels), or where the stream is itself the output of a
layer norm (post-norm, BERT), or where a norm runs over several places (patch merging in Swin): there only copies are right.
What a model allows is tried with its numbers when it is traced (`evolvenet.tracing.exact_growth`).

In the first two, consumers get 0 from the new units, so their new columns are free. They are random, of twice the mean norm
of the present columns. With columns of 0 the new units would stay as they are for good: their gradient is a product with the
columns, and that of the columns a product with the new units' outputs. With random ones each new unit has a gradient of its own
at once, though all new units are equal at first. Copies are told apart in the same way: the m columns of a unit sum to the
column that it had, and differ at random.

Zero and mean units are those of Wang, Su, Wang, Ji and Wang, "LEMON: lossless model expansion", ICLR 2024; copies those of Chen,
Yin, Shang, Jiang, Qin, Wang, Wang, Chen, Liu and Liu, "bert2BERT: towards reusable pretrained language models", ACL 2022.
"""

# Tensor.movedim and nn.Module.get_submodule have no full types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from evolvenet.graph.exact_growth import COPY, MEAN, ExactGrowth
from evolvenet.graph.index_map import NEW_UNIT, IndexMap
from evolvenet.graph.width_graph import CONSUMES, FOLLOWS, MASKS, Tie, Width, WidthGraph
from evolvenet.surgery.norms import Norm, norms_over, query_rows
from evolvenet.surgery.resize_model import AttributeChange, Surgery, TensorChange

COLUMNS = 2.0
"""Norm of a new unit's random columns, in mean norms of the present ones; measured in experiments/compare/growth_language.md."""

DIFFERENCE = 0.5
"""Norm of the random part of a copy's column, as a share of the mean norm of the columns."""


def expand_norms(
    model: nn.Module,
    graph: WidthGraph,
    surgery: Surgery,
    generator: torch.Generator | None = None,
    *,
    columns: bool = True,
) -> Surgery:
    """The surgery with the entries of new units of those widths that a norm mixes. Nothing is changed.

    Args:
        model: the surgery's model.
        graph: its widths before.
        surgery: whose new units of these widths are zeros.
        generator: where the columns' random numbers come from, a CPU generator; None for PyTorch's global one.
        columns: whether consumers get random columns; without, those in the surgery stay, and columns of copies are equal.
    """
    grown = [name for name, index_map in surgery.maps.items() if index_map.adds_units]
    widths = [graph.widths[name] for name in grown if graph.widths[name].exact_growth is not None]
    values = {change.name: change.value.clone() for change in surgery.changes}
    changes = {change.name: change for change in surgery.changes}
    norms: dict[str, Norm] = {}
    for width in widths:
        own = norms_over(model, width)
        norms |= own
        new_units = _NewUnits(model, graph, surgery, width, changes, values, generator, columns)
        if width.exact_growth == ExactGrowth(COPY):
            new_units.copy()
        else:
            new_units.fill(own)
        new_units.scale_queries()
    attributes: dict[tuple[int, str], AttributeChange] = {}
    rescaled: set[str] = set()
    for path, norm in norms.items():
        module, weight = model.get_submodule(path), _named(graph, path, norm.weight)
        share = changes[weight].tensor.numel() / values[weight].numel()
        if weight not in rescaled:
            rescaled.add(weight)
            _rescale(values[weight], changes[weight], norm, share)
        eps = getattr(module, norm.eps)
        eps = torch.finfo(values[weight].dtype).eps if eps is None else eps
        attributes[id(module), norm.eps] = AttributeChange(module, norm.eps, eps * share)
    made = tuple(replace(change, value=values[change.name]) for change in surgery.changes)
    return replace(surgery, changes=made, attributes=(*surgery.attributes, *attributes.values()))


def _named(graph: WidthGraph, path: str, tensor: str) -> str:
    """The name in the graph of a module's tensor."""
    full = f"{path}.{tensor}" if path else tensor
    return graph.aliases.get(full, full)


def _rescale(value: Tensor, change: TensorChange, norm: Norm, share: float) -> None:
    """Multiply a norm's weight by the root of old over new size; new units get the mean magnitude of the others."""
    level = float((change.tensor.detach() + norm.offset).abs().mean()) or 1.0
    new = torch.zeros_like(value, dtype=torch.bool)
    for dim, index_map in change.axes.items():
        is_new = torch.tensor([index == NEW_UNIT for index in index_map.indices], device=value.device)
        new |= is_new.view([-1 if axis == dim else 1 for axis in range(value.dim())])
    value.add_(norm.offset).masked_fill_(new, level).mul_(math.sqrt(share)).sub_(norm.offset)


@dataclass(frozen=True)
class _NewUnits:
    """The new units of one width in all values of a surgery, which are written in place.

    Args:
        model: the surgery's model.
        graph: the widths before.
        surgery: the change.
        width: the one, before.
        changes: of the surgery, by the tensors' names.
        values: the new values, by the tensors' names.
        generator: of random numbers.
        columns: whether consumers get random columns.
    """

    model: nn.Module
    graph: WidthGraph
    surgery: Surgery
    width: Width
    changes: dict[str, TensorChange]
    values: dict[str, Tensor]
    generator: torch.Generator | None
    columns: bool

    @cached_property
    def index_map(self) -> IndexMap:
        """Of the width."""
        return self.surgery.maps[self.width.name]

    @cached_property
    def ties(self) -> tuple[Tie, ...]:
        """Where the width occurs after the change."""
        return self.surgery.graph.widths[self.width.name].ties

    def _present(self, tie: Tie) -> Tensor:
        """The positions of the units that were there, in the part of the width that a tie holds."""
        indices = self.index_map.part(tie.part).indices
        return torch.tensor([place for place, index in enumerate(indices) if index != NEW_UNIT], device="cpu")

    def _new(self, tie: Tie) -> Tensor:
        """The positions of the new units, in the same part."""
        return torch.tensor(self.index_map.part(tie.part).new_units, device="cpu")

    def _templates(self, tie: Tie) -> Tensor:
        """For each new unit the position of a present one; they take turns."""
        present, count = self._present(tie), len(self._new(tie))
        return present.repeat(-(-count // len(present)))[:count]

    def fill(self, norms: dict[str, Norm]) -> None:
        """Units of zeros, or of the mean of the others, with random columns in their consumers."""
        weights = {_named(self.graph, path, norm.weight) for path, norm in norms.items()}
        biases = {_named(self.graph, path, norm.bias) for path, norm in norms.items() if norm.bias is not None}
        lengths = {self.changes[name].tensor.numel() for name in weights}
        for tie in self.ties:
            if tie.tensor in weights or tie.tensor in biases or tie.role == MASKS:
                continue
            if tie.role == CONSUMES and not self._is_table(tie):
                if self.columns:
                    self._draw(tie)
            elif tie.role == FOLLOWS and tie.tensor in self.graph.gates and tie.tensor not in self.graph.added:
                self._copy(tie)
            # An axis of another length, such as that of queries, keys and values side by side, is not the stream itself.
            elif self._is_mean and self.changes[tie.tensor].tensor.shape[tie.dim] in lengths:
                self._average(tie)

    def scale_queries(self) -> None:
        """Multiply queries so that their products with keys, divided by the root of a head's size, stay as they are.

        Where heads get no new places, but new heads are added, there is nothing to do.
        """
        ratio = self.index_map.new_size / self.width.size
        factor = ratio ** (-0.5 if self.width.exact_growth == ExactGrowth(COPY) else 0.5)
        more_heads = {change.module for change in self.surgery.attributes if change.name == "num_heads"}
        for path in dict.fromkeys(tie.module for tie in self.ties):
            module = self.model.get_submodule(path)
            for name, share in query_rows(module).items() if module not in more_heads else ():
                value = self.values.get(tensor := _named(self.graph, path, name))
                if value is not None and 0 in self.changes[tensor].axes:
                    value.narrow(0, 0, len(value) // share).mul_(factor)

    def _is_table(self, tie: Tie) -> bool:
        """Whether a consumer is also a table of embeddings, which writes to the units that it is multiplied with elsewhere."""
        names = {tie.tensor, *(other for other, first in self.graph.aliases.items() if first == tie.tensor)}
        owners = [self.model.get_submodule(name.rpartition(".")[0]) for name in names]
        return tie.role == CONSUMES and any(isinstance(owner, nn.Embedding | nn.EmbeddingBag) for owner in owners)

    @property
    def _is_mean(self) -> bool:
        return self.width.exact_growth is not None and self.width.exact_growth.new_units == MEAN

    def copy(self) -> None:
        """Every unit several times: equal rows, and columns that sum to those of before."""
        for tie in self.ties:
            assert len(self._new(tie)) % len(self._present(tie)) == 0, self.width.name
            self._copy(tie)
        for tie in self.ties:
            if tie.role == CONSUMES:
                self._divide(tie)

    def _places(self, tie: Tie, units: Tensor) -> Tensor:
        """The places of units on the axis of a tie, one after the other."""
        value = self.values[tie.tensor]
        places = tie.start + units.reshape(-1, 1) * tie.repeat + torch.arange(tie.repeat, device="cpu")
        return places.reshape(-1).to(value.device)

    def _copy(self, tie: Tie) -> None:
        """The entries of present units for the new ones."""
        value = self.values[tie.tensor]
        there = value.index_select(tie.dim, self._places(tie, self._templates(tie)))
        value.index_copy_(tie.dim, self._places(tie, self._new(tie)), there)

    def _average(self, tie: Tie) -> None:
        """The mean over the whole axis as it was, for the new units; entries that are there already stay (running variances)."""
        value, dim = self.values[tie.tensor], tie.dim
        new = self._places(tie, self._new(tie))
        if tie.role == FOLLOWS and tie.tensor not in self.graph.added and bool(value.index_select(dim, new).any()):
            return
        old = [place for place, index in enumerate(self.changes[tie.tensor].axes[dim].indices) if index != NEW_UNIT]
        mean = value.index_select(dim, torch.tensor(old, device=value.device)).mean(dim, keepdim=True)
        shape = [len(new) if axis == dim else size for axis, size in enumerate(value.shape)]
        value.index_copy_(dim, new, mean.expand(shape).contiguous())

    def _draw(self, tie: Tie) -> None:
        """Random columns for the new units, of `COLUMNS` times the mean norm of the present columns."""
        value = self.values[tie.tensor].movedim(tie.dim, 0)
        kept, added = self._present(tie), self._new(tie)
        if not len(added):
            return
        present = value[self._places(tie, kept)].reshape(len(kept), -1)
        new = self._places(tie, added)
        drawn = self._random((len(added), value[new].numel() // len(added)))
        drawn *= COLUMNS * float(present.norm(dim=1).mean()) / drawn.norm(dim=1, keepdim=True)
        value[new] = drawn.to(value.dtype).to(value.device).reshape(value[new].shape)

    def _divide(self, tie: Tie) -> None:
        """The column of each unit divided between its copies, unequally where columns are to be random."""
        value = self.values[tie.tensor].movedim(tie.dim, 0)
        kept, added = self._present(tie), self._new(tie)
        count = 1 + len(added) // len(kept)
        units = torch.cat([kept, added]).reshape(count, -1)
        places = self._places(tie, units)
        part = value[places].reshape(count, -1) / count
        if self.columns:
            noise = self._random(tuple(part.shape))
            noise -= noise.mean(0)
            norm = float(value[places].reshape(units.numel(), -1).norm(dim=1).mean())
            noise *= DIFFERENCE * norm / math.sqrt(value[places].numel() / units.numel())
            # Rows of new units of other widths may be equal on purpose.
            part += (
                (noise.reshape(value[places].shape) * self._is_old(tie))
                .reshape(count, -1)
                .to(part.dtype)
                .to(part.device)
            )
        value[places] = part.reshape(value[places].shape)

    def _is_old(self, tie: Tie) -> Tensor:
        """1 for the entries of present units of all other widths, of the shape of the value with the tie's axis first."""
        found = torch.ones(1, device="cpu")
        value = self.values[tie.tensor]
        for dim, index_map in self.changes[tie.tensor].axes.items():
            if dim != tie.dim:
                old = torch.tensor([float(index != NEW_UNIT) for index in index_map.indices], device="cpu")
                found = found * old.view([-1 if axis == dim else 1 for axis in range(value.dim())])
        return found.movedim(tie.dim, 0) if found.dim() == value.dim() else found

    def _random(self, shape: Iterable[int]) -> Tensor:
        """Random numbers in double precision."""
        return torch.randn(tuple(shape), generator=self.generator, dtype=torch.float64, device="cpu")

"""How the model's code uses each weight: which bias it adds to the products, and whether it uses the weight in any other way."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from evolvenet.execution.weight_ops import WeightOp
from evolvenet.graph.naming import named_tensors
from evolvenet.graph.width_graph import WidthGraph


class Bias(NamedTuple):
    """A parameter that shifts every product with a weight, and is used in no other way.

    Args:
        name: of the parameter, `[out]`.
        sign: 1 if it is added, −1 if it is subtracted, or the product is subtracted from it: the parameter plus `sign`·d makes up
            for products that are smaller by d.
    """

    name: str
    sign: int


@dataclass(frozen=True)
class WeightUses:
    """What the ops of a run say about weights; names of parameters decide nothing.

    Args:
        biases: {weight: its bias}.
        axes: {weight: the axis of its inputs}, of parameters that are multiplied with data along one axis and used in no
            other way: their columns may be refitted.
    """

    biases: dict[str, Bias]
    axes: dict[str, int]


class UseRecorder:
    """Records the uses of weights in some runs of a model.

    Args:
        model: the model, for the shapes of its tensors.
    """

    def __init__(self, model: nn.Module) -> None:
        self._tensors, _, self._parameters = named_tensors(model)
        self._calls: Counter[str] = Counter()
        self._axes: dict[str, set[int]] = defaultdict(set)
        self._biases: dict[str, Counter[Bias]] = defaultdict(Counter)
        self._other_uses: set[str] = set()

    def add_op(self, op: WeightOp) -> None:
        """Add a weight op, with the bias that it adds itself."""
        self._calls[op.tensor] += 1
        self._axes[op.tensor].add(op.axis)
        if op.bias is not None and op.bias_name is not None:
            bias = self._tensors[op.bias_name]
            whole = bias.numel() == self._tensors[op.tensor].shape[1 - op.axis]
            if whole and int(op.bias.storage_offset() - bias.storage_offset()) == op.start:
                self._biases[op.tensor][Bias(op.bias_name, 1)] += 1
            else:
                self._other_uses.add(op.bias_name)

    def add_bias(self, op: WeightOp, name: str, values: Tensor | None, sign: int) -> None:
        """Add a bias that an op of its own adds to the output of a weight op, or subtracts; see `ResidualSumMode`."""
        if values is None:
            return
        if op.start or len(values) != self._tensors[op.tensor].shape[1 - op.axis]:
            self._other_uses.add(name)
        else:
            self._biases[op.tensor][Bias(name, sign)] += 1

    def add_other_uses(self, names: Iterable[str]) -> None:
        """Add tensors that took part in ops that are no weight ops."""
        self._other_uses.update(names)

    def found(self, graph: WidthGraph) -> WeightUses:
        """The uses so far; a tensor that has several names in the graph has none of them."""
        shared = self._other_uses | set(graph.aliases.values())
        totals = Counter[str]()
        for counts in self._biases.values():
            for bias, count in counts.items():
                totals[bias.name] += count
        biases = {}
        for weight, counts in self._biases.items():
            own = [bias for bias, count in counts.items() if count == totals[bias.name] == self._calls[weight]]
            # Of two that are added to the same product one takes the change of the mean.
            own = [bias for bias in own if bias.name not in shared and weight not in shared]
            if own:
                biases[weight] = own[0]
        axes = {
            weight: next(iter(found))
            for weight, found in self._axes.items()
            if len(found) == 1 and weight in self._parameters and weight not in shared
        }
        return WeightUses(biases, axes)

"""`OpTrace` numbers every tensor of a run, with a new number after a write in place."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from evolvenet.tracing.op_trace import OpTrace


def names(op_trace: OpTrace) -> list[str]:
    return [op.name for op in op_trace.producers.values()]


def test_every_op_is_recorded_with_its_inputs_and_output() -> None:
    weight, x = torch.randn(3, 2), torch.randn(4, 2)
    with (op_trace := OpTrace({"weight": weight})):
        out = torch.add(torch.mm(x, weight.t()), 1.0, alpha=2).sum(1, keepdim=True)
    turn, product, add, total = op_trace.producers.values()
    assert names(op_trace) == ["t", "mm", "add", "sum"]
    assert op_trace.own_values == {0} == set(turn.inputs)
    assert (turn.output, product.inputs, product.output) == (1, (2, 1), 3)
    assert add.inputs == (product.output,)
    assert add.kwargs == {"alpha": 2}
    assert add.args[1] == 1.0
    assert total.args[1:] == ([1], True)
    assert op_trace.shapes[total.output] == (4, 1) == tuple(out.shape)
    assert op_trace.consumers[product.output] == [add]
    assert total.output not in op_trace.consumers


def test_values_computed_from_parameters_alone_have_a_tensor_name() -> None:
    one, two, x = torch.randn(3, 3), torch.randn(3), torch.randn(2, 3)
    with (op_trace := OpTrace({"one": one, "two": two})):
        mixed = one * two
        torch.mm(x, mixed.exp())
    product = list(op_trace.producers.values())[-1]
    assert [op_trace.tensor_names.get(value) for value in product.inputs] == [None, "one"]
    assert product.output not in op_trace.tensor_names
    assert op_trace.own_values == {value for value, name in op_trace.tensor_names.items() if value < 2}


def _chain(op_trace: OpTrace, last: str) -> list[str]:
    """Names of the ops that lead to the last op of a name, as far as they are known."""
    found = []
    op = [each for each in op_trace.producers.values() if each.name == last][-1]
    while op is not None:
        found.append(op.name)
        op = op_trace.producers.get(op.inputs[0]) if op.inputs else None
    return found[::-1]


def test_a_tensor_written_in_place_gets_a_new_number() -> None:
    x = torch.randn(2, 3)
    with (op_trace := OpTrace({})):
        made = x.exp()
        before = made.sum()
        made.mul_(2.0)
        after = made.sum()
    assert names(op_trace) == ["exp", "sum", "mul", "sum"]
    assert _chain(op_trace, "sum") == ["exp", "mul", "sum"]
    first, second = (op for op in op_trace.producers.values() if op.name == "sum")
    assert first.inputs != second.inputs
    assert bool((before * 2 - after).abs() < 1e-5)


def test_views_of_a_tensor_written_in_place_get_new_numbers() -> None:
    """A view is written into: its base has changed, and no op made the base what it is now."""
    x = torch.randn(2, 3)
    with (op_trace := OpTrace({})):
        made = x.exp()
        made.view(-1).mul_(2.0)
        made.relu()
    (relu,) = (op for op in op_trace.producers.values() if op.name == "relu")
    assert relu.inputs[0] not in op_trace.producers


def test_the_output_of_an_in_place_module_has_its_op_as_producer() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.act = nn.Linear(3, 4), nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.layer(x)) + 1

    model, x = Net(), torch.randn(2, 3)
    with torch.no_grad(), (op_trace := OpTrace(dict(model.named_parameters()))):
        model(x)
    assert names(op_trace) == ["t", "addmm", "relu", "add"]
    relu, add = list(op_trace.producers.values())[-2:]
    assert add.inputs == (relu.output,)

"""`WeightOp` against the outputs of the layers, and `ResidualSumMode` against the operands of sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from evolvenet.execution.isolation import op_by_op
from evolvenet.execution.residual_sums import ResidualSumMode, TrackedOutput
from evolvenet.execution.weight_ops import WeightOp, WeightOpMode, output_positions
from tests.helpers.cases import FLOAT


class Sideways(nn.Module):
    """A dense layer with its weight stored `[in, out]`, as GPT-2's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "dense": (lambda: nn.Linear(4, 3), (5, 4)),
    "dense over tokens": (lambda: nn.Linear(4, 3), (5, 7, 4)),
    "dense over a grid": (lambda: nn.Linear(4, 3, bias=False), (5, 2, 3, 4)),
    "dense to one": (lambda: nn.Linear(4, 1), (5, 4)),
    "dense from one": (lambda: nn.Linear(1, 3), (5, 1)),
    "sideways": (Sideways, (5, 4)),
    "conv1d": (lambda: nn.Conv1d(4, 3, 3, stride=2, padding=1), (5, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 3, (3, 2), stride=(1, 2), padding=(2, 0), dilation=(2, 1)), (5, 4, 8, 9)),
    "conv2d of one place": (lambda: nn.Conv2d(4, 3, 1, bias=False), (5, 4, 6, 6)),
    "conv2d same": (lambda: nn.Conv2d(4, 3, 3, padding="same"), (5, 4, 6, 6)),
    "conv2d circular": (lambda: nn.Conv2d(4, 3, 3, padding=1, padding_mode="circular"), (5, 4, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(4, 3, 2, padding=1), (5, 4, 3, 4, 5)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (5, 4, 6, 6)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4), (5, 4, 6, 6)),
    "transposed1d": (lambda: nn.ConvTranspose1d(4, 3, 4, stride=3, padding=1, output_padding=2), (5, 4, 6)),
    "transposed2d": (
        lambda: nn.ConvTranspose2d(4, 3, (3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 2)),
        (5, 4, 5, 6),
    ),
    "transposed past its kernel": (lambda: nn.ConvTranspose2d(4, 3, 2, padding=2), (5, 4, 7, 7)),
}


def weight_ops_of(model: nn.Module, *inputs: Any) -> list[tuple[WeightOp, Tensor]]:
    found: list[tuple[WeightOp, Tensor]] = []
    with op_by_op(WeightOpMode(model, after=lambda op, out: found.append((op, out)))):
        model(*inputs)
    return found


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("kept", [torch.preserve_format, torch.channels_last])
def test_columns_times_matrix_is_the_output(name: str, kept: torch.memory_format) -> None:
    made, shape = LAYERS[name]
    model, x = made().double(), torch.randn(shape, dtype=FLOAT)
    if kept is torch.channels_last and x.dim() == 4 and name.startswith("conv"):
        model, x = model.to(memory_format=kept), x.to(memory_format=kept)  # type: ignore
    ((op, out),) = weight_ops_of(model, x)
    assert op.tensor == "weight"
    rows = torch.tensor([0, output_positions(op, out) - 1, output_positions(op, out) // 2])
    bias = 0 if op.bias is None else op.bias.reshape(op.groups, 1, -1)
    torch.testing.assert_close(op.columns(rows) @ op.matrix().mT + bias, op.outputs_at(out, rows))
    before = model.get_parameter("weight").detach().clone()
    with torch.no_grad():
        op.write_matrix(op.matrix().clone())
    assert torch.equal(before, model.get_parameter("weight"))


@pytest.mark.parametrize("name", LAYERS)
def test_input_rows_hold_the_inputs_of_the_weights_input_axis(name: str) -> None:
    made, shape = LAYERS[name]
    ((op, _),) = weight_ops_of(made().double(), torch.randn(shape, dtype=FLOAT))
    rows = op.input_rows(torch.arange(op.input_positions))
    assert rows.shape[1] == op.weight.shape[1]
    torch.testing.assert_close(rows.sort(0).values.sum(), op.inputs.sum())


def test_projections_of_attention_are_weight_ops() -> None:
    model = nn.MultiheadAttention(8, 2, batch_first=True).double().eval()
    x, y = torch.randn(2, 3, 5, 8, dtype=FLOAT)
    biases: list[tuple[str, str, int]] = []
    mode = ResidualSumMode(model, on_bias=lambda op, name, values, sign: biases.append((op.tensor, name, sign)))
    with op_by_op(mode):
        model(x, x, x)
    assert biases == [("in_proj_weight", "in_proj_bias", 1)]
    assert not mode.other_uses
    own = [(op.tensor, op.start, len(op.weight)) for op, _ in weight_ops_of(model, x, x, x)]
    assert own == [("in_proj_weight", 0, 24), ("out_proj.weight", 0, 8)]
    across = [(op.tensor, op.start, len(op.weight)) for op, _ in weight_ops_of(model, x, y, y)]
    assert across == [("in_proj_weight", 0, 8), ("in_proj_weight", 8, 16), ("out_proj.weight", 0, 8)]


def test_functional_calls_are_weight_ops() -> None:
    class Functional(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return functional.linear(input, self.weight[:2], self.bias[:2])

    ((op, _),) = weight_ops_of(Functional(4, 3), torch.zeros(5, 4))
    assert (op.tensor, op.start, len(op.weight), op.bias_name) == ("weight", 0, 2, "bias")


def test_other_uses_of_a_weight_are_in_other_uses() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.scale = nn.Embedding(6, 4), nn.Parameter(torch.ones(4))
            self.plain = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(self.plain(self.table(x)) * self.scale, self.table.weight)

    model = Tied()
    mode = WeightOpMode(model)
    with op_by_op(mode):
        model(torch.tensor([[1, 2]]))
    assert mode.other_uses == {"table.weight", "scale"}


class Block(nn.Module):
    """A residual block with a norm at the end of its branch."""

    def __init__(self, projected: bool) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(3)
        self.norm.running_mean = torch.randn(3)
        self.shortcut = nn.Conv2d(3, 3, 1) if projected else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        branch = self.norm(self.conv2(self.conv1(x).relu()))
        branch += self.shortcut(x)
        return branch.relu()


@pytest.mark.parametrize("projected", [False, True])
def test_a_branch_is_tracked_to_its_residual_sum(projected: bool) -> None:
    model, x = Block(projected).double().eval(), torch.randn(2, 3, 5, 5, dtype=FLOAT)
    found: list[tuple[str, Tensor, Tensor]] = []

    def on_sum(output: TrackedOutput, own: Tensor, other: Tensor) -> None:
        torch.testing.assert_close(output.recomputed(own), own)
        found.append((output.op.tensor, own.clone(), other.clone()))

    means: list[tuple[str, str, int]] = []
    with op_by_op(
        ResidualSumMode(
            model, on_sum=on_sum, on_bias=lambda op, mean, values, sign: means.append((op.tensor, mean, sign))
        )
    ):
        model(x)
    assert means == [("conv2.weight", "norm.running_mean", -1)]
    ((name, own, other),) = found
    assert name == "conv2.weight"
    torch.testing.assert_close(own, model.norm(model.conv2(model.conv1(x).relu())))
    torch.testing.assert_close(other, model.shortcut(x))


@pytest.mark.parametrize("spoil", [torch.relu_, torch.relu, lambda t: t.transpose(-1, -2)])
def test_an_op_that_is_not_tracked_ends_the_tracking(spoil: Callable[[Tensor], Tensor]) -> None:
    class Spoiled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return spoil(self.layer(x)) + torch.ones(4, 4)

    found: list[TrackedOutput] = []
    model = Spoiled()
    with op_by_op(ResidualSumMode(model, on_sum=lambda output, own, other: found.append(output))):
        model(torch.zeros(4, 4))
    assert not found

"""A training step is traced as if its network had not been traced before: what was found there may not hold in the step."""

from __future__ import annotations

import evolvenet  # noqa: F401  isort: skip

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from evolvenet.execution.chosen_outputs import Outputs
from evolvenet.graph.serialization import to_state_dict
from evolvenet.lightning.subject import choose_subject
from evolvenet.tracing.trace import trace
from evolvenet.tracing.unreached import freeze_possible_inputs

X = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0))


class Stepped(LightningModule):
    """A loss of one network, with other modules beside it."""

    def __init__(self, net: nn.Module, loss: Callable[[Any, Tensor], Tensor], **beside: nn.Module) -> None:
        super().__init__()
        for name, module in beside.items():
            setattr(self, name, module)
        self.net, self.loss = net, loss

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return self.loss(self, batch)


class Hidden(nn.Module):
    """Layers with a first part that can be called alone; the whole accepts 8 hidden units only, if that is asked for."""

    def __init__(self, fixed: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.c, self.fixed = nn.Linear(3, 8), nn.Linear(8, 6), nn.Linear(6, 2), fixed

    def encode(self, x: Tensor) -> Tensor:
        return self.a(x).relu()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.encode(x)
        assert hidden.shape[-1] == 8 or not self.fixed
        return {"logits": self.c(self.b(hidden).relu()), "hidden": hidden}


class Rotated(nn.Module):
    """Queries and keys of heads of 4 places, turned by positions: its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.q, self.k = nn.Linear(3, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.register_buffer("inv_freq", 1 / 100 ** (torch.arange(0, 4, 2) / 4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden, frequencies = self.inp(x), self.get_buffer("inv_freq")
        angles = torch.arange(x.shape[1], device=x.device)[:, None].to(frequencies.dtype) * frequencies
        cos, sin = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()

        def turned(each: Tensor) -> Tensor:
            heads = each.view(*x.shape[:2], -1, 4).transpose(1, 2)
            one, two = heads.chunk(2, -1)
            return heads * cos + torch.cat([-two, one], -1) * sin

        return turned(self.q(hidden)), turned(self.k(hidden))


class Scores(nn.Module):
    """How much each place attends to each other one: whole heads can go where the frequencies stay as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.rotated = Rotated()

    def forward(self, x: Tensor) -> Tensor:
        queries, keys = self.rotated(x)
        return (queries @ keys.mT).softmax(-1).sum(1)


def relative() -> nn.Module:
    """An attention with relative biases, which have an entry for each head."""
    sizes: Any = {
        "vocab_size": 12,
        "d_model": 16,
        "d_kv": 4,
        "d_ff": 20,
        "num_layers": 1,
        "num_heads": 4,
        "dropout_rate": 0.0,
    }
    return transformers.T5EncoderModel(transformers.T5Config(**sizes)).eval()


def with_fixed_tail(module: Any, logits: Tensor) -> Tensor:
    """A width in the step alone that cannot be resized, so that each width has trials of its own."""
    hidden = module.tail(logits)
    assert hidden.shape[-1] == 7
    return hidden.square().sum()


def picked(result: dict[str, Tensor]) -> Tensor:
    assert result["hidden"].shape[-1] == 8
    return result["logits"]


def of_picked_outputs() -> tuple[Stepped, Outputs | None]:
    return Stepped(Hidden(), lambda m, x: with_fixed_tail(m, m.net(x)["logits"]), tail=nn.Linear(2, 7)), picked


def of_another_method() -> tuple[Stepped, Outputs | None]:
    def loss(m: Any, x: Tensor) -> Tensor:
        return with_fixed_tail(m, m.net.c(m.net.b(m.net.encode(x)).relu()))

    return Stepped(Hidden(fixed=True), loss, tail=nn.Linear(2, 7)), "logits"


def of_outputs_that_the_loss_sums() -> tuple[Stepped, Outputs | None]:
    def loss(m: Any, x: Tensor) -> Tensor:
        queries, keys = m.net(x)
        return (queries @ keys.mT).softmax(-1).square().mean()

    return Stepped(Rotated(), loss), None


def of_heads_beside_it() -> tuple[Stepped, Outputs | None]:
    def loss(m: Any, x: Tensor) -> Tensor:
        return m.other(inputs_embeds=m.net(x)).last_hidden_state.square().sum()

    return Stepped(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 16)), loss, other=relative()), None


def of_two_names() -> tuple[Stepped, Outputs | None]:
    network = Scores()
    return Stepped(network, lambda m, x: m.net(x).square().sum(), backbone=network.rotated), None


@pytest.mark.parametrize(
    "case", [of_picked_outputs, of_another_method, of_outputs_that_the_loss_sums, of_heads_beside_it, of_two_names]
)
def test_the_graph_of_a_step_is_that_of_a_trace_by_itself(case: Callable[[], tuple[Stepped, Outputs | None]]) -> None:
    module, outputs = case()
    found = choose_subject(
        module, "net", {"net": X}, {"training_step": (X, 0)}, lambda _, graph: graph, outputs, with_loss=True
    )
    assert found.path == ""
    assert to_state_dict(found.graph) == to_state_dict(freeze_possible_inputs(trace(module, found.runs)))

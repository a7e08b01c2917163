"""What a trace finds is there, what it cannot know it leaves alone, and the model does not notice it."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import networks
import numpy as np
import pytest
import torch
from cases import CASES, FLOAT, Case, distance, graph_of, outputs, shuffled, without_reasons
from states import State
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint

import evolvenet
from evolvenet.errors import TraceError
from evolvenet.index_map import IndexMap
from evolvenet.trace import trace

Code = Callable[..., Tensor]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_finds_the_widths(case: Case) -> None:
    graph = graph_of(case)
    assert graph.sizes == case.sizes
    assert {width.name for width in graph.resizable if width.mixed} == case.mixed
    for name, reason in case.frozen.items():
        assert reason in (graph.widths[name].frozen or "")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_leaves_the_model_as_it_was(case: Case) -> None:
    model, inputs = case.model(), case.inputs()
    model.train()
    next(model.children()).eval()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    before, given = State.of(model, [optimizer]), case.inputs()
    trace(model, inputs)
    assert before.differences(model, [optimizer]) == []
    assert str(inputs) == str(given)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_exchanging_units_everywhere_changes_nothing(case: Case) -> None:
    """Every width at once, in an order of its own: what is tied together is all there is."""
    model, inputs, graph = case.model(), case.inputs(), graph_of(case)
    expected = outputs(model, inputs)
    evolvenet.resize(model, graph, {name: shuffled(size) for name, size in graph.sizes.items()})
    assert distance(outputs(model, inputs), expected) < 1e-9


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_a_width_claims_is_alive(case: Case) -> None:
    """Zeroing one unit wherever it shows does change the output: no width is a mere name."""
    inputs, graph = case.inputs(), graph_of(case)
    model = case.model()
    expected = outputs(model, inputs)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for width in graph.resizable:
        if (case.name, width.name) == ("auxiliary", "extra"):
            continue  # it runs in train mode only
        model.load_state_dict(before)
        tensors = model.state_dict()
        for tie in width.ties:
            tensors[tie.tensor].narrow(tie.dim, tie.start, width.size * tie.repeat).zero_()
        assert distance(outputs(model, inputs), expected) > 1e-6, width.name


class Between(nn.Module):
    """A dense layer `a` from 5 to 8 units, code between, and a dense layer `b` to 3."""

    def __init__(self, code: Code, reads: int = 8, **modules: nn.Module) -> None:
        super().__init__()
        self.code = code
        self.a, self.b = nn.Linear(5, 8), nn.Linear(reads, 3)
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.code(self, x, self.a(x)))


def _write(h: Tensor, where: slice, value: Tensor | float) -> Tensor:
    h[..., where] = value
    return h


def _doubled(h: Tensor) -> Tensor:
    h[:, :4] *= 2
    return h


KEEP_THEIR_NUMBER: dict[str, tuple[Code, int, str]] = {
    "sums along the units": (lambda m, x, h: h.cumsum(1), 8, "works along its units"),
    "a triangle of them": (lambda m, x, h: h.tril(), 8, "works along its units"),
    "softmax over them": (lambda m, x, h: h.softmax(1), 8, "makes its units compete"),
    "the largest three": (lambda m, x, h: h.topk(3, 1)[0], 3, "works along its units"),
    "an order of their own": (lambda m, x, h: h.flip(1), 8, "another order"),
    "rolled by one": (lambda m, x, h: h.roll(1, 1), 8, "another order"),
    "picked by an index": (lambda m, x, h: h[:, torch.tensor([0, 3, 3, 1])], 4, "picks them by an index"),
    "sorted by themselves": (lambda m, x, h: h.sort(1)[0], 8, "works along its units"),
    "gathered": (lambda m, x, h: h.gather(1, x.argsort(1)), 5, "has no rule"),
    "numbers by place": (lambda m, x, h: h * torch.arange(h.shape[1], device=h.device), 8, DATA := "fixed size"),
    "numbers from outside": (lambda m, x, h: h * torch.tensor([1.0] * 8, device=h.device), 8, DATA),
    "an input of their size": (lambda m, x, h: h + torch.cat([x, x[:, :3]], 1), 8, DATA),
    "a part doubled in place": (lambda m, x, h: _doubled(h), 8, "a part of its units"),
    "a part set to zero": (lambda m, x, h: _write(h, slice(4), 0.0), 8, "a part of its units"),
    "two activations": (lambda m, x, h: torch.cat([h[:, :4].sigmoid(), h[:, 4:].tanh()], 1), 8, "a part of its units"),
    "written into a part": (
        lambda m, x, h: _write(torch.zeros(2, 12, dtype=FLOAT, device=h.device), slice(8), h),
        12,
        "a part of another tensor",
    ),
    "other numbers from the same bits": (lambda m, x, h: h.view(torch.int64).view(FLOAT), 8, "has no rule"),
    "memory read anew": (lambda m, x, h: h.t().as_strided((2, 8), (8, 1)), 8, "laid out in another way"),
    "an op without a rule": (lambda m, x, h: torch.fft.rfft(h, dim=0).abs(), 8, "has no rule"),
    "a view by a number": (lambda m, x, h: h.view(2, 8), 8, "a trial raised"),
    "halves cut at a number": (lambda m, x, h: h[:, :4].relu() * h[:, 4:], 4, "a trial raised"),
    "a view by a number in training": (lambda m, x, h: h.view(-1, 8) if m.training else h, 8, "a trial raised"),
    "through numpy": (lambda m, x, h: torch.from_numpy(h.detach().numpy() * 2), 8, "a trial raised"),
}


@pytest.mark.parametrize("name", KEEP_THEIR_NUMBER)
def test_freezes_rather_than_guesses(name: str) -> None:
    code, reads, reason = KEEP_THEIR_NUMBER[name]
    graph = trace(Between(code, reads).double(), torch.randn(2, 5, dtype=FLOAT))
    assert graph.sizes == {}
    assert any(reason in (width.frozen or "") for width in graph.widths.values()), str(graph)


LEAVE_THEM_FREE: dict[str, tuple[Code, int, dict[str, int]]] = {
    "moved in place": (lambda m, x, h: h.t_().t_().unsqueeze_(1).transpose_(1, 2).squeeze_(2), 8, {"a": 8}),
    "squeezed in place": (lambda m, x, h: h[:, :, None, None].squeeze_(), 8, {"a": 8}),
    "every unit twice": (lambda m, x, h: h.repeat_interleave(2, 1), 16, {"a": 8}),
    "all units twice": (lambda m, x, h: torch.cat([h, -h], 1), 16, {"a": 8}),
    "with the input beside": (lambda m, x, h: torch.cat([h, x], 1), 13, {"a": 8}),
    "normalised": (lambda m, x, h: F.normalize(h, dim=1), 8, {"a": 8}),
    "sums along the samples": (lambda m, x, h: h.cumsum(0).sort(0)[0], 8, {"a": 8}),
    "samples picked": (lambda m, x, h: h[x[:, 0].argsort()], 8, {"a": 8}),
    "samples masked": (lambda m, x, h: h.masked_fill(x[:, :1] > 0, 0.0), 8, {"a": 8}),
    "steps set to zero": (lambda m, x, h: _write(h, slice(None), 0.0) + m.c(x), 8, {"a": 8}),
    "the first units apart": (lambda m, x, h: h[:, 4:], 4, {"a#2": 4}),
    "padded": (lambda m, x, h: h + F.pad(m.d(x), (0, 3)), 8, {"a": 5}),
    "checkpointed": (lambda m, x, h: checkpoint(m.c, x, use_reentrant=False) + h, 8, {"a": 8}),
    "einsum": (lambda m, x, h: torch.einsum("bi,oi->bo", h, m.e.weight), 7, {"a": 8, "e": 7}),
    "mapped over samples": (lambda m, x, h: torch.vmap(m.e)(h), 7, {"a": 8, "e": 7}),
    "equal pieces": (
        lambda m, x, h: (lambda p, q: torch.cat([m.e(p), q], 1))(*h.chunk(2, 1)),
        8,
        {"a": 4, "e": 4},
    ),
    "branches compete": (lambda m, x, h: (lambda g: (g.softmax(1) * g).sum(1))(h.view(len(h), 2, -1)), 4, {"a": 4}),
    "normalised heads": (lambda m, x, h: F.normalize(h.view(len(h), 2, -1), dim=-1).flatten(1), 8, {"a": 4}),
    "gated in place": (lambda m, x, h: (lambda a, b: a.mul_(b.sigmoid_()))(*h.chunk(2, -1)), 4, {"a": 4}),
}


LEAVE_THEM_FREE_WITH = {"equal pieces": {"e": nn.Linear(4, 4, bias=False)}}


@pytest.mark.parametrize("name", LEAVE_THEM_FREE)
def test_frees_what_it_understands(name: str) -> None:
    code, reads, sizes = LEAVE_THEM_FREE[name]
    layers = {"c": nn.Linear(5, 8), "d": nn.Linear(5, 5), "e": nn.Linear(8, 7, bias=False)}
    layers |= LEAVE_THEM_FREE_WITH.get(name, {})
    model = Between(code, reads, **layers).double()
    x = torch.randn(2, 5, dtype=FLOAT)
    expected = outputs(model, x)
    graph = trace(model, x)
    assert graph.sizes == sizes
    graph = evolvenet.resize(model, graph, {name: shuffled(size) for name, size in graph.sizes.items()})
    assert distance(outputs(model, x), expected) < 1e-9
    wider = {width.name: IndexMap.grow(width.size, 3) for width in graph.resizable if width.mixed is None}
    graph = evolvenet.resize(model, graph, wider)
    assert distance(outputs(model, x), expected) < 1e-9
    assert without_reasons(graph) == without_reasons(trace(model, x))


def test_a_trial_is_compared_beyond_its_shapes() -> None:
    """Four groups of 16, or two halves cut at 8: other sizes fit as well, but hold other units."""
    x = torch.randn(2, 5, dtype=FLOAT)
    grouped = Between(lambda m, x, h: F.group_norm(m.c(x), 4), 16, c=nn.Linear(5, 16)).double()
    assert "a trial tied its units differently" in (trace(grouped, x).widths["c"].frozen or "")

    def halves(model: nn.Module, x: Tensor, h: Tensor) -> Tensor:
        joined = torch.cat([h, model.get_submodule("c")(x)], 1)
        return torch.cat([joined[:, :8].tanh(), joined[:, 8:].sigmoid()], 1)

    graph = trace(Between(halves, 16, c=nn.Linear(5, 8)).double(), x)
    assert "in a trial aten::tanh in Between works on a part of its units" in (graph.widths["a"].frozen or "")


class Scales(nn.Module):
    """Res2Net's way: pieces of `width` channels, each convolved together with what the one before has become."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.width = width
        self.enter = nn.Conv2d(3, width * count, 1)
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(count - 1))
        self.leave = nn.Conv2d(width * count, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, *rest = self.enter(x).split(self.width, 1)
        made = [first]
        for conv, piece in zip(self.convs, rest, strict=True):
            made.append(conv(made[-1] + piece).relu())
        return self.leave(torch.cat(made, 1))


def test_pieces_of_one_split_change_together_with_the_number_that_cuts_them() -> None:
    model, x = Scales(4, 3).double(), torch.randn(2, 3, 5, 5, dtype=FLOAT)
    graph, expected = trace(model, x), outputs(model, x)
    assert graph.sizes == {"enter": 4, "convs.1": 4}
    graph = evolvenet.resize(model, graph, {"enter": IndexMap.grow(4, 2)})
    assert distance(outputs(model, x), expected) < 1e-9
    assert model.width == 6
    assert {name: width.ties for name, width in graph.widths.items()} == {
        name: width.ties for name, width in trace(model, x).widths.items()
    }


class Scaled(nn.Module):
    """MetaFormer's way: the shape of the scale is kept in a tuple."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shape = (channels, 1, 1)
        self.enter, self.leave = nn.Conv2d(3, channels, 1), nn.Conv2d(channels, 2, 1)
        self.scale = nn.Parameter(torch.randn(channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.enter(x) * self.scale.view(self.shape))


def test_a_number_in_a_tuple_follows() -> None:
    model, x = Scaled(6).double(), torch.randn(2, 3, 5, 5, dtype=FLOAT)
    graph, expected = trace(model, x), outputs(model, x)
    graph = evolvenet.resize(model, graph, {"enter": IndexMap.grow(6, 3)})
    assert distance(outputs(model, x), expected) < 1e-9
    assert model.shape == (9, 1, 1)
    assert without_reasons(graph) == without_reasons(trace(model, x))


def test_values_of_no_data_decide_nothing() -> None:
    """An index that is computed has no values on shadows without data: it must not be read there."""
    model = Between(lambda m, x, h: torch.index_select(h, 0, h[:, 0].argsort()), 8).double()
    x = torch.randn(2, 5, dtype=FLOAT)
    assert [trace(model, x).sizes for _ in range(3)] == [{"a": 8}] * 3


class LowRank(nn.Module):
    """LoRA: a product of two thin matrices is added to a weight `[out, in]`."""

    def __init__(self, rows: int, columns: int, rank: int) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(rows, rank)), nn.Parameter(torch.randn(rank, columns))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + 0.5 * self.up @ self.down


PARAMETRIZED = {
    "weight norm": (nn.utils.parametrizations.weight_norm, {"a": 8, "c.parametrizations.weight": 8}),
    "spectral norm": (nn.utils.parametrizations.spectral_norm, {"a": 8, "c.parametrizations.weight": 8}),
    "low rank": (
        lambda layer: parametrize.register_parametrization(layer, "weight", LowRank(8, 8, 3)),
        {"a": 8, "c.parametrizations.weight": 8, "c.parametrizations.weight.0": 3},
    ),
}


@pytest.mark.parametrize("name", PARAMETRIZED)
def test_a_parametrized_layer_resizes_with_what_makes_its_weight(name: str) -> None:
    wrap, sizes = PARAMETRIZED[name]
    model = nn.Sequential(
        OrderedDict(a=nn.Linear(5, 8), f=nn.ReLU(), c=wrap(nn.Linear(8, 8)), g=nn.ReLU(), h=nn.Linear(8, 2))
    )
    x = torch.randn(2, 5, dtype=FLOAT)
    graph, expected = trace(model.double().eval(), x), outputs(model, x)
    assert graph.sizes == sizes
    (full,) = [n for n, shape in graph.shapes.items() if n.startswith("c.") and shape == (8, 8)]
    assert full in {tie.tensor for tie in graph.widths["c.parametrizations.weight"].producers}
    assert full in {tie.tensor for tie in graph.widths["a"].consumers}
    graph = evolvenet.resize(model, graph, {name: shuffled(size) for name, size in graph.sizes.items()})
    assert distance(outputs(model, x), expected) < 1e-9
    wider = {width.name: IndexMap.grow(width.size, 3) for width in graph.resizable if width.mixed is None}
    graph = evolvenet.resize(model, graph, wider)
    assert distance(outputs(model, x), expected) < 1e-9
    assert without_reasons(graph) == without_reasons(trace(model, x))
    grown = {width.name: width.size + 2 for width in graph.resizable if width.mixed is None}
    evolvenet.grow(model, graph, grown)
    assert distance(outputs(model, x), expected) < 1e-9
    layer: Any = model.get_submodule("c")
    assert (layer.out_features, layer.in_features) == tuple(layer.weight.shape)


class Biased(nn.Module):
    """Swin v2's way: a dense layer reads a table of coordinates, which is a buffer, and makes a bias for each place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(4, 2))
        self.mlp = nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 1))
        self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu() + self.mlp(self.table).flatten())


def test_a_product_with_a_buffer_is_one_with_data() -> None:
    """Not a weight made of weights: whichever made the units would count as reading them, and growth change the output."""
    model, x = Biased().double(), torch.randn(2, 5, dtype=FLOAT)
    graph, expected = trace(model, x), outputs(model, x)
    assert [tie.tensor for tie in graph.widths["mlp.0"].producers] == ["mlp.0.weight"]
    assert [tie.tensor for tie in graph.widths["mlp.0"].consumers] == ["mlp.2.weight"]
    evolvenet.grow(model, graph, {"mlp.0": 9})
    assert distance(outputs(model, x), expected) < 1e-9


def test_a_weight_made_in_an_unknown_way_stays() -> None:
    """`torch.nn.utils.prune` keeps the layer's weight in an attribute; what the layer reads can change all the same."""
    masked = prune.identity(nn.Linear(8, 8), "weight")
    model = Between(lambda m, x, h: m.c(h), c=masked).double()
    graph = trace(model, torch.randn(2, 5, dtype=FLOAT))
    assert graph.sizes == {}
    assert any("it makes it from other tensors" in (width.frozen or "") for width in graph.widths.values())


def test_a_layer_of_which_a_part_is_used_stays_whole() -> None:
    """Its weight could be resized and its idle bias not: nothing could load such a layer again."""
    graph = trace(Between(lambda m, x, h: F.linear(h, m.c.weight), c=nn.Linear(8, 8)), torch.randn(2, 5))
    assert graph.sizes == {"a": 8}
    assert "expected bias of shape (7,)" in (graph.widths["c"].frozen or "")


def test_reasons_name_the_place() -> None:
    graph = graph_of(next(case for case in CASES if case.name == "hard_coded"))
    reason = graph.widths["stem"].frozen or ""
    assert "networks.py" in reason
    assert "view(len(x), 6, 16)" in reason


@pytest.mark.filterwarnings("ignore:Using `torch.compile:UserWarning")
def test_hooks_and_compiled_models_are_followed() -> None:
    model = networks.Mlp().double().eval()
    model[0].register_forward_hook(lambda module, inputs, output: output.mul(2))
    x = torch.randn(2, 5, dtype=FLOAT)
    assert trace(model, x).sizes == {"0": 12, "3": 9}
    assert trace(torch.compile(model), x).sizes == {"_orig_mod.0": 12, "_orig_mod.3": 9}  # type: ignore[arg-type]


def test_a_batch_of_one_will_do() -> None:
    """Batch norm in train mode refuses one value per channel; the batch is then given twice."""
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    assert trace(model, torch.randn(1, 5)).sizes == {"0": 8}


def test_a_train_mode_that_cannot_run_counts_as_not_run() -> None:
    def code(model: nn.Module, x: Tensor, h: Tensor) -> Tensor:
        if model.training:
            raise NotImplementedError("needs targets")
        return h

    assert trace(Between(code), torch.randn(2, 5)).sizes == {"a": 8}


def test_inputs_are_not_written_into() -> None:
    """Not even where the model needs real data and works in place."""
    model = Between(lambda m, x, h: h * float(x.add_(1.0).sum()))
    x = torch.zeros(2, 5)
    assert trace(model, x).sizes == {"a": 8}
    assert torch.equal(x, torch.zeros(2, 5))


def test_random_generators_go_on_as_if_nothing_had_run() -> None:
    def code(model: nn.Module, x: Tensor, h: Tensor) -> Tensor:
        return h * (random.random() + np.random.rand() + torch.rand(()).item())

    model, x = Between(code), torch.randn(2, 5)
    states = (random.getstate(), str(np.random.get_state()), torch.get_rng_state())
    assert trace(model, x).sizes == {"a": 8}
    assert states[:2] == (random.getstate(), str(np.random.get_state()))
    assert torch.equal(states[2], torch.get_rng_state())


def test_half_precision_and_frozen_weights() -> None:
    model = networks.ConvNet().bfloat16().requires_grad_(False)
    graph = trace(model, torch.randn(2, 3, 8, 8, dtype=torch.bfloat16))
    assert graph.sizes == {"0": 6, "4": 5, "7": 7}


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        (nn.ReLU(), torch.zeros(1), "got a ReLU without any"),
        (nn.Linear(5, 3), torch.zeros(1, 4), "does not run on the example inputs: RuntimeError"),
        (nn.Linear(5, 3), (torch.zeros(1, 5), torch.zeros(1)), "TypeError"),
        (nn.Linear(5, 3), {"wrong": torch.zeros(1, 5)}, "unexpected keyword argument 'wrong'"),
        (nn.LazyLinear(3), torch.zeros(1, 5), "got a lazy one. Run the model once"),
    ],
    ids=["no parameters", "wrong shape", "too many", "wrong keyword", "lazy"],
)
def test_bad_input(model: nn.Module, inputs: object, message: str) -> None:
    before = dict(vars(model)), dict(model._parameters), torch.get_rng_state()
    with pytest.raises(TraceError, match=message):
        trace(model, inputs)
    assert before[:2] == (dict(vars(model)), dict(model._parameters))
    assert torch.equal(before[2], torch.get_rng_state())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_module_is_refused() -> None:
    model = nn.Sequential(nn.Linear(5, 8), torch.jit.script(nn.Linear(8, 3)))
    with pytest.raises(TraceError, match="got a scripted Linear"):
        trace(model, torch.zeros(1, 5))
    assert model(torch.zeros(1, 5)).shape == (1, 3)

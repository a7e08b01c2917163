"""`trace` finds the widths of a model, freezes what it does not understand, and does not change the model."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import evolvenet
from evolvenet.errors import TraceError
from evolvenet.tracing.trace import trace
from tests.helpers import networks
from tests.helpers.cases import CASES, FLOAT, Case, distance, graph_of, outputs, shuffled
from tests.helpers.states import State
from tests.helpers.tracing import Between, Code, shuffle_and_widen


@pytest.mark.parametrize("case", CASES, ids=str)
def test_widths_are_those_listed_with_the_case(case: Case) -> None:
    graph = graph_of(case)
    assert graph.sizes == case.sizes
    assert {width.name for width in graph.resizable if width.mixed} == case.mixed
    for name, reason in case.frozen.items():
        assert reason in (graph.widths[name].frozen or "")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tracing_does_not_change_the_model(case: Case) -> None:
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
def test_permuting_the_units_of_all_widths_keeps_the_outputs(case: Case) -> None:
    """Every width at once, each by a permutation of its own: no tie is missing."""
    model, inputs, graph = case.model(), case.inputs(), graph_of(case)
    expected = outputs(model, inputs)
    evolvenet.resize(model, graph, {name: shuffled(size) for name, size in graph.sizes.items()})
    assert distance(outputs(model, inputs), expected) < 1e-9


@pytest.mark.parametrize("case", CASES, ids=str)
def test_zeroing_a_unit_of_any_width_changes_the_outputs(case: Case) -> None:
    """The unit is zeroed in all tensors of its width."""
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


def _write(h: Tensor, where: slice | Tensor, value: Tensor | float) -> Tensor:
    h[..., where] = value
    return h


def _rows(h: Tensor) -> Tensor:
    """The numbers of the rows."""
    return torch.tensor([1, 0], device=h.device)


def _doubled(h: Tensor) -> Tensor:
    h[:, :4] *= 2
    return h


def _in_half(op: Callable[[Tensor], Tensor]) -> Code:
    """An op on the first half of the units, in places: the boundary between the halves moves with the width."""

    def code(m: nn.Module, x: Tensor, h: Tensor) -> Tensor:
        places, half = h[:, :, None] * torch.arange(1, 5, device=h.device).to(h), h.shape[1] // 2
        return torch.cat([op(places[:, :half]), places[:, half:]], 1).mean(2)

    return code


def _filled_in_part(h: Tensor, value: float | bool, dtype: torch.dtype = FLOAT) -> Tensor:
    filled = torch.zeros(h.shape[1], dtype=dtype, device=h.device)
    filled[: h.shape[1] // 2] = value
    return filled


def _written(h: Tensor, unit: int) -> Tensor:
    h = h.clone()
    h[:, unit] = 0.0
    return h


PART = "works on a part of its units"
HALVES: dict[str, Callable[[Tensor], Tensor]] = {
    "rolled": lambda u: u.roll(1, 2),
    "flipped": lambda u: u.flip(2),
    "laid out in another order": lambda u: u.view(len(u), -1, 2, 2).transpose(2, 3).reshape(u.shape),
    "shifted": lambda u: torch.nn.functional.pad(u[:, :, 1:], (0, 1)),
    "averaged": lambda u: u.mean(2, keepdim=True).expand_as(u),
    "in proportion": lambda u: u.softmax(2),
    "normalised over a batch": lambda u: torch.nn.functional.batch_norm(u, None, None, training=True),
    "normalised": lambda u: torch.nn.functional.layer_norm(u, u.shape[2:]),
    "picked by an index": lambda u: u[:, :, torch.arange(3, -1, -1)],
    "mixed by a product": lambda u: u @ torch.ones(4, 4, dtype=FLOAT, device=u.device).tril(),
}

FROZEN: dict[str, tuple[Code, int, str]] = {
    **{f"a half {name}": (_in_half(op), 8, PART) for name, op in HALVES.items()},
    "a constant filled in part": (lambda m, x, h: h * _filled_in_part(h, 2.0), 8, DATA := "fixed size"),
    "a mask filled in part": (lambda m, x, h: torch.where(_filled_in_part(h, True, torch.bool), h, -h), 8, DATA),
    "two constants side by side": (
        lambda m, x, h: h * torch.cat([torch.ones(h.shape[1] - 2), torch.full((2,), 2.0)]).to(h),
        8,
        DATA,
    ),
    "gated by the last one": (lambda m, x, h: h * h[:, -1:].sigmoid(), 8, PART),
    "gated by the first one": (lambda m, x, h: h * h[:, 0].sigmoid()[:, None], 8, PART),
    "less the first one": (lambda m, x, h: h - h[:, :1], 8, PART),
    "one of them zeroed": (lambda m, x, h: _written(h, 2), 8, PART),
    "one of them read by itself": (lambda m, x, h: h + h[:, 0].sum(), 8, PART),
    "sums along the units": (lambda m, x, h: h.cumsum(1), 8, "works along its units"),
    "a triangle of them": (lambda m, x, h: h.tril(), 8, "works along its units"),
    "softmax over them": (lambda m, x, h: h.softmax(1), 8, "makes its units compete"),
    "the largest three": (lambda m, x, h: h.topk(3, 1)[0], 3, "works along its units"),
    "an order of their own": (lambda m, x, h: h.flip(1), 8, "another order"),
    "rolled by one": (lambda m, x, h: h.roll(1, 1), 8, "another order"),
    "picked by an index": (lambda m, x, h: h[:, torch.tensor([0, 3, 3, 1])], 4, "picks them by an index"),
    "sorted by themselves": (lambda m, x, h: h.sort(1)[0], 8, "works along its units"),
    "gathered": (lambda m, x, h: h.gather(1, x.argsort(1)), 5, "picks them by an index"),
    "some of them gathered": (lambda m, x, h: h.gather(0, _rows(h)[:, None].repeat(1, 3)), 3, "a part of its units"),
    "added up by an index": (
        lambda m, x, h: h.new_zeros(2, 8).index_add(1, h[0].long() * 0, h),
        8,
        "picks them by an index",
    ),
    "in the sum of a fixed size": (
        lambda m, x, h: h.new_zeros(3, 8).index_add(0, _rows(h), h)[:2],
        8,
        "a trial raised",
    ),
    "put to places": (
        lambda m, x, h: h.index_put((_rows(h)[:, None], _rows(h)), torch.ones(2, 2).to(h)),
        8,
        "picks them by",
    ),
    "put to the last places": (lambda m, x, h: _write(h, _rows(h), 0.0), 8, "writes them by an index"),
    "numbers by place": (lambda m, x, h: h * torch.arange(h.shape[1], device=h.device), 8, DATA),
    "numbers from outside": (lambda m, x, h: h * torch.tensor([1.0] * 8, device=h.device), 8, DATA),
    "an input of their size": (lambda m, x, h: h + torch.cat([x, x[:, :3]], 1), 8, DATA),
    "a part doubled in place": (lambda m, x, h: _doubled(h), 8, "a part of its units"),
    "a part set to zero": (lambda m, x, h: _write(h, slice(4), 0.0), 8, "a part of its units"),
    "two activations": (lambda m, x, h: torch.cat([h[:, :4].sigmoid(), h[:, 4:].tanh()], 1), 8, "a part of its units"),
    "written into a part": (
        lambda m, x, h: _write(torch.zeros(2, 12, dtype=FLOAT, device=h.device), slice(8), h),
        12,
        "a trial raised",
    ),
    "other numbers from the same bits": (lambda m, x, h: h.view(torch.int64).view(FLOAT), 8, "has no rule"),
    "memory read anew": (lambda m, x, h: h.t().as_strided((2, 8), (8, 1)), 8, "laid out in another way"),
    "an op without a rule": (lambda m, x, h: torch.linalg.qr(h)[0] @ h[:, :2].T @ h, 8, "has no rule"),
    "a view by a number": (lambda m, x, h: h.view(2, 8), 8, "a trial raised"),
    "halves cut at a number": (lambda m, x, h: h[:, :4].relu() * h[:, 4:], 4, "a trial raised"),
    "a view by a number in training": (lambda m, x, h: h.view(-1, 8) if m.training else h, 8, "a trial raised"),
    "through numpy": (lambda m, x, h: torch.from_numpy(h.detach().numpy() * 2), 8, "a trial raised"),
}


@pytest.mark.parametrize("name", FROZEN)
def test_units_used_in_an_unknown_way_are_frozen(name: str) -> None:
    code, reads, reason = FROZEN[name]
    graph = trace(Between(code, reads).double(), torch.randn(2, 5, dtype=FLOAT))
    assert graph.sizes == {}
    assert any(reason in (width.frozen or "") for width in graph.widths.values()), str(graph)


RESIZABLE: dict[str, tuple[Code, int, dict[str, int]]] = {
    "a number for each row": (lambda m, x, h: h + torch.full_like(h[:, :1], 0.5), 8, {"a": 8}),
    "mean of a distribution": (lambda m, x, h: torch.distributions.Normal(h, 1.0 + 0 * h).mean, 8, {"a": 8}),
    "rows gathered": (lambda m, x, h: h.gather(0, _rows(h)[:, None].expand_as(h)), 8, {"a": 8}),
    "rows added up": (lambda m, x, h: torch.zeros_like(h).index_add_(0, _rows(h), h), 8, {"a": 8}),
    "rows added up in a new tensor": (
        lambda m, x, h: h.new_zeros(2, h.shape[1]).index_add(0, _rows(h), h),
        8,
        {"a": 8},
    ),
    "rows scattered": (
        lambda m, x, h: torch.zeros_like(h).scatter_add(0, _rows(h)[:, None].expand_as(h), h),
        8,
        {"a": 8},
    ),
    "rows filled": (lambda m, x, h: h.index_fill(0, _rows(h)[:1], 0.0), 8, {"a": 8}),
    "rows put by an index": (
        lambda m, x, h: torch.zeros_like(h).index_put((_rows(h),), h, accumulate=True),
        8,
        {"a": 8},
    ),
    "rows put by a mask": (lambda m, x, h: h.index_put((x[:, 0] > 100,), h.new_zeros(())), 8, {"a": 8}),
    "moved in place": (lambda m, x, h: h.t_().t_().unsqueeze_(1).transpose_(1, 2).squeeze_(2), 8, {"a": 8}),
    "squeezed in place": (lambda m, x, h: h[:, :, None, None].squeeze_(), 8, {"a": 8}),
    "every unit twice": (lambda m, x, h: h.repeat_interleave(2, 1), 16, {"a": 8}),
    "all units twice": (lambda m, x, h: torch.cat([h, -h], 1), 16, {"a": 8}),
    "with the input beside": (lambda m, x, h: torch.cat([h, x], 1), 13, {"a": 8}),
    "normalised": (lambda m, x, h: functional.normalize(h, dim=1), 8, {"a": 8}),
    "sums along the samples": (lambda m, x, h: h.cumsum(0).sort(0)[0], 8, {"a": 8}),
    "samples picked": (lambda m, x, h: h[x[:, 0].argsort()], 8, {"a": 8}),
    "samples masked": (lambda m, x, h: h.masked_fill(x[:, :1] > 0, 0.0), 8, {"a": 8}),
    "steps set to zero": (lambda m, x, h: _write(h, slice(None), 0.0) + m.c(x), 8, {"a": 8}),
    "the first units apart": (lambda m, x, h: h[:, 4:], 4, {"a#2": 4}),
    "padded": (lambda m, x, h: h + functional.pad(m.d(x), (0, 3)), 8, {"a": 5}),
    "checkpointed": (lambda m, x, h: checkpoint(m.c, x, use_reentrant=False) + h, 8, {"a": 8}),
    "einsum": (lambda m, x, h: torch.einsum("bi,oi->bo", h, m.e.weight), 7, {"a": 8, "e": 7}),
    "mapped over samples": (lambda m, x, h: torch.vmap(m.e)(h), 7, {"a": 8, "e": 7}),
    "equal pieces": (
        lambda m, x, h: (lambda p, q: torch.cat([m.e(p), q], 1))(*h.chunk(2, 1)),
        8,
        {"a": 4, "e": 4},
    ),
    "branches compete": (lambda m, x, h: (lambda g: (g.softmax(1) * g).sum(1))(h.view(len(h), 2, -1)), 4, {"a": 4}),
    "normalised heads": (lambda m, x, h: functional.normalize(h.view(len(h), 2, -1), dim=-1).flatten(1), 8, {"a": 4}),
    "gated in place": (lambda m, x, h: (lambda a, b: a.mul_(b.sigmoid_()))(*h.chunk(2, -1)), 4, {"a": 4}),
}


RESIZABLE_WITH = {"equal pieces": {"e": nn.Linear(4, 4, bias=False)}}


@pytest.mark.parametrize("name", RESIZABLE)
def test_units_used_in_a_known_way_are_resizable(name: str) -> None:
    code, reads, sizes = RESIZABLE[name]
    layers = {"c": nn.Linear(5, 8), "d": nn.Linear(5, 5), "e": nn.Linear(8, 7, bias=False)}
    layers |= RESIZABLE_WITH.get(name, {})
    model = Between(code, reads, **layers).double()
    x = torch.randn(2, 5, dtype=FLOAT)
    graph = trace(model, x)
    assert graph.sizes == sizes
    shuffle_and_widen(model, graph, x)


def test_a_trial_fails_by_its_ties_though_shapes_agree() -> None:
    """Four groups of 16, or two halves cut at 8: other sizes fit as well, but hold other units."""
    x = torch.randn(2, 5, dtype=FLOAT)
    grouped = Between(lambda m, x, h: functional.group_norm(m.c(x), 4), 16, c=nn.Linear(5, 16)).double()
    assert "a trial tied its units differently" in (trace(grouped, x).widths["c"].frozen or "")

    def halves(model: nn.Module, x: Tensor, h: Tensor) -> Tensor:
        joined = torch.cat([h, model.get_submodule("c")(x)], 1)
        return torch.cat([joined[:, :8].tanh(), joined[:, 8:].sigmoid()], 1)

    graph = trace(Between(halves, 16, c=nn.Linear(5, 8)).double(), x)
    assert "in a trial aten::tanh in Between works on a part of its units" in (graph.widths["a"].frozen or "")


def test_a_computed_index_is_not_read_on_meta_tensors() -> None:
    """An index that is computed has no values on shadows without data: it must not be read there."""
    model = Between(lambda m, x, h: torch.index_select(h, 0, h.norm(dim=1).argsort()), 8).double()
    x = torch.randn(2, 5, dtype=FLOAT)
    assert [trace(model, x).sizes for _ in range(3)] == [{"a": 8}] * 3


def test_reasons_name_the_line_of_the_model_that_raised() -> None:
    graph = graph_of(next(case for case in CASES if case.name == "hard_coded"))
    reason = graph.widths["stem"].frozen or ""
    assert "unusual.py" in reason
    assert "view(len(x), 6, 16)" in reason


@pytest.mark.filterwarnings("ignore:Using `torch.compile:UserWarning")
def test_hooks_and_compiled_models_are_traced() -> None:
    model = networks.Mlp().double().eval()
    model[0].register_forward_hook(lambda module, inputs, output: output.mul(2))
    x = torch.randn(2, 5, dtype=FLOAT)
    assert trace(model, x).sizes == {"0": 12, "3": 9}
    assert trace(torch.compile(model), x).sizes == {"_orig_mod.0": 12, "_orig_mod.3": 9}  # type: ignore[arg-type]


def test_a_batch_of_one_sample_is_enough_with_batch_norm() -> None:
    """Batch norm in train mode refuses one value per channel; the batch is then given twice."""
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    assert trace(model, torch.randn(1, 5)).sizes == {"0": 8}


def test_a_model_that_raises_in_train_mode_is_traced_in_eval_mode() -> None:
    def code(model: nn.Module, x: Tensor, h: Tensor) -> Tensor:
        if model.training:
            raise NotImplementedError("needs targets")
        return h

    assert trace(Between(code), torch.randn(2, 5)).sizes == {"a": 8}


def test_inputs_are_not_written_to() -> None:
    """Not even where the model needs real data and works in place."""
    model = Between(lambda m, x, h: h * float(x.add_(1.0).sum()))
    x = torch.zeros(2, 5)
    assert trace(model, x).sizes == {"a": 8}
    assert torch.equal(x, torch.zeros(2, 5))


def test_tracing_does_not_change_random_generators() -> None:
    def code(model: nn.Module, x: Tensor, h: Tensor) -> Tensor:
        return h * (random.random() + np.random.rand() + torch.rand(()).item())

    model, x = Between(code), torch.randn(2, 5)
    states = (random.getstate(), str(np.random.get_state()), torch.get_rng_state())
    assert trace(model, x).sizes == {"a": 8}
    assert states[:2] == (random.getstate(), str(np.random.get_state()))
    assert torch.equal(states[2], torch.get_rng_state())


def test_half_precision_and_parameters_without_gradients_are_traced() -> None:
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
def test_inputs_that_the_model_does_not_run_on_are_refused(model: nn.Module, inputs: object, message: str) -> None:
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


class Tokens(nn.Module):
    """Dense features after register tokens, of which there may be none, and in which no place may be left to pass through."""

    def __init__(self, registers: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)
        self.registers = nn.Parameter(torch.randn(1, registers, 8))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([self.registers.expand(len(x), -1, -1), self.a(x)], 1)
        size = h.shape[-1]
        return self.b(torch.cat([h[..., :size] * 2, h[..., size:]], -1))


@pytest.mark.parametrize("registers", [0, 1, 2])
def test_tensors_without_elements_have_the_units_of_their_axes(registers: int) -> None:
    model, x = Tokens(registers).double(), torch.randn(2, 3, 4, dtype=FLOAT)
    graph = shuffle_and_widen(model, trace(model, x), x)
    assert list(graph.sizes.values()) == [11]
    assert model.registers.shape == (1, registers, len(model.a.bias))

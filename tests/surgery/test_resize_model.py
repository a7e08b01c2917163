"""A surgery against a copy of every entry by itself; the model is untouched until it is installed, whole or not at all."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import evolvenet
from evolvenet.errors import ResizeError
from evolvenet.graph.index_map import IndexMap
from evolvenet.graph.width_graph import WidthGraph
from evolvenet.surgery import resize_model as surgery_module
from evolvenet.surgery.resize_model import compile_surgery, exchange, install, moved
from evolvenet.tracing.trace import trace
from tests.helpers import networks
from tests.helpers.cases import CASES, Case, distance, graph_of, outputs
from tests.helpers.states import State, same_bits

BY_NAME = {case.name: case for case in CASES}


def mixture(graph: WidthGraph) -> dict[str, IndexMap]:
    """For every width: one unit removed, one split, two new units, the rest in another order."""
    return {
        width.name: IndexMap.of([width.size - 1, -1, *range(1, width.size), -1], width.size)
        for width in graph.resizable
    }


def by_hand(tensor: Tensor, graph: WidthGraph, maps: Mapping[str, IndexMap], name: str, new_unit: float) -> Tensor:
    """The new tensor, each entry looked up by itself: its old place along every axis, or that of a new unit."""
    sources: list[list[int]] = []
    for dim, length in enumerate(tensor.shape):
        here: list[int] = []
        start = 0
        for part in graph.layouts[name].get(dim, ()):
            units = range(part.length // part.repeat)
            indices = maps[part.width].indices if part.width is not None and part.width in maps else units
            for unit in indices:
                here += [-1 if unit < 0 else start + unit * part.repeat + k for k in range(part.repeat)]
            start += part.length
        sources.append(here if dim in graph.layouts[name] else list(range(length)))
    entries = [new_unit if -1 in place else float(tensor[place]) for place in itertools.product(*sources)]
    return torch.tensor(entries, dtype=tensor.dtype).reshape([len(axis) for axis in sources])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_entry_goes_where_its_units_go(case: Case) -> None:
    model, graph = case.model(), graph_of(case)
    maps = mixture(graph)
    before = State.of(model)
    surgery = compile_surgery(model, graph, maps)
    assert before.differences(model) == []
    ones = {id(m) for m in model.modules() if "Norm" in type(m).__name__}
    for change in surgery.changes:
        owner = model.get_submodule(change.name.rpartition(".")[0])
        scales = id(owner) in ones and change.name.endswith(("weight", "running_var"))
        gates = change.name in graph.gates and not change.tensor.requires_grad
        here = {name: index_map.copying() for name, index_map in maps.items()} if gates else maps
        expected = by_hand(change.tensor.detach(), graph, here, change.name, float(scales))
        assert same_bits(change.value, expected), change.name
        assert tuple(change.value.shape) == surgery.graph.shapes[change.name]
        assert change.value.data_ptr() != change.tensor.data_ptr()
    untouched = graph.shapes.keys() - {change.name for change in surgery.changes}
    assert all(graph.shapes[name] == surgery.graph.shapes[name] for name in untouched)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_install_keeps_every_object_and_undo_brings_all_back(case: Case) -> None:
    model, graph = case.model(), graph_of(case)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = State.of(model)
    identities = [id(tensor) for tensor in (*model.parameters(), *model.buffers())]
    undo = install(model, compile_surgery(model, graph, mixture(graph)))
    assert [id(tensor) for tensor in (*model.parameters(), *model.buffers())] == identities
    assert {name: tuple(p.shape) for name, p in model.named_parameters()}.items() <= _after(case).shapes.items()
    assert before.differences(model) != []
    undo()
    assert before.differences(model) == []


def _after(case: Case) -> WidthGraph:
    graph = graph_of(case)
    return graph.resized(mixture(graph))


@pytest.mark.parametrize("failing", ["exchange", "refresh"])
@pytest.mark.parametrize("name", ["resnet", "mobilenet", "lstm_deep", "channels_last", "tied_weights"])
def test_an_error_on_the_way_leaves_all_as_it_was(name: str, failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever step fails, here every second one in turn."""
    case = BY_NAME[name]
    model, graph = case.model(), graph_of(case)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    surgery = compile_surgery(model, graph, mixture(graph))
    before, real = State.of(model), getattr(surgery_module, failing)
    steps = len(surgery.changes) if failing == "exchange" else len(list(model.modules()))
    for bad in range(0, steps, 2):
        calls = itertools.count()

        def fail(*args: object, calls: itertools.count[int] = calls, bad: int = bad) -> None:
            real(*args)
            if next(calls) == bad:
                raise MemoryError("no more")

        monkeypatch.setattr(surgery_module, failing, fail)
        with pytest.raises(MemoryError):
            install(model, surgery)
        monkeypatch.undo()
        assert before.differences(model) == []
    install(model, surgery)


def test_gradients_follow_their_entries() -> None:
    case = BY_NAME["resnet"]
    model, graph = case.model(), graph_of(case)
    outputs_before = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.grad = outputs_before[name].clone()
    model.get_parameter("stem.weight").grad = None
    maps = mixture(graph)
    install(model, compile_surgery(model, graph, maps))
    for name, parameter in model.named_parameters():
        if name == "stem.weight":
            assert parameter.grad is None
            continue
        assert parameter.grad is not None
        assert same_bits(parameter.grad, by_hand(outputs_before[name], graph, maps, name, 0.0)), name


def test_an_autograd_graph_from_before_the_change_is_no_obstacle() -> None:
    """A loss from before the change holds the old shapes; the next step is correct all the same."""
    case = BY_NAME["conv"]
    model, graph, x = case.model(), graph_of(case), case.inputs()
    old = model(x).square().sum()
    old.backward(retain_graph=True)
    install(model, compile_surgery(model, graph, {"0": IndexMap.keep([0, 1, 4], 6), "4": IndexMap.grow(5, 3)}))
    other = networks.ConvNet().double().eval()
    install(other, compile_surgery(other, graph, {"0": IndexMap.keep([0, 1, 4], 6), "4": IndexMap.grow(5, 3)}))
    other.load_state_dict(model.state_dict())
    for one in (model, other):
        one.zero_grad()
        one(x).square().sum().backward()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert one.grad is not None
        assert two.grad is not None
        assert same_bits(one.grad, two.grad)
    kept = {name: parameter.grad for name, parameter in model.named_parameters()}
    with pytest.raises(RuntimeError):
        old.backward()
    assert all(parameter.grad is kept[name] for name, parameter in model.named_parameters())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_in_any_gradient_mode(mode: type) -> None:
    """Parameters changed under inference mode could not be trained."""
    case = BY_NAME["conv"]
    model, graph, x = case.model(), graph_of(case), case.inputs()
    with mode():
        install(model, compile_surgery(model, graph, mixture(graph)))
    model(x).sum().backward()
    assert all(parameter.grad is not None and parameter.is_leaf for parameter in model.parameters())


def test_the_memory_format_stays() -> None:
    case = BY_NAME["channels_last"]
    model, graph = case.model(), graph_of(case)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    install(model, compile_surgery(model, graph, mixture(graph)))
    for parameter in model.parameters():
        if parameter.dim() == 4:
            assert parameter.is_contiguous(memory_format=torch.channels_last)
            assert parameter.grad is not None
            assert parameter.grad.is_contiguous(memory_format=torch.channels_last)


def in_channels_last(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dim() == 4:
            expected = torch.empty(parameter.shape).to(memory_format=torch.channels_last)
            assert parameter.stride() == expected.stride(), name


@pytest.mark.parametrize("name", ["mobilenet", "resnet"])
def test_the_memory_format_stays_where_only_strides_tell(name: str, tmp_path: Path) -> None:
    # Depthwise and 1 × 1 weights are contiguous in both formats, and convolutions go by the strides.
    case = BY_NAME[name]
    model, again = (case.model().to(memory_format=torch.channels_last) for _ in range(2))  # pyright: ignore
    optimizer, graph = torch.optim.AdamW(model.parameters()), graph_of(case)
    smaller = {width.name: width.size - width.size // 3 for width in graph.resizable}
    batches = [case.inputs(seed) for seed in range(2)]
    graph = evolvenet.prune(model, graph, smaller, batches=batches, optimizers=[optimizer])
    in_channels_last(model)
    torch.save(model.state_dict(), tmp_path / "smaller.pt")
    in_channels_last(evolvenet.load(again, tmp_path / "smaller.pt"))
    evolvenet.grow(model, graph, case.sizes, optimizers=[optimizer])
    in_channels_last(model)


def test_exchange_keeps_what_hangs_on_the_parameter() -> None:
    parameter = nn.Parameter(torch.ones(3))
    seen: list[Tensor] = []
    parameter.register_hook(seen.append)
    parameter.mark = "kept"  # type: ignore[attr-defined]
    exchange(parameter, torch.ones(2), torch.zeros(2))
    assert parameter.requires_grad
    assert parameter.mark == "kept"  # type: ignore[attr-defined]
    (parameter * 2).sum().backward()
    assert len(seen) == 1
    assert torch.equal(parameter.grad, torch.full((2,), 2.0))  # type: ignore[arg-type]


def test_moved_is_true_for_old_entries_and_false_for_new_units() -> None:
    case = BY_NAME["densenet"]
    model, graph = case.model(), graph_of(case)
    ones = {name: torch.ones_like(parameter) for name, parameter in model.named_parameters()}
    model.load_state_dict({**model.state_dict(), **ones})
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = torch.ones(module.num_features, dtype=torch.float64)
    for change in compile_surgery(model, graph, mixture(graph)).changes:
        if not change.name.startswith("norms"):
            assert torch.equal(moved(change), change.value.bool()), change.name


def test_numbers_that_modules_keep() -> None:
    case = BY_NAME["mobilenet"]
    model, graph = case.model(), graph_of(case)
    install(model, compile_surgery(model, graph, {"expand": IndexMap.keep([1, 5], 8), "stem": IndexMap.grow(4, 1)}))
    depthwise, project = model.get_submodule("depthwise"), model.get_submodule("project")
    assert (depthwise.groups, depthwise.in_channels, depthwise.out_channels) == (2, 2, 2)
    assert (project.in_channels, project.out_channels) == (2, 5)
    assert model.get_submodule("norm2").num_features == 2
    assert model.get_submodule("head").in_features == 5


class Stored(nn.Module):
    """Keeps the size of one layer in an attribute that its code uses; its last layer consumes two layers side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.dim = 8
        self.one, self.two = nn.Linear(5, 8), nn.Linear(5, 8)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.one(x).view(len(x), self.dim), self.two(x)], 1))


def test_numbers_of_the_models_own_code_follow() -> None:
    """In proportion, unless a function for the module's type computes them."""
    model, x = Stored().double(), torch.randn(2, 5, dtype=torch.float64)
    graph, expected = trace(model, x), outputs(model, x)
    assert graph.sizes == {"one": 8, "two": 8}
    undo = install(model, compile_surgery(model, graph, {"one": IndexMap.grow(8, 1), "two": IndexMap.grow(8, 3)}))
    assert (model.dim, model.head.in_features, model.one.out_features) == (9, 20, 9)
    assert distance(outputs(model, x), expected) < 1e-9
    undo()
    assert (model.dim, model.head.in_features, model.one.out_features) == (8, 16, 8)
    install(model, compile_surgery(model, graph, {"two": IndexMap.keep([1, 2], 8)}))
    assert (model.dim, model.head.in_features) == (8, 10)


@pytest.mark.parametrize("change", ["another model", "an older state"])
def test_a_graph_of_something_else_is_refused(change: str) -> None:
    case = BY_NAME["mlp"]
    graph, shrink = graph_of(case), {"0": IndexMap.keep([0, 1], 12)}
    model = case.model() if change == "an older state" else networks.Reused()
    if change == "an older state":
        install(model, compile_surgery(model, graph, shrink))
    before = State.of(model)
    with pytest.raises(ResizeError, match=r"'0\.weight' of shape .* trace the model again"):
        compile_surgery(model, graph, shrink)
    assert before.differences(model) == []


def test_a_resized_model_computes_with_the_columns_of_the_kept_units() -> None:
    """One forward pass by hand: a dense layer that keeps units 2 and 0."""
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 1, bias=False)).double()
    rows, columns = torch.tensor([[1.0, 2], [3, 4], [5, 6]]), torch.tensor([[7.0, 8, 9]])
    model.load_state_dict({"0.weight": rows, "1.weight": columns})
    graph = graph_of(Case("two", lambda: model, (1, 2), {"0": 3}))
    model.load_state_dict({"0.weight": rows, "1.weight": columns})
    install(model, compile_surgery(model, graph, {"0": IndexMap.keep([2, 0], 3)}))
    x = torch.tensor([[1.0, 10.0]], dtype=torch.float64)
    assert outputs(model, x)[0].item() == 9 * (5 + 60) + 7 * (1 + 20)
    assert distance(outputs(model, x), outputs(model, x)) == 0

"""Readers fitted one after the other, against least squares on the rows and against the network's own outputs."""

from __future__ import annotations

import pytest
import torch
from cases import FLOAT, distance, outputs
from hypothesis import given
from hypothesis import strategies as st
from states import State
from torch import Tensor, nn

import evolvenet
from evolvenet import compensate as compensate_module
from evolvenet.compensate import Places, compensate, fit_reader, outputs_first, reads
from evolvenet.index_map import IndexMap
from evolvenet.surgery import compile_surgery
from evolvenet.trace import trace

READERS = {
    "dense": (nn.Linear(4, 3), (5, 4)),
    "dense over tokens": (nn.Linear(4, 3), (5, 7, 4)),
    "dense over a grid": (nn.Linear(4, 3, bias=False), (5, 2, 3, 4)),
    "conv1d": (nn.Conv1d(4, 3, 3, stride=2, padding=1), (5, 4, 9)),
    "conv2d": (nn.Conv2d(4, 3, (3, 2), stride=(1, 2), padding=(2, 0), dilation=(2, 1)), (5, 4, 8, 9)),
    "conv2d of one place": (nn.Conv2d(4, 3, 1, bias=False), (5, 4, 6, 6)),
    "conv3d": (nn.Conv3d(4, 3, 2, padding=1), (5, 4, 3, 4, 5)),
}


@pytest.mark.parametrize("name", READERS)
def test_what_a_reader_multiplies_gives_its_output(name: str) -> None:
    made, shape = READERS[name]
    module = made.double()
    x = torch.randn(shape, dtype=FLOAT)
    y = outputs_first(module, module(x))
    places = Places(torch.tensor([0, 4, 2]), torch.tensor([0, y.shape[1] - 1, y.shape[1] // 2]))
    rows = reads(module, x, places)
    assert rows is not None
    weight = module.get_parameter("weight").flatten(1)
    bias = 0 if module.bias is None else module.bias
    torch.testing.assert_close(rows @ weight.T + bias, y[places.sample, places.position])


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        nn.ConvTranspose2d(4, 4, 3),
        nn.Bilinear(4, 4, 2),
    ],
    ids=str,
)
def test_what_is_not_understood_is_left_alone(module: nn.Module) -> None:
    assert reads(module, torch.zeros(2, 4, 8, 8), Places(torch.tensor([0]), torch.tensor([0]))) is None


@given(st.integers(1, 6), st.integers(1, 4), st.booleans(), st.integers(0, 999))
def test_a_fit_is_least_squares_on_all_rows(columns: int, out: int, bias: bool, seed: int) -> None:
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(80, columns, generator=made, dtype=FLOAT) + 1
    y = x @ torch.randn(columns, out, generator=made, dtype=FLOAT) + 3 * bias
    wide = torch.cat([x, torch.ones(80, 1).double()], 1) if bias else x
    solution = torch.linalg.lstsq(wide, y).solution
    start = torch.randn(out, columns, generator=made, dtype=FLOAT)
    odd = torch.arange(80) % 2 == 1
    found = fit_reader(x, y, start, torch.zeros(out, dtype=FLOAT) if bias else None, odd)
    assert found is not None
    torch.testing.assert_close(found[0], solution[:columns].T, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found[1], solution[-1] if bias else torch.zeros(out).double(), atol=5e-3, rtol=1e-3)


@given(st.integers(2, 12), st.integers(1, 12), st.integers(0, 999))
def test_noise_is_not_fitted(rows: int, columns: int, seed: int) -> None:
    """What an offered fit does to the half that chose it is never worse than leaving the weights."""
    made = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(rows, width, generator=made, dtype=FLOAT) for width in (columns, 2))
    weight, odd = torch.zeros(2, columns, dtype=FLOAT), torch.arange(rows) % 2 == 1
    found = fit_reader(x, y, weight, None, odd)
    if found is not None:
        whole = (y - x @ found[0].T).square().sum()
        assert whole <= y.square().sum() * (1 + 1e-9)


def convnet() -> nn.Sequential:
    """Convolutions with a norm between, flattened into dense layers."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(96, 10),
        nn.ReLU(),
        nn.Linear(10, 3),
    ).double()


def test_units_that_others_can_stand_in_for_cost_nothing() -> None:
    model = convnet().eval()
    with torch.no_grad():
        for name in ("weight", "bias"):
            for layer, rows in ((0, 4), (6, 5)):
                whole = model[layer].get_parameter(name)
                whole[rows:] = 2 * whole[:rows]
        nn.init.zeros_(model[1].get_buffer("running_mean"))
    x = torch.randn(64, 2, 8, 8, dtype=FLOAT)
    graph, expected = trace(model, x[:1]), outputs(model, x)
    evolvenet.prune(model, graph, {"0": 4, "6": 5}, batches=[x[:40], x[40:]])
    assert distance(outputs(model, x), expected) < 1e-3


def error_after(cut: dict[str, int], batches: list[Tensor] | None, x: Tensor) -> float:
    model = convnet().eval()
    expected = outputs(model, x)
    evolvenet.prune(model, trace(model, x[:1]), cut, batches=batches)
    return distance(outputs(model, x), expected)


def test_fitted_outputs_are_nearer_on_images_not_seen() -> None:
    seen, unseen = torch.randn(2, 256, 2, 8, 8, dtype=FLOAT)
    cut = {"0": 5, "3": 4, "6": 6}
    assert error_after(cut, [seen], unseen) < 0.7 * error_after(cut, None, unseen)


def test_nothing_is_changed_yet() -> None:
    model = convnet().train()
    x = torch.randn(32, 2, 8, 8, dtype=FLOAT)
    graph = trace(model, x[:1])
    surgery = compile_surgery(model, graph, {"0": IndexMap.keep(range(5), size=8)})
    before, held = State.of(model), [change.value.clone() for change in surgery.changes]
    fitted = compensate(model, graph, surgery, [x])
    assert before.differences(model) == []
    assert all(torch.equal(change.value, value) for change, value in zip(surgery.changes, held, strict=True))
    moved = {change.name for change in fitted.changes} - {change.name for change in surgery.changes}
    assert moved == {"3.bias"}


class Twice(nn.Module):
    """A layer that runs twice reads two different things: there is no one fit for it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.b(self.a(x)).relu()))


class Gated(nn.Linear):
    """A dense layer with a weight of its own beside the usual one, which reads the same units."""

    def __init__(self) -> None:
        super().__init__(6, 2)
        self.gate_weight = nn.Parameter(torch.randn(2, 6))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * (input @ self.gate_weight.T).sigmoid()


class SharedBias(nn.Module):
    """Two readers with one bias: no fit of one of them may move it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 6), nn.Linear(6, 2), nn.Linear(6, 2)
        self.c.bias = self.b.bias

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x).relu()
        return self.b(hidden) + self.c(hidden.square())


@pytest.mark.parametrize(
    ("model", "batches"),
    [
        (nn.Sequential(nn.Linear(3, 6), Gated()), [torch.randn(32, 3)]),
        (SharedBias(), [torch.randn(32, 3)]),
        (Twice(), [torch.randn(32, 3)]),
        (nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2)), [torch.randn(1, 3)]),
        (nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2)), []),
        (nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2)), [torch.full((8, 3), float("nan"))]),
    ],
    ids=["a weight of its own", "a shared bias", "runs twice", "one sample", "no batch", "NaN"],
)
def test_without_a_fit_the_cut_is_bare(model: nn.Module, batches: list[Tensor]) -> None:
    graph = trace(model, torch.zeros(2, 3))
    (name,) = list(graph.sizes)[-1:]
    surgery = compile_surgery(model, graph, {name: IndexMap.keep([0, 2], size=6)})
    bare = {change.name: change.value.clone() for change in surgery.changes}
    fitted = {change.name: change.value for change in compensate(model, graph, surgery, batches).changes}
    skipped = {"c.weight"} if isinstance(model, Twice) else set()
    assert all(torch.equal(fitted[key], value) for key, value in bare.items() if key not in skipped)


def test_batches_of_other_shapes_are_not_joined() -> None:
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    graph = trace(model, torch.zeros(2, 3, dtype=FLOAT))
    x = torch.randn(40, 3, dtype=FLOAT)
    expected = outputs(model, x)
    evolvenet.prune(model, graph, {"0": 5}, batches=[x, torch.randn(4, 2, 3, dtype=FLOAT)])
    assert distance(outputs(model, x), expected) < 1


def test_large_samples_are_taken_in_small_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them run in one pass, so what they hold is bounded and not only their number."""
    seen: list[int] = []
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2))
    graph = trace(model, torch.zeros(2, 3))
    model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    surgery = compile_surgery(model, graph, {"0": IndexMap.keep([0, 2], size=6)})
    for entries, samples in ((60, 20), (3, 2), (10**9, 50)):
        monkeypatch.setattr(compensate_module, "ENTRIES", entries)
        compensate(model, graph, surgery, [torch.randn(25, 3), torch.randn(25, 3)])
        assert seen == [samples] * 2
        seen.clear()

"""The fit after a cut is taken as far as it helps on batches that are held out from it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import evolvenet
from evolvenet.errors import TraceError
from evolvenet.execution.sampling import held_out, in_halves
from evolvenet.graph.width_graph import WidthGraph
from evolvenet.measurement.output_error import output_error, outputs_on
from evolvenet.pruning import fitted_prune
from evolvenet.pruning.fitted_prune import plan_fitted_prune
from evolvenet.pruning.reconstruction import reconstruct
from evolvenet.surgery.resize_model import Surgery, compile_surgery, install
from evolvenet.tracing.trace import trace
from tests.helpers.small_models import convnet, mlp, mobile

SIZES = {"0": 12, "2": 12}


def case(seed: int = 0) -> tuple[nn.Module, WidthGraph, list[Tensor]]:
    torch.manual_seed(seed)
    model = mlp(6, 24, 24, 3)
    batches = [torch.randn(40, 6, dtype=torch.float64) for _ in range(4)]
    return model, trace(model, batches[0][:2]), batches


def values(surgery: Surgery) -> Mapping[str, Tensor]:
    return {change.name: change.value for change in surgery.changes}


def error(model: nn.Module, surgery: Surgery, batches: list[Tensor]) -> float:
    whole = outputs_on(model, batches)
    undo = install(model, surgery)
    try:
        return output_error(whole, outputs_on(model, batches))
    finally:
        undo()


def fits(change: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Surgery]:
    """A fit that is changed, given the bare cut's values."""

    def fit(model: nn.Module, graph: WidthGraph, surgery: Surgery, *others: Any) -> Surgery:
        bare = values(compile_surgery(model, graph, surgery.maps, surgery.bases))
        fitted = reconstruct(model, graph, surgery, *others)
        changes = tuple(
            replace(each, value=change(each.value, bare[each.name]) if each.name in bare else each.value)
            for each in fitted.changes
        )
        return replace(fitted, changes=changes)

    return fit


def test_a_fit_that_helps_is_that_to_all_batches() -> None:
    model, graph, batches = case()
    found = plan_fitted_prune(model, graph, SIZES, batches)
    assert found.graph.notes == ()
    bare = compile_surgery(model, graph, found.maps)
    assert error(model, found, batches) < 0.5 * error(model, bare, batches)
    _, expected = fitted_prune._fitted(model, graph, SIZES, batches, fitted_prune.ONE_SHOT_LIMITS)
    assert all(torch.equal(value, values(expected)[name]) for name, value in values(found).items())


def test_a_fit_that_hurts_on_held_out_batches_is_refused_with_a_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, graph, batches = case()
    monkeypatch.setattr(fitted_prune, "reconstruct", fits(lambda fit, bare: fit - 9 * (fit - bare) + 1))
    with caplog.at_level(logging.WARNING, "evolvenet"):
        after = evolvenet.prune(model, graph, SIZES, batches)
    (note,) = after.notes
    assert note.startswith("the fit of the consumers is refused: the outputs' error on held-out batches is ")
    assert note in caplog.text
    assert str(after).endswith(note)
    fresh, graph, batches = case()
    maps = plan_fitted_prune(fresh, graph, SIZES, batches).maps
    evolvenet.resize(fresh, graph, maps)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), fresh.parameters(), strict=True))


def test_a_fit_that_goes_too_far_is_taken_by_half(monkeypatch: pytest.MonkeyPatch) -> None:
    model, graph, batches = case()
    expected = values(fitted_prune._fitted(model, graph, SIZES, batches, fitted_prune.ONE_SHOT_LIMITS)[1])
    monkeypatch.setattr(fitted_prune, "reconstruct", fits(lambda fit, bare: bare + 2 * (fit - bare)))
    found = plan_fitted_prune(model, graph, SIZES, batches)
    assert "taken by 50%" in found.graph.notes[0]
    for name in values(compile_surgery(model, graph, found.maps)):
        torch.testing.assert_close(values(found)[name], expected[name])


def test_a_note_is_of_the_last_change_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, graph, batches = case()
    monkeypatch.setattr(fitted_prune, "reconstruct", fits(lambda fit, bare: fit + 5))
    after = evolvenet.prune(model, graph, SIZES, batches)
    assert after.notes
    assert evolvenet.prune(model, after, {"0": 6}).notes == ()


def test_two_batches_are_both_fitted_to_and_one_tensor_is_refused() -> None:
    model, graph, batches = case()
    found = plan_fitted_prune(model, graph, SIZES, batches[:2])
    bare = compile_surgery(model, graph, found.maps)
    assert error(model, found, batches[:2]) < error(model, bare, batches[:2])
    with pytest.raises(TraceError, match="got one tensor"):
        evolvenet.prune(model, graph, SIZES, batches[0])


@pytest.mark.parametrize("counts", [[5], [4, 0], [2, 3, 1], [0, 2, 0, 2, 2], [0], []])
def test_the_halves_of_batches_are_those_of_their_samples(counts: list[int]) -> None:
    batches = [torch.zeros(count, 2) for count in counts]
    found = list(in_halves(iter(batches)))
    assert [len(batch) for batch, _ in found] == counts
    joined = torch.cat([half for _, half in found]) if found else torch.zeros(0, dtype=torch.bool)
    assert torch.equal(joined, held_out(counts))


def test_crops_of_one_source_in_one_batch_are_not_held_out_from_each_other() -> None:
    """Each batch has a source: what fits all samples of one batch does not count as held out."""
    assert held_out([3, 3, 3]).view(3, 3).tolist() == [[False] * 3, [True] * 3, [False] * 3]
    assert held_out([5]).tolist() == [False, False, False, True, True]


def test_a_fit_whose_outputs_are_no_numbers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).double()
    batches = [torch.randn(16, 4, dtype=torch.float64) for _ in range(4)]
    graph = trace(model, batches[0][:1])
    monkeypatch.setattr(fitted_prune, "_errors", lambda *_: {1.0: float("nan"), 0.5: float("inf"), 0.0: 0.01})
    plan = fitted_prune.plan_fitted_prune(model, graph, {"0": 6}, batches)
    assert plan.graph.notes
    assert "refused" in plan.graph.notes[0]


@pytest.mark.parametrize(("count", "held"), [(3, 1), (16, 2)])
def test_an_eighth_of_the_batches_is_in_the_test_and_not_in_the_fit(
    count: int, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, graph, _ = case()
    batches = [torch.randn(8, 6, dtype=torch.float64) for _ in range(count)]
    fits, tests = list[list[Tensor]](), list[Any]()
    fitted, errors = fitted_prune._fitted, fitted_prune._errors
    monkeypatch.setattr(fitted_prune, "_fitted", lambda *given: (fits.append(list(given[3])), fitted(*given))[1])
    monkeypatch.setattr(fitted_prune, "_errors", lambda *given: (tests.append(given[4]), errors(*given))[1])
    plan_fitted_prune(model, graph, SIZES, batches)
    assert len(fits[0]) == count - held
    assert torch.equal(torch.cat(list(tests[0])), torch.cat(batches[-held:]))


@pytest.mark.parametrize(("half", "taken"), [(0.99, True), (0.9, False)])
def test_a_fit_that_is_next_to_the_best_is_taken(half: float, taken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, graph, batches = case()
    monkeypatch.setattr(fitted_prune, "_errors", lambda *_: {1.0: 1.0, 0.5: half, 0.0: 2.0})
    assert (plan_fitted_prune(model, graph, SIZES, batches).graph.notes == ()) == taken


def test_a_model_is_never_taken_for_true_or_false() -> None:
    """A compiled module has no length, an empty container is falsy."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.leave = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.leave(self.enter(x).relu())

    model: Any = torch.compile(Net(), backend="eager")
    graph = evolvenet.trace(model, torch.randn(2, 4))
    (name,) = graph.sizes
    evolvenet.prune(model, graph, {name: 5}, [torch.randn(32, 4) for _ in range(4)])
    assert model._orig_mod.enter.out_features == 5


def photos(count: int, seed: int) -> Tensor:
    """Smooth noise `[count, 3, 12, 12]`."""
    noise = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return nn.functional.interpolate(noise, size=12, mode="bicubic")


@pytest.mark.parametrize("make", [convnet, mobile])
@pytest.mark.parametrize("share", [0.9, 0.7])
def test_fits_to_crops_of_three_photos_are_no_worse_than_the_bare_cut_on_others(
    make: Callable[[], Any], share: float
) -> None:
    """Each batch has crops of each photo, so that those that are held out tell little of other photos."""
    torch.manual_seed(0)
    model, few = make(), photos(3, 1)
    places = torch.randint(0, 7, (48, 2)).tolist()
    crops = torch.stack([few[k % 3, :, y : y + 6, x : x + 6] for k, (y, x) in enumerate(places)])
    graph = trace(model, crops[:2])
    sizes = {width.name: width.rounded(int(share * width.size)) for width in graph.resizable}
    found = plan_fitted_prune(model, graph, sizes, list(crops.split(12)))
    others = [photos(64, 2)[:, :, 3:9, 3:9]]
    assert found.graph.parameters < graph.parameters
    assert error(model, found, others) <= error(model, compile_surgery(model, graph, found.maps), others)

"""Ranks for a measured time: it is kept, no layer becomes slower, and the whole model's time decides. No clock is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

import evolvenet
from evolvenet.lowrank import factorize as factorize_module
from evolvenet.lowrank.latency import Run, fastest
from evolvenet.measurement.cost import macs
from tests.helpers.states import State

LAUNCH = 5e-6
"""Seconds that each layer takes beside its multiply-accumulates."""


def synthetic(module: nn.Module, inputs: Tensor, launch: float = LAUNCH) -> float:
    """Seconds of a machine on which layers have a fixed cost, and a multiply-accumulate takes a nanosecond."""
    layers = sum(isinstance(each, (nn.Linear, nn.Conv2d)) for each in module.modules())
    return launch * layers + 1e-9 * macs(module, inputs) * len(inputs)


def use(monkeypatch: pytest.MonkeyPatch, time: Callable[[nn.Module, Tensor], float]) -> None:
    def timer(runs: Sequence[Run]) -> list[float]:
        for run in runs:
            run.function()
        return [time(run.module, run.inputs) for run in runs]

    monkeypatch.setattr(factorize_module, "fastest", timer)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(24, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1152, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def images(samples: int = 8) -> Tensor:
    coarse = torch.randn(samples, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    return nn.functional.interpolate(coarse, size=(12, 12), mode="bilinear")


@pytest.mark.parametrize("share", [0.8, 0.5])
def test_the_time_is_within_its_limit_and_used(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, synthetic)
    model, x = network(), images()
    whole = synthetic(model, x)
    report = evolvenet.factorize(model, batches=[x, images(64)], latency=share * whole)
    assert report.seconds == (whole, synthetic(model, x))
    assert 0.85 * share * whole < synthetic(model, x) <= share * whole
    assert all(line.after <= line.before for line in report)
    assert f"forward pass: {1e3 * whole:.3g} ms →" in str(report)


def test_a_layer_whose_chains_are_not_faster_stays_whole_with_the_times(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, lambda module, x: synthetic(module, x, launch=3e-4))
    model, x = network(), images()
    report = evolvenet.factorize(model, batches=[x], latency=0.9 * synthetic(model, x, launch=3e-4))
    assert report["7"].kind is None
    assert "none of its factors was faster: 0.6" in (report["7"].reason or "")
    assert "0.305 ms whole" in (report["7"].reason or "")
    assert report["2"].kind is not None
    assert report["2"].after < report["2"].before


def test_where_layers_alone_promise_too_much_the_whole_models_time_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    def time(module: nn.Module, x: Tensor) -> float:
        # In the model a chain saves half of what it saves alone.
        alone = synthetic(module, x)
        return 0.5 * alone + 0.5 * whole if isinstance(module, nn.Sequential) and len(module) == 8 else alone

    model, x = network(), images()
    whole = synthetic(model, x)
    use(monkeypatch, time)
    evolvenet.factorize(model, batches=[x], latency=0.8 * whole)
    assert 0.77 * whole < time(model, x) <= 0.8 * whole
    assert synthetic(model, x) <= 0.6 * whole


def test_a_time_that_is_kept_already_changes_nothing_and_one_that_no_ranks_reach_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use(monkeypatch, synthetic)
    model, x = network(), images()
    before = State.of(model)
    report = evolvenet.factorize(model, batches=[x], latency=1.0)
    assert report.before == report.after
    assert "within the limit" in (report["2"].reason or "")
    with pytest.raises(evolvenet.FactorizationError, match=r"expected a latency of .* ms or more"):
        evolvenet.factorize(model, batches=[x], latency=1e-5)
    with pytest.raises(evolvenet.FactorizationError, match="expected batches with `latency`"):
        evolvenet.factorize(model, latency=1e-5)
    assert before.differences(model) == []


def test_hooks_do_not_run_while_layers_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, synthetic)
    model, x = network(), images()
    shapes: set[tuple[int, ...]] = set()
    model[5].register_forward_hook(lambda _module, args, _out: shapes.add(tuple(args[0].shape)))
    evolvenet.factorize(model, batches=[x], latency=0.7 * synthetic(model, x))
    assert shapes <= {(8, 1152)}


def test_a_layer_that_does_not_run_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, synthetic)
    model, x = network(), images()
    model[5].register_module("unused", nn.Linear(64, 64))
    report = evolvenet.factorize(model, batches=[x], latency=0.7 * synthetic(model, x))
    assert report["5.unused"].kind is None
    assert any(line.kind is not None for line in report)


def test_attentions_grouped_and_transposed_layers_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(16, 32, 3, groups=2),
        nn.ConvTranspose2d(32, 16, 4, stride=2, padding_mode="zeros"),
        nn.Flatten(2),
        nn.Linear(196, 64),
        nn.TransformerEncoderLayer(64, 2, 64, batch_first=True),
    ).eval()
    use(monkeypatch, lambda module, x: 1e-9 * macs(module, x) * len(x))
    x = torch.randn(2, 16, 8, 8)
    before = 2e-9 * macs(model, x)
    report = evolvenet.factorize(model, batches=[x], latency=0.5 * before)
    assert 2e-9 * macs(model, x) <= 0.5 * before
    assert sum(line.kind is not None for line in report) >= 4


def test_the_real_timer_takes_the_least_of_several_and_calls_in_turns() -> None:
    calls: list[str] = []
    runs = [Run(nn.Identity(), None, lambda name=name: calls.append(name)) for name in "ab"]
    found = fastest(runs)
    assert len(found) == 2
    assert all(each >= 0 for each in found)
    assert len(calls) >= 20
    assert calls == list("aabb") * (len(calls) // 4)

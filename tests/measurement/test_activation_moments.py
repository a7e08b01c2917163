"""Streaming moments against those of all samples at once; the model stays as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from evolvenet.errors import SpectrumError, TraceError
from evolvenet.execution.isolation import isolated
from evolvenet.graph.width_graph import Tie, WidthGraph
from evolvenet.measurement import activation_moments as module
from evolvenet.measurement.activation_moments import Moments, collect
from evolvenet.tracing.trace import trace
from tests.helpers.small_models import Branches, Residual, convnet, images, mlp, mobile
from tests.helpers.transformers_families import family, inputs_of


def tie_of(graph: WidthGraph, tensor: str) -> Tie:
    """The one consumer tie of a weight."""
    (tie,) = [tie for width in graph.resizable for tie in width.consumers if tie.tensor == tensor]
    return tie


def slow_moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and uncentred second moment, sample by sample."""
    mean, second = torch.zeros(rows.shape[1]).double(), torch.zeros(rows.shape[1], rows.shape[1]).double()
    for row in rows.double():
        mean += row / len(rows)
        second += torch.outer(row, row) / len(rows)
    return mean, second


@given(
    st.lists(st.integers(0, 7), min_size=1, max_size=6),
    st.integers(1, 5),
    st.floats(-1e3, 1e3),
    st.integers(0, 1000),
)
def test_merged_moments_equal_the_slow_ones(lengths: list[int], size: int, offset: float, seed: int) -> None:
    torch.manual_seed(seed)
    parts = [offset + torch.randn(length, size, dtype=torch.float64) for length in lengths]
    moments = Moments.empty(size)
    for part in parts:
        moments = moments.merge(Moments.of(part))
    everything = torch.cat(parts)
    assert moments.count == len(everything)
    if len(everything):
        mean, second = slow_moments(everything)
        centred = everything - everything.mean(0)
        torch.testing.assert_close(moments.mean, mean)
        torch.testing.assert_close(moments.second, second)
        torch.testing.assert_close(moments.covariance, centred.T @ centred / len(centred), atol=1e-9, rtol=1e-9)


def test_a_large_mean_does_not_cost_the_covariance_its_digits() -> None:
    noise = torch.randn(5000, 3)
    exact = Moments.of(noise.double() + 1000)
    moments = Moments.of(noise + 1000)
    torch.testing.assert_close(moments.covariance, exact.covariance, rtol=1e-3, atol=1e-3)
    raw = (noise + 1000).T @ (noise + 1000) / 5000 - torch.outer((noise + 1000).mean(0), (noise + 1000).mean(0))
    assert (raw - exact.covariance).abs().max() > 10 * (moments.covariance - exact.covariance).abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_computed_in_float32(dtype: torch.dtype) -> None:
    rows = torch.randn(300, 4).to(dtype)
    mean, second = slow_moments(rows)
    torch.testing.assert_close(Moments.of(rows).mean, mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(Moments.of(rows).second, second, rtol=1e-5, atol=1e-6)


def test_dense_convolution_and_flattened_inputs_equal_those_of_all_samples() -> None:
    model, x = convnet(), images(7)
    graph = trace(model, x)
    statistics = collect(model, graph, [x])
    with torch.no_grad():
        hidden = model[:3](x)
        flat = model[:6](x)
    rows = {"3.weight": hidden.permute(0, 2, 3, 1).reshape(-1, 8), "6.weight": flat.reshape(7, 6, 16).mT.reshape(-1, 6)}
    for tensor, expected in rows.items():
        moments = statistics[tie_of(graph, tensor)]
        mean, second = slow_moments(expected)
        assert moments.count == len(expected)
        torch.testing.assert_close(moments.mean, mean)
        torch.testing.assert_close(moments.second, second)


def test_a_concatenated_axis_gives_each_width_its_own_columns() -> None:
    model = Branches().double()
    x = torch.randn(9, 4, dtype=torch.float64)
    graph = trace(model, x)
    statistics = collect(model, graph, [x])
    for name in ("left", "right"):
        (tie,) = graph.widths[name].consumers
        mean, second = slow_moments(getattr(model, name)(x).relu().detach())
        torch.testing.assert_close(statistics[tie].mean, mean)
        torch.testing.assert_close(statistics[tie].second, second)


def test_every_second_batch_is_kept_apart_from_the_others() -> None:
    model = mlp(3, 4, 2)
    x = torch.randn(11, 3, dtype=torch.float64)
    graph = trace(model, x)
    statistics = collect(model, graph, [x[:3], x[3:4], x[4:]])
    (tie,) = statistics
    hidden = model[:2](x).detach()
    for half, rows in ((statistics.even, torch.cat([hidden[:3], hidden[4:]])), (statistics.odd, hidden[3:4])):
        mean, second = slow_moments(rows)
        assert half[tie].count == len(rows)
        torch.testing.assert_close(half[tie].mean, mean)
        torch.testing.assert_close(half[tie].second, second)


def test_every_position_of_a_sample_goes_to_the_same_half() -> None:
    model, x = convnet(), images(4)
    graph = trace(model, x)
    tie = tie_of(graph, "3.weight")
    statistics = collect(model, graph, [x])
    rows = model[:3](x[:2]).detach().permute(0, 2, 3, 1).reshape(-1, 8)
    torch.testing.assert_close(statistics.even[tie].second, slow_moments(rows)[1])


def test_every_place_of_a_flattened_sample_goes_to_the_same_half() -> None:
    model, x = convnet(), images(4)
    graph = trace(model, x)
    statistics = collect(model, graph, [x])
    rows = model[:6](x[2:]).detach().reshape(2, 6, 16).mT.reshape(-1, 6)
    torch.testing.assert_close(statistics.odd[tie_of(graph, "6.weight")].second, slow_moments(rows)[1])


def test_both_reads_of_a_residual_stream_are_measured() -> None:
    model = Residual().double().eval()
    graph = trace(model, images(2))
    found = collect(model, graph, [images(4)])
    assert {tie.tensor for tie in graph.widths["stem"].consumers} == {"conv1.weight", "head.weight"}
    assert {tie.tensor for tie in found} == {"conv1.weight", "head.weight", "conv2.weight"}


def test_consumers_that_are_not_understood_are_left_out() -> None:
    model = mobile()
    graph = trace(model, images(2))
    found = {tie.tensor for tie in collect(model, graph, [images(2)])}
    assert found == {"4.weight", "7.weight"}


def test_batches_may_be_tensors_tuples_or_dicts() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(3, 4, 2)

        def forward(self, x: Tensor, shift: Tensor) -> Tensor:
            return self.net(x + shift)

    model = Two()
    x, shift = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    graph = trace(model, (x, shift))
    first = collect(model, graph, [(x, shift)])
    second = collect(model, graph, [{"x": x, "shift": shift}])
    for tie in first:
        torch.testing.assert_close(first[tie].second, second[tie].second, rtol=0, atol=0)


def test_many_positions_are_sampled_evenly_and_always_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = convnet(), images(40)
    graph = trace(model, images(2))
    tie = tie_of(graph, "3.weight")
    full = collect(model, graph, [x])[tie]
    monkeypatch.setattr(module, "CAP", 480)
    statistics = collect(model, graph, [x])
    again = collect(model, graph, [x])
    assert full.count == 40 * 36
    assert statistics[tie].count == 480
    assert statistics.even[tie].count == statistics.odd[tie].count == 240
    assert torch.equal(statistics[tie].second, again[tie].second)
    assert (statistics[tie].second - full.second).norm() < 0.15 * full.second.norm()


@given(st.integers(1, 5000), st.integers(1, 300))
def test_sampled_indices_are_distinct_and_spread(count: int, cap: int) -> None:
    chosen = module.evenly(count, cap)
    assert len(chosen) == min(count, cap)
    assert len(chosen.unique()) == len(chosen)
    assert 0 <= int(chosen.min()) <= int(chosen.max()) < count
    if count > cap:
        assert int(chosen.diff().max() if cap > 1 else 0) <= 2 * (count // cap + 1)


def test_sampling_does_not_fall_in_step_with_the_grid() -> None:
    columns = module.evenly(256 * 256, 4096) % 16
    assert columns.bincount(minlength=16).min() > 4096 / 16 / 2


class Restless(nn.Module):
    """Counts its calls in a buffer, exchanges another one, draws random numbers, has a layer in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("latest", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        """Dense, norm, dense on noisy inputs."""
        self.calls += 1
        self.latest = self.latest + 1
        return self.last(self.norm(self.first(x + torch.rand_like(x))))


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_afterwards_as_it_was(fails: bool) -> None:
    model = Restless()
    graph = trace(model, torch.zeros(2, 3))
    model.train()
    model.norm.eval()
    flags = [part.training for part in model.modules()]
    buffers = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    random = torch.get_rng_state()
    batches = [torch.randn(4, 3), torch.randn(4, 7 if fails else 3)]
    torch.set_rng_state(random)
    if fails:
        with pytest.raises(RuntimeError, match=r"size of tensor|shapes cannot be multiplied"):
            collect(model, graph, batches)
    else:
        collect(model, graph, batches)
    assert [part.training for part in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(part._forward_pre_hooks for part in model.modules())
    for name, buffer in model.named_buffers():
        assert buffer is buffers[name][0]
        assert torch.equal(buffer, buffers[name][1])


def test_a_backward_through_saved_buffers_still_works_after_measuring() -> None:
    model = Restless().eval()
    graph = trace(model, torch.zeros(2, 3))
    loss = model(torch.randn(4, 3)).sum()
    with isolated(model):
        pass
    collect(model, graph, [torch.randn(4, 3)])
    loss.backward()
    assert model.first.weight.grad is not None


def test_autocast_around_it_does_not_reach_the_moments() -> None:
    model = mlp(3, 4, 2).float()
    x = torch.randn(64, 3)
    graph = trace(model, x)
    (tie,) = plain = collect(model, graph, [x])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        moments = collect(model, graph, [x])[tie]
    assert torch.equal(moments.second, plain[tie].second)


def test_no_batch_and_a_bare_tensor_are_refused() -> None:
    model = mlp(3, 4, 2)
    graph = trace(model, torch.zeros(2, 3).double())
    with pytest.raises(TraceError, match="at least one batch"):
        collect(model, graph, [])
    with pytest.raises(TraceError, match="Wrap it in a list"):
        collect(model, graph, torch.zeros(2, 3).double())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinite_inputs_are_refused_with_the_layer(bad: float) -> None:
    model = mlp(3, 4, 2)
    graph = trace(model, torch.zeros(2, 3).double())
    x = torch.randn(4, 3, dtype=torch.float64)
    x[2, 1] = bad
    with pytest.raises(SpectrumError, match=r"^2: expected finite inputs"):
        collect(model, graph, [x])


def test_an_empty_batch_adds_nothing() -> None:
    model = mlp(3, 4, 2)
    x = torch.randn(6, 3, dtype=torch.float64)
    graph = trace(model, x)
    (tie,) = collect(model, graph, [x])
    assert torch.equal(collect(model, graph, [x, x[:0]])[tie].second, collect(model, graph, [x])[tie].second)


def test_logits_and_keys_that_nobody_needs_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs, ran = family("llama").double(), inputs_of("llama", 4), list[Any]()
    graph, run = trace(model, inputs, outputs="logits"), module.run_model
    inner = [width.name for width in graph.resizable if "mlp" in width.name]
    monkeypatch.setattr(module, "run_model", lambda *given: ran.append(given[1]) or run(*given))
    found = collect(model, graph, [inputs], inner)
    assert ran[0].items() >= {"logits_to_keep": 1, "use_cache": False}.items()
    whole = collect(model, graph, [inputs])
    assert whole.keys() > found.keys()
    assert "logits_to_keep" not in ran[1]
    assert all(torch.equal(found.even[tie].covariance, whole.even[tie].covariance) for tie in found)

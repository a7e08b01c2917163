"""Growth of widths that norms mix: the outputs stay in double precision, and new units learn, each of them its own way."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import evolvenet
from evolvenet.errors import RecordError, ResizeError
from evolvenet.graph.exact_growth import COPY, MEAN, ZERO
from evolvenet.graph.width_graph import Width, WidthGraph
from evolvenet.surgery.norms import Norm, norm_of
from evolvenet.surgery.untrusted_files import refuse_unsafe
from evolvenet.tracing.trace import trace
from tests.helpers.cases import distance, outputs
from tests.helpers.networks.residual import ChannelNorm, ConvNeXt, Encoder, PatchMerging, ResidualMlp
from tests.helpers.transformers_families import family, inputs_of

SEQUENCES, ROWS, IMAGES = (2, 4, 6), (5, 6), (2, 3, 8, 8)


def _randomized(model: nn.Module) -> nn.Module:
    """In double precision, every norm with weights and biases of its own."""
    torch.manual_seed(0)
    for parameter in model.double().parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


def _streams(graph: WidthGraph) -> list[Width]:
    return [width for width in graph.resizable if width.mixed is not None and width.kind == "stream"]


def _larger(width: Width) -> int:
    assert width.exact_growth is not None, width.name
    return 2 * width.size if width.exact_growth.new_units == COPY else width.size + 5


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[str]]] = {
    "layer norm": (lambda: ResidualMlp(nn.LayerNorm), ROWS, [MEAN]),
    "layer norm without bias": (lambda: ResidualMlp(lambda size: nn.LayerNorm(size, bias=False)), ROWS, [MEAN]),
    "layer norm, large eps": (lambda: ResidualMlp(lambda size: nn.LayerNorm(size, eps=0.3)), ROWS, [MEAN]),
    "layer norm without weight": (
        lambda: ResidualMlp(lambda size: nn.LayerNorm(size, elementwise_affine=False)), ROWS, [COPY],
    ),
    "layer norm, bare consumer": (lambda: ResidualMlp(nn.LayerNorm, bare=True), ROWS, [COPY]),
    "RMS norm": (lambda: ResidualMlp(nn.RMSNorm), ROWS, [ZERO]),
    "RMS norm, large eps": (lambda: ResidualMlp(lambda size: nn.RMSNorm(size, eps=0.3)), ROWS, [ZERO]),
    "RMS norm, bare consumer": (lambda: ResidualMlp(nn.RMSNorm, bare=True), ROWS, [ZERO]),
    "encoder, norms first": (lambda: Encoder(norm_first=True), SEQUENCES, [MEAN]),
    "encoder, norms last": (lambda: Encoder(norm_first=False), SEQUENCES, [COPY]),
    "depthwise": (ConvNeXt, IMAGES, [COPY]),
    "patch merging": (PatchMerging, SEQUENCES, [COPY, MEAN]),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_a_stream_under_norms_grows_without_a_change_of_the_outputs(name: str) -> None:
    factory, shape, expected = NETWORKS[name]
    model, inputs = _randomized(factory()), torch.randn(shape, dtype=torch.float64)
    graph = trace(model, inputs)
    streams = _streams(graph)
    assert [width.exact_growth and width.exact_growth.new_units for width in streams] == expected
    before = outputs(model, inputs)
    after = evolvenet.grow(model, graph, {width.name: _larger(width) for width in streams})
    assert distance(outputs(model, inputs), before) < 1e-12
    # Once more, now with all other widths, and back.
    sizes = {
        width.name: _larger(width) if width.mixed else width.size + 3 for width in after.resizable if width.can_grow
    }
    evolvenet.grow(model, after, sizes)
    assert distance(outputs(model, inputs), before) < 1e-12


FAMILIES = {
    "llama tied": ZERO, "t5": ZERO, "gpt2": MEAN, "vit": MEAN, "llama": ZERO, "qwen2": ZERO, "gpt_neox": MEAN, "opt": MEAN,
}  # fmt: skip
QUICK = 4


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] if k >= QUICK else []) for k, name in enumerate(FAMILIES)]
)
def test_the_stream_of_a_transformer_grows(name: str) -> None:
    model = family(name).double()
    inputs = {key: each.double() if each.is_floating_point() else each for key, each in inputs_of(name).items()}
    graph = trace(model, inputs, outputs="logits", heads=name == "gpt2")
    streams = _streams(graph)
    assert {width.exact_growth and width.exact_growth.new_units for width in streams} == {FAMILIES[name]}
    with torch.no_grad():
        before = model(**inputs).logits
        evolvenet.grow(model, graph, {width.name: _larger(width) for width in streams})
        # RMS norms of the transformers library compute in single precision.
        assert distance([model(**inputs).logits], [before]) < (1e-6 if FAMILIES[name] == ZERO else 1e-12)


class ScaledNorm(nn.Module):
    """An RMS norm as models define it, its weight around 0, in the manner of Gemma."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.zeros(size)), 1e-3

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon) * (1 + self.weight)


class FixedNorm(ScaledNorm):
    """The same with an eps that is written in the code."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3) * (1 + self.weight)


def test_norms_are_told_by_what_they_compute() -> None:
    assert norm_of(ScaledNorm(4)) == Norm(ZERO, "weight", None, "variance_epsilon", 1.0)
    assert norm_of(ChannelNorm(4)) == norm_of(nn.LayerNorm(4)) == Norm(MEAN, "weight", "bias", "eps")
    for other in (
        FixedNorm(4),
        nn.Linear(4, 4),
        nn.BatchNorm1d(4),
        nn.RMSNorm(4, elementwise_affine=False),
    ):
        assert norm_of(other) is None


def test_a_norm_whose_eps_is_written_in_its_code_gets_copies_alone() -> None:
    for norm, expected in ((ScaledNorm, ZERO), (FixedNorm, COPY)):
        model, inputs = _randomized(ResidualMlp(norm)), torch.randn(ROWS, dtype=torch.float64)
        graph, before = trace(model, inputs), outputs(model, inputs)
        (stream,) = _streams(graph)
        assert stream.exact_growth is not None
        assert stream.exact_growth.new_units == expected
        evolvenet.grow(model, graph, {stream.name: _larger(stream)})
        assert distance(outputs(model, inputs), before) < 1e-12


def test_sizes_that_are_no_multiple_are_refused_where_new_units_are_copies() -> None:
    model, inputs = _randomized(ConvNeXt()), torch.randn(IMAGES, dtype=torch.float64)
    graph = trace(model, inputs)
    (stream,) = _streams(graph)
    assert stream.rounded(9) == 16
    with pytest.raises(ResizeError, match="whole copies of its 8 units"):
        evolvenet.grow(model, graph, {stream.name: 12})


@pytest.mark.parametrize("name", ["layer norm", "RMS norm", "encoder, norms first", "encoder, norms last", "depthwise"])
def test_new_units_learn_each_in_its_own_way(name: str) -> None:
    factory, shape, _ = NETWORKS[name]
    model = _randomized(factory())
    inputs, targets = torch.randn((64, *shape[1:]), dtype=torch.float64), torch.randn(64, 3, dtype=torch.float64)
    graph = trace(model, inputs[:2])
    (stream,) = _streams(graph)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    after = evolvenet.grow(model, graph, {stream.name: 2 * stream.size}, optimizers=optimizer)
    tie = after.widths[stream.name].producers[0]
    weight = model.get_parameter(tie.tensor)
    new = slice(stream.size * tie.repeat, None)
    start = weight.detach()[new].flatten(1).clone()
    for _ in range(20):
        optimizer.zero_grad()
        out = model(inputs)
        (out.mean(1) if out.dim() == 3 else out).sub(targets).square().mean().backward()
        optimizer.step()
    moved = weight.detach()[new].flatten(1) - start
    assert bool((moved.norm(dim=1) > 1e-2).all()), "every new unit has moved"
    units = weight.detach()[new].flatten(1)
    apart = torch.cdist(units, units) + torch.eye(len(units), dtype=units.dtype)
    assert float(apart.min()) > 1e-3, "no two new units are equal"


def test_weights_and_eps_are_rescaled_and_travel_with_a_state_dict(tmp_path: Any) -> None:
    model: Any = ResidualMlp(nn.RMSNorm, 8)
    inputs = torch.randn(ROWS, dtype=torch.float64)
    _randomized(model)
    model.norms[0].eps = 0.5
    fresh = copy.deepcopy(model)
    graph, before = trace(model, inputs), outputs(model, inputs)
    weight = model.norms[0].weight.detach().clone()
    evolvenet.grow(model, graph, {"embed": 10})
    assert torch.allclose(model.norms[0].weight[:8], weight * math.sqrt(0.8))
    assert [norm.eps for norm in model.norms] == pytest.approx([0.4, *[0.8 * torch.finfo(torch.float64).eps] * 2])
    evolvenet.save(model, tmp_path / "grown.pt")
    evolvenet.load(fresh, tmp_path / "grown.pt")
    assert [norm.eps for norm in fresh.norms] == [norm.eps for norm in model.norms]
    assert distance(outputs(fresh, inputs), before) < 1e-12


@pytest.mark.parametrize("value", ["1e-6", -1.0, float("inf"), float("nan"), True])
def test_a_file_sets_an_eps_to_numbers_alone_that_are_one(value: Any) -> None:
    model = ResidualMlp(nn.LayerNorm)
    with pytest.raises(RecordError, match=r"'eps' of norms\.0"):
        refuse_unsafe(model, {}, {"numbers": [["norms.0", "eps", value]], "buffers": {}})


@pytest.mark.parametrize("method", ["paired", "gradmax", "tiny"])
@pytest.mark.parametrize("others", [{}, {"up.0": 24}])
def test_a_stream_starts_in_its_own_way_whatever_the_method(method: str, others: dict[str, int]) -> None:
    model, inputs = _randomized(ResidualMlp(nn.LayerNorm)), torch.randn(ROWS, dtype=torch.float64)
    graph, before = trace(model, inputs), outputs(model, inputs)
    batches, loss = [(inputs, torch.zeros(5, 3, dtype=torch.float64))], nn.functional.mse_loss
    given: dict[str, Any] = {} if method == "paired" else {"batches": batches, "loss": loss}
    evolvenet.grow(model, graph, {"embed": 14, **others}, method, **given)
    assert distance(outputs(model, inputs), before) < 1e-12

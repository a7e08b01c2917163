"""`factorize` and `merge` on models: the same outputs, tied weights once, refusals with reasons, all or nothing."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import evolvenet
from evolvenet.lowrank import factorize as factorize_module
from evolvenet.lowrank import merge as merge_module
from evolvenet.lowrank.layers import FactoredLayer
from tests.helpers.states import State


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 5, padding=2),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, stride=2, bias=False),
        nn.BatchNorm2d(24),
        nn.Flatten(),
        nn.Linear(216, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    ).double()


X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
RANKS: dict[str, Any] = {"0": ("spatial", 6), "2": ("tucker", (8, 6)), "5": 12}


def with_merged_weights(model: nn.Module, chains: nn.Module) -> nn.Module:
    """A copy of a model whose layers have the merged weights of another's chains."""
    made = copy.deepcopy(model)
    with torch.no_grad():
        for path, chain in chains.named_modules():
            if isinstance(chain, FactoredLayer):
                made.get_submodule(path).get_parameter("weight").copy_(chain.merged_weight)
    return made


def test_a_factorized_model_computes_with_the_merged_weights() -> None:
    model = network().eval()
    whole = copy.deepcopy(model)
    report = evolvenet.factorize(model, RANKS)
    assert [(line.name, line.kind, line.ranks) for line in report] == [
        ("0", "spatial", (6,)),
        ("2", "tucker", (8, 6)),
        ("5", "svd", (12,)),
    ]
    assert report.after == sum(p.numel() for n, p in model.named_parameters() if n[0] in "025" and n.endswith("weight"))
    expected = with_merged_weights(whole, model)
    torch.testing.assert_close(model(X), expected(X), rtol=0, atol=1e-10)
    assert evolvenet.merge(model) == ("0", "2", "5")
    assert repr(model) == repr(whole)
    torch.testing.assert_close(model(X), expected(X), rtol=0, atol=1e-10)


def test_by_default_layers_keep_their_share_of_energy_and_none_grows() -> None:
    model = network()
    report = evolvenet.factorize(model, 0.9)
    assert [line.name for line in report] == ["0", "2", "5", "7"]
    assert all(line.after <= line.before for line in report)
    assert all(line.reason is not None and "no fewer" in line.reason for line in report if line.kind is None)
    assert all(line.error <= 0.1 + 1e-6 for line in report)
    assert str(report).count("\n") == 4


def test_where_factors_do_not_pay_the_layer_stays_whole() -> None:
    model = network()
    layer = model[5]
    line = evolvenet.factorize(model, {"5": 30})["5"]
    assert line.kind is None
    assert line.after == line.before
    assert "no fewer than 6,912" in (line.reason or "")
    assert model[5] is layer


@pytest.mark.parametrize(
    ("ranks", "kinds", "message"),
    [
        ({"6": 2}, "auto", "expected names of dense layers"),
        ({"5": ("spatial", 2)}, "auto", "take 'svd'"),
        ({"5": 0}, "auto", "1 or more"),
        ({"2": ("tucker", 1, 2, 3)}, "auto", r"expected 2 number"),
        (1.5, "auto", "share above 0 and below 1"),
        ("pca", "auto", "'evbmf'"),
        (2, "pca", "expected one of svd"),
        (2, {"nothing": "svd"}, "expected names"),
    ],
)
def test_malformed_requests_are_refused_and_change_nothing(ranks: Any, kinds: Any, message: str) -> None:
    model = network()
    before = State.of(model)
    with pytest.raises(evolvenet.FactorizationError, match=message):
        evolvenet.factorize(model, ranks, kinds)
    assert before.differences(model) == []


@pytest.mark.parametrize("rule", ["evbmf", "gavish_donoho"])
def test_rules_by_name_choose_ranks(rule: str) -> None:
    model = network()
    with torch.no_grad():
        signal = torch.randn(32, 4).double() @ torch.randn(4, 216).double()
        model[5].get_parameter("weight").copy_(signal + 0.1 * torch.randn(32, 216))
    line = evolvenet.factorize(model, {"5": rule})["5"]
    assert line.ranks == ((8,) if rule == "evbmf" else (4,))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.two.weight = self.one.weight
        self.again = self.one
        self.embedding, self.head = nn.Embedding(9, 8), nn.Linear(8, 9)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.again(self.two(self.one(x))))


def test_tied_weights_and_shared_modules_are_factorized_once() -> None:
    model, x = Tied(), torch.randn(3, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    report = evolvenet.factorize(model, 2, optimizers=optimizer)
    assert [(line.name, line.kind) for line in report] == [("one", "svd"), ("head", None)]
    assert "shared with a Embedding" in (report["head"].reason or "")
    assert model.again is model.one
    one, two = model.one, model.two
    assert isinstance(one, FactoredLayer)
    assert isinstance(two, FactoredLayer)
    assert [a.weight is b.weight for a, b in zip(one.factors, two.factors, strict=True)] == [True, True]
    assert one.bias is not two.bias
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model.parameters()}
    before = model(x)
    evolvenet.merge(model, optimizers=optimizer)
    assert model.one.weight is model.two.weight
    assert model.again is model.one
    torch.testing.assert_close(model(x), before)
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model.parameters()}


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Held(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.order = [self.layer]


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Doubled(8, 8), "forward of its own"),
        (nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)), "parametrization"),
        (nn.LazyLinear(8), "no shape yet"),
        (Held(), "held outside of the module tables, in '0.order'"),
        (nn.MultiheadAttention(8, 2, add_zero_attn=True), "is not split: its bias_k, bias_v or add_zero_attn"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_factors_cannot_stand_for_stays_whole_with_the_reason(layer: nn.Module, reason: str) -> None:
    model = nn.Sequential(layer)
    before = State.of(model) if not isinstance(layer, nn.LazyLinear) else None
    (line,) = evolvenet.factorize(model, 1)
    assert reason in (line.reason or "")
    if before is not None:
        assert before.differences(model) == []
    with pytest.raises(evolvenet.FactorizationError, match=reason):
        evolvenet.factorize(model, {line.name: 1})


def test_the_model_itself_is_no_layer_to_replace() -> None:
    assert "wrap it" in (evolvenet.factorize(nn.Linear(8, 8), 1)[""].reason or "")


def test_hooks_flags_and_layout_go_with_the_layer() -> None:
    model = nn.Sequential(nn.Conv2d(16, 16, 3)).eval()
    weight = model[0].get_parameter("weight")
    weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    weight.requires_grad_(False)
    seen: list[tuple[int, ...]] = []
    handle = model[0].register_forward_hook(lambda _module, _args, out: seen.append(tuple(out.shape)))
    evolvenet.factorize(model, 2)
    model(torch.zeros(1, 16, 5, 5))
    assert seen == [(1, 16, 3, 3)]
    assert not model[0].training
    assert [parameter.requires_grad for parameter in model[0].parameters()][:2] == [False] * 2
    assert model.get_parameter("0.1.weight").is_contiguous(memory_format=torch.channels_last)
    handle.remove()
    evolvenet.merge(model)
    model(torch.zeros(1, 16, 5, 5))
    assert len(seen) == 1
    assert not model[0].weight.requires_grad


def test_a_factorized_model_is_copied_pickled_exported_compiled_and_traced() -> None:
    model = network().float().eval()
    evolvenet.factorize(model, RANKS)
    x = X.float()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(model),
        torch.load(buffer, weights_only=False),
        torch.export.export(model, (x,)).module(),
    ):
        torch.testing.assert_close(other(x), model(x))
    scripted: Any = torch.jit.trace(model, (x,))
    torch.testing.assert_close(scripted(x), model(x))
    graph = evolvenet.trace(model, x)
    assert graph.widths["5.0"].frozen is None
    assert graph.widths["5.0"].size == 12
    graph = evolvenet.resize(model, graph, {"5.0": evolvenet.IndexMap.keep(range(7), size=12)})
    assert model[5].ranks == (7,)
    assert model[5].merged_weight.shape == (32, 216)


def test_code_that_uses_a_layers_weight_itself_uses_the_merged_one() -> None:
    block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    evolvenet.factorize(block, {"linear1": 4, "linear2": 4})
    with torch.no_grad():
        fast = block(x)
    torch.testing.assert_close(fast, block(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("failing", ["exchange_modules", "replace_parameters"])
def test_a_failure_leaves_model_and_optimizer_as_they_were(failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    model(X).sum().backward()
    optimizer.step()
    before = State.of(model, [optimizer])
    original = getattr(factorize_module, failing)

    def fails(*args: Any) -> None:
        original(*args)
        raise RuntimeError("broken")

    monkeypatch.setattr(factorize_module, failing, fails)
    with pytest.raises(RuntimeError, match="broken"):
        evolvenet.factorize(model, RANKS, optimizers=optimizer)
    assert before.differences(model, [optimizer]) == []
    monkeypatch.undo()
    evolvenet.factorize(model, RANKS, optimizers=optimizer)
    before = State.of(model, [optimizer])
    monkeypatch.setattr(merge_module, failing, fails)
    with pytest.raises(RuntimeError, match="broken"):
        evolvenet.merge(model, optimizers=optimizer)
    assert before.differences(model, [optimizer]) == []

"""An attention split into its projections computes the same, and its projections are factorized like any layer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import evolvenet
from evolvenet.lowrank.attention import SplitAttention
from evolvenet.lowrank.layers import FactoredLayer
from tests.helpers.states import State

CAUSAL = torch.ones(5, 5).triu(1).bool()
PADDING = torch.arange(5) >= torch.tensor([[5], [3], [4]])
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no weights": {"need_weights": False},
    "weights of each head": {"average_attn_weights": False},
    "causal": {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False},
    "causal with weights": {"attn_mask": CAUSAL},
    "added mask": {"attn_mask": torch.randn(5, 5, generator=torch.Generator().manual_seed(0)).double()},
    "mask of each head": {"attn_mask": CAUSAL.expand(12, 5, 5), "need_weights": False},
    "padding": {"key_padding_mask": PADDING},
    "padding and causal": {"key_padding_mask": PADDING, "attn_mask": CAUSAL, "is_causal": True, "need_weights": False},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "batch first": {"batch_first": True},
    "positions first": {},
    "without biases": {"bias": False, "batch_first": True},
    "other keys and values": {"kdim": 6, "vdim": 10, "batch_first": True},
}


def attention(**options: Any) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    made = nn.MultiheadAttention(16, 4, dtype=torch.float64, **options)
    if made.in_proj_bias is not None:
        made.in_proj_bias.data.normal_()
    return made


def inputs(module: nn.MultiheadAttention) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    made = [torch.randn(3, 5, size, generator=generator).double() for size in (16, module.kdim, module.vdim)]
    return tuple(made) if module.batch_first else tuple(x.transpose(0, 1) for x in made)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_split_attention_computes_the_same(options: dict[str, Any], call: dict[str, Any]) -> None:
    whole = attention(**options)
    split = SplitAttention(whole)
    expected, found = whole(*inputs(whole), **call), split(*inputs(whole), **call)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-10)
    assert (found[1] is None) == (expected[1] is None)
    if expected[1] is not None:
        torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-10)
    again = split.whole()
    assert repr(again) == repr(whole)
    torch.testing.assert_close(again(*inputs(whole), **call)[0], expected[0], rtol=0, atol=0)


def test_a_sequence_without_a_batch_is_attended_to() -> None:
    whole = attention()
    x = torch.randn(5, 16).double()
    for one, two in zip(whole(x, x, x), SplitAttention(whole)(x, x, x), strict=True):
        torch.testing.assert_close(two, one, rtol=0, atol=1e-10)


def test_dropout_is_applied_in_training_alone() -> None:
    split = SplitAttention(attention(dropout=0.5, batch_first=True))
    x = torch.randn(3, 5, 16).double()
    assert not torch.equal(split(x, x, x)[0], split(x, x, x)[0])
    split.eval()
    assert torch.equal(split(x, x, x)[0], split(x, x, x)[0])


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
        self.blocks, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(16, 7)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.head(self.blocks(x, src_key_padding_mask=padding))


X = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(2))


def test_projections_of_a_transformer_are_factorized_and_merged(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Encoder().eval()
    original = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters())
    report = evolvenet.factorize(model, 4, batches=[torch.randn(64, 5, 16)], optimizers=optimizer)
    assert [line.name for line in report][:4] == [
        f"blocks.layers.0.self_attn.{part}_proj" for part in ("q", "k", "v", "out")
    ]
    assert {line.kind for line in report if "self_attn" in line.name} == {"svd"}
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}
    with torch.no_grad():
        merged = copy.deepcopy(model)
        evolvenet.merge(merged)
        assert repr(merged) == repr(original)
        # The first runs torch's fused path, with merged weights; the others run the factors.
        fused, padded = model(X), model(X, PADDING)
        torch.testing.assert_close(fused, merged(X), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(padded[~PADDING], merged(X, PADDING)[~PADDING], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(X), fused, rtol=1e-4, atol=1e-5)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    fresh = evolvenet.load(Encoder().eval(), tmp_path / "weights.pt")
    torch.testing.assert_close(fresh(X), model(X), rtol=0, atol=0)
    torch.save(original.state_dict(), tmp_path / "whole.pt")
    torch.testing.assert_close(evolvenet.load(fresh, tmp_path / "whole.pt")(X), original(X), rtol=0, atol=0)
    evolvenet.merge(model, optimizers=optimizer)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}


def test_an_attention_is_named_as_a_whole_or_by_its_projections() -> None:
    for ranks in ({"0": 2}, {"0.q_proj": 2, "0.v_proj": 3}):
        model = nn.ModuleList([attention(batch_first=True), attention(batch_first=True)])
        second = model[1]
        report = evolvenet.factorize(model, ranks)
        chains = [name for name, module in model.named_modules() if isinstance(module, FactoredLayer)]
        assert chains == [line.name for line in report]
        assert chains == ([f"0.{part}_proj" for part in ("q", "k", "v", "out")] if "0" in ranks else list(ranks))
        assert model[1] is second
        x = torch.randn(2, 5, 16).double()
        before = model[0](x, x, x)[0]
        evolvenet.merge(model, ["0"])
        torch.testing.assert_close(model[0](x, x, x)[0], before, rtol=0, atol=1e-10)
        assert type(model[0]) is nn.MultiheadAttention


def test_where_no_projection_pays_the_attention_stays_as_it_is() -> None:
    model = nn.Sequential(attention())
    optimizer = torch.optim.Adam(model.parameters())
    before = State.of(model, [optimizer])
    report = evolvenet.factorize(model, 15, optimizers=optimizer)
    assert {line.kind for line in report} == {None}
    assert before.differences(model, [optimizer]) == []

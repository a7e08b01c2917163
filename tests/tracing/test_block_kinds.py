"""Which kind of block each width is, by what is done with it, and the coverage of each kind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import evolvenet
from evolvenet.graph.block_kinds import ATTENTION, EMBEDDINGS, EXPERTS, FEED_FORWARD, OTHER, ROUTER, STREAM
from evolvenet.graph.serialization import from_state_dict, to_state_dict
from tests.helpers.networks import EncoderDecoder
from tests.helpers.networks.encoder_decoder import Layer
from tests.helpers.networks.experts import Mixture, PickedExperts

TOKENS = torch.randint(0, 20, (2, 6), generator=torch.Generator().manual_seed(0))


def kinds_of(model: nn.Module, inputs: Tensor) -> dict[str, str]:
    return {name: width.kind for name, width in evolvenet.trace(model, inputs).widths.items()}


def test_every_part_of_a_transformer_is_told_and_counted_once() -> None:
    graph = evolvenet.trace(EncoderDecoder(), TOKENS, "logits")
    kinds = {name: width.kind for name, width in graph.widths.items()}
    assert kinds["words"] == kinds["others"] == STREAM
    assert kinds["words.weight[0]"] == EMBEDDINGS
    assert kinds["encoder.0.attend.query"] == kinds["decoder.0.attend.query"] == ATTENTION
    assert kinds["encoder.0.up"] == kinds["decoder.0.up"] == FEED_FORWARD
    shares = graph.coverage_by_kind
    assert sum(removable for removable, _ in shares.values()) == pytest.approx(graph.coverage)
    assert sum(share for _, share in shares.values()) == pytest.approx(1.0)
    assert shares[EMBEDDINGS] == pytest.approx((20 * (12 + 16) / graph.parameters,) * 2)
    assert from_state_dict(to_state_dict(graph)) == graph
    assert graph.resized({}).coverage_by_kind == shares


def test_what_outputs_fix_is_shown_under_its_kind() -> None:
    graph = evolvenet.trace(EncoderDecoder(), TOKENS, ["logits", "encoder"])
    removable, share = graph.coverage_by_kind[STREAM]
    assert 0 < removable < share
    assert graph.coverage_by_kind[FEED_FORWARD][0] == pytest.approx(graph.coverage_by_kind[FEED_FORWARD][1])
    assert f"stream {100 * removable:.1f} of {share:.1%}" in str(graph).splitlines()[-1]


class Written(nn.Module):
    """No residual sums: an activation function that adds a power of its input, gates, a sum of two layers, a product."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x)
        h = 0.5 * h * (1 + torch.tanh(h + 0.044715 * h.pow(3)))
        return self.head((h + self.two(x)) * functional.softmax(self.two(x).sum(-1, keepdim=True), 1))


def test_sums_without_a_weight_between_are_no_stream() -> None:
    assert set(kinds_of(Written(), torch.randn(3, 4)).values()) == {OTHER}
    assert set(kinds_of(nn.GRU(4, 6), torch.randn(2, 3, 4)).values()) == {OTHER}


def test_a_stream_is_known_from_one_layer_whatever_its_names() -> None:
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(5, 12), Layer(12, 2, 24), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x))[0])

    assert kinds_of(First(), torch.randn(2, 4, 5)) == {
        "a": STREAM, "a:in": OTHER, "b.attend.query": ATTENTION, "b.up": FEED_FORWARD, "c": OTHER,
    }  # fmt: skip


def test_a_width_behind_an_op_without_a_rule_counts_as_kept() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.linalg.inv_ex(torch.diag_embed(self.b(self.a(x)).exp()))[0].sum(-1))

    graph = evolvenet.trace(Net(), torch.randn(3, 4))
    assert graph.widths["b"].frozen is not None
    assert graph.coverage == pytest.approx((4 * 8 + 8 + 8 * 6 / 2) / graph.parameters)


def test_experts_and_routers_are_told_and_their_weights_counted_as_a_whole() -> None:
    model = Mixture(bias=True)
    graph = evolvenet.trace(model, torch.randint(11, (2, 6)))
    kinds = {name: width.kind for name, width in graph.widths.items() if width.kind in (EXPERTS, ROUTER)}
    assert kinds == dict.fromkeys(("blocks.0.router", "blocks.0", "blocks.1.router", "blocks.1"), EXPERTS)
    sizes = {EXPERTS: 0, ROUTER: 0}
    for name, parameter in model.blocks.named_parameters():
        sizes[ROUTER if "router" in name else EXPERTS] += parameter.numel()
    for kind, size in sizes.items():
        assert graph.coverage_by_kind[kind] == pytest.approx((size / graph.parameters,) * 2)


def test_a_router_whose_experts_cannot_go_is_a_router_all_the_same() -> None:
    graph = evolvenet.trace(PickedExperts("code"), torch.randn(5, 4))
    assert graph.widths["router"].frozen is not None
    removable, share = graph.coverage_by_kind[ROUTER]
    assert 0 < removable < share, "the units that it is computed from can go"


class BestFeatures(nn.Module):
    """A sparse autoencoder: the largest few features of each sample pass on."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(4, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        values, places = (h := self.encode(x)).topk(3, -1)
        return self.decode(torch.zeros_like(h).scatter(-1, places, values))


def test_features_that_compete_are_no_experts() -> None:
    assert kinds_of(BestFeatures(), torch.randn(5, 4))["encode"] == OTHER

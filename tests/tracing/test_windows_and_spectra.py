"""Windows, sampling, Fourier transforms, distances, products of three, slices that are written to: units beside them pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Conv1d, Conv2d, Linear, functional
from torch.nn.utils import rnn

from evolvenet.tracing.part_writes import places_of_view
from tests.helpers.coded import CodedCases

ROWS = torch.linspace(-1, 1, 30).view(6, 5).sin() * 3
STEPS = torch.linspace(-2, 2, 60).view(2, 6, 5).cos()
IMAGE = torch.linspace(-2, 2, 384).view(2, 3, 8, 8).cos()
SERIES = torch.linspace(-2, 2, 96).view(2, 3, 16).cos()
WORDS, LENGTHS = torch.arange(24).view(4, 6) % 9, torch.tensor([6, 3, 4, 2])
CASES = CodedCases()
DATA = "data of a fixed size"


def _two(**more: nn.Module | Tensor) -> dict[str, nn.Module | Tensor]:
    return {"a": Linear(5, 8), "b": Linear(8, 3), **more}


def _three(**more: nn.Module | Tensor) -> dict[str, nn.Module | Tensor]:
    return {"a": Linear(5, 8), "c": Linear(5, 7), **more}


def _convs(channels: int = 6, **more: nn.Module | Tensor) -> dict[str, nn.Module | Tensor]:
    return {"a": Conv2d(3, 6, 3, padding=1), "b": Conv2d(channels, 2, 1), **more}


@CASES.add("rows of a table added", lambda: {"e": nn.EmbeddingBag(9, 8), "b": Linear(8, 3)}, WORDS, sizes={"e": 8})
@CASES.add(
    "largest of rows", lambda: {"e": nn.EmbeddingBag(9, 8, mode="max"), "b": Linear(8, 3)}, WORDS, sizes={"e": 8}
)
def _(net: Any, words: Tensor) -> Tensor:
    return net.b(net.e(words))


def _prototypes() -> dict[str, nn.Module | Tensor]:
    return {"a": Linear(5, 8), "p": nn.Parameter(torch.randn(4, 8)), "b": Linear(4, 3)}


@CASES.add("distances to prototypes", _prototypes, ROWS, sizes={"a": 8, "p": 4}, mixed=frozenset({"a"}))
def _(net: Any, x: Tensor) -> Tensor:
    return net.b(torch.cdist(net.a(x), net.p))


@CASES.add("distances to data", _two, ROWS, sizes={}, frozen={"a": DATA})
def _(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    return net.b(net.a(x)), torch.cdist(net.a(x), torch.cat([x, x[:, :3]], 1))


@CASES.add(
    "convolution by windows", lambda: _convs(5, w=nn.Parameter(torch.randn(5, 54))), IMAGE, sizes={"a": 6, "w": 5}
)
def _(net: Any, x: Tensor) -> Tensor:
    return net.b((net.w @ functional.unfold(net.a(x), (3, 3), padding=1)).view(len(x), -1, 8, 8))


@CASES.add("windows and back", _convs, IMAGE, sizes={"a": 6})
def _(net: Any, x: Tensor) -> Tensor:
    return net.b(functional.fold(functional.unfold(net.a(x), (2, 2), stride=2).relu(), (8, 8), (2, 2), stride=2))


@CASES.add("an image of patches", lambda: {"a": Linear(5, 24), "b": Conv2d(6, 2, 1)}, STEPS[:, :4], sizes={"a": 6})
def _(net: Any, x: Tensor) -> Tensor:
    """The units of all places of a patch in one channel go together."""
    return net.b(functional.fold(net.a(x).transpose(1, 2), (4, 4), (2, 2), stride=2))


@CASES.add(
    "patches", lambda: {"a": Conv2d(3, 6, 1), "p": Linear(24, 7), "b": Linear(7, 2)}, IMAGE, sizes={"a": 6, "p": 7}
)
def _(net: Any, x: Tensor) -> Tensor:
    return net.b(net.p(functional.unfold(net.a(x), (2, 2), stride=2).transpose(1, 2)).relu())


@CASES.add(
    "windows by Tensor.unfold",
    lambda: _convs(7, w=nn.Parameter(torch.randn(7, 6, 3, 3))),
    IMAGE,
    sizes={"a": 6, "w": 7},
)
def _(net: Any, x: Tensor) -> Tensor:
    return net.b(torch.einsum("bchwij,ocij->bohw", net.a(x).unfold(2, 3, 1).unfold(3, 3, 1), net.w))


@CASES.add(
    "a spatial transformer",
    lambda: _convs(l=Linear(6, 6)),
    IMAGE,
    sizes={"a": 6},
    frozen={"l": "a transform of coordinates"},
)
def _(net: Any, x: Tensor) -> Tensor:
    h = net.a(x)
    grid = functional.affine_grid(net.l(h.mean((2, 3))).view(-1, 2, 3), list(h.shape), align_corners=False)
    return net.b(functional.grid_sample(h, grid, align_corners=False))


@CASES.add("pooled and put back", _convs, IMAGE, sizes={"a": 6})
def _(net: Any, x: Tensor) -> Tensor:
    pooled, places = functional.max_pool2d(net.a(x), 2, return_indices=True)
    return net.b(functional.max_unpool2d(pooled, places, [2, 2]))


@CASES.add("pooled at random places", _convs, IMAGE, sizes={"a": 6})
def _(net: Any, x: Tensor) -> Tensor:
    places = torch.full((2, net.a.out_channels, 2), 0.3, dtype=x.dtype, device=x.device)
    return net.b(functional.fractional_max_pool2d(net.a(x), 2, output_size=4, _random_samples=places))


@CASES.add("rounded as in int8", _two, ROWS, sizes={"a": 8})
def _(net: Any, x: Tensor) -> Tensor:
    return net.b(torch.fake_quantize_per_tensor_affine(net.a(x).float(), 0.1, 0, -128, 127).to(x.dtype))


@CASES.add("spectrum along the steps", _two, STEPS, sizes={"a": 8})
def _(net: Any, x: Tensor) -> Tensor:
    return net.b(torch.fft.fft(net.a(x), dim=1).real)


@CASES.add("spectrum along the units", _two, STEPS, sizes={}, frozen={"a": "works along its units"})
def _(net: Any, x: Tensor) -> Tensor:
    return net.b(torch.fft.fft(net.a(x), dim=-1).real)


@CASES.add(
    "a global filter",
    lambda: _convs(f=nn.Parameter(torch.randn(6, 8, 5, 2))),
    IMAGE,
    sizes={"a": 6},
    frozen={"f[3]": "imaginary"},
)
def _(net: Any, x: Tensor) -> Tensor:
    spectrum = torch.fft.rfft2(net.a(x), norm="ortho") * torch.view_as_complex(net.f)
    return net.b(torch.fft.irfft2(spectrum, s=(8, 8), norm="ortho"))


def _operator() -> dict[str, nn.Module | Tensor]:
    weight = torch.randn(6, 7, 4, dtype=torch.complex128)
    return {"a": Conv1d(3, 6, 1), "w": nn.Parameter(weight), "s": Conv1d(6, 7, 1), "b": Conv1d(7, 2, 1)}


@CASES.add("a neural operator", _operator, SERIES, sizes={"a": 6, "w": 7})
def _(net: Any, x: Tensor) -> Tensor:
    h = net.a(x)
    out = torch.zeros(len(x), net.w.shape[1], 9, dtype=torch.complex128, device=x.device)
    out[:, :, :4] = torch.einsum("bix,iox->box", torch.fft.rfft(h)[:, :, :4], net.w)
    return net.b((torch.fft.irfft(out, n=16) + net.s(h)).relu())


def _circular() -> dict[str, nn.Module | Tensor]:
    return {"a": Conv2d(3, 6, 1), "c": Conv2d(6, 7, 3, padding=1, padding_mode="circular"), "b": Conv2d(7, 2, 1)}


@CASES.add("circular padding", _circular, IMAGE, sizes={"a": 6, "c": 7})
def _(net: Any, x: Tensor) -> Tensor:
    return net.b(net.c(net.a(x)).relu())


@CASES.add("bilinear", lambda: _three(bi=nn.Bilinear(8, 7, 6), b=Linear(6, 3)), ROWS, sizes={"a": 8, "c": 7, "bi": 6})
def _(net: Any, x: Tensor) -> Tensor:
    return net.b(net.bi(net.a(x), net.c(x)).relu())


@CASES.add(
    "bilinear with data",
    lambda: {"a": Linear(5, 8), "bi": nn.Bilinear(8, 5, 6), "b": Linear(6, 3)},
    ROWS,
    sizes={"a": 8, "bi": 6},
    frozen={"bi:in": DATA},
)
def _(net: Any, x: Tensor) -> Tensor:
    return net.b(net.bi(net.a(x), x).relu())


@CASES.add(
    "a sum over pairs",
    lambda: _three(w=nn.Parameter(torch.randn(8, 7, 6)), b=Linear(6, 3)),
    ROWS,
    sizes={"a": 8, "c": 7, "w": 6},
)
def _(net: Any, x: Tensor) -> Tensor:
    return net.b(torch.einsum("bi,bj,ijo->bo", net.a(x), net.c(x), net.w))


def _knots() -> dict[str, nn.Module | Tensor]:
    return {
        "a": Linear(5, 6),
        "w": nn.Parameter(torch.randn(7, 6, 4)),
        "base": nn.Parameter(torch.randn(7, 6)),
        "b": Linear(7, 3),
        "knots": torch.linspace(-1, 1, 4),
    }


@CASES.add("functions on edges (KAN)", _knots, ROWS, sizes={"a": 6, "knots[0]": 4, "base": 7})
def _(net: Any, x: Tensor) -> Tensor:
    h = net.a(x).tanh()
    bumps = torch.exp(-4 * (h[..., None] - net.knots) ** 2).flatten(1).relu()
    return net.b(functional.linear(functional.silu(h), net.base) + functional.linear(bumps, net.w.flatten(1)))


def _words(both: bool) -> dict[str, nn.Module | Tensor]:
    lstm = nn.LSTM(8, 6, batch_first=True, bidirectional=both)
    return {"e": nn.Embedding(9, 8), "l": lstm, "b": Linear(12 if both else 6, 2)}


@CASES.add("packed steps", lambda: _words(both=False), WORDS, LENGTHS, sizes={"e": 8, "l": 6})
@CASES.add("packed steps both ways", lambda: _words(both=True), WORDS, LENGTHS, sizes={"e": 8, "l": 6})
def _(net: Any, words: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    given = rnn.pack_padded_sequence(net.e(words), lengths.cpu(), batch_first=True, enforce_sorted=False)
    found, (last, _) = net.l(given)
    return net.b(rnn.pad_packed_sequence(found, batch_first=True)[0].sum(1)), net.b(torch.cat(list(last), -1))


@CASES.add("padded sequences", _two, ROWS, sizes={"a": 8})
def _(net: Any, x: Tensor) -> Tensor:
    return net.b(rnn.pad_sequence([net.a(x[:2]), net.a(x[2:])], batch_first=True))


@CASES.add("written beside each other", lambda: _three(b=Linear(15, 3)), ROWS, sizes={"a": 8, "c": 7})
def _(net: Any, x: Tensor) -> Tensor:
    h, g = net.a(x), net.c(x)
    out = x.new_zeros(len(x), h.shape[1] + g.shape[1])
    out[:, : h.shape[1]], out[:, h.shape[1] :] = h, g
    return net.b(out)


@CASES.add("written beside data", lambda: _two(c=Linear(13, 3)), ROWS, sizes={"a": 8})
def _(net: Any, x: Tensor) -> Tensor:
    h = net.a(x)
    out = x.new_empty(len(x), h.shape[1] + 5)
    out[:, :5], out[:, 5:] = x, h
    return net.c(out)


@CASES.add("written below each other", lambda: _convs(c=Conv2d(3, 6, 1)), IMAGE, sizes={"a": 6})
def _(net: Any, x: Tensor) -> Tensor:
    h = net.a(x)
    out = x.new_zeros(len(x), h.shape[1], 16, 8)
    out[:, :, :8], out[:, :, 8:] = h, net.c(x)
    return net.b(out)


@CASES.add("steps written and added to", lambda: {"g": nn.GRUCell(5, 8), "b": Linear(8, 3)}, STEPS, sizes={"g": 8})
def _(net: Any, x: Tensor) -> Tensor:
    state = x.new_zeros(len(x), net.g.hidden_size)
    out = torch.empty(len(x), x.shape[1], net.g.hidden_size, dtype=x.dtype, device=x.device).zero_()
    for step in range(x.shape[1]):
        state = net.g(x[:, step], state)
        out[:, step] += state
    return net.b(out)


@CASES.add("written into memory of another shape", _two, STEPS, sizes={"a": 8})
def _(net: Any, x: Tensor) -> Tensor:
    h = net.a(x)
    out = x.new_zeros(h.shape)
    out.view(-1, h.shape[2])[:] = h.flatten(0, 1)
    return net.b(out)


@CASES.add("written into one long row", _two, ROWS, sizes={}, frozen={"a": "into a part of another tensor"})
def _(net: Any, x: Tensor) -> Tensor:
    h = net.a(x)
    out = x.new_zeros(h.shape)
    out.view(-1)[:] = h.flatten()
    return net.b(out)


def _scan() -> dict[str, nn.Module | Tensor]:
    layers = {"i": Linear(5, 16), "m": Linear(8, 4), "n": Linear(8, 4), "dt": Linear(8, 8), "b": Linear(8, 3)}
    return {**layers, "decay": nn.Parameter(torch.rand(8, 4)), "skip": nn.Parameter(torch.randn(8))}


@CASES.add("a selective scan", _scan, STEPS, sizes={"i": 8, "m": 4}, mixed=frozenset({"m"}))
def _(net: Any, x: Tensor) -> Tensor:
    u, z = net.i(x).chunk(2, -1)
    dt, decay, ins, outs = functional.softplus(net.dt(u)), -net.decay.exp(), net.m(u), net.n(u)
    state, found = x.new_zeros(len(x), *net.decay.shape), []
    for step in range(x.shape[1]):
        given = dt[:, step, :, None] * ins[:, step, None] * u[:, step, :, None]
        state = torch.exp(dt[:, step, :, None] * decay) * state + given
        found.append((state * outs[:, step, None]).sum(-1))
    return net.b((torch.stack(found, 1) + net.skip * u) * functional.silu(z))


@CASES.add(
    "a retention",
    lambda: {"q": Linear(5, 8), "k": Linear(5, 8), "v": Linear(5, 7), "b": Linear(7, 3)},
    STEPS,
    sizes={"q": 8, "v": 7},
    mixed=frozenset({"q"}),
)
def _(net: Any, x: Tensor) -> Tensor:
    q, k, v = net.q(x), net.k(x), net.v(x)
    state, found = x.new_zeros(len(x), q.shape[2], v.shape[2]), []
    for step in range(x.shape[1]):
        state = 0.9 * state + k[:, step, :, None] * v[:, step, None]
        found.append((q[:, step, :, None] * state).sum(1))
    return net.b(torch.stack(found, 1))


@pytest.mark.parametrize("name", CASES)
def test_units_beside_an_op_are_resizable_and_along_it_frozen(name: str) -> None:
    CASES[name].check()


@pytest.mark.parametrize(
    "view",
    [
        lambda base: base[1],
        lambda base: base[:, 2:, ::2],
        lambda base: base[..., -1:].squeeze(-1),
        lambda base: base.transpose(0, 2)[1:3],
        lambda base: base[:, 1].t(),
        lambda base: base[None, 2:, :, None],
        lambda base: base.view(20, 6)[::3],
        lambda base: base.diagonal(),
        lambda base: base.unfold(1, 3, 1)[..., 0],
    ],
)
def test_the_places_of_a_view_are_those_that_writing_to_it_changes(view: Any) -> None:
    base = torch.zeros(4, 5, 6)
    part = view(base)
    places = places_of_view(base, part)
    assert places
    part.copy_(torch.arange(1.0, part.numel() + 1).view(part.shape))
    for dim, found in places.items():
        assert len(found.at) == part.shape[dim]
        for k, at in enumerate(found.at):
            assert set(part.select(dim, k).flatten().tolist()) <= set(base.select(found.dim, at).flatten().tolist())


@pytest.mark.parametrize(
    ("view", "known"),
    [
        (lambda base: base.view(-1), {}),
        (lambda base: base.view(20, 6)[::3], {1: 2}),
        (lambda base: base.diagonal(), {0: 2}),
        (lambda base: base.unfold(1, 3, 1), {0: 0, 2: 2}),
        (lambda base: base.view(4, 30), {0: 0}),
    ],
)
def test_dimensions_that_go_along_several_have_no_places(view: Any, known: dict[int, int]) -> None:
    base = torch.zeros(4, 5, 6)
    assert {dim: places.dim for dim, places in places_of_view(base, view(base)).items()} == known

"""Outputs that are compared before and after a change."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from evolvenet.measurement.output_error import output_divergence, output_error, outputs_on, real


class Words(nn.Module):
    """Logits of many words."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(30, 8), nn.Linear(8, 50)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.embedding(words))


def test_of_large_outputs_the_same_places_are_compared_of_every_batch() -> None:
    model = Words()
    batches = [torch.randint(0, 30, (4, 20)) for _ in range(2)]
    every, some = (outputs_on(model, batches, most=most)[0] for most in (None, 2000))
    assert every.shape == (8, 20, 50)
    assert some.shape == (40, 50)
    rows = every.reshape(-1, 50)
    assert all(bool((rows == row).all(1).any()) for row in some)
    assert torch.equal(some, outputs_on(model, batches, most=2000)[0])
    with torch.no_grad():
        model.head.weight += 0.1 * torch.randn(50, 8)
    whole = output_error([rows], [outputs_on(model, batches, most=None)[0].reshape(-1, 50)])
    assert 0.5 < output_error([some], outputs_on(model, batches, most=2000)) / whole < 2


def test_no_batch_is_left_out_where_some_places_are_taken_of_large_ones_only() -> None:
    model = Words()
    batches = [torch.randint(0, 30, (count, 20)) for count in (8, 8, 2)]
    (some,) = outputs_on(model, batches, most=15000)
    assert some.shape == (100 + 100 + 40, 50)


def test_the_error_is_normalized_alike_with_all_and_with_some_places() -> None:
    whole, moved = torch.randn(6, 20, 5) + torch.arange(20)[:, None], torch.randn(6, 20, 5)
    rows = [each.reshape(-1, 5) for each in (whole, moved)]
    assert output_error([whole], [moved]) == pytest.approx(output_error(rows[:1], rows[1:]))


def test_of_as_many_outputs_as_samples_those_of_the_first_batch_are_compared() -> None:
    class Each(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> list[Tensor]:
            return list(self.layer(x))

    model, batches = Each(), [torch.randn(5, 3), torch.randn(2, 3)]
    found = outputs_on(model, batches)
    assert torch.equal(torch.stack(found), torch.stack(model(batches[0])).detach().double())


@pytest.mark.parametrize("shape", [(6,), (6, 5), (6, 4, 5)], ids=str)
def test_complex_outputs_count_with_both_parts_of_every_entry(shape: tuple[int, ...]) -> None:
    whole, moved = torch.randn(shape, dtype=torch.complex64) + 3 - 5j, torch.randn(shape, dtype=torch.complex64)
    rows = whole.flatten(0, -2) if len(shape) > 1 else whole
    expected = (moved - whole).abs().square().sum() / (rows - rows.mean(0)).abs().square().sum()
    assert output_error([real(whole)], [real(moved)]) == pytest.approx(float(expected), rel=1e-4)


def test_places_are_taken_evenly_from_the_first_to_the_last_of_every_batch() -> None:
    batches = [torch.arange(300.0).reshape(100, 3) + start for start in (0, 1000, 2000)]
    (some,) = outputs_on(nn.Identity(), batches, most=90)
    assert some.shape == (30, 3)
    for batch, places in zip(batches, some.split(10), strict=True):
        taken = (places[:, 0] - batch[0, 0]) / 3
        assert (taken // 10).tolist() == list(range(10)), "one of each tenth"


def test_a_divergence_counts_classes_that_are_masked_in_both_as_nothing_and_shows_nan() -> None:
    one, two = torch.tensor([[0.0, 1.0, -torch.inf]]), torch.tensor([[1.0, 0.0, -torch.inf]])
    assert output_divergence([one], [two]) == pytest.approx(output_divergence([one[:, :2]], [two[:, :2]]))
    assert math.isnan(output_divergence([one], [torch.full_like(one, torch.nan)]))
    assert output_divergence([one], [torch.tensor([[-torch.inf, 0.0, 0.0]])]) == math.inf

"""Rules that choose a rank: from the singular values of a layer's unfoldings, or by a metric of the model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from evolvenet.errors import FactorizationError
from evolvenet.linalg.noise_rank import evbmf_rank, gavish_donoho_threshold
from evolvenet.linalg.precision import in_float64
from evolvenet.linalg.spectrum import singular_values, units_for_energy


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Singular values of one unfolding; of a grouped convolution those of all groups, added up by their squares.

    Args:
        values: `[min(rows, columns)]`, descending.
        rows: of the unfolding.
        columns: of the unfolding.
        unfoldings: number of the layer's unfoldings, whose errors add up.
    """

    values: Tensor
    rows: int
    columns: int
    unfoldings: int = 1

    @classmethod
    def of(cls, matrices: list[Tensor], unfoldings: int = 1) -> Spectrum:
        """The spectrum of the unfoldings `[rows, columns]` of all channel groups.

        >>> Spectrum.of([torch.diag(torch.tensor([3.0, 0.0])), torch.diag(torch.tensor([4.0, 0.0]))]).values
        tensor([5., 0.], dtype=torch.float64)
        """
        squares = [in_float64(singular_values(matrix.float())).square() for matrix in matrices]
        rows, columns = matrices[0].shape
        return cls(torch.stack(squares).sum(0).sqrt(), rows, columns, unfoldings)


class RankRule(Protocol):
    """Chooses a rank for each unfolding of a layer."""

    uses_data: ClassVar[bool]
    """Whether the spectra are those of outputs, where there are batches, or always those of weights."""

    def rank(self, spectrum: Spectrum) -> int:
        """A rank of 1 or more."""
        ...


@dataclass(frozen=True)
class Energy:
    """The smallest rank that keeps a share of the energy of the layer's outputs; of its weight's where there are no batches.

    A closed form, from one pass. Layers that lose the same share are the allocation that keeps the most accuracy for its
    size. A kind with several ranks loses an equal part of the share by each; for all kinds but "svd" and one
    of several ranks the share is an estimate.

    Args:
        kept: the share, above 0 and below 1.

    >>> Energy(0.85).rank(Spectrum.of([torch.diag(torch.tensor([3.0, 1.0, 0.1]))]))
    1
    """

    kept: float = 0.99
    uses_data: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.kept < 1:
            raise FactorizationError(
                f"Energy: expected a share above 0 and below 1, got {self.kept}. A rank is given by an int."
            )

    def rank(self, spectrum: Spectrum) -> int:
        """See `RankRule`."""
        return max(1, units_for_energy(spectrum.values, (1 - self.kept) / spectrum.unfoldings))


@dataclass(frozen=True)
class EVBMF:
    """The rank of the weight by empirical variational Bayes, rounded up to a multiple. For compatibility with articles.

    See `evolvenet.linalg.noise_rank.evbmf_rank` (Nakajima et al. 2013). It takes whatever looks like noise for noise: of
    trained networks it keeps 7 to 23 % of the parameters and leaves accuracies near chance. The factors must be trained
    afterwards. `Energy` with batches is the rule for use without training.

    Args:
        multiple: to which ranks are rounded up.

    >>> noise = torch.randn(20, 40, generator=torch.Generator().manual_seed(0))
    >>> noise[:, :20] += torch.diag(torch.tensor([20.0, 15.0] + [0.0] * 18))
    >>> EVBMF(multiple=8).rank(Spectrum.of([noise]))
    8
    """

    multiple: int = 8
    uses_data: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.multiple < 1:
            raise FactorizationError(f"EVBMF: expected a multiple of 1 or more, got {self.multiple}.")

    def rank(self, spectrum: Spectrum) -> int:
        """See `RankRule`."""
        found = max(1, evbmf_rank(spectrum.values, spectrum.rows, spectrum.columns))
        return math.ceil(found / self.multiple) * self.multiple


@dataclass(frozen=True)
class GavishDonoho:
    """The number of singular values of the weight above the optimal hard threshold for noise of unknown strength.

    See `evolvenet.linalg.noise_rank.gavish_donoho_threshold` (2014). As with `EVBMF`, factors must be trained afterwards.

    >>> GavishDonoho().rank(Spectrum.of([torch.diag(torch.tensor([9.0, 1.0, 1.0, 1.0]))]))
    1
    """

    uses_data: ClassVar[bool] = False

    def rank(self, spectrum: Spectrum) -> int:
        """See `RankRule`."""
        threshold = gavish_donoho_threshold(spectrum.values, spectrum.rows, spectrum.columns)
        return max(1, int((spectrum.values > threshold).sum()))


@dataclass(frozen=True)
class Within:
    """The smallest rank with which a metric of the model stays within a tolerance, found by bisection.

    For all layers, `factorize(model, Within(…))`, one share of energy that each of them keeps is bisected. For layers by name,
    `factorize(model, {"conv2": Within(…), "fc": Within(…)})`, the rank of each is bisected, in the order of execution, behind
    the layers found before. Each adds its drop: the metric stays within the sum of the drops so far of the model's value at the
    start. What one layer does not use of its drop is there for the next ones, if they have the same `evaluate`. The four
    projections of an attention have a drop each. A layer of which no rank is found stays whole.

    Bisection rests on this: if a rank is within the tolerance, so are all larger ones. Therefore two smaller ranks than the
    one found are measured as well. Where one of them is within the tolerance, it is taken, and a warning says that the metric
    is not monotone. `evolvenet.lowrank.tolerance` has the details.

    Args:
        evaluate: model → metric, in some seconds: on a validation set, without training. It gets the model itself, with
            factors in place, and calls `model.eval()` if it must.
        drop: how far the metric may fall below that of the model as it is (rise above it with mode="min"), in its own units.
        mode: "max" if larger is better, "min" if smaller is.

    >>> from evolvenet.lowrank.factorize import factorize
    >>> model, x = nn.Sequential(nn.Linear(32, 32)), torch.eye(32)
    >>> model[0].weight.data = torch.diag(torch.tensor([3.0, 2.0, 1.0] + 29 * [0.01]))
    >>> before = model(x)
    >>> print(factorize(model, {"0": Within(lambda model: float((model(x) - before).norm()), 1.5, mode="min")}))
    0: svd of rank 2, 1,024 → 128 parameters, error 0.072
    all: 1,024 → 128 parameters
    0: metric 1.001 (0 before, 1.5 at worst), 5 ranks measured
    """

    evaluate: Callable[[nn.Module], float]
    drop: float
    mode: Literal["max", "min"] = "max"

    def __post_init__(self) -> None:
        if not 0 <= self.drop < math.inf or self.mode not in ("max", "min"):
            raise FactorizationError(
                f"Within: expected a drop of 0 or more and a mode of 'max' or 'min', got {self.drop} and {self.mode!r}."
            )

"""How do the targets of a regression go with its inputs? Means, covariances with the inputs, variances."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .base import Statistic, no_tokens


@dataclass(frozen=True)
class Cross:
    """Inputs and targets of a regression, but for the covariance of the inputs among themselves."""

    n: int
    input_mean: Float[Tensor, " d"]
    mean: Float[Tensor, " k"]  # of the targets
    covariance: Float[Tensor, "d k"]  # of inputs with targets, divided by n
    variance: Float[Tensor, " k"]  # of the targets, divided by n


class CrossMoments(Statistic):
    """n, sums, sum a b' and sum b² of rows [a | b] about a pilot mean, in float64: a the inputs, b the targets.

    The covariance of a itself is that of `Moments`, of which the upper triangle is enough.
    """

    fixed: ClassVar[tuple[str, ...]] = ("shift",)

    @classmethod
    def about(cls, sample: Float[Tensor, "n width"], d: int) -> CrossMoments:
        """Nothing seen yet, shifted by the mean of a pilot sample, whose first `d` columns are the inputs."""
        return cls(_start(sample, d))

    def _summary(self, x: Float[Tensor, "n width"], at: Int[Tensor, " n"]) -> dict[str, Tensor]:
        x = x if x.dtype == torch.float64 else x.float()
        x = x - self._state["shift"].to(x.dtype)
        a, b = x.tensor_split([len(self._state["cross"])], dim=1)
        return {
            "n": torch.tensor(len(x)),
            "s": x.sum(0, dtype=torch.float64),
            "cross": a.mT @ b,
            "squares": torch.linalg.vector_norm(b, dim=0, dtype=torch.float64).square(),
        }

    def compute(self) -> Cross:
        """Means, the covariance of inputs with targets, and the targets' variances.

        Raises:
            ValueError: no token seen, or a sum that is not finite.
        """
        self._need(1, "a regression")
        if not torch.isfinite(self._state["cross"]).all():
            raise ValueError("the cross-moment is not finite: the activations hold NaN or Inf, or overflow")
        mean, d = self._state["s"] / self.n, len(self._state["cross"])
        a, b = mean[:d], mean[d:]
        covariance = (self._state["cross"] / self.n).addr_(a, b, alpha=-1)
        variance = (self._state["squares"] / self.n - b**2).clamp(min=0)
        a, b = (mean + self._state["shift"]).tensor_split([d])
        return Cross(self.n, a, b, covariance, variance)


class QuadraticMoments(CrossMoments):
    """`CrossMoments` whose inputs are products of the leading principal components of x; rows are [x | b].

    The components are those of a pilot sample, brought to variance 1; every z_i z_j, i <= j, is an input, and the
    targets are [products | x | b].
    """

    fixed = ("shift", "centre", "basis")

    @classmethod
    def about(cls, sample: Float[Tensor, "n width"], d: int, k: int = 16) -> QuadraticMoments:
        """Nothing seen yet. `d` columns of the sample are x, of which `k` components are taken."""
        x = sample[:, :d].double()
        centre, basis = x.new_zeros(d), torch.eye(d, min(k, d)).to(x)
        if len(x) > 1:
            centre = x.mean(0)
            spread, vectors = torch.linalg.eigh(torch.cov(x.mT, correction=0).view(d, d))
            deviation = spread.flip(0)[:k].clamp(min=float(spread[-1]) * 1e-12).sqrt()
            # what never varies has no unit to be measured in
            basis = vectors.flip(1)[:, :k] / torch.where(deviation > 0, deviation, 1.0)
        rows = _with_products(sample, centre, basis)
        return cls(_start(rows, (rows.shape[1] - sample.shape[1]) // 2) | {"centre": centre, "basis": basis})

    @property
    def basis(self) -> Float[Tensor, "d k"]:
        """Components of x: (x - centre) @ basis has variance 1 in the pilot."""
        return self._state["basis"].clone()

    def _summary(self, x: Float[Tensor, "n width"], at: Int[Tensor, " n"]) -> dict[str, Tensor]:
        return super()._summary(_with_products(x, self._state["centre"], self._state["basis"]), at)


def _start(sample: Float[Tensor, "n width"], d: int) -> dict[str, Tensor]:
    width = sample.shape[1]
    zeros = torch.zeros(width, dtype=torch.float64, device=sample.device)
    return {
        "n": no_tokens(),
        "shift": sample.double().mean(0) if len(sample) else zeros,
        "s": zeros,
        "cross": torch.zeros(d, width - d, dtype=torch.float64, device=sample.device),
        "squares": zeros[d:],
    }


def _with_products(
    rows: Float[Tensor, "n width"], centre: Float[Tensor, " d"], basis: Float[Tensor, "d k"]
) -> Float[Tensor, "n wider"]:
    rows = rows if rows.dtype == torch.float64 else rows.float()
    z = (rows[:, : len(centre)] - centre.to(rows.dtype)) @ basis.to(rows.dtype)
    i, j = _pairs(basis.shape[1])
    products = z[:, i] * z[:, j]
    return torch.cat([products, products, rows], dim=1)


@cache
def _pairs(k: int) -> tuple[Int[Tensor, " m"], Int[Tensor, " m"]]:
    i, j = torch.triu_indices(k, k)
    return i, j

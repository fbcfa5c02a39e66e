"""How much of a set of targets is an affine map of the inputs? From means and covariances alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

RIDGE = 1e-8  # of each input's variance


@dataclass(frozen=True)
class Paired:
    """Inputs and targets of a regression over n tokens: means, and covariances divided by n."""

    n: int
    input_mean: Float[Tensor, " d"]
    inputs: Float[Tensor, "d d"]
    mean: Float[Tensor, " k"]  # of the targets
    cross: Float[Tensor, "d k"]  # covariance of inputs with targets
    variance: Float[Tensor, " k"]  # of each target

    def targets(self, which: slice) -> Paired:
        """Some of the targets."""
        mean, cross, variance = self.mean[which], self.cross[:, which], self.variance[which]
        return replace(self, mean=mean, cross=cross, variance=variance)

    def of(self, matrix: Float[Tensor, "d m"]) -> Paired:
        """The same targets beside x @ matrix in place of the inputs x."""
        inputs = matrix.T @ self.inputs @ matrix
        return replace(self, input_mean=self.input_mean @ matrix, inputs=inputs, cross=matrix.T @ self.cross)


@dataclass(frozen=True)
class AffineMap:
    """x -> x @ weights + offset."""

    weights: Float[Tensor, "d k"]
    offset: Float[Tensor, " k"]

    def __call__(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n k"]:
        return x @ self.weights.to(x) + self.offset.to(x)

    def into(self, matrix: Float[Tensor, "k m"], offset: Float[Tensor, " m"]) -> AffineMap:
        """This map, and then another: target @ matrix + offset."""
        return AffineMap(self.weights @ matrix, self.offset @ matrix + offset)


def fit(p: Paired, ridge: float = RIDGE) -> AffineMap:
    """The affine map of least mean square error, with a ridge relative to each input's variance.

    Directions in which the inputs vary no more than float32 rounds are left out: a LayerNorm leaves one, and fewer
    tokens than inputs leave many.

    >>> one = torch.ones(1, dtype=torch.float64)
    >>> fit(Paired(9, 0 * one, torch.diag(one), one, torch.diag(3 * one), 9 * one))(torch.tensor([2.0]))
    tensor([7.])
    """
    inputs = p.inputs.double()
    scale = inputs.diagonal().clamp(min=0).sqrt()
    scale = torch.where(scale > 0, 1 / scale, 0.0)
    spread, vectors = torch.linalg.eigh(scale[:, None] * inputs * scale)
    real = spread > 4 * torch.finfo(torch.float32).eps * spread[-1]
    inverse = torch.where(real, 1 / (spread + ridge), 0.0)
    basis = scale[:, None] * vectors
    weights = basis @ (inverse[:, None] * (basis.T @ p.cross.double()))
    return AffineMap(weights, p.mean - p.input_mean @ weights)


def mean_square_error(found: AffineMap, p: Paired) -> Float[Tensor, " k"]:
    """Of each target, over the tokens of `p`, which need not be those that the map was fitted on."""
    explained = (found.weights * (2 * p.cross - p.inputs @ found.weights)).sum(0)
    off = p.mean - found.offset - p.input_mean @ found.weights
    return p.variance - explained + off**2


@dataclass(frozen=True)
class HeldOut:
    """Mean square errors and variances of each target in each part, by maps fitted on the other part."""

    n: Float[Tensor, " parts"]
    error: Float[Tensor, "parts k"]
    variance: Float[Tensor, "parts k"]

    def targets(self, which: slice) -> HeldOut:
        """Some of the targets."""
        return replace(self, error=self.error[:, which], variance=self.variance[:, which])

    @property
    def share(self) -> float:
        """R²: 1 - sum of errors / sum of variances over all targets and parts, at most 1."""
        return 1 - float((self.n @ self.error).sum() / (self.n @ self.variance).sum())

    @property
    def spread(self) -> float:
        """Half the difference of R² between the parts."""
        parts = 1 - self.error.sum(1) / self.variance.sum(1)
        return float(parts.max() - parts.min()) / 2

    @property
    def each(self) -> Float[Tensor, " k"]:
        """R² of each target; NaN where it never varies."""
        return 1 - (self.n @ self.error) / (self.n @ self.variance)

    def weighted(self, weights: Float[Tensor, " k"]) -> float:
        """R² of the targets as if each had this variance; those that never vary are left out."""
        some = torch.isfinite(self.each)
        return float(weights[some] @ self.each[some] / weights[some].sum())


def held_out(parts: Sequence[Paired], maps: Sequence[AffineMap]) -> HeldOut:
    """How well the map of each of two parts does on the other one."""
    error = torch.stack([mean_square_error(found, p) for found, p in zip(reversed(maps), parts, strict=True)])
    n = torch.tensor([part.n for part in parts], dtype=torch.float64, device=error.device)
    return HeldOut(n, error, torch.stack([part.variance for part in parts]))


def cross_fitted(parts: Sequence[Paired]) -> HeldOut:
    """The best affine map of each of two parts, judged on the other."""
    return held_out(parts, [fit(part) for part in parts])

"""How does what a neuron writes spread over the vocabulary?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

TILE = 1024  # tokens at a time, and as many values: few enough to stay in the processor's cache
ROUNDING = 1e-10  # a variance of cosines below this is that of float32, and its higher moments mean nothing


class Spread(NamedTuple):
    """Moments over the vocabulary of the cosine of each value with each token's direction."""

    variance: Float[Tensor, " n"]
    skew: Float[Tensor, " n"]  # 0 for a symmetric spread; NaN where nothing varies
    kurtosis: Float[Tensor, " n"]  # not excess: 3 for a Gaussian; NaN where nothing varies


@dataclass(frozen=True)
class Vocabulary:
    """An unembedding, with all that is needed of it to read directions: their length changes nothing here.

    >>> v = Vocabulary.of(torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]]))
    >>> v.spread(torch.tensor([[3.0, 0.0]])).variance, v.logit_variance(torch.tensor([[3.0, 0.0]]))
    (tensor([0.5000], dtype=torch.float64), tensor([1.6000], dtype=torch.float64))
    """

    rows: Float[Tensor, "d_vocab d_model"]
    mean: Float[Tensor, " d_model"]  # of the unit rows
    cosines: Float[Tensor, "d_model d_model"]  # covariance of the unit rows over the vocabulary
    logits: Float[Tensor, "d_model d_model"]  # covariance of the rows over the vocabulary
    centred: bool  # every row has mean 0, as behind a LayerNorm: the all-ones direction writes nothing

    @classmethod
    def of(cls, rows: Float[Tensor, "d_vocab d_model"]) -> Vocabulary:
        """Of an unembedding, such as `unembedding(model)`."""
        sums = torch.zeros(2, rows.shape[1], dtype=torch.float64, device=rows.device)
        for tile in rows.split(TILE):
            sums += torch.stack([_unit(tile).sum(0, dtype=torch.float64), tile.sum(0, dtype=torch.float64)])
        mean, overall = sums / len(rows)
        cosines, logits = torch.zeros(2, rows.shape[1], rows.shape[1]).to(sums)
        for tile in rows.split(TILE):
            for total, some in ((cosines, _unit(tile) - mean.to(rows)), (logits, tile - overall.to(rows))):
                total += (some.T @ some).double() / len(rows)
        centred = bool(logits.sum() < 1e-9 * len(logits) * logits.trace())
        return cls(rows, mean, cosines, logits, centred)

    def spread(self, values: Float[Tensor, "n d_model"]) -> Spread:
        """Variance, skew and kurtosis of the cosines (Gurnee et al. 2024).

        The variance is the closed form v' Cov v; the higher moments take one product of values and vocabulary, in
        float32 tiles that are summed in float64. Tokens are centred first, so that no moment is a small difference
        of large ones.
        """
        values = _unit(values.to(self.rows))
        variance = _quadratic(values, self.cosines)
        sums = torch.zeros(2, len(values), dtype=torch.float64, device=values.device)
        for tile in self._tiles():
            for some, total in zip(values.split(TILE), sums.split(TILE, dim=1), strict=True):
                cosine = some @ tile.T
                square = cosine * cosine
                total += torch.stack([cosine.mul_(square).sum(1), square.square_().sum(1)])
        third, fourth = sums / len(self.rows)
        variance_or_nan = torch.where(variance > ROUNDING, variance, torch.nan)
        return Spread(variance, third / variance_or_nan**1.5, fourth / variance_or_nan**2)

    def logit_variance(self, values: Float[Tensor, "n d_model"]) -> Float[Tensor, " n"]:
        """Variance over the vocabulary of the logits that a unit value writes, v' Cov(W_U) v, over the mean of
        random directions, tr Cov(W_U) / d: exact, and 1 in the mean for those (Stolfo et al. 2024)."""
        return _quadratic(_unit(values.to(self.rows)), self.logits) * self.dimensions / self.logits.trace()

    def null_share(self, values: Float[Tensor, "n d_model"], directions: int) -> Float[Tensor, " n"]:
        """Share of each squared value in the effective null space: the directions of least logit variance.

        directions / `dimensions` for random ones. The all-ones direction, which a LayerNorm takes away, is none of
        them: nothing is written along it.
        """
        return (_unit(values.to(self.rows)).double() @ self._axes[:, :directions]).square().sum(1)

    @cached_property
    def _axes(self) -> Float[Tensor, "d_model d_model"]:
        """The principal axes of the logits, the one that says least first."""
        total = self.logits
        if self.centred:  # lift the all-ones direction above all others
            total = total + total.trace() * torch.ones_like(total) / len(total)
        return torch.linalg.eigh(total).eigenvectors

    @property
    def dimensions(self) -> int:
        """Of the space in which a value can say something."""
        return self.rows.shape[1] - self.centred

    def random(self, n: int, seed: int) -> Float[Tensor, "n d_model"]:
        """Gaussian directions of that space."""
        # away from the small seeds, one of which may have made the very rows
        generator = torch.Generator().manual_seed(1_000_003 * seed + 2**31)
        drawn = torch.randn(n, self.rows.shape[1], generator=generator).to(self.rows)
        return drawn - drawn.mean(dim=1, keepdim=True) if self.centred else drawn

    def _tiles(self) -> Iterator[Float[Tensor, "tile d_model"]]:
        mean = self.mean.to(self.rows)
        return (_unit(tile) - mean for tile in self.rows.split(TILE))


def _unit(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    return torch.nn.functional.normalize(rows, dim=1)


def _quadratic(rows: Float[Tensor, "n d"], form: Float[Tensor, "d d"]) -> Float[Tensor, " n"]:
    rows = rows.double()
    return ((rows @ form) * rows).sum(1).clamp(min=0)

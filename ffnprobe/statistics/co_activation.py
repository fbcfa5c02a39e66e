"""Which neurons are strongly active on the same tokens?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from . import triangle
from .base import IN_CACHE, Statistic, no_tokens

KEEP = ("counts", "magnitudes", "both")
ROUNDING = 1e-5  # of sums of squares in float32: a variance that is less of them is that of a constant


@dataclass(frozen=True)
class CoActive:
    """How pairs of neurons are active together: by counts of tokens, by the covariance of |x|, or both."""

    n: int
    both: Int[Tensor, "d d"] | None  # tokens on which both are active; on the diagonal, each neuron's own
    covariance: Float[Tensor, "d d"] | None  # of |x|, divided by n

    @property
    def active(self) -> Int[Tensor, " d"]:
        return self._kept(self.both, "counts").diagonal()

    def correlation(self) -> Float[Tensor, "d d"]:
        """The phi coefficient of each pair, in [-1, 1]; 0 for independent neurons, NaN for a constant one."""
        rate = self.active.double() / self.n
        sd = (rate * (1 - rate)).sqrt()
        both = self._kept(self.both, "counts").double()
        return (both / self.n).addr_(rate, rate, alpha=-1) / sd / sd[:, None]

    def magnitude_correlation(self) -> Float[Tensor, "d d"]:
        """The correlation of |x| of each pair, in [-1, 1]; NaN for a neuron whose |x| is constant."""
        covariance = self._kept(self.covariance, "magnitudes")
        sd = covariance.diagonal().clamp(min=0).sqrt()
        return covariance / sd / sd[:, None]

    def _kept(self, part: Tensor | None, name: str) -> Tensor:
        if part is None:
            raise ValueError(f'{name} were not kept: make the statistic with keep="{name}" or "both"')
        return part


class CoActivation(Statistic):
    """Exact counts of tokens on which two neurons are both active, and second moments of |x|.

    A neuron is active where |x| is above a threshold, a quantile of its own |x| in a pilot, so that scale and
    sign, which are free in a gated neuron, change nothing, as they change no correlation of |x|. What is exactly
    0 is never active. |x| is shifted by its pilot mean (see `Moments`). Of each matrix the upper triangle is kept:
    about 4.3 d² bytes.
    """

    fixed = ("threshold", "shift")

    @classmethod
    def about(cls, sample: Float[Tensor, "n d"], share: float = 0.1, keep: str = "counts") -> CoActivation:
        """Nothing seen yet; a neuron is active on the `share` of its strongest tokens in the pilot sample.

        Args:
            keep: counts, magnitudes or both.
        """
        if keep not in KEEP:
            raise ValueError(f'keep "{keep}" is unknown: choose from {", ".join(KEEP)}')
        d, magnitude = sample.shape[1], sample.double().abs()
        zeros = torch.zeros(d, dtype=torch.float64, device=sample.device)
        threshold = torch.zeros(d, device=sample.device)
        if len(sample):
            threshold = torch.quantile(sample.float().abs(), 1 - share, dim=0)
        counted, summed = (triangle.size(d) if keep in (one, "both") else 0 for one in KEEP[:2])
        return cls(
            {
                "n": no_tokens(),
                "threshold": threshold,
                "shift": magnitude.mean(0) if len(sample) else zeros.clone(),
                "both": torch.zeros(counted, dtype=torch.int64, device=sample.device),
                "s": zeros,
                "S": torch.zeros(summed, dtype=torch.float64, device=sample.device),
            }
        )

    def _summary(self, x: Float[Tensor, "n d"], at: Int[Tensor, " n"]) -> dict[str, Tensor]:
        part = {"n": torch.tensor(len(x))}
        if len(self._state["both"]):
            active = torch.empty(x.shape, dtype=torch.bool, device=x.device)
            for rows, strong in zip(x.split(IN_CACHE), active.split(IN_CACHE), strict=True):
                torch.gt(rows.abs(), self._state["threshold"], out=strong)
            part["both"] = triangle.counts(active)
        if len(self._state["S"]):
            # never a Gram matrix in half precision
            magnitude = x.to(torch.promote_types(x.dtype, torch.float32)).abs()
            magnitude -= self._state["shift"].to(magnitude.dtype)
            part |= {"s": magnitude.sum(0).double(), "S": triangle.gram(magnitude)}
        return part

    def compute(self) -> CoActive:
        """How often each pair of neurons is active together.

        Raises:
            ValueError: no token seen.
        """
        self._need(1, "a co-activation")
        d, both, covariance = len(self._state["threshold"]), None, None
        if len(self._state["both"]):
            both = triangle.square(self._state["both"], d)
        if len(self._state["S"]):
            mean = self._state["s"] / self.n
            covariance = triangle.square(self._state["S"], d) / self.n
            rounding = ROUNDING * covariance.diagonal()
            covariance = covariance.addr_(mean, mean, alpha=-1)
            still = covariance.diagonal() < rounding
            covariance[still] = covariance[:, still] = 0
        return CoActive(self.n, both, covariance)

"""How is each neuron's activation distributed? Its first four moments."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .base import IN_CACHE, Statistic, no_tokens


@dataclass(frozen=True)
class Marginal:
    """Each coordinate's distribution, apart from the others."""

    n: int
    mean: Float[Tensor, " d"]
    variance: Float[Tensor, " d"]  # divided by n
    skewness: Float[Tensor, " d"]  # 0 for a symmetric one; NaN where nothing varies
    kurtosis: Float[Tensor, " d"]  # not excess: 3 for a Gaussian; NaN where nothing varies


class Marginals(Statistic):
    """n and the sums of z, z², z³, z⁴ of each coordinate in float64; z: x about a pilot mean in its deviations.

    The fourth powers of a faint or a loud neuron's own x would leave the range of float32.
    """

    fixed = ("shift", "scale")

    @classmethod
    def about(cls, sample: Float[Tensor, "n d"]) -> Marginals:
        """Nothing seen yet; shift and scale are the mean and the deviation of a pilot sample."""
        sums = torch.zeros(4, sample.shape[1], dtype=torch.float64, device=sample.device)
        shift, scale = sums[0].clone(), torch.ones_like(sums[0])
        if len(sample):
            deviation, shift = torch.std_mean(sample.double(), dim=0, correction=0)
            scale = torch.where(deviation > 0, deviation, 1.0)
        return cls({"n": no_tokens(), "shift": shift, "scale": scale, "sums": sums})

    def _summary(self, x: Float[Tensor, "n d"], at: Int[Tensor, " n"]) -> dict[str, Tensor]:
        dtype = torch.promote_types(x.dtype, torch.float32)
        shift, scale = self._state["shift"].to(dtype), self._state["scale"].to(dtype)
        sums = x.new_zeros(4, min(len(x), IN_CACHE), x.shape[1], dtype=dtype)
        z, square = torch.empty_like(sums[:2])
        for rows in x.split(IN_CACHE):
            n = len(rows)
            torch.sub(rows, shift, out=z[:n]).div_(scale)
            torch.mul(z[:n], z[:n], out=square[:n])
            sums[0, :n] += z[:n]
            sums[1, :n] += square[:n]
            sums[2, :n].addcmul_(z[:n], square[:n])
            sums[3, :n].addcmul_(square[:n], square[:n])
        return {"n": torch.tensor(len(x)), "sums": sums.sum(1, dtype=torch.float64)}

    def compute(self) -> Marginal:
        """Mean, variance, skewness and kurtosis of each coordinate.

        Raises:
            ValueError: fewer than two tokens.
        """
        self._need(2, "a variance")
        m1, m2, m3, m4 = self._state["sums"] / self.n
        variance = (m2 - m1**2).clamp(min=0)
        third = m3 - 3 * m1 * m2 + 2 * m1**3
        fourth = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
        skewness, kurtosis = third / variance**1.5, fourth / variance**2
        scale = self._state["scale"]
        return Marginal(self.n, m1 * scale + self._state["shift"], variance * scale**2, skewness, kurtosis)

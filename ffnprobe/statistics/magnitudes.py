"""How large is each neuron's activation, whatever its sign?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .base import IN_CACHE, Statistic, no_tokens


@dataclass(frozen=True)
class Magnitude:
    """Moments of |x| of each coordinate about 0."""

    n: int
    mean: Float[Tensor, " d"]
    mean_square: Float[Tensor, " d"]

    @property
    def variance(self) -> Float[Tensor, " d"]:
        """Of |x|, divided by n."""
        return (self.mean_square - self.mean.square()).clamp(min=0)


class Magnitudes(Statistic):
    """n and the sums of |x| and x² of each coordinate in float64: unchanged where a sign is free."""

    @classmethod
    def about(cls, sample: Float[Tensor, "n d"]) -> Magnitudes:
        """Nothing seen yet, as wide as a pilot sample."""
        sums = torch.zeros(2, sample.shape[1], dtype=torch.float64, device=sample.device)
        return cls({"n": no_tokens(), "sums": sums})

    def _summary(self, x: Float[Tensor, "n d"], at: Int[Tensor, " n"]) -> dict[str, Tensor]:
        dtype = torch.promote_types(x.dtype, torch.float32)
        sums = x.new_zeros(2, min(len(x), IN_CACHE), x.shape[1], dtype=dtype)
        for rows in x.to(dtype).split(IN_CACHE):
            n = len(rows)
            sums[0, :n] += rows.abs()
            sums[1, :n].addcmul_(rows, rows)
        return {"n": torch.tensor(len(x)), "sums": sums.sum(1, dtype=torch.float64)}

    def compute(self) -> Magnitude:
        """Mean and mean square of |x|.

        Raises:
            ValueError: no token seen.
        """
        self._need(1, "a mean")
        return Magnitude(self.n, *(self._state["sums"] / self.n))

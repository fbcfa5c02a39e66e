"""How often is each neuron's pre-activation positive?"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .base import IN_CACHE, Statistic, no_tokens


class FiringRate(Statistic):
    """Tokens with x > 0, each neuron apart. On smooth activations a positive pre-activation is a
    convention, not a switch: GELU and SiLU write below 0 as well."""

    @classmethod
    def about(cls, sample: Float[Tensor, "n d"]) -> FiringRate:
        """Nothing seen yet, as wide as a pilot sample."""
        return cls(
            {
                "n": no_tokens(),
                "positive": torch.zeros(sample.shape[1], dtype=torch.int64, device=sample.device),
            }
        )

    def _summary(self, x: Float[Tensor, "n d"], at: Int[Tensor, " n"]) -> dict[str, Tensor]:
        # as floats they add up exactly, and several times faster than as booleans
        firing, positive = torch.zeros(2, min(len(x), IN_CACHE), x.shape[1], device=x.device)
        for rows in x.split(IN_CACHE):
            n = len(rows)
            positive[:n] += torch.gt(rows, 0, out=firing[:n])
        return {"n": torch.tensor(len(x)), "positive": positive.sum(0).long()}

    def compute(self) -> Float[Tensor, " d"]:
        """Share of tokens with x > 0, in [0, 1]. A neuron at 0 fires on fewer than 3/n tokens (95%).

        Raises:
            ValueError: no token seen.
        """
        self._need(1, "a firing rate")
        return self._state["positive"].double() / self.n

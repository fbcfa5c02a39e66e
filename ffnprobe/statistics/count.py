"""How many tokens came by?"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .base import Statistic, no_tokens


class Count(Statistic):
    """The number of tokens, whatever they hold."""

    @classmethod
    def about(cls, sample: Float[Tensor, "n d"]) -> Count:
        """Nothing seen yet."""
        return cls({"n": no_tokens()})

    def _summary(self, x: Float[Tensor, "n d"], at: Int[Tensor, " n"]) -> dict[str, Tensor]:
        return {"n": torch.tensor(len(x))}

    def compute(self) -> int:
        """Tokens seen."""
        return self.n

"""Which neurons are strongly active on the same tokens?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from . import triangle
from .base import Statistic, no_tokens


@dataclass(frozen=True)
class CoActive:
    """Counts of tokens on which neurons are active, alone and in pairs."""

    n: int
    both: Int[Tensor, "d d"]  # tokens on which both are active; on the diagonal, each neuron's own

    @property
    def active(self) -> Int[Tensor, " d"]:
        return self.both.diagonal()

    def correlation(self) -> Float[Tensor, "d d"]:
        """The phi coefficient of each pair, in [-1, 1]; 0 for independent neurons, NaN for a constant one."""
        rate = self.active.double() / self.n
        sd = (rate * (1 - rate)).sqrt()
        return (self.both.double() / self.n).addr_(rate, rate, alpha=-1) / sd / sd[:, None]


class CoActivation(Statistic):
    """Exact counts of tokens on which two neurons are both active: |x| above a threshold of each neuron.

    The threshold is a quantile of the neuron's own |x| in a pilot, so that scale and sign, which are free in a
    gated neuron, change nothing. What is exactly 0 is never active.
    """

    fixed = ("threshold",)

    @classmethod
    def about(cls, sample: Float[Tensor, "n d"], share: float = 0.1) -> CoActivation:
        """Nothing seen yet; a neuron is active on the `share` of its strongest tokens in the pilot sample."""
        d = sample.shape[1]
        threshold = torch.zeros(d, device=sample.device)
        if len(sample):
            threshold = torch.quantile(sample.float().abs(), 1 - share, dim=0)
        both = torch.zeros(triangle.size(d), dtype=torch.int64, device=sample.device)
        return cls({"n": no_tokens(), "threshold": threshold, "both": both})

    def _summary(self, x: Float[Tensor, "n d"], at: Int[Tensor, " n"]) -> dict[str, Tensor]:
        active = x.abs() > self._state["threshold"]
        return {"n": torch.tensor(len(x)), "both": triangle.counts(active)}

    def _add(self, part) -> None:
        triangle.add(self._state["both"], part["both"])
        super()._add({name: tensor for name, tensor in part.items() if name != "both"})

    def compute(self) -> CoActive:
        """How often each pair of neurons is active together.

        Raises:
            ValueError: no token seen.
        """
        self._need(1, "a co-activation")
        return CoActive(self.n, triangle.square(self._state["both"], len(self._state["threshold"])))

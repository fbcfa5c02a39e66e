"""Does a neuron's firing depend on where in the sequence a token stands?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .base import IN_CACHE, Statistic, no_tokens


@dataclass(frozen=True)
class ByPosition:
    """Counts of tokens, and of those on which each neuron's pre-activation is positive, by range of positions."""

    tokens: Int[Tensor, " ranges"]
    positive: Int[Tensor, "ranges d"]

    @property
    def n(self) -> int:
        return int(self.tokens.sum())

    @property
    def ranges(self) -> int:
        """Those in which there are tokens."""
        return int((self.tokens > 0).sum())

    def information(self) -> Float[Tensor, " d"]:
        """Mutual information of firing and range of positions in nats, corrected for its bias (Miller & Madow).

        The counted information of independent variables is about (ranges - 1) / 2n too large; taking that off
        leaves 0 in the mean, and a little below 0 as often as above.
        """
        cells = torch.stack([self.positive, self.tokens[:, None] - self.positive])
        both, firing, place = (_entropy(c, self.n) for c in (cells.flatten(0, 1), cells.sum(1), self.tokens))
        return firing + place - both


def _entropy(counts: Int[Tensor, "cells *d"], n: int) -> Float[Tensor, "*d"]:
    share = counts.double() / n
    return -torch.xlogy(share, share).sum(0) + ((counts > 0).sum(0) - 1) / (2 * n)


class FiringByPosition(Statistic):
    """Tokens with x > 0, each neuron and each range of positions in the sequence apart.

    A token's position is its index in the corpus modulo the sequences' length: what a position embedding sees,
    not its place in its document.
    """

    fixed = ("length",)

    @classmethod
    def about(cls, sample: Float[Tensor, "n d"], length: int, ranges: int = 32) -> FiringByPosition:
        """Nothing seen yet; `length` positions in `ranges` of equal length, or a range each if there are fewer."""
        ranges = min(ranges, length)
        return cls(
            {
                "n": no_tokens(),
                "length": torch.tensor(length),
                "tokens": torch.zeros(ranges, dtype=torch.int64, device=sample.device),
                "positive": torch.zeros(ranges, sample.shape[1], dtype=torch.int64, device=sample.device),
            }
        )

    def _summary(self, x: Float[Tensor, "n d"], at: Int[Tensor, " n"]) -> dict[str, Tensor]:
        length, ranges = int(self._state["length"]), len(self._state["tokens"])
        place = at.to(x.device) % length * ranges // length
        positive = torch.zeros_like(self._state["positive"])
        firing = torch.empty(min(len(x), IN_CACHE), x.shape[1], device=x.device)
        for rows, where in zip(x.split(IN_CACHE), place.split(IN_CACHE), strict=True):
            # as floats they add up exactly, and several times faster than as booleans
            torch.gt(rows, 0, out=firing[: len(rows)])
            here = (where == torch.arange(ranges, device=x.device)[:, None]).float()
            positive += (here @ firing[: len(rows)]).long()
        return {"n": torch.tensor(len(x)), "tokens": place.bincount(minlength=ranges), "positive": positive}

    def compute(self) -> ByPosition:
        """The counts.

        Raises:
            ValueError: no token seen.
        """
        self._need(1, "a firing rate")
        return ByPosition(self._state["tokens"].clone(), self._state["positive"].clone())

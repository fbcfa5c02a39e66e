"""A few rows of a stream, each as likely as any other, whatever the order it comes in."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .base import Statistic, no_tokens

EMPTY = torch.iinfo(torch.int64).max


class Sample(Statistic):
    """The k rows whose token index has the smallest hash: a sample without replacement that merges."""

    fixed = ("seed",)

    @classmethod
    def about(cls, sample: Float[Tensor, "n d"], k: int, seed: int = 0) -> Sample:
        """Nothing seen yet, as wide as a pilot sample."""
        wide = torch.promote_types(sample.dtype, torch.float32)
        return cls(
            {
                "n": no_tokens(),
                "seed": torch.tensor(seed),
                "key": torch.full((k,), EMPTY, device=sample.device),
                "rows": torch.zeros(k, sample.shape[1], dtype=wide, device=sample.device),
            }
        )

    def _summary(self, x: Float[Tensor, "n d"], at: Int[Tensor, " n"]) -> dict[str, Tensor]:
        key = hashed(at, int(self._state["seed"]))
        key, row = key.sort()
        k = len(self._state["key"])
        return {"n": torch.tensor(len(x)), "key": key[:k], "rows": x[row[:k]].to(self._state["rows"].dtype)}

    def _add(self, part) -> None:
        key = torch.cat([self._state["key"], part["key"]])
        rows = torch.cat([self._state["rows"], part["rows"]])
        key, order = key.sort(stable=True)
        k = len(self._state["key"])
        self._state["key"], self._state["rows"] = key[:k].clone(), rows[order[:k]]
        self._state["n"] = self._state["n"] + part["n"]

    def compute(self) -> Float[Tensor, "k d"]:
        """min(k, n) rows in random order.

        Raises:
            ValueError: no token seen.
        """
        self._need(1, "a sample")
        return self._state["rows"][: self.n].clone()


def hashed(at: Int[Tensor, " n"], seed: int) -> Int[Tensor, " n"]:
    """A non-negative number for each token, no two alike below 2^31: xor-shifts and odd factors, 62 bits."""
    mixed = at ^ (seed * 0x632BE59BD9B4E019 & MASK)
    for shift, factor in ((31, 0x1F58476D1CE4E5B9), (29, 0x14D049BB133111EB), (32, 0x2545F4914F6CDD1D)):
        mixed = ((mixed ^ (mixed >> shift)) * factor) & MASK
    return mixed ^ (mixed >> 31)


MASK = 2**62 - 1

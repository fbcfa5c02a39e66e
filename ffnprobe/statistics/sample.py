"""Which rows stand for a stream that is too long to keep?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .base import Statistic, no_tokens

LAST = torch.iinfo(torch.int64).max  # the place in the order of what is not there


@dataclass(frozen=True)
class Drawn:
    """Rows drawn without replacement, in random order."""

    x: Float[Tensor, "n d"]
    at: Int[Tensor, " n"]  # flat token index in the corpus


class Sample(Statistic):
    """The k rows whose token index has the smallest hash, in float32 at least: a random sample of min(k, n) rows.

    The hash is one to one, so that the sample depends on the seed and on the tokens seen, not on how the stream
    was cut; and two samples of the same tokens, of whatever sites, hold the same tokens.
    """

    fixed = ("seed",)

    @classmethod
    def about(cls, sample: Float[Tensor, "n d"], k: int = 4096, seed: int = 0) -> Sample:
        """Nothing seen yet."""
        device, wide = sample.device, torch.promote_types(sample.dtype, torch.float32)
        return cls(
            {
                "n": no_tokens(),
                "seed": torch.tensor(seed),
                "order": torch.full((k,), LAST, device=device),
                "at": torch.full((k,), -1, device=device),
                "rows": torch.zeros(k, sample.shape[1], dtype=wide, device=device),
            }
        )

    def _summary(self, x: Float[Tensor, "n d"], at: Int[Tensor, " n"]) -> dict[str, Tensor]:
        order = _hashed(at, self._state["seed"])
        few = (order < self._state["order"][-1]).nonzero().squeeze(1)
        return {
            "n": torch.tensor(len(x)),
            "order": order[few],
            "at": at[few],
            "rows": x[few].to(self._state["rows"]),
        }

    def _add(self, part) -> None:
        order = torch.cat([self._state["order"], part["order"]])
        self._state["order"], best = order.topk(len(self._state["order"]), largest=False)
        for name in ("at", "rows"):
            self._state[name] = torch.cat([self._state[name], part[name]])[best]
        self._state["n"] = self._state["n"] + part["n"]

    def compute(self) -> Drawn:
        """The rows drawn.

        Raises:
            ValueError: no token seen.
        """
        self._need(1, "a sample")
        return Drawn(self._state["rows"][: self.n].clone(), self._state["at"][: self.n].clone())


def _hashed(at: Int[Tensor, " n"], seed: Int[Tensor, ""]) -> Int[Tensor, " n"]:
    """A number for each index: steps that can be undone, so that no two indices have the same one."""
    z = at * 0x1E3779B97F4A7C15 + (seed + 1) * 0x14D049BB133111EB
    for shift, odd in ((30, 0x3F58476D1CE4E5B9), (27, 0x14D049BB133111EB)):
        z = (z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))) * odd
    return z ^ ((z >> 31) & ((1 << 33) - 1))

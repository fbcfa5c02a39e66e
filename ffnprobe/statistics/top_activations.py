"""Which tokens activate each neuron most?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .base import Statistic, no_tokens

MOST_TOKENS = 2**31
EMPTY = torch.iinfo(torch.int64).min


@dataclass(frozen=True)
class Top:
    """The strongest tokens of each neuron, strongest first; places that no token has taken are cut."""

    activation: Float[Tensor, "d_mlp k"]  # signed
    at: Int[Tensor, "d_mlp k"]  # flat token index in the corpus


class TopActivations(Statistic):
    """The k tokens of largest |x| (or x) for each neuron; equal ones go to the earlier token.

    Each entry is one sortable integer: 32 bits of float that order as the float does, 31 bits of token
    index counted down, the sign. A total order makes the selection independent of how the stream was cut,
    and a merge one `topk`.
    """

    fixed = ("by_magnitude",)

    @classmethod
    def about(cls, sample: Float[Tensor, "n d"], k: int = 20, by_magnitude: bool = False) -> TopActivations:
        """Nothing seen yet. `by_magnitude` ranks by |x|: on gated neurons the sign of x is a gauge."""
        empty = torch.full((sample.shape[1], k), EMPTY, device=sample.device)
        return cls({"n": no_tokens(), "entries": empty, "by_magnitude": torch.tensor(by_magnitude)})

    def _summary(self, x: Float[Tensor, "n d"], at: Int[Tensor, " n"]) -> dict[str, Tensor]:
        if int(at.max()) >= MOST_TOKENS:
            raise ValueError(
                f"token index {int(at.max())} is beyond {MOST_TOKENS}: split the corpus into several runs"
            )
        x = x.float()
        score = x.abs() if self._state["by_magnitude"] else x
        k, least = self._state["entries"].shape[1], self._state["entries"][:, -1].contiguous()
        entries = _best(score, x, at, k) if (least == EMPTY).any() else _above(least, score, x, at)
        return {"n": torch.tensor(len(x)), "entries": entries}

    def _add(self, part) -> None:
        k = self._state["entries"].shape[1]
        both = torch.cat([self._state["entries"], part["entries"]], dim=1)
        self._state["entries"].copy_(both.topk(k, dim=1).values)
        self._state["n"] += part["n"]

    def compute(self) -> Top:
        """Activation and token index of the min(k, n) strongest tokens of each neuron.

        Raises:
            ValueError: no token seen.
        """
        self._need(1, "a top activation")
        entries = self._state["entries"][:, : self.n]
        magnitude = _unsortable(entries >> 32)
        negative = (entries & 1).bool()
        activation = torch.where(negative, -magnitude.abs(), magnitude)
        return Top(activation, _at(entries))


def _best(
    score: Float[Tensor, "n d"], x: Float[Tensor, "n d"], at: Int[Tensor, " n"], k: int
) -> Int[Tensor, "d best"]:
    """The k best entries of a batch for each neuron."""
    best, row = score.topk(min(k, len(x)), dim=0)
    entries = _pack(best, at[row], x.gather(0, row) < 0)
    # topk chooses freely among equals at its edge: neurons with such equals are ranked by whole entries
    tied = ((score >= best[-1]).sum(0) > len(best)).nonzero().squeeze(1)
    if len(tied):
        every = _pack(score[:, tied], rearrange(at, "n -> n 1"), x[:, tied] < 0)
        entries[:, tied] = every.topk(len(best), dim=0).values
    return entries.mT


def _above(
    least: Int[Tensor, " d"], score: Float[Tensor, "n d"], x: Float[Tensor, "n d"], at: Int[Tensor, " n"]
) -> Int[Tensor, "d most"]:
    """The entries that are above each neuron's least one: few, once a stream has run for a while."""
    floor, d = _unsortable(least >> 32), len(least)
    flags = torch.empty(-(-x.numel() // 8) * 8, dtype=torch.bool, device=x.device)
    flags[x.numel() :] = False
    above = flags[: x.numel()].view(x.shape)
    torch.gt(score, floor, out=above)
    if at.min() < _at(least).max():  # an equal score counts where its token is the earlier one
        above |= (score == floor) & (rearrange(at, "n -> n 1") < _at(least))
    place = _true(flags)
    row, neuron = place // d, place % d
    neuron, order = neuron.sort(stable=True)
    row = row[order]
    value = x[row, neuron]
    many = neuron.bincount(minlength=d)
    column = torch.arange(len(row), device=row.device) - (many.cumsum(0) - many)[neuron]
    entries = torch.full((d, int(many.max())), EMPTY, device=least.device)
    entries[neuron, column] = _pack(value.abs() if score is not x else value, at[row], value < 0)
    return entries


def _true(flags: Bool[Tensor, " n"]) -> Int[Tensor, " true"]:
    """Where it is true, if it seldom is: in words of eight first."""
    words = flags.view(torch.int64).nonzero().squeeze(1)
    word, byte = flags.view(-1, 8)[words].nonzero(as_tuple=True)
    return words[word] * 8 + byte


def _at(entries: Int[Tensor, "*n"]) -> Int[Tensor, "*n"]:
    return MOST_TOKENS - 1 - ((entries >> 1) & (MOST_TOKENS - 1))


def _pack(score: Float[Tensor, "*n"], at: Int[Tensor, "*#n"], negative: Bool[Tensor, "*n"]) -> Int[Tensor, "*n"]:
    return (_sortable(score) << 32) | ((MOST_TOKENS - 1 - at) << 1) | negative


def _sortable(x: Float[Tensor, "*n"]) -> Int[Tensor, "*n"]:
    """int64 in 32 bits that orders as the float does."""
    bits = (x + 0.0).view(torch.int32).long()  # + 0.0: -0.0 and 0.0 are one number
    return torch.where(bits >= 0, bits, -(bits & 0x7FFFFFFF))


def _unsortable(order: Int[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    magnitude = order.abs().to(torch.int32).view(torch.float32)
    return torch.where(order >= 0, magnitude, -magnitude)

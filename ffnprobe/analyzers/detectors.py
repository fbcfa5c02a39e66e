"""Which tokens trigger a neuron, and does it write against them?"""

from __future__ import annotations

from math import ceil

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..corpus import Tokens

ALIKE = 20  # tokens of like frequency, beside which a trigger token is set
HELD = 256  # neurons at a time, whose triggers' directions are gathered


def _equal(ids: Int[Tensor, "n k"]) -> tuple[Int[Tensor, "n k"], Bool[Tensor, "n k"]]:
    """How often each id is there, and where it is there first."""
    equal = ids[:, :, None] == ids[:, None, :]
    return equal.sum(2), ~equal.tril(-1).any(2)


def covering(ids: Int[Tensor, "n k"], share: float) -> Int[Tensor, " n"]:
    """The least number of distinct tokens that make up this share of each neuron's triggers.

    >>> covering(torch.tensor([[5, 5, 5, 5], [1, 2, 2, 3], [4, 3, 2, 1]]), 0.75).tolist()
    [1, 2, 3]
    """
    count, first = _equal(ids)
    covered = torch.where(first, count, 0).sort(1, descending=True).values.cumsum(1)
    return (covered < ceil(share * ids.shape[1] - 1e-9)).sum(1) + 1


def commonest(ids: Int[Tensor, "n k"]) -> Int[Tensor, " n"]:
    """The commonest of each neuron's trigger tokens; of equally common ones the strongest, which comes first.

    >>> commonest(torch.tensor([[5, 4, 4, 5], [1, 2, 3, 3]])).tolist()
    [5, 3]
    """
    count, first = _equal(ids)
    order = torch.where(first, count * (ids.shape[1] + 1) - torch.arange(ids.shape[1]), -1)
    return ids.gather(1, order.argmax(1, keepdim=True)).squeeze(1)


def against(
    values: Float[Tensor, "n d_model"],
    token: Int[Tensor, " n"],
    alike: Int[Tensor, "n m"],
    vocabulary: Float[Tensor, "d_vocab d_model"],
) -> tuple[Bool[Tensor, " n"], Float[Tensor, " n"]]:
    """Does each value lower its own token's logit, and what share of the tokens alike does it lower?"""
    ids = torch.cat([token[:, None], alike], dim=1)
    lowered = torch.cat(
        [
            (vocabulary[some.to(vocabulary.device)] @ value.to(vocabulary)[:, :, None]).squeeze(2) < 0
            for some, value in zip(ids.split(HELD), values.split(HELD), strict=True)
        ]
    ).cpu()
    return lowered[:, 0], lowered[:, 1:].double().mean(1)


def alike(tokens: Tokens, ids: Int[Tensor, " n"], many: int = ALIKE) -> Int[Tensor, "n m"]:
    """The `many` tokens of the corpus that are nearest to each id in frequency, itself left out."""
    there, count = tokens.ids[~tokens.special].unique(return_counts=True)
    order = (count * (int(there.max()) + 1) + there).argsort()  # by frequency, then by id
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order))
    mine = rank[torch.searchsorted(there, ids)]
    many = min(many, len(there) - 1)
    start = (mine - many // 2).clamp(0, len(there) - 1 - many)
    near = start[:, None] + torch.arange(many)
    return there[order[near + (near >= mine[:, None]).long()]]


def chance(tokens: Tokens, triggers: int, most: int, share: float, seed: int, draws: int = 2000) -> float:
    """How often `most` tokens make up that share of as many random ordinary tokens as a neuron has triggers."""
    ordinary = tokens.ids[~tokens.special]
    generator = torch.Generator().manual_seed(seed)
    drawn = ordinary[torch.randint(len(ordinary), (draws, triggers), generator=generator)]
    return float((covering(drawn, share) <= most).double().mean())

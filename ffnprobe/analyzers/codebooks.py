"""How much of an output does a code of the input tell? Codes of tokens, and what is decoded from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple
from warnings import catch_warnings, simplefilter

import torch
from jaxtyping import Bool, Float, Int
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

HELD = 64 * 2**20  # entries of a table of distances held at once


class Halves(NamedTuple):
    """Something of each token of the documents that a code is fitted on, and of those it is tested on."""

    fit: Tensor
    test: Tensor


def decoded(codes: Halves, y: Float[Tensor, "n d"], size: int) -> tuple[Float[Tensor, "m d"], Bool[Tensor, " m"]]:
    """For each test token the mean output of its code over the fit tokens, and whether the code occurred there.

    A code that did not occur is answered with the mean of all.

    >>> decoded(Halves(torch.tensor([0, 0, 1]), torch.tensor([1, 0, 2])), torch.tensor([[1.0], [3.0], [8.0]]), 3)
    (tensor([[8.],
            [2.],
            [4.]]), tensor([ True,  True, False]))
    """
    count = torch.bincount(codes.fit, minlength=size)
    sums = y.new_zeros(size, y.shape[1]).index_add_(0, codes.fit, y)
    means = torch.where(count[:, None] > 0, sums / count.clamp(min=1)[:, None], y.mean(dim=0))
    return means[codes.test], count[codes.test] > 0


class Kept(NamedTuple):
    r2: float
    se: float


def kept_variance(predicted: Float[Tensor, "n d"], y: Float[Tensor, "n d"], document: Int[Tensor, " n"]) -> Kept:
    """R² = 1 - E|y - predicted|² / E|y - mean|², at most 1; below 0 it is worse than one vector for all tokens.

    se: its standard error with documents as the units drawn (linearised ratio of sums); not a number of one.
    """
    _, of = document.unique(return_inverse=True)
    n = int(of.max()) + 1

    def summed(difference: Tensor) -> Tensor:
        squares = difference.square().sum(dim=1, dtype=torch.float64)
        return squares.new_zeros(n).index_add_(0, of, squares)

    lost, whole = summed(y - predicted), summed(y - y.mean(dim=0))
    share = lost.sum() / whole.sum()
    spread = (lost - share * whole).square().sum().sqrt() / whole.sum()
    return Kept(float(1 - share), float(spread * (n / (n - 1)) ** 0.5) if n > 1 else float("nan"))


def perplexity(codes: Int[Tensor, " n"]) -> float:
    """exp of the entropy of how often each code occurs, in [1, codes that occur].

    >>> round(perplexity(torch.tensor([3, 3, 0, 0])), 6)
    2.0
    """
    share = torch.bincount(codes).double() / len(codes)
    return float(torch.special.entr(share).sum().exp())


def nearest(
    rows: Float[Tensor, "n d"], centres: Float[Tensor, "k d"]
) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
    """The nearest centre to each row, and the squared distance to it."""
    half = centres.square().sum(dim=1) / 2
    found = [(half - some @ centres.mT).min(dim=1) for some in rows.split(max(1, HELD // len(centres)))]
    least = torch.cat([part.values for part in found])
    return torch.cat([part.indices for part in found]), (rows.square().sum(dim=1) + 2 * least).clamp(min=0)


def kmeans(
    rows: Float[Tensor, "n d"], sizes: Sequence[int], *, seed: int = 0, iterations: int = 5
) -> Iterator[Float[Tensor, "k d"]]:
    """Centres of k-means (Lloyd 1982), for one size after the other, smallest first.

    The centres of a size start that of the next one, and those that it has more are rows drawn in proportion to
    their squared distance from the centres there are (Arthur & Vassilvitskii 2007), a 64th of them at a time.

    Raises:
        ValueError: a size that is above the number of rows.
    """
    if max(sizes) > len(rows):
        raise ValueError(f"cannot place {max(sizes)} centres among {len(rows)} rows: choose fewer")
    generator = torch.Generator().manual_seed(seed)
    # about the mean, or the distances of float32 would be small differences of large numbers
    shift = rows.mean(dim=0)
    rows = rows - shift
    data = rows.cpu().numpy()
    centres = rows[torch.randint(len(rows), (1,), generator=generator)]
    distance = nearest(rows, centres)[1]
    for k in sorted(sizes):
        while len(centres) < k:
            some = min(max(1, k // 64), k - len(centres))
            # never 0, because as many are drawn as there are rows in the end; rounding is no distance
            weight = distance.clamp(min=1e-6 * float(distance.mean()) + 1e-30).cpu()
            new = rows[torch.multinomial(weight, some, generator=generator).to(rows.device)]
            centres = torch.cat([centres, new])
            distance = torch.minimum(distance, nearest(rows, new)[1])
        means = KMeans(k, init=centres.cpu().numpy(), n_init=1, max_iter=iterations, random_state=seed)
        with catch_warnings():
            simplefilter("ignore", ConvergenceWarning)  # equal rows share a centre: it is counted as dead
            fitted = means.fit(data)
        centres = torch.from_numpy(fitted.cluster_centers_).to(rows)
        distance = nearest(rows, centres)[1]
        yield centres + shift

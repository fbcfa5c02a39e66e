"""Which rows point the same way? Spherical k-means, and k-lines where a sign means nothing."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def spherical_kmeans(
    rows: Float[Tensor, "n d"],
    k: int,
    *,
    seed: int = 0,
    signed: bool = True,
    iterations: int = 50,
) -> tuple[Int[Tensor, " n"], float]:
    """Cluster the directions of the rows (Dhillon & Modha 2001).

    Args:
        k: clusters, in [1, n].
        signed: by cosine; False clusters lines, by |cosine|: a row and its negative are one.
        iterations: at most so many; it ends when no label changes.

    Returns:
        labels in [0, k) and the objective, the mean |cosine| or cosine of a row to its centre, in [0, 1].

    Raises:
        ValueError: k is not in [1, n].
    """
    if not 1 <= k <= len(rows):
        raise ValueError(f"cannot make {k} clusters of {len(rows)} rows: choose 1 to {len(rows)}")
    unit = torch.nn.functional.normalize(rows, dim=1)
    generator = torch.Generator().manual_seed(seed)
    centres = unit[_spread(unit, k, signed, generator)]
    labels = torch.full((len(rows),), -1)
    for _ in range(iterations):
        cosine = unit @ centres.mT
        best, new = (cosine if signed else cosine.abs()).max(dim=1)
        if torch.equal(new, labels):
            break
        labels = new
        sign = 1.0 if signed else cosine.gather(1, labels[:, None]).sign()
        sums = torch.zeros_like(centres).index_add_(0, labels, unit * sign)
        empty = torch.bincount(labels, minlength=k) == 0
        if empty.any():
            # an empty cluster takes the rows that fit theirs least
            sums[empty] = unit[best.argsort()[: int(empty.sum())]]
        centres = torch.nn.functional.normalize(sums, dim=1)
    return labels, float(best.mean())


def _spread(unit: Tensor, k: int, signed: bool, generator: torch.Generator) -> list[int]:
    """k-means++ on the sphere: each start is drawn in proportion to its distance from those before it."""
    chosen = [int(torch.randint(len(unit), (1,), generator=generator))]
    nearest = torch.full((len(unit),), -1.0, dtype=unit.dtype)
    while len(chosen) < k:
        cosine = unit @ unit[chosen[-1]]
        nearest = torch.maximum(nearest, cosine if signed else cosine.abs())
        distance = (1 - nearest).clamp(min=1e-12)
        distance[chosen] = 0
        chosen.append(int(torch.multinomial(distance.cpu(), 1, generator=generator)))
    return chosen

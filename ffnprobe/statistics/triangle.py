"""How is a large symmetric sum of products kept and computed at half the price?

Of a symmetric [d, d] matrix the upper triangle is kept in row panels, each from its first diagonal entry to the
right edge: with 8 panels, 9/16 of the square. What stands below the diagonal within a panel means nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

PANELS = 8
NARROW = 128  # torch 2.13's product of bytes gives garbage for a single row; its panels here have 16 or more


def size(d: int) -> int:
    """Entries that are kept of a [d, d] matrix."""
    return sum((stop - start) * (d - start) for start, stop in _edges(d))


def gram(x: Float[Tensor, "n d"]) -> Float[Tensor, "d d"]:
    """x' x in the precision of x; only the upper triangle is meant."""
    # not BLAS's syrk through scipy: its threads spin for a while after each call and take the cores from torch's
    found = x.new_empty(x.shape[1], x.shape[1])
    for start, stop in _edges(x.shape[1]):
        torch.mm(x[:, start:stop].mT, x[:, start:], out=found[start:stop, start:])
    return found


def counts(active: Bool[Tensor, "n d"]) -> Int[Tensor, "d d"]:
    """active' active, exactly; only the upper triangle is meant."""
    d = active.shape[1]
    if active.device.type != "cpu" or d < NARROW:
        return gram(active.float()).int()  # exact up to 2^24 rows
    active, found = active.to(torch.int8), torch.empty(d, d, dtype=torch.int32)
    for start, stop in _edges(d):
        found[start:stop, start:] = torch._int_mm(active[:, start:stop].mT, active[:, start:])
    return found


def add(kept: Tensor, part: Tensor) -> None:
    """Add a [d, d] matrix, or another kept triangle, to a kept one in place."""
    if part.dim() == 1:
        kept += part
        return
    for panel, (start, stop) in zip(_panels(kept, len(part)), _edges(len(part)), strict=True):
        panel += part[start:stop, start:]


def square(kept: Tensor, d: int) -> Tensor:
    """The whole symmetric [d, d] matrix."""
    whole = torch.empty(d, d, dtype=kept.dtype, device=kept.device)
    for panel, (start, stop) in zip(_panels(kept, d), _edges(d), strict=True):
        block, right = panel[:, : stop - start], panel[:, stop - start :]
        whole[start:stop, start:stop] = block.triu() + block.triu(1).mT
        whole[start:stop, stop:] = right
        whole[stop:, start:stop] = right.mT
    return whole


def _edges(d: int) -> Iterator[tuple[int, int]]:
    edges = [round(d * i / PANELS) for i in range(PANELS + 1)]
    return ((start, stop) for start, stop in pairwise(edges) if stop > start)


def _panels(kept: Tensor, d: int) -> Iterator[Tensor]:
    offset = 0
    for start, stop in _edges(d):
        end = offset + (stop - start) * (d - start)
        yield kept[offset:end].view(stop - start, d - start)
        offset = end

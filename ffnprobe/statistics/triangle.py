"""How is a large symmetric sum of products kept and computed at half the price?

Of a symmetric [d, d] matrix the upper triangle is kept as square blocks: the upper right quarter, then that of
each of the two quarters on the diagonal, and so on until the squares on the diagonal, which are kept as well, are
narrow. Blocks of one width are one batched product. A width that does not halve evenly is filled up with zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

WIDEST = 128  # square on the diagonal: its lower half is computed for nothing
NARROW = 128  # torch 2.13's product of bytes gives garbage for a single row; its blocks here have 64 or more

_Product = Callable[[Tensor, Tensor, Tensor], object]  # of [b, w, n] and [b, n, w] into [b, w, w]


def size(d: int) -> int:
    """Entries that are kept of a [d, d] matrix."""
    return sum(blocks * width**2 for blocks, width in _levels(d))


def gram(x: Float[Tensor, "n d"]) -> Float[Tensor, " kept"]:
    """x' x in the precision of x."""
    # not BLAS's syrk through scipy: its threads spin for a while after each call and take the cores from torch's
    return _products(x, x.dtype, lambda left, right, out: torch.bmm(left, right, out=out))


def counts(active: Bool[Tensor, "n d"]) -> Int[Tensor, " kept"]:
    """active' active, exactly."""
    if active.device.type != "cpu" or active.shape[1] < NARROW:
        return gram(active.float()).int()  # exact up to 2^24 rows

    def product(left: Tensor, right: Tensor, out: Tensor) -> None:
        for some, others, block in zip(left, right, out, strict=True):
            torch._int_mm(some, others, out=block)

    return _products(active.view(torch.int8), torch.int32, product)


def square(kept: Tensor, d: int) -> Tensor:
    """The whole symmetric [d, d] matrix."""
    width = _even(d)
    whole = torch.empty(width, width, dtype=kept.dtype, device=kept.device)
    for block in _views(kept, d):
        b, w, _ = block.shape
        if b * w == width:
            block = block.triu() + block.triu(1).mT
        parts = whole.view(b, -1, w, b, width // (b * w), w).diagonal(dim1=0, dim2=3)
        parts[0, :, -1] = block.permute(1, 2, 0)
        parts[-1, :, 0] = block.permute(2, 1, 0)
    return whole[:d, :d]


def _products(x: Tensor, dtype: torch.dtype, product: _Product) -> Tensor:
    d = x.shape[1]
    if d < _even(d):
        x = torch.nn.functional.pad(x, (0, _even(d) - d))
    found = torch.empty(size(d), dtype=dtype, device=x.device)
    for block in _views(found, d):
        b, w, _ = block.shape
        parts = x.unflatten(1, (b, -1, w))  # [n, b, 2, w], on the diagonal [n, b, 1, w]
        product(parts[:, :, 0].permute(1, 2, 0), parts[:, :, -1].permute(1, 0, 2), block)
    return found


def _views(kept: Tensor, d: int) -> Iterator[Tensor]:
    """The blocks [b, w, w] of each width."""
    levels = list(_levels(d))
    for (b, w), flat in zip(levels, kept.split([b * w**2 for b, w in levels]), strict=True):
        yield flat.view(b, w, w)


def _levels(d: int) -> Iterator[tuple[int, int]]:
    """How many blocks of which width, the widest first; the last are on the diagonal."""
    blocks, width = 1, _even(d)
    while width > WIDEST:
        width //= 2
        yield blocks, width
        blocks *= 2
    yield blocks, width


def _even(d: int) -> int:
    """The least width from d on that halves evenly until it is narrow."""
    squares = 1
    while d > squares * WIDEST:
        squares *= 2
    return -(-d // squares) * squares

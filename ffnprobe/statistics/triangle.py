"""How is a large symmetric sum of products kept and computed at half the price?

Of a symmetric [d, d] matrix the upper triangle is kept as blocks: the upper right quarter, and so on within the
two quarters on the diagonal, three times; with the 8 squares that are left then, 9/16 of the matrix, one block
after the other. Blocks that are nearly square are quicker to compute than panels from the diagonal to the edge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

HALVINGS = 3
NARROW = 128  # torch 2.13's product of bytes gives garbage for a single row; its blocks here have 16 or more


def size(d: int) -> int:
    """Entries that are kept of a [d, d] matrix."""
    return sum((rows.stop - rows.start) * (columns.stop - columns.start) for rows, columns in _blocks(0, d))


def gram(x: Float[Tensor, "n d"]) -> Float[Tensor, " kept"]:
    """x' x in the precision of x."""
    # not BLAS's syrk through scipy: its threads spin for a while after each call and take the cores from torch's

    def product(left: Tensor, right: Tensor, block: Tensor) -> None:
        torch.mm(left.mT, right, out=block)

    return _products(x, x.dtype, product)


def counts(active: Bool[Tensor, "n d"]) -> Int[Tensor, " kept"]:
    """active' active, exactly."""
    if active.device.type != "cpu" or active.shape[1] < NARROW:
        return gram(active.float()).int()  # exact up to 2^24 rows

    def product(left: Tensor, right: Tensor, block: Tensor) -> None:
        block.copy_(torch._int_mm(left.mT, right))

    return _products(active.to(torch.int8), torch.int32, product)


def square(kept: Tensor, d: int) -> Tensor:
    """The whole symmetric [d, d] matrix."""
    whole = torch.empty(d, d, dtype=kept.dtype, device=kept.device)
    for block, rows, columns in _views(kept, d):
        if rows == columns:
            whole[rows, rows] = block.triu() + block.triu(1).mT
        else:
            whole[rows, columns] = block
            whole[columns, rows] = block.mT
    return whole


def _products(x: Tensor, dtype: torch.dtype, product: Callable[[Tensor, Tensor, Tensor], None]) -> Tensor:
    d = x.shape[1]
    found = torch.empty(size(d), dtype=dtype, device=x.device)
    for block, rows, columns in _views(found, d):
        product(x[:, rows], x[:, columns], block)
    return found


def _views(kept: Tensor, d: int) -> Iterator[tuple[Tensor, slice, slice]]:
    """Each block, and the rows and columns of the matrix that it stands for."""
    offset = 0
    for rows, columns in _blocks(0, d):
        shape = rows.stop - rows.start, columns.stop - columns.start
        end = offset + shape[0] * shape[1]
        yield kept[offset:end].view(shape), rows, columns
        offset = end


def _blocks(start: int, stop: int, halvings: int = HALVINGS) -> Iterator[tuple[slice, slice]]:
    middle = (start + stop) // 2
    if not halvings or middle == start:
        yield slice(start, stop), slice(start, stop)
        return
    yield slice(start, middle), slice(middle, stop)
    yield from _blocks(start, middle, halvings - 1)
    yield from _blocks(middle, stop, halvings - 1)

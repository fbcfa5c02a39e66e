"""What do two changes of an input do together that they do not do one by one?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..ffn import FFN

SCALES = (0.25, 0.5, 1.0)  # of the differences of tokens
JUDGED = 0.5
T = TypeVar("T")


def at_judged(by_scale: Sequence[T]) -> T:
    """Of a number a scale, that which verdicts go by."""
    return by_scale[SCALES.index(JUDGED)]


def index_numbers(ffn: FFN, x: Float[Tensor, "n d_model"], seed: int) -> dict[str, Any]:
    """The interaction index of a layer along differences of tokens, with its two nulls."""
    ffn = ffn.wide()
    x = x.to(ffn.keys)
    generator = torch.Generator().manual_seed(1_000_003 * seed + ffn.layer)
    a, b = x.roll(1, 0) - x.roll(2, 0), x.roll(3, 0) - x.roll(4, 0)  # a sample's rows are in random order

    def random_like(change: Tensor) -> Tensor:
        other = torch.randn(change.shape, generator=generator).to(change)
        return other * (change.norm(dim=1, keepdim=True) / other.norm(dim=1, keepdim=True))

    null, directions = ffn.canonical().randomised(seed), (random_like(a), random_like(b))
    of_scale = [interaction_parts(ffn, x, a, b, scale) for scale in SCALES]
    halves = [index_of(at_judged(of_scale)[:, i::2]) for i in (0, 1)]
    return {
        "index": [index_of(parts) for parts in of_scale],
        "index_spread": abs(halves[0] - halves[1]) / 2,
        "index_directions": [index_of(interaction_parts(ffn, x, *directions, scale)) for scale in SCALES],
        "index_weights": [index_of(interaction_parts(null, x, a, b, scale)) for scale in SCALES],
    }


def interaction_parts(
    ffn: FFN, x: Float[Tensor, "n d"], a: Float[Tensor, "n d"], b: Float[Tensor, "n d"], scale: float
) -> Float[Tensor, "2 n"]:
    """|f(x+a+b) - f(x+a) - f(x+b) + f(x)|² and |f(x+a) - f(x)|² + |f(x+b) - f(x)|² at each x, a and b scaled."""
    a, b = scale * a, scale * b
    here, one, other, both = (ffn.write(ffn.hidden(at)).double() for at in (x, x + a, x + b, x + a + b))
    together = (both - one - other + here).square().sum(1)
    return torch.stack([together, (one - here).square().sum(1) + (other - here).square().sum(1)])


def index_of(parts: Float[Tensor, "2 n"]) -> float:
    """0 for an affine layer, and 0 where nothing changes at all."""
    together, alone = parts.sum(1)
    return float((together / alone).sqrt()) if alone else 0.0

"""What does up-then-down cost, and what else could as much buy?"""

from __future__ import annotations

from typing import NamedTuple


class Design(NamedTuple):
    """A map from d_model to d_model numbers, and what its matrices cost; biases are left out."""

    name: str
    parameters: int
    flops: int  # a token; a product and its addition are two
    rank: int  # the greatest that its derivative can have
    nonlinear: bool


def account(d_model: int, d_mlp: int, gated: bool) -> list[Design]:
    """The layer; what as many parameters could be instead; and what those of one square map could be.

    >>> [(design.name, design.parameters, design.rank) for design in account(6, 24, gated=False)][:3]
    [('up, then down', 288, 6), ('linear factors, as many parameters', 288, 6), ('one square map', 36, 6)]
    """
    matrices = 3 if gated else 2
    sizes = [
        ("up, then down", matrices * d_model, d_mlp, True),
        ("linear factors, as many parameters", 2 * d_model, matrices * d_mlp // 2, False),
        ("one square map", d_model, d_model, False),
        ("FFN, as many as the square map", matrices * d_model, d_model // matrices, True),
        ("linear factors, as many as the square map", 2 * d_model, d_model // 2, False),
    ]
    return [
        Design(name, each * width, 2 * each * width, min(d_model, width), bent)
        for name, each, width, bent in sizes
    ]

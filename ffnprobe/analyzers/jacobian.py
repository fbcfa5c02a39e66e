"""What is the derivative of a layer at a token, and over how many directions does it spread?"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..ffn import ACTIVATIONS, FFN
from ..spectrum import eigenvalues

SQUARED = 1e-6  # of a float64 matrix times its transpose, which is quicker than the SVD, so small a ratio is exact


class Slopes(NamedTuple):
    """dh = key * (keys dx) + gate * (gates dx), neuron by neuron; `gate` is None in a plain layer."""

    key: Float[Tensor, " d_mlp"]
    gate: Float[Tensor, " d_mlp"] | None


def slopes(ffn: FFN, x: Float[Tensor, " d_model"]) -> Slopes:
    """act'(z) at one token; of a gated layer act(g) for the key and act'(g) u for the gate."""
    act, z = ACTIVATIONS[ffn.activation], ffn.pre(x).detach()
    with torch.enable_grad():
        z.requires_grad_()
        h = act(z)
        (slope,) = torch.autograd.grad(h.sum(), z)
    if ffn.gates is None:
        return Slopes(slope, None)
    return Slopes(h.detach(), slope * torch.nn.functional.linear(x, ffn.keys, ffn.key_bias))


def jacobian(ffn: FFN, x: Float[Tensor, " d_model"]) -> Float[Tensor, "d_model d_model"]:
    """dy/dx at one token: V' diag(act'(z)) K; gated V' (diag(act'(g) u) G + diag(act(g)) K). No norm, no stream.

    >>> ffn = FFN(0, torch.eye(2), torch.tensor([[0.0, 3.0], [1.0, 0.0]]), "relu")
    >>> jacobian(ffn, torch.tensor([1.0, -1.0]))
    tensor([[0., 0.],
            [3., 0.]])
    """
    at = slopes(ffn, x)
    reading = at.key[:, None] * ffn.keys
    if at.gate is not None and ffn.gates is not None:
        reading = reading + at.gate[:, None] * ffn.gates
    return ffn.values.T @ reading


def forward_product(ffn: FFN, at: Slopes, w: Float[Tensor, "d_model p"]) -> Float[Tensor, "d_model p"]:
    """J w, without J."""
    h = at.key[:, None] * (ffn.keys @ w)
    if at.gate is not None and ffn.gates is not None:
        h += at.gate[:, None] * (ffn.gates @ w)
    return ffn.values.T @ h


def backward_product(ffn: FFN, at: Slopes, w: Float[Tensor, "d_model p"]) -> Float[Tensor, "d_model p"]:
    """J' w, without J."""
    h = ffn.values @ w
    found = ffn.keys.T @ (at.key[:, None] * h)
    if at.gate is not None and ffn.gates is not None:
        found += ffn.gates.T @ (at.gate[:, None] * h)
    return found


def hutchinson(
    ffn: FFN, x: Float[Tensor, " d_model"], vectors: int, generator: torch.Generator
) -> tuple[float, float]:
    """PR(JJ') and |J|² at one token from random signs w: (mean |J'w|²)² / mean |J J'w|² (Hutchinson 1990).

    Both means are unbiased, tr JJ' and tr (JJ')²; their ratio is so up to the order 1 / (vectors * rank).
    """
    at, w = slopes(ffn, x), (torch.randint(2, (ffn.d_model, vectors), generator=generator) * 2 - 1).to(x)
    once = backward_product(ffn, at, w)
    trace, square = (part.square().sum(0).double() for part in (once, forward_product(ffn, at, once)))
    if not square.any():
        return 0.0, 0.0
    return float(trace.mean() ** 2 / square.mean()), float(trace.mean())


@dataclass(frozen=True, eq=False)
class Exact:
    """What J itself tells, in its own precision."""

    J: Float[Tensor, "d_model d_model"]

    @cached_property
    def gram(self) -> Float[Tensor, "d_model d_model"]:
        """J J'."""
        return self.J @ self.J.T

    @property
    def gain(self) -> float:
        """|J|²."""
        return float(self.gram.trace())

    @property
    def rank(self) -> float:
        """PR(JJ') = |J|⁴ / |JJ'|²; 0 where a layer writes nothing, which has no direction."""
        return self.gain**2 / float(self.gram.square().sum()) if self.gain else 0.0

    @property
    def singular(self) -> Float[Tensor, " d_model"]:
        """Singular values of J, largest first."""
        return eigenvalues(self.gram).sqrt()

    @property
    def condition(self) -> float:
        """cond(I + J)."""
        beside = self.J + torch.eye(len(self.J)).to(self.J)
        squares = eigenvalues(beside @ beside.T)
        if squares[-1] > SQUARED * squares[0]:
            return float((squares[0] / squares[-1]).sqrt())
        singular = torch.linalg.svdvals(beside)
        return float(singular[0] / singular[-1].clamp(min=1e-300))

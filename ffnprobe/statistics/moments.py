"""Mean, covariance and what a debiased rank needs, of a site: the moments up to the fourth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from .. import spectrum as sp
from . import triangle
from .base import Statistic, no_tokens
from .partial_spectrum import Spectrum


@dataclass(frozen=True)
class Covariance:
    """The second-order picture of a site: what `Moments.compute` gives."""

    n: int
    mean: Float[Tensor, " d"]
    centred: Float[Tensor, "d d"]  # covariance about the mean, divided by n
    uncentred: Float[Tensor, "d d"]  # mean of x x'

    sketch: ClassVar[int] = 0  # test vectors: none, this is exact

    @property
    def variance(self) -> Float[Tensor, " d"]:
        """Of each coordinate."""
        return self.centred.diagonal()

    def spectrum(self, centred: bool = True) -> Spectrum:
        """Of the covariance, or of the second moment about zero."""
        return Spectrum.exact(sp.eigenvalues(self.centred if centred else self.uncentred))

    def scaled(self, variance: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
        """The spectrum after every coordinate is brought to this variance."""
        scale = (variance / self.variance.clamp(min=torch.finfo(self.centred.dtype).tiny)).sqrt()
        return sp.eigenvalues(scale[:, None] * self.centred * scale)


class Moments(Statistic):
    """n, s = sum x, S = sum x x', c = sum |x|² x, q = sum |x|⁴ of the shifted x, in float64.

    The shift is fixed before the first token: a covariance is a small difference of large sums, and a
    mean of 100 standard deviations once made a participation ratio of 86 read 8.7. Of S the upper triangle
    is kept (see `triangle`).
    """

    fixed = ("shift",)

    @classmethod
    def about(cls, sample: Float[Tensor, "n d"]) -> Moments:
        """Nothing seen yet, shifted by the mean of a pilot sample."""
        d = sample.shape[1]
        zeros = torch.zeros(d, dtype=torch.float64, device=sample.device)
        return cls(
            {
                "n": no_tokens(),
                "shift": sample.double().mean(0) if len(sample) else zeros.clone(),
                "s": zeros.clone(),
                "S": torch.zeros(triangle.size(d), dtype=torch.float64, device=sample.device),
                "c": zeros.clone(),
                "q": torch.zeros((), dtype=torch.float64, device=sample.device),
            }
        )

    def _summary(self, x: Float[Tensor, "n d"], at: Int[Tensor, " n"]) -> dict[str, Tensor]:
        x = x if x.dtype == torch.float64 else x.float()  # never a Gram matrix in half precision
        x = x - self._state["shift"].to(x.dtype)
        square = torch.linalg.vector_norm(x, dim=1).square()
        s, c = torch.stack([torch.ones_like(square), square]) @ x
        return {
            "n": torch.tensor(len(x)),
            "s": s.double(),
            "S": triangle.gram(x),
            "c": c.double(),
            "q": (square.double() ** 2).sum(),
        }

    def _scatter(self) -> Float[Tensor, "d d"]:
        return triangle.square(self._state["S"], len(self._state["s"]))

    def compute(self) -> Covariance:
        """Mean, covariance and second moment.

        Raises:
            ValueError: fewer than two tokens, or a sum that is not finite.
        """
        self._need(2, "a covariance")
        scatter, s, shift = self._scatter() / self.n, self._state["s"] / self.n, self._state["shift"]
        if not torch.isfinite(scatter).all():
            raise ValueError("the second moment is not finite: the activations hold NaN or Inf, or overflow")
        # add_ and addr_ keep one d x d matrix at a time: at d_mlp 16,384 each is 2 GiB
        centred = scatter.addr(s, s, alpha=-1)
        uncentred = scatter.addr_(s, shift).addr_(shift, s).addr_(shift, shift)
        return Covariance(self.n, s + shift, centred, uncentred)

    def participation_ratio(self) -> float:
        """Participation ratio of the covariance, corrected for the finite number of tokens.

        The row-corrected estimator of Chun et al. (ICLR 2026): each moment of the covariance is replaced
        by its U-statistic over distinct tokens. Unbiased numerator and denominator, so about right at
        n far below d, where the plain ratio is bounded by n.

        Raises:
            ValueError: fewer than four tokens.
        """
        self._need(4, "a debiased participation ratio")
        s, scatter = self._state["s"], self._scatter()
        return debiased_participation_ratio(
            self.n,
            square=(scatter * scatter).sum(),
            fourth=self._state["q"],
            third=s @ self._state["c"],
            quadratic=einsum(s, scatter, s, "d, d e, e ->"),
            trace=scatter.trace(),
            norm=s @ s,
        )


def debiased_participation_ratio(
    n: int, *, square: Tensor, fourth: Tensor, third: Tensor, quadratic: Tensor, trace: Tensor, norm: Tensor
) -> float:
    """The row-corrected participation ratio from |S|², q, s'c, s'S s, tr S and |s|² of n >= 4 tokens."""
    t1, t2, t3, t5 = square, fourth, third, quadratic
    t6, t7, t9 = trace**2, trace * norm, norm**2
    # names say which token indices coincide in the sum over i, j, l, m
    ij2, iijj = t1 - t2, t6 - t2
    ijjl = t5 - 2 * t3 - t1 + 2 * t2
    iijl = t7 - 2 * t3 - t6 + 2 * t2
    ijlm = t9 - 2 * t7 - 4 * t5 + t6 + 8 * t3 + 2 * t1 - 6 * t2
    f2 = n * (n - 1)
    f3 = f2 * (n - 2)
    f4 = f3 * (n - 3)
    return float((iijj / f2 - 2 * iijl / f3 + ijlm / f4) / (ij2 / f2 - 2 * ijjl / f3 + ijlm / f4))

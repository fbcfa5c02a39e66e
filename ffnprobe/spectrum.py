"""How many directions does a spectrum spread over?

Every rank takes the eigenvalues of a covariance (or of a Gram matrix), in any order, and lies in
[1, number of eigenvalues]. Negative eigenvalues, which only rounding makes, count as 0. All ranks are
unchanged when the spectrum is scaled. p below is the spectrum divided by its sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor


def eigenvalues(symmetric: Float[Tensor, "d d"]) -> Float[Tensor, " d"]:
    """Eigenvalues of a covariance in float64, largest first, negative rounding clipped to 0.

    >>> eigenvalues(torch.diag(torch.tensor([1.0, 3.0])))
    tensor([3., 1.], dtype=torch.float64)
    """
    # not numpy's, which is as quick, but whose threads spin on and hold up what torch does next
    return torch.linalg.eigvalsh(symmetric.double().cpu()).flip(0).clamp(min=0)


def participation_ratio(spectrum: Float[Tensor, " d"]) -> float:
    """(sum l)² / sum l²: the hard rank, the number of equal directions with the same concentration.

    >>> participation_ratio(torch.ones(7))
    7.0
    """
    p = _shares(spectrum)
    return float(1 / (p**2).sum())


def soft_rank(spectrum: Float[Tensor, " d"]) -> float:
    """exp of the entropy of the normalised *eigenvalues*. Biased low when tokens are few.

    >>> round(soft_rank(torch.tensor([1.0, 1.0, 0.0])), 6)
    2.0
    """
    return renyi_rank(spectrum, 1.0)


def erank_rv(spectrum: Float[Tensor, " d"]) -> float:
    """exp of the entropy of the normalised *singular values*, the roots of the eigenvalues given.

    Larger than `soft_rank`; the two are never comparable. Roy & Vetterli 2007.
    """
    return soft_rank(_shares(spectrum).sqrt())


def renyi_rank(spectrum: Float[Tensor, " d"], order: float) -> float:
    """exp of the Renyi entropy of order a: a = 1 the soft rank, 2 the hard rank, inf the stable rank."""
    p = _shares(spectrum)
    if order == 1:
        return float(torch.special.entr(p).sum().exp())
    if math.isinf(order):
        return float(1 / p.max())
    return float((p**order).sum() ** (1 / (1 - order)))


def stable_rank(spectrum: Float[Tensor, " d"]) -> float:
    """sum l / max l."""
    return renyi_rank(spectrum, math.inf)


def rank_at_energy(spectrum: Float[Tensor, " d"], energy: float) -> int:
    """The least number of leading directions that carry the share `energy` of the variance.

    The worst of the ranks on few tokens: it wants 50 tokens for every dimension.
    """
    cumulative = _shares(spectrum).sort(descending=True).values.cumsum(0)
    # rounding may leave the last sum just below the energy asked for
    return int((cumulative < energy - 1e-12).sum()) + 1


def numerical_rank(spectrum: Float[Tensor, " d"], dtype: torch.dtype = torch.float32) -> int:
    """Eigenvalues above rounding: 4 max l * eps of float32, in which products are summed up.

    Activations of a narrower `dtype` are themselves rounded, which adds a variance of up to eps² / 12 of
    their square: then eigenvalues above max l * eps² of it.
    """
    p = spectrum.double()
    return int((p > p.max() * max(4 * torch.finfo(torch.float32).eps, torch.finfo(dtype).eps ** 2)).sum())


def early_enrichment(spectrum: Float[Tensor, " d"]) -> float:
    """How far the cumulative spectrum runs ahead of a flat one: 0 for flat, (d - 1)/d for one direction.

    sum_k (cumulative share_k - k/d) / (d/2), clamped to [0, 1]. NerVE (eigenvalue early enrichment).
    """
    p = _shares(spectrum).sort(descending=True).values
    d = len(p)
    flat = torch.arange(1, d + 1, dtype=p.dtype) / d
    return float(((p.cumsum(0) - flat).sum() / (d / 2)).clamp(0, 1))


def spectrum_divergence(one: Float[Tensor, " d"], other: Float[Tensor, " d"]) -> float:
    """Jensen-Shannon divergence of two sorted spectra in nats, in [0, ln 2]."""
    p, q = (_shares(spectrum).sort(descending=True).values for spectrum in (one, other))
    entropy = torch.special.entr
    return float((entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2).sum().clamp(min=0))


def linear_share(activation: Callable[[Tensor], Tensor], gated: bool = False) -> float:
    """Share of the variance of f(z), z standard normal, that a straight line carries, in [0, 1].

    (E z f)² / Var f by quadrature on a fine grid: ReLU 0.733, GELU 0.723, SiLU 0.799, tanh 0.930. Gated: of
    f(z) u, u another standard normal, (E f)² / E f²: SiLU 0.120.

    >>> round(linear_share(torch.relu), 3), round(linear_share(torch.nn.functional.silu, gated=True), 3)
    (0.733, 0.12)
    """
    z = torch.linspace(-12, 12, 48_001, dtype=torch.float64)
    weight = torch.exp(-(z**2) / 2)
    weight, f = weight / weight.sum(), activation(z)
    if gated:
        return float((weight * f).sum() ** 2 / (weight * f**2).sum())
    f = f - (weight * f).sum()
    return float((weight * z * f).sum() ** 2 / (weight * f**2).sum())


def random_jacobian_rank(expansion: float, activation: Callable[[Tensor], Tensor], gated: bool = False) -> float:
    """PR(JJ') / d_model of a layer with Gaussian weights at standard normal pre-activations, in (0, 1/2).

    1 / (2 + k / r), r the expansion, k = E s² / (E s)²: s the squared slope of a neuron, act'(z)², or of a gated
    one act'(g)² u² + act(g)². k: 1 linear, 2 ReLU, 2.1 GELU. Never above half of d_model, however wide the layer.

    >>> round(random_jacobian_rank(4.0, torch.relu), 3), round(random_jacobian_rank(4.0, lambda z: z), 3)
    (0.4, 0.444)
    """
    z = torch.linspace(-12, 12, 48_001, dtype=torch.float64)
    weight = torch.exp(-(z**2) / 2)
    weight, f = weight / weight.sum(), activation(z)
    slope = torch.gradient(f, spacing=(z,))[0] ** 2
    if gated:
        mean = (weight * (slope + f**2)).sum()
        square = (weight * (3 * slope**2 + 2 * slope * f**2 + f**4)).sum()
    else:
        mean, square = (weight * slope).sum(), (weight * slope**2).sum()
    return 1 / (2 + float(square / mean**2) / expansion)


def random_feature_rank(rank_in: float, width: int, activation: Callable[[Tensor], Tensor]) -> float:
    """Participation ratio of `width` random plain neurons on inputs of participation ratio `rank_in`.

    1 / (rho² / rank_in + 1 / width), rho the `linear_share`; its ceiling is rank_in / rho². A layer that
    has learnt nothing has it. Not for gated neurons, which have no such ceiling.
    """
    return 1 / (linear_share(activation) ** 2 / rank_in + 1 / width)


def subset_participation_ratio(covariance: Float[Tensor, "d d"], k: int) -> float:
    """Participation ratio to expect of k of the d coordinates, drawn at random.

    E (tr C_k)² / E |C_k|²: a coordinate is in with probability k/d, a pair with k(k-1) / d(d-1). That of the whole
    covariance at k = d; within 1% of the mean over subsets where k is well above the rank.
    """
    c = covariance.double()
    d = len(c)
    one, two = k / d, k * (k - 1) / (d * (d - 1)) if d > 1 else 1.0
    own = (c.diagonal() ** 2).sum()
    trace, square = c.trace() ** 2 - own, (c**2).sum() - own
    return float((one * own + two * trace) / (one * own + two * square))


def isotropic_ranks(width: int, n: int) -> tuple[float, float]:
    """(participation ratio, soft rank) to expect of n samples of an isotropic Gaussian of this width.

    1 / (1/d + 1/n) and d exp(-d / 2n), whose roles of d and n change over where n < d.
    """
    few, many = sorted((width, n))
    return 1 / (1 / width + 1 / n), few * math.exp(-few / (2 * many))


def gram_eigenvalues(matrix: Float[Tensor, "n d"]) -> Float[Tensor, " k"]:
    """Squared singular values of a matrix, largest first, k = min(n, d)."""
    matrix = matrix.double()
    if matrix.shape[0] < matrix.shape[1]:
        return eigenvalues(einsum(matrix, matrix, "n d, m d -> n m"))
    return eigenvalues(einsum(matrix, matrix, "n d, n e -> d e"))


def _shares(spectrum: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    clipped = spectrum.double().clamp(min=0)
    total = clipped.sum()
    if not (torch.isfinite(total) and total > 0):
        raise ValueError(f"a spectrum needs a positive finite sum, got {float(total)}: are all rows the same?")
    return clipped / total

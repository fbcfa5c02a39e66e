"""How does a rank grow with the width: by a power of it, or up to a ceiling?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize_scalar
from scipy.stats import t, theilslopes

LEVEL = 0.95
SATURATES = 2.0  # AICc that the law with a ceiling must win by


@dataclass(frozen=True)
class Scaling:
    """Two laws of ranks R over widths D, both fitted to ln R by least squares.

    Power: ln R = ln A + b ln D. Saturating: 1/R = 1/ceiling + 1/(slope D), which starts as a power of 1.
    """

    n: int
    exponent: float  # b
    low: float  # ends of its 95% t-interval; not a number for two widths
    high: float
    theil_sen: float  # the median slope of all pairs
    theil_sen_low: float
    theil_sen_high: float
    ceiling: float  # infinite where none is seen
    slope: float
    aicc_power: float  # Akaike's criterion corrected for few points; infinite below five
    aicc_saturating: float

    @property
    def ceiling_wins_by(self) -> float:
        """AICc of the power law less that of the saturating law; not a number below five widths."""
        return self.aicc_power - self.aicc_saturating


def fit_scaling(widths: ArrayLike, ranks: ArrayLike) -> Scaling:
    """Fit both laws.

    Raises:
        ValueError: fewer than two widths, or something that is not positive and finite.

    >>> law = fit_scaling([64, 128, 256, 512, 1024], [8, 16, 32, 64, 128])
    >>> round(law.exponent, 6), round(law.theil_sen, 6)
    (1.0, 1.0)
    """
    x, y = _logarithms(widths, ranks)
    n = len(x)
    b, a = np.polyfit(x, y, 1)
    off = y - a - b * x
    error = math.sqrt(off @ off / (n - 2)) / np.linalg.norm(x - x.mean()) if n > 2 else math.nan
    half = t.ppf((1 + LEVEL) / 2, n - 2) * error if n > 2 else math.nan
    robust = theilslopes(y, x, LEVEL)
    ceiling, slope, squares = _saturating(x, y)
    return Scaling(
        n=n,
        exponent=float(b),
        low=float(b - half),
        high=float(b + half),
        theil_sen=float(robust.slope),
        theil_sen_low=float(robust.low_slope),
        theil_sen_high=float(robust.high_slope),
        ceiling=ceiling,
        slope=slope,
        aicc_power=_aicc(float(off @ off), n),
        aicc_saturating=_aicc(squares, n),
    )


def exponent(widths: ArrayLike, ranks: ArrayLike) -> float:
    """b of ln R = ln A + b ln D by least squares; not a number below two widths."""
    if np.unique(widths).size < 2:
        return math.nan
    return float(np.polyfit(*_logarithms(widths, ranks), 1)[0])


def _logarithms(widths: ArrayLike, ranks: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    D, R = (np.asarray(values, dtype=float) for values in (widths, ranks))
    if len(np.unique(D)) < 2:
        raise ValueError(f"got widths {np.unique(D).tolist()}: a law of the width needs at least two")
    if not (np.isfinite(D).all() and np.isfinite(R).all() and (D > 0).all() and (R > 0).all()):
        raise ValueError(f"widths and ranks must be positive and finite, got {D.tolist()} and {R.tolist()}")
    return np.log(D), np.log(R)


def _saturating(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """(ceiling, slope, sum of squares in ln R) of 1/R = (1 + knee / D) / ceiling.

    For each knee the best ceiling is a mean, which leaves one number to search: from far below the widths, where R
    is constant, to far above, where it is proportional to D.
    """

    def off(knee: np.ndarray | float) -> np.ndarray:
        return y + np.log1p(np.exp(np.asarray(knee)[..., None] - x))

    def squares(knee: np.ndarray | float) -> Any:
        return off(knee).var(axis=-1) * len(x)

    grid = np.linspace(x.min() - 12, x.max() + 12, 200)
    best = grid[squares(grid).argmin()]
    step = grid[1] - grid[0]
    found = minimize_scalar(squares, bounds=(best - step, best + step), method="bounded", options={"xatol": 1e-10})
    height = float(off(found.x).mean())  # ln of the ceiling
    seen = height < y.max() + math.log(1e4)  # a ceiling far above all ranks is none
    return math.exp(height) if seen else math.inf, math.exp(height - found.x), float(found.fun)


def _aicc(squares: float, n: int, k: int = 3) -> float:
    """Akaike's criterion of a least-squares fit of k parameters, the variance among them, for few points."""
    if n < k + 2:
        return math.inf
    floor = n * np.finfo(float).eps ** 2  # an exact fit
    return n * math.log(max(squares, floor) / n) + 2 * k + 2 * k * (k + 1) / (n - k - 1)

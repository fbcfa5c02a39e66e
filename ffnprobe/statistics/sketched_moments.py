"""What `Moments` keeps, of a site too wide for it: d x k numbers in place of d x d, with a bound on the error."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .. import spectrum as sp
from .base import Statistic, no_tokens
from .moments import debiased_participation_ratio
from .partial_spectrum import Spectrum, completed

VECTORS = 256
NESTED = 5  # sketches by a half, a quarter, ... of the test vectors tell how the spectrum falls
FOLDS = 4  # the test vectors are probed in turn against the approximation that the others give


@dataclass(frozen=True)
class SketchedCovariance:
    """What `SketchedMoments.compute` gives: `Covariance` seen through k test vectors.

    From Y = C W the Nystrom approximation is Y (W'Y)^+ Y'. What it leaves of C is positive semidefinite, so
    every eigenvalue is at least the sketch's, and what they lack adds up to the difference of the traces, of
    which that of C is known exactly: a bound that holds for this very sketch, up to rounding. For Gaussian
    test vectors the expected difference is at most (1 + r / (k - r - 1)) times the sum of all but the r
    largest eigenvalues, any r < k - 1 (Tropp, Yurtsever, Udell & Cevher 2017, arXiv 1706.05736); random
    signs did as well on every covariance tried.
    """

    n: int
    mean: Float[Tensor, " d"]
    variance: Float[Tensor, " d"]
    product: Float[Tensor, "d k"]  # C W, C the covariance about the mean, divided by n
    test: Float[Tensor, "d k"]  # W, random signs

    @property
    def sketch(self) -> int:
        """Test vectors; 0 where a covariance is exact."""
        return self.test.shape[1]

    def spectrum(self, centred: bool = True) -> Spectrum:
        """Of the covariance, or of the second moment about zero; completed where the sketch does not reach."""
        product, test, trace = self._seen(centred)
        d = len(self.mean)
        blurs = {
            j: (trace - float(_factor(product[:, :j], test[:, :j]).square().sum())) / j
            for j in {self.sketch // 2**i for i in range(NESTED)} - {0}
        }
        least, squares = self.least(centred), _sum_of_squares(product, test)
        return Spectrum.partial(least, blurs, trace, min(d, self.n - centred), d, squares)

    def least(self, centred: bool = True) -> Float[Tensor, " k"]:
        """Eigenvalues that the true ones are never below, largest first."""
        product, test, _ = self._seen(centred)
        return _eigenvalues(_factor(product, test))

    def _seen(self, centred: bool) -> tuple[Float[Tensor, "d k"], Float[Tensor, "d k"], float]:
        """Y, W and the trace."""
        test = self.test.to(self.product)
        if centred:
            return self.product, test, float(self.variance.sum())
        product = self.product + torch.outer(self.mean, self.mean @ test)  # a change of rank one, exact
        return product, test, float((self.variance + self.mean**2).sum())

    def scaled(self, variance: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
        """The completed spectrum after every coordinate is brought to this variance.

        A Nystrom approximation is covariant: that of E C E by the test vectors E^-1 W is E times that of C
        times E. But the completion takes the test vectors for isotropic, so E has to be near 1 (see `scale`):
        else the soft rank of random weights comes out up to 43% off. A coordinate that alone lacks more
        variance than isotropic test vectors would leave of any direction counts as a direction of its own.
        """
        d, tiny = len(variance), torch.finfo(variance.dtype).tiny
        factor = _factor(self.product, self.test.to(self.product))
        # rounding can leave a coordinate of almost no variance with more than it has
        known = self.variance.maximum(factor.square().sum(1))
        factor = factor * (variance / known.clamp(min=tiny)).sqrt()[:, None]
        lacking = (variance - factor.square().sum(1)).clamp(min=0)
        alone = (lacking > lacking.sum() / self.sketch).nonzero().squeeze(1)
        own = torch.zeros(d, len(alone), dtype=variance.dtype, device=variance.device)
        own[alone, torch.arange(len(alone), device=variance.device)] = lacking[alone].sqrt()
        least, count = _eigenvalues(torch.cat([factor, own], dim=1)), min(d, self.n - 1)
        values = completed(least, float(variance.sum()), count)
        return torch.nn.functional.pad(values, (0, d - count))

    def along(self, direction: Float[Tensor, " d"]) -> float:
        """m'C m, as far as the sketch has resolved C."""
        return float((direction @ _factor(self.product, self.test.to(self.product))).square().sum())


class SketchedMoments(Statistic):
    """`Moments` with Y = sum x x'W, k columns, in place of sum x x'; the trace is kept exactly.

    Linear in the tokens, so it merges like any sum, whatever the order; Frequent Directions does not.
    W is made from the seed when it is needed, of random signs: they are the same on every machine, where
    Gaussian numbers may differ in the last bit and spoil a merge, and they give the traces less variance.
    """

    fixed = ("shift", "scale", "seed")

    @classmethod
    def about(
        cls,
        sample: Float[Tensor, "n d"],
        k: int = VECTORS,
        seed: int = 0,
        scale: Float[Tensor, " d"] | None = None,
    ) -> SketchedMoments:
        """Nothing seen yet, shifted by the mean of a pilot sample.

        Args:
            k: test vectors, at least 8.
            scale: what each coordinate is multiplied by; 1 by default.
        """
        d, device = sample.shape[1], sample.device
        zeros = torch.zeros(d, dtype=torch.float64, device=device)
        return cls(
            {
                "n": no_tokens(),
                "shift": sample.double().mean(0) if len(sample) else zeros,
                "scale": torch.ones_like(zeros) if scale is None else scale.double(),
                "s": zeros,
                "squares": zeros,  # sum x² of each coordinate
                "c": zeros,
                "q": torch.zeros((), dtype=torch.float64, device=device),
                "product": torch.zeros(d, k, dtype=torch.float64, device=device),
                "seed": torch.tensor(seed),
            }
        )

    def _summary(self, x: Float[Tensor, "n d"], at: Int[Tensor, " n"]) -> dict[str, Tensor]:
        x = x if x.dtype == torch.float64 else x.float()
        x = (x - self._state["shift"].to(x.dtype)) * self._state["scale"].to(x.dtype)
        squares = x * x
        norm = squares.sum(1)
        return {
            "n": torch.tensor(len(x)),
            "s": x.sum(0, dtype=torch.float64),
            "squares": squares.sum(0, dtype=torch.float64),
            "c": (norm @ x).double(),
            "q": (norm.double() ** 2).sum(),
            "product": (x.mT @ (x @ self._test().to(x.dtype))).double(),
        }

    def _test(self) -> Float[Tensor, "d k"]:
        product = self._state["product"]
        return signs(*product.shape, int(self._state["seed"]), product.device)

    def compute(self) -> SketchedCovariance:
        """Mean, variances and the sketch of the covariance.

        Raises:
            ValueError: fewer than two tokens, or a sum that is not finite.
        """
        self._need(2, "a covariance")
        mean, test = self._state["s"] / self.n, self._test()
        product = self._state["product"] / self.n
        if not torch.isfinite(product).all():
            raise ValueError("the second moment is not finite: the activations hold NaN or Inf, or overflow")
        variance = (self._state["squares"] / self.n - mean**2).clamp(min=0)
        product = product.addr_(mean, mean @ test.double(), alpha=-1)
        shift = self._state["shift"] * self._state["scale"]
        return SketchedCovariance(self.n, mean + shift, variance, product, test)

    def participation_ratio(self) -> float:
        """Participation ratio corrected for the finite number of tokens, as `Moments.participation_ratio`.

        tr C² is that of `SketchedCovariance.spectrum`; m'C m, m the mean about the shift, is the sketch's,
        and what it lacks nearly cancels.

        Raises:
            ValueError: fewer than four tokens.
        """
        self._need(4, "a debiased participation ratio")
        n, s, covariance = self.n, self._state["s"], self.compute()
        mean = s / n
        norm, along = mean @ mean, covariance.along(mean)
        total = covariance.variance.sum() ** 2 / covariance.spectrum().participation_ratio
        return debiased_participation_ratio(
            n,
            square=n**2 * (total + 2 * along + norm**2),
            fourth=self._state["q"],
            third=s @ self._state["c"],
            quadratic=n**3 * (along + norm**2),
            trace=self._state["squares"].sum(),
            norm=s @ s,
        )


@lru_cache(maxsize=8)
def signs(d: int, k: int, seed: int, device: torch.device) -> Float[Tensor, "d k"]:
    """The test vectors of every sketch of this shape and seed: -1 and 1, float32, shared, not to be changed."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(2, (d, k), generator=generator).float() * 2 - 1).to(device)


def _factor(product: Float[Tensor, "d k"], test: Float[Tensor, "d k"]) -> Float[Tensor, "d k"]:
    """F with F F' = Y (W'Y)^+ Y'.

    Directions of the core W'Y that rounding reaches, as its own asymmetry tells, are left out. That is the
    approximation of fewer test vectors, so it stays below C; the usual shift by a multiple of the identity
    would have to be taken off again, and the order with it.
    """
    core = test.mT @ product
    spread, vectors = torch.linalg.eigh((core + core.mT) / 2)
    rounding = max(len(core) * torch.finfo(core.dtype).eps * float(spread[-1]), float((core - core.mT).norm()))
    return product @ (vectors * torch.where(spread > rounding, spread, torch.inf).rsqrt())


def _eigenvalues(factor: Float[Tensor, "d k"]) -> Float[Tensor, " k"]:
    return sp.eigenvalues(factor.mT @ factor)


def _sum_of_squares(product: Float[Tensor, "d k"], test: Float[Tensor, "d k"]) -> tuple[float, float]:
    """tr C² and its standard error, from |C w|² of every test vector w (Hutchinson).

    Each is compared with |F F'w|², F F' the approximation by the other folds' vectors, of which tr (F F')² is
    known: only what that leaves over is noise (control variates; compare Hutch++, Meyer et al. 2021).
    """
    k, estimates, variance = product.shape[1], [], 0.0
    for fold in range(FOLDS):
        mine = torch.arange(k, device=product.device) % FOLDS == fold
        factor = _factor(product[:, ~mine], test[:, ~mine])
        inner = factor.mT @ factor
        seen = (factor @ (factor.mT @ test[:, mine])).square().sum(0)
        found = product[:, mine].square().sum(0) - seen + inner.square().sum()
        estimates.append(found)
        variance += float(found.var()) * len(found)
    return float(torch.cat(estimates).mean()), variance**0.5 / k

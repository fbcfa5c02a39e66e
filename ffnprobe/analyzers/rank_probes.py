"""What does `hidden_rank` need of one pass over the tokens, and how many bytes is that?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import InputError
from ..ffn import FFN
from ..statistics import Count, Moments, SketchedMoments, Statistic
from ..stream import SITES, Probe

BUDGET = 4 * 2**30  # bytes
MOST, FEWEST = 1024, 64  # test vectors


def probes(layers: Sequence[FFN], seed: int = 0, budget: int = BUDGET) -> dict[str, Probe]:
    """What `hidden_rank` needs of one pass over the tokens, in at most `budget` bytes of moments.

    Raises:
        InputError: it does not fit.
    """
    k = plan_moments(layers, budget)
    wanted: dict[str, Probe] = {}
    for ffn in layers:
        prefix, null = f"hidden_rank/{ffn.layer}", _Null(ffn, seed)
        matched = _Matched(k, seed)
        for site in sites(ffn):
            probe = Probe(ffn.layer, site, Moments.about)
            if site in ("pre", "up"):
                # z is linear in x: d_model numbers tell its spectrum, for d_model^2 of work instead of d_mlp^2
                probe = Probe(ffn.layer, "in", Moments.about, of=_Reading(ffn, site))
            elif site == "post":
                probe = replace(probe, make=matched.trained if k else Moments.about)
                probe = replace(probe, of=ffn.weighing) if ffn.gated else probe
            wanted |= {f"{prefix}/{site}/{half}": replace(probe, block=(half, 2)) for half in (0, 1)}
            wanted[f"{prefix}/{site}/dropped"] = replace(probe, kinds=("sink", "special"))
        make = matched.null if k else Moments.about
        wanted[f"{prefix}/post/null"] = Probe(ffn.layer, "in", make, of=null.hidden)
        if k:
            wanted[f"{prefix}/out/null"] = Probe(ffn.layer, "post", Moments.about, of=null.write)
        wanted[f"{prefix}/sinks"] = Probe(ffn.layer, "in", Count.about, kinds=("sink",))
    return wanted


def plan_moments(layers: Sequence[FFN], budget: int = BUDGET) -> int:
    """Test vectors of the d_mlp-wide sites: 0 where exact moments of all sites take at most `budget` bytes.

    Else as many as fit of 1024, 512, ... 64. A function of shapes alone, so that a run resumes as it began.

    Raises:
        InputError: 64 do not fit.
    """
    k = MOST
    if _bytes(layers, 0) <= budget:
        return 0
    while _bytes(layers, k) > budget:
        if k == FEWEST:
            raise InputError(
                f"the moments of {len(layers)} layers do not fit into a budget of {budget:,} bytes: give at least "
                f"{_bytes(layers, FEWEST):,}, or fewer layers"
            )
        k //= 2
    return k


def moment_bytes(layers: Sequence[FFN], budget: int = BUDGET) -> int:
    """Bytes of all moments that `hidden_rank` keeps of these layers, test vectors included."""
    return _bytes(layers, plan_moments(layers, budget))


def _bytes(layers: Sequence[FFN], k: int) -> int:
    widths = {ffn.d_mlp for ffn in layers}
    total = sum(widths) * k * torch.float32.itemsize  # test vectors: layers of one width share them
    for ffn in layers:
        reading = min(ffn.d_mlp, ffn.d_model + 1)  # the pre-activation in a basis of its own span
        # two halves and what was set apart; h has a null beside, and sketched, the null of y has moments too
        total += 6 * _exact(ffn.d_model) + 3 * (1 + ffn.gated) * _exact(reading)
        total += 4 * _sketched(ffn.d_mlp, k) + _exact(ffn.d_model) if k else 4 * _exact(ffn.d_mlp)
    return total


@cache
def _exact(width: int) -> int:
    return _size(Moments.about(torch.empty(0, width, device="meta")))


@cache
def _sketched(width: int, k: int) -> int:
    return _size(SketchedMoments.about(torch.empty(0, width, device="meta"), k))


def _size(statistic: Statistic) -> int:
    return sum(tensor.nbytes for tensor in statistic.tensors().values())


def sites(ffn: FFN) -> list[str]:
    """The sites that a layer has, in their order."""
    return [site for site in SITES if site != "up" or ffn.gated]


def triangle(ffn: FFN, site: str) -> tuple[Float[Tensor, "k d_model"], Float[Tensor, " k"]]:
    """(A, b) such that A x + b is the pre-activation in an orthonormal basis of its own span."""
    matrix, bias = ffn.keys, ffn.key_bias
    if site == "pre" and ffn.gates is not None:
        matrix, bias = ffn.gates, ffn.gate_bias
    offset = matrix.new_zeros(len(matrix)) if bias is None else bias
    upper = torch.linalg.qr(torch.cat([matrix, offset[:, None]], dim=1).double(), mode="r").R
    return upper[:, :-1], upper[:, -1]


@dataclass(frozen=True, eq=False)
class _Reading:
    """x -> the pre-activation in a basis of its own span."""

    ffn: FFN
    site: str

    @cached_property
    def triangle(self) -> tuple[Tensor, Tensor]:
        matrix, offset = triangle(self.ffn.canonical(), self.site)
        return matrix.to(self.ffn.keys.dtype), offset.to(self.ffn.keys.dtype)

    def __call__(self, x: Float[Tensor, "n d_model"]) -> Float[Tensor, "n k"]:
        matrix, offset = self.triangle
        return x.to(matrix.dtype) @ matrix.mT + offset


class _Null:
    """A layer with random weights in its place: made when it is first asked, as large as the layer, and kept."""

    def __init__(self, ffn: FFN, seed: int) -> None:
        self.ffn, self.seed = ffn, seed

    @cached_property
    def random(self) -> FFN:
        return self.ffn.canonical().randomised(self.seed).to(self.ffn.keys.dtype)

    @cached_property
    def values(self) -> Float[Tensor, "d_mlp d_model"]:
        return (self.ffn.gauge[:, None] * self.random.values).to(self.random.values.dtype)

    def hidden(self, x: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_mlp"]:
        return self.random.hidden(x)

    def write(self, hidden: Float[Tensor, "n d_mlp"]) -> Float[Tensor, "n d_model"]:
        """What the random values make of the trained hidden activations."""
        return hidden @ self.values


@dataclass
class _Matched:
    """Sketches of h and of its null, whose neurons are brought near h's variances beforehand.

    The pilot makes the statistics in the order of the probes, that of h first.
    """

    k: int
    seed: int
    spread: Float[Tensor, " d_mlp"] = field(init=False)

    def trained(self, sample: Float[Tensor, "n d_mlp"]) -> SketchedMoments:
        self.spread = _spread(sample)
        return SketchedMoments.about(sample, self.k, self.seed)

    def null(self, sample: Float[Tensor, "n d_mlp"]) -> SketchedMoments:
        scale = torch.nan_to_num(self.spread / _spread(sample), nan=1.0, posinf=1.0)
        return SketchedMoments.about(sample, self.k, self.seed, scale)


def _spread(sample: Float[Tensor, "n d_mlp"]) -> Float[Tensor, " d_mlp"]:
    """Standard deviations; those of neurons that hardly fire in so few tokens no less than 1% of the median."""
    spread = sample.double().std(0, correction=0)
    return spread.clamp(min=float(spread.median()) / 100)

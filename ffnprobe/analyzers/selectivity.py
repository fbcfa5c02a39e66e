"""How much of the variance of h lies where the values read it, and what is its rank before and after?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean, stdev
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .. import spectrum as sp
from ..ffn import FFN
from ..forward import evenly
from ..statistics import Marginals, Moments, SketchedMoments
from ..stream import Probe
from .contraction_cuts import CUT
from .rank_probes import BUDGET, plan_moments
from .svd_directions import Singular, singular

PERMUTED = 4  # draws of the null in which values belong to other neurons


@dataclass(frozen=True)
class Selectivity:
    """Of one layer, on h weighed by `FFN.gauge`; the null of other neurons is None where h was sketched."""

    tokens: int
    sketch: int
    share: float
    spread: float
    blind: float
    permuted: tuple[float, float] | None  # mean and sd over draws
    ranks: dict[str, tuple[float, float] | None]  # (soft rank, participation ratio) of h, y, y permuted


def probes(
    layers: Sequence[FFN],
    causal_layers: Sequence[int] | None = None,
    seed: int = 0,
    budget: int | None = BUDGET,
) -> dict[str, Probe]:
    """What `contraction` needs of one pass over the tokens.

    With `budget` None no moments of h and y: for a pass that collects those of `hidden_rank` too.
    """
    to_cut = evenly([ffn.layer for ffn in layers], CUT) if causal_layers is None else causal_layers
    wanted = {}
    for ffn in layers:
        weighed, name = ffn.weighing, f"contraction/{ffn.layer}"
        if ffn.layer in to_cut:
            wanted[f"{name}/size"] = Probe(ffn.layer, "post", Marginals.about, of=_sizing(ffn))
        if budget is None:
            continue
        k = plan_moments(layers, budget)
        make: Callable[[Tensor], Any] = partial(SketchedMoments.about, k=k, seed=seed) if k else Moments.about
        for half in (0, 1):
            wanted[f"{name}/post/{half}"] = Probe(ffn.layer, "post", make, weighed, block=(half, 2))
            if k:
                wanted[f"{name}/out/{half}"] = Probe(ffn.layer, "out", Moments.about, block=(half, 2))
    return wanted


def merged(statistics: Mapping[str, Any], layer: int, site: str) -> Any:
    """The moments of all ordinary tokens, of the halves that `hidden_rank` or `contraction` has collected."""
    one, other = _halves(statistics, layer, site)
    whole = type(one)(one.state())
    whole.merge(other)
    return whole


def measure(ffn: FFN, statistics: Mapping[str, Any], seed: int) -> Selectivity:
    """Of one layer, from the moments of h; where they are sketched, from those of y and the variances of h."""
    ffn = ffn.canonical()
    values = ffn.values.detach().cpu().double()
    space = row_space(values)  # whichever neurons the values belong to
    halves = [half.compute() for half in _halves(statistics, ffn.layer, "post")]
    hidden = merged(statistics, ffn.layer, "post").compute()
    if hidden.sketch:
        outs = [half.compute().centred for half in _halves(statistics, ffn.layer, "out")]
        written, permuted = merged(statistics, ffn.layer, "out").compute().centred, []
    else:
        outs = [_written(values, half.centred) for half in halves]
        written = _written(values, hidden.centred)
        generator = torch.Generator().manual_seed(1_000_003 * seed + ffn.layer)
        orders = (torch.randperm(ffn.d_mlp, generator=generator) for _ in range(PERMUTED))
        permuted = [_written(values[order], hidden.centred) for order in orders]
    shares = [kept(space, y, half.variance.sum()) for y, half in zip(outs, halves, strict=True)]
    null = [kept(space, y, hidden.variance.sum()) for y in permuted]
    ranks = [_ranks(sp.eigenvalues(y)) for y in permuted]
    return Selectivity(
        tokens=hidden.n,
        sketch=hidden.sketch,
        share=kept(space, written, hidden.variance.sum()),
        spread=abs(shares[0] - shares[1]) / 2,
        blind=len(space.values) / ffn.d_mlp,
        permuted=(fmean(null), stdev(null)) if null else None,
        ranks={
            "": _ranks(hidden.spectrum().values),
            "_written": _ranks(sp.eigenvalues(written)),
            "_permuted": (fmean(soft for soft, _ in ranks), fmean(hard for _, hard in ranks)) if ranks else None,
        },
    )


def kept(space: Singular, written: Float[Tensor, "d_model d_model"], variance: Float[Tensor, ""]) -> float:
    """tr(P C_h) / tr C_h, P the projector on the row space of the values, in [0, 1].

    From the covariance of y alone: what P leaves of h is y through the pseudo-inverse of the values, so that
    tr(P C_h) = tr((V'V)^+ C_y).

    >>> V, C = torch.tensor([[2.0], [0.0]]).double(), torch.diag(torch.tensor([3.0, 1.0])).double()
    >>> kept(row_space(V), V.T @ C @ V, C.trace())
    0.75
    """
    along = ((space.directions @ written.cpu().double()) * space.directions).sum(1)
    return float((along / space.values**2).sum() / variance.cpu())


def row_space(values: Float[Tensor, "d_mlp d_model"]) -> Singular:
    """Singular values beyond rounding, and where they point in the residual stream."""
    sizes, directions = singular(values)
    real = sizes > sizes[0] * max(values.shape) * torch.finfo(torch.float32).eps
    return Singular(sizes[real], directions[real])


def _written(
    values: Float[Tensor, "d_mlp d_model"], covariance: Float[Tensor, "d_mlp d_mlp"]
) -> Float[Tensor, "d_model d_model"]:
    return values.T @ (covariance.cpu() @ values)


def _ranks(spectrum: Float[Tensor, " k"]) -> tuple[float, float]:
    return sp.soft_rank(spectrum), sp.participation_ratio(spectrum)


def _halves(statistics: Mapping[str, Any], layer: int, site: str) -> list[Any]:
    name = "hidden_rank" if f"hidden_rank/{layer}/{site}/0" in statistics else "contraction"
    return [statistics[f"{name}/{layer}/{site}/{half}"] for half in (0, 1)]


def _sizing(ffn: FFN) -> Callable[[Tensor], Tensor]:
    norms = ffn.wide().values.norm(dim=1)
    return lambda hidden: (hidden * norms).abs()

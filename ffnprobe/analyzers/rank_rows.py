"""What is measured of the spectra of one layer, beside their nulls?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from einops import einsum
from torch import Tensor

from .. import spectrum as sp
from ..ffn import FFN
from ..result import column
from ..statistics import Moments, SketchedMoments
from .rank_probes import sites, triangle

_Moments = TypeVar("_Moments", Moments, SketchedMoments)


@dataclass(frozen=True)
class Row:
    layer: int = column("", "layer")
    site: str = column("", "in: read, pre: before the nonlinearity, up: a gated FFN's other factor, post, out")
    width: int = column("dimensions", "dimensions of the site")
    tokens: int = column("tokens", "ordinary tokens measured: neither sinks nor special")
    sinks: int = column("tokens", "attention sinks, set apart by norm")
    special: int = column("tokens", "special tokens, set apart")
    participation_ratio: float = column("directions", "(sum l)^2 / sum l^2 of the covariance: the hard rank")
    participation_ratio_debiased: float = column("directions", "the same, corrected for finite tokens")
    soft_rank: float = column("directions", "exp of the entropy of the normalised eigenvalues")
    soft_rank_extrapolated: float = column("directions", "soft rank at endless tokens, from document halves")
    soft_rank_spread: float = column("directions", "half the difference between the document halves")
    erank_rv: float = column("directions", "exp of the entropy of the singular values (Roy & Vetterli)")
    stable_rank: float = column("directions", "sum l / max l")
    rank_at_90: int = column("directions", "fewest with 90% of the variance; wants 50 tokens a dimension")
    rank_at_99: int = column("directions", "fewest with 99% of the variance; wants 50 tokens a dimension")
    numerical_rank: int | None = column("directions", "eigenvalues above rounding; unknown where sketched")
    early_enrichment: float = column("0..1", "how early the cumulative spectrum fills: 0 flat, 1 one direction")
    divergence_from_pre: float | None = column("nats", "Jensen-Shannon divergence from z's spectrum, to ln 2")
    participation_ratio_uncentred: float = column("directions", "hard rank of the second moment about zero")
    soft_rank_uncentred: float = column("directions", "soft rank of the second moment about zero")
    participation_ratio_unmasked: float = column("directions", "hard rank with sinks and special tokens left in")
    soft_rank_unmasked: float = column("directions", "soft rank with sinks and special tokens left in")
    participation_ratio_null: float = column(
        "directions", "hard rank with random weights here, on the same input; of an isotropic Gaussian for in"
    )
    soft_rank_null: float = column("directions", "soft rank of the same null")
    sketch: int = column(
        "test vectors",
        "0: exact; else all but the participation ratios are of the spectrum that was completed from so many",
    )
    unresolved: float = column("0..1", "no eigenvalue lies further above the sketch's, as a share of the variance")
    participation_ratio_error: float = column("0..1", "relative standard error of the debiased ratio")
    soft_rank_low: float = column("directions", "least soft rank of a spectrum likely to give this sketch")
    soft_rank_high: float = column("directions", "greatest soft rank of a spectrum likely to give this sketch")
    soft_rank_least: float = column("directions", "proven: no spectrum below this can give this sketch")
    soft_rank_most: float = column("directions", "proven: no spectrum above this can give this sketch")


def layer_rows(ffn: FFN, statistics: Mapping[str, Any], seed: int) -> list[Row]:
    """One row a site, of what one pass over `rank_probes.probes` gave; `seed` as it was there."""
    prefix, null = f"hidden_rank/{ffn.layer}", ffn.canonical().randomised(seed)
    sinks = statistics[f"{prefix}/sinks"].n
    rows, spectra, covariances = [], {}, {}
    for site in sites(ffn):
        halves = [statistics[f"{prefix}/{site}/{half}"] for half in (0, 1)]
        kept = _merged(*halves)
        everything = _merged(kept, statistics[f"{prefix}/{site}/dropped"])
        covariance = covariances[site] = kept.compute()
        centred, uncentred = covariance.spectrum(), covariance.spectrum(centred=False)
        spectrum = spectra[site] = centred.values
        unmasked = everything.compute().spectrum()
        half_ranks = [sp.soft_rank(half.compute().spectrum().values) for half in halves]
        soft = sp.soft_rank(spectrum)
        lost = torch.tensor(soft).log() - torch.tensor(half_ranks).log().mean()  # by halving the tokens
        width = ffn.d_model if site in ("in", "out") else ffn.d_mlp
        null_pr, null_soft = _null_ranks(site, ffn, null, covariances, statistics)
        debiased = kept.participation_ratio()
        rows.append(
            Row(
                layer=ffn.layer,
                site=site,
                width=width,
                tokens=kept.n,
                sinks=sinks,
                special=everything.n - kept.n - sinks,
                participation_ratio=centred.participation_ratio,
                participation_ratio_debiased=debiased,
                soft_rank=soft,
                soft_rank_extrapolated=min(width, soft * float(lost.exp())),
                soft_rank_spread=abs(half_ranks[0] - half_ranks[1]) / 2,
                erank_rv=sp.erank_rv(spectrum),
                stable_rank=sp.stable_rank(spectrum),
                rank_at_90=sp.rank_at_energy(spectrum, 0.90),
                rank_at_99=sp.rank_at_energy(spectrum, 0.99),
                numerical_rank=None if covariance.sketch else sp.numerical_rank(spectrum, ffn.keys.dtype),
                early_enrichment=sp.early_enrichment(_padded(spectrum, width)),
                divergence_from_pre=_divergence(spectra, site),
                participation_ratio_uncentred=uncentred.participation_ratio,
                soft_rank_uncentred=sp.soft_rank(uncentred.values),
                participation_ratio_unmasked=unmasked.participation_ratio,
                soft_rank_unmasked=sp.soft_rank(unmasked.values),
                participation_ratio_null=null_pr,
                soft_rank_null=null_soft,
                sketch=covariance.sketch,
                unresolved=centred.unresolved,
                # what is taken off for the finite number of tokens is exact, and makes the error larger
                participation_ratio_error=centred.participation_ratio_error
                * abs(debiased / centred.participation_ratio),
                soft_rank_low=centred.soft_rank_range[0],
                soft_rank_high=centred.soft_rank_range[1],
                soft_rank_least=centred.soft_rank_bound[0],
                soft_rank_most=centred.soft_rank_bound[1],
            )
        )
    return rows


def _null_ranks(
    site: str,
    ffn: FFN,
    null: FFN,
    covariances: Mapping[str, Any],
    statistics: Mapping[str, Any],
) -> tuple[float, float]:
    if site == "in":
        return sp.isotropic_ranks(ffn.d_model, covariances["in"].n)
    measured = f"hidden_rank/{ffn.layer}/{site}/null"
    if site == "post":
        ranks = statistics[measured].compute().scaled(covariances["post"].variance)
    elif measured in statistics:
        ranks = statistics[measured].compute().spectrum().values
    elif site == "out":
        centred = covariances["post"].centred
        values = null.values.to(centred)
        ranks = sp.eigenvalues(einsum(values, centred, values, "i d, i j, j e -> d e"))
    else:
        centred = covariances["in"].centred
        matrix = triangle(null, site)[0].to(centred)
        ranks = sp.eigenvalues(matrix @ centred @ matrix.mT)
    return sp.participation_ratio(ranks), sp.soft_rank(ranks)


def _divergence(spectra: Mapping[str, Tensor], site: str) -> float | None:
    if site in ("in", "out"):
        return None  # another width
    width = max(len(spectra[site]), len(spectra["pre"]))
    return sp.spectrum_divergence(_padded(spectra[site], width), _padded(spectra["pre"], width))


def _padded(spectrum: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(spectrum, (0, width - len(spectrum)))


def _merged(*parts: _Moments) -> _Moments:
    whole = type(parts[0])(parts[0].state())
    for part in parts[1:]:
        whole.merge(part)
    return whole

"""How many directions do activations use before, inside and after the expansion?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from einops import einsum
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from .. import spectrum as sp
from ..stream import Probe, choose_layers, collect, settings_of
from ..corpus import Tokens
from ..ffn import FFN
from ..figure import BLACK, BLUE, GREEN, GREY, ORANGE, caption, new_figure, styled
from ..models import Model, ffns
from ..result import Result, Verdict, column
from ..statistics import Count, Covariance, Moments, Statistic

SITES = ("in", "pre", "up", "post", "out")
MARK = {
    "in": ("x, read", BLUE),
    "pre": ("z, pre-activation", ORANGE),
    "post": ("h, hidden", BLACK),
    "out": ("y, written", GREEN),
}


@dataclass(frozen=True)
class Row:
    layer: int = column("", "layer")
    site: str = column(
        "",
        "in: what the FFN reads, pre: before the nonlinearity, up: up-projection of a gated FFN, post: hidden activation, out: what it writes",
    )
    width: int = column("dimensions", "dimensions of the site")
    tokens: int = column("tokens", "ordinary tokens measured: neither sinks nor special")
    sinks: int = column("tokens", "attention sinks, set apart by norm")
    special: int = column("tokens", "special tokens, set apart")
    participation_ratio: float = column(
        "directions", "(sum l)^2 / sum l^2 of the covariance's eigenvalues l: the hard rank"
    )
    participation_ratio_debiased: float = column(
        "directions", "the same, corrected for the finite number of tokens"
    )
    soft_rank: float = column("directions", "exp of the entropy of the normalised eigenvalues")
    soft_rank_extrapolated: float = column(
        "directions", "soft rank extrapolated from the document halves to endless tokens"
    )
    soft_rank_spread: float = column(
        "directions", "half the difference of the soft rank between the document halves"
    )
    erank_rv: float = column(
        "directions", "exp of the entropy of the normalised singular values (Roy & Vetterli)"
    )
    stable_rank: float = column("directions", "sum l / max l")
    rank_at_90: int = column(
        "directions", "fewest directions with 90% of the variance; wants 50 tokens a dimension"
    )
    rank_at_99: int = column(
        "directions", "fewest directions with 99% of the variance; wants 50 tokens a dimension"
    )
    numerical_rank: int = column("directions", "eigenvalues above rounding")
    early_enrichment: float = column(
        "0..1", "how early the cumulative spectrum fills: 0 flat, 1 one direction"
    )
    divergence_from_pre: float | None = column(
        "nats",
        "Jensen-Shannon divergence of the spectrum from the pre-activation's, 0 to ln 2; none where the width differs",
    )
    participation_ratio_uncentred: float = column(
        "directions", "participation ratio of the second moment about zero"
    )
    soft_rank_uncentred: float = column("directions", "soft rank of the second moment about zero")
    participation_ratio_unmasked: float = column(
        "directions", "participation ratio with sinks and special tokens left in"
    )
    soft_rank_unmasked: float = column("directions", "soft rank with sinks and special tokens left in")
    participation_ratio_null: float = column(
        "directions",
        "participation ratio of the null: this map with random weights of the same row norms on the trained input; isotropic Gaussian for in",
    )
    soft_rank_null: float = column("directions", "soft rank of the same null")


@dataclass(frozen=True)
class HiddenRank(Result):
    name: ClassVar[str] = "hidden_rank"
    question: ClassVar[str] = "How many directions do activations use before, inside and after the expansion?"
    Row: ClassVar[type] = Row

    def site(self, site: str) -> list[Row]:
        """The rows of one site, in the order of the layers."""
        return [row for row in self.rows if row.site == site]

    def findings(self) -> list[str]:
        before, hidden, after = self.site("in"), self.site("post"), self.site("out")
        grows = _median([h.soft_rank / x.soft_rank for h, x in zip(hidden, before, strict=True)])
        null = _median([h.soft_rank_null / x.soft_rank for h, x in zip(hidden, before, strict=True)])
        shrinks = _median([y.soft_rank / h.soft_rank for y, h in zip(after, hidden, strict=True)])
        worst = max(hidden, key=lambda row: row.soft_rank / row.soft_rank_unmasked)
        middle = sorted(hidden, key=lambda row: row.soft_rank)[len(hidden) // 2]
        return [
            f"Expansion by {hidden[0].width / before[0].width:.3g} multiplies the soft rank by {grows:.2f} "
            f"(median layer); random weights of the same norms on the same inputs: {null:.2f}. "
            f"Contraction multiplies it by {shrinks:.2f}.",
            f"Sinks: at layer {worst.layer} the soft rank of the hidden activations is {worst.soft_rank:.1f} with "
            f"{worst.sinks} of {worst.tokens + worst.sinks + worst.special:,} tokens set apart as attention sinks "
            f"and {worst.soft_rank_unmasked:.2f} with them left in.",
            f"The hidden layer has {middle.width:,} neurons and a soft rank of {middle.soft_rank:.0f} ± "
            f"{middle.soft_rank_spread:.0f} (layer {middle.layer}, the median one; extrapolated to endless tokens "
            f"{middle.soft_rank_extrapolated:.0f}), a participation ratio of {middle.participation_ratio_debiased:.0f} "
            f"(random weights: {middle.participation_ratio_null:.0f}).",
        ]

    def verdicts(self) -> list[Verdict]:
        hidden, before = self.site("post"), self.site("in")
        wider = sum(
            h.soft_rank - h.soft_rank_spread > x.soft_rank for h, x in zip(hidden, before, strict=True)
        )
        above = sum(h.soft_rank - h.soft_rank_spread > h.soft_rank_null for h in hidden)
        n = len(hidden)
        if wider <= n / 2:
            verdict = "not supported"
        else:
            verdict = "supported" if above > n / 2 else "mixed"
        after = self.site("out")
        narrower = sum(
            y.soft_rank < h.soft_rank - h.soft_rank_spread for y, h in zip(after, hidden, strict=True)
        )
        below = sum(y.soft_rank < y.soft_rank_null for y in after)
        if narrower <= n / 2:
            contraction = "not supported"
        else:
            contraction = "supported" if below > n / 2 else "mixed"
        return [
            Verdict(
                claim=2,
                rule="supported if, in more than half of the layers, the soft rank of h exceeds that of x by more than "
                "the document spread and exceeds that of random weights; mixed if only the first holds",
                measured=f"h above x in {wider} of {n} layers, h above random weights in {above} of {n}",
                verdict=verdict,
                against="An untrained random layer already raises the linear rank, up to 1.9 d for ReLU; linear rank "
                "rises while a Lipschitz map cannot raise the dimension of the data manifold.",
            ),
            Verdict(
                claim=3,
                rule="supported if, in more than half of the layers, the soft rank of y is below that of h by more than "
                "the document spread and below that of random values on the same h; mixed if only the first holds",
                measured=f"y below h in {narrower} of {n} layers, y below random values in {below} of {n}",
                verdict=contraction,
                against="y has d_model dimensions, so part of the fall in rank is forced by the shape, not learnt; "
                "whether contraction selects is not measured here.",
            ),
        ]

    @styled
    def plot(self) -> Figure:
        figure, (profile, sinks, share) = new_figure(
            3, caption(self.settings, "sinks and special tokens set apart")
        )
        for site, (label, colour) in MARK.items():
            rows = self.site(site)
            layers = [row.layer for row in rows]
            profile.plot(layers, [row.soft_rank for row in rows], "o-", color=colour, label=label)
            if site == "post":
                low = [row.soft_rank - row.soft_rank_spread for row in rows]
                high = [row.soft_rank + row.soft_rank_spread for row in rows]
                profile.fill_between(layers, low, high, color=colour, alpha=0.15, linewidth=0)
                profile.plot(
                    layers, [row.soft_rank_null for row in rows], "--", color=GREY, label="h, random weights"
                )
        profile.set(
            title="Expand and contract", xlabel="layer", ylabel="soft rank (directions)", yscale="log"
        )
        hidden = self.site("post")
        layers = [row.layer for row in hidden]
        sinks.plot(layers, [row.soft_rank for row in hidden], "o-", color=BLACK, label="sinks set apart")
        sinks.plot(
            layers, [row.soft_rank_unmasked for row in hidden], "s--", color=ORANGE, label="sinks left in"
        )
        sinks.set(
            title="What attention sinks do to h",
            xlabel="layer",
            ylabel="soft rank (directions)",
            yscale="log",
        )
        for measure, label, mark in (
            ("participation_ratio_debiased", "participation ratio, debiased", "^-"),
            ("soft_rank", "soft rank", "o-"),
            ("erank_rv", "effective rank (Roy & Vetterli)", "s-"),
            ("rank_at_99", "99% of the variance", "v-"),
        ):
            used = [getattr(row, measure) / row.width for row in hidden]
            share.plot(
                layers,
                used,
                mark,
                label=label,
                color={"^": BLUE, "o": BLACK, "s": GREEN, "v": ORANGE}[mark[0]],
            )
        share.set(
            title="Share of the hidden width in use", xlabel="layer", ylabel="rank of h / d_mlp", ylim=(0, 1)
        )
        for axis in (profile, sinks, share):
            axis.legend()
        return figure


def probes(layers: Sequence[FFN], seed: int = 0) -> dict[str, Probe]:
    """What `hidden_rank` needs of one pass over the tokens."""
    wanted: dict[str, Probe] = {}
    for ffn in layers:
        rank = partial(Probe, ffn.layer, make=Moments.about)
        for site in _sites(ffn):
            # z is linear in x: d_model numbers tell its spectrum, for d_model^2 of work instead of d_mlp^2
            place, view = ("in", {"of": _reading(ffn, site)}) if site in ("pre", "up") else (site, {})
            wanted |= {
                f"hidden_rank/{ffn.layer}/{site}/0": rank(place, half=0, **view),
                f"hidden_rank/{ffn.layer}/{site}/1": rank(place, half=1, **view),
                f"hidden_rank/{ffn.layer}/{site}/dropped": rank(place, kinds=("sink", "special"), **view),
            }
        wanted[f"hidden_rank/{ffn.layer}/post/null"] = rank("in", of=randomised(ffn, seed).hidden)
        wanted[f"hidden_rank/{ffn.layer}/sinks"] = Probe(ffn.layer, "in", Count.about, kinds=("sink",))
    return wanted


def hidden_rank(
    model: Model,
    tokens: Tokens,
    *,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    statistics: Mapping[str, Statistic] | None = None,
    **collecting,
) -> HiddenRank:
    """Every rank of what each FFN reads, holds and writes, with nulls, sinks set apart.

    Args:
        layers: the layers to measure; all by default.
        seed: of the null's random weights.
        statistics: what one `collect` over `probes(...)` gave, when several analyzers share a pass.
        collecting: passed to `collect` (batch, sink_factor, progress).

    Raises:
        InputError: a layer that is not there.
        ValueError: fewer than four ordinary tokens in a half of the documents.
    """
    chosen = {tap.layer for tap in choose_layers(model, layers)}
    measured = [ffn for ffn in ffns(model) if ffn.layer in chosen]
    if statistics is None:
        statistics = collect(model, tokens, probes(measured, seed), **collecting)
    rows = [row for ffn in measured for row in _layer_rows(ffn, statistics, randomised(ffn, seed))]
    return HiddenRank(rows, settings_of(model, tokens, seed, **collecting))


def randomised(ffn: FFN, seed: int = 0) -> FFN:
    """The null of a layer: Gaussian rows of the trained norms in place of every matrix, biases kept."""
    generator = torch.Generator().manual_seed(seed)

    def random_rows(matrix: Tensor | None) -> Tensor | None:
        if matrix is None:
            return None
        rows = torch.randn(matrix.shape, generator=generator).to(matrix)
        return rows * (matrix.norm(dim=1, keepdim=True) / rows.norm(dim=1, keepdim=True))

    return replace(
        ffn, keys=random_rows(ffn.keys), gates=random_rows(ffn.gates), values=random_rows(ffn.values)
    )


def _sites(ffn: FFN) -> list[str]:
    return [site for site in SITES if site != "up" or ffn.gated]


def _triangle(ffn: FFN, site: str) -> tuple[Float[Tensor, "k d_model"], Float[Tensor, " k"]]:
    """(A, b) such that A x + b is the pre-activation in an orthonormal basis of its own span."""
    gate = site == "pre" and ffn.gates is not None
    rows, bias = (ffn.gates, ffn.gate_bias) if gate else (ffn.keys, ffn.key_bias)
    if bias is None:
        bias = rows.new_zeros(len(rows))
    triangle = torch.linalg.qr(torch.cat([rows, bias[:, None]], dim=1).double(), mode="r").R
    return triangle[:, :-1], triangle[:, -1]


def _reading(ffn: FFN, site: str):
    matrix, offset = (part.to(ffn.keys.dtype) for part in _triangle(ffn, site))
    return lambda x: x @ matrix.mT + offset


def _layer_rows(ffn: FFN, statistics: Mapping[str, Statistic], null: FFN) -> list[Row]:
    prefix = f"hidden_rank/{ffn.layer}"
    sinks = statistics[f"{prefix}/sinks"].n
    rows, spectra, covariances = [], {}, {}
    for site in _sites(ffn):
        halves = [statistics[f"{prefix}/{site}/{half}"] for half in (0, 1)]
        kept = _merged(*halves)
        everything = _merged(kept, statistics[f"{prefix}/{site}/dropped"])
        covariance = covariances[site] = kept.compute()
        spectra[site] = sp.eigenvalues(covariance.centred)
        uncentred = sp.eigenvalues(covariance.uncentred)
        unmasked = sp.eigenvalues(everything.compute().centred)
        half_ranks = [sp.soft_rank(sp.eigenvalues(half.compute().centred)) for half in halves]
        soft = sp.soft_rank(spectra[site])
        entropy_gain = torch.tensor(half_ranks).log().mean() - torch.tensor(soft).log()
        width = {"in": ffn.d_model, "out": ffn.d_model}.get(site, ffn.d_mlp)
        null_pr, null_soft = _null_ranks(site, ffn, null, covariances, statistics[f"{prefix}/post/null"])
        rows.append(
            Row(
                layer=ffn.layer,
                site=site,
                width=width,
                tokens=kept.n,
                sinks=sinks,
                special=everything.n - kept.n - sinks,
                participation_ratio=sp.participation_ratio(spectra[site]),
                participation_ratio_debiased=kept.participation_ratio(),
                soft_rank=soft,
                soft_rank_extrapolated=min(width, soft * float(torch.exp(-entropy_gain))),
                soft_rank_spread=abs(half_ranks[0] - half_ranks[1]) / 2,
                erank_rv=sp.erank_rv(spectra[site]),
                stable_rank=sp.stable_rank(spectra[site]),
                rank_at_90=sp.rank_at_energy(spectra[site], 0.90),
                rank_at_99=sp.rank_at_energy(spectra[site], 0.99),
                numerical_rank=sp.numerical_rank(spectra[site], width),
                early_enrichment=sp.early_enrichment(_padded(spectra[site], width)),
                divergence_from_pre=_divergence(spectra, site),
                participation_ratio_uncentred=sp.participation_ratio(uncentred),
                soft_rank_uncentred=sp.soft_rank(uncentred),
                participation_ratio_unmasked=sp.participation_ratio(unmasked),
                soft_rank_unmasked=sp.soft_rank(unmasked),
                participation_ratio_null=null_pr,
                soft_rank_null=null_soft,
            )
        )
    return rows


def _null_ranks(
    site: str, ffn: FFN, null: FFN, covariances: Mapping[str, Covariance], null_hidden: Moments
) -> tuple[float, float]:
    if site == "in":
        return sp.isotropic_ranks(ffn.d_model, covariances["in"].n)
    if site == "post":
        through = null_hidden.compute().centred
    elif site == "out":
        through = einsum(
            null.values.double(), covariances["post"].centred, null.values.double(), "i d, i j, j e -> d e"
        )
    else:
        matrix, _ = _triangle(null, site)
        through = matrix @ covariances["in"].centred @ matrix.mT
    ranks = sp.eigenvalues(through)
    return sp.participation_ratio(ranks), sp.soft_rank(ranks)


def _divergence(spectra: Mapping[str, Tensor], site: str) -> float | None:
    if site in ("in", "out"):
        return None  # another width
    width = max(len(spectra[site]), len(spectra["pre"]))
    return sp.spectrum_divergence(_padded(spectra[site], width), _padded(spectra["pre"], width))


def _padded(spectrum: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(spectrum, (0, width - len(spectrum)))


def _merged(*parts: Moments) -> Moments:
    whole = Moments(parts[0].state())
    for part in parts[1:]:
        whole.merge(part)
    return whole


def _median(values: list[float]) -> float:
    return float(torch.tensor(values).median())

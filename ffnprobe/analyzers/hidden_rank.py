"""How many directions do activations use before, inside and after the expansion?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, ClassVar, Literal, TypeVar

import torch
from einops import einsum
from matplotlib.figure import Figure
from torch import Tensor

from .. import spectrum as sp
from ..corpus import Tokens
from ..errors import InputError
from ..ffn import FFN
from ..figure import BLACK, BLUE, GREEN, GREY, ORANGE, caption, legend_below, new_figure, styled
from ..models import Model, ffns
from ..result import FEWEST_LAYERS, Result, Verdict, beyond, column
from ..statistics import Moments, SketchedMoments
from ..stream import choose_layers, collect, settings_of
from .rank_probes import BUDGET, sites, triangle
from .rank_probes import moment_bytes as moment_bytes
from .rank_probes import probes as probes

RULE = "supported if, in most layers (sign test, 5%),"
_Moments = TypeVar("_Moments", Moments, SketchedMoments)
_Judgement = Literal["supported", "mixed", "not supported"]
MARK = {
    "in": ("x, read", BLUE),
    "pre": ("z, pre-activation", ORANGE),
    "post": ("h, hidden", BLACK),
    "out": ("y, written", GREEN),
}


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


@dataclass(frozen=True)
class HiddenRank(Result):
    name: ClassVar[str] = "hidden_rank"
    question: ClassVar[str] = "How many directions do activations use before, inside and after the expansion?"
    row_type: ClassVar[type] = Row

    def site(self, site: str) -> list[Row]:
        """The rows of one site, in the order of the layers."""
        return [row for row in self.rows if row.site == site]

    def findings(self) -> list[str]:
        before, hidden, after = self.site("in"), self.site("post"), self.site("out")
        grows = median(h.soft_rank / x.soft_rank for h, x in zip(hidden, before, strict=True))
        null = median(h.soft_rank_null / x.soft_rank for h, x in zip(hidden, before, strict=True))
        shrinks = median(y.soft_rank / h.soft_rank for y, h in zip(after, hidden, strict=True))
        first = hidden[0]
        middle = sorted(hidden, key=lambda row: row.soft_rank)[len(hidden) // 2]
        sentences = [
            f"Expansion by {first.width / before[0].width:.3g} multiplies the soft rank by {grows:.2f} (median "
            f"layer); random weights on the same inputs: {null:.2f}. Contraction multiplies it by {shrinks:.2f}.",
            f"The hidden layer has {middle.width:,} neurons and, at layer {middle.layer} (the median one), a "
            f"soft rank of {middle.soft_rank:.0f} ± {middle.soft_rank_spread:.0f} ({_bound(middle)}at endless "
            f"tokens {middle.soft_rank_extrapolated:.0f}; random weights {middle.soft_rank_null:.0f}) and a "
            f"participation ratio of {middle.participation_ratio_debiased:.0f}{_error(middle)} (random weights "
            f"{middle.participation_ratio_null:.0f}).",
        ]
        if first.sketch:
            least, most = (
                median(getattr(h, end) / x.soft_rank for h, x in zip(hidden, before, strict=True))
                for end in ("soft_rank_low", "soft_rank_high")
            )
            sentences.append(
                f"Sketched: exact covariances of {first.width:,} neurons exceed the budget, so h was seen through "
                f"{first.sketch} test vectors, which leave {median(row.unresolved for row in hidden):.0%} of its "
                f"variance unresolved (median layer): no eigenvalue is off by more. The expansion multiplies the "
                f"soft rank by {least:.2f} to {most:.2f}, the range that the sketch leaves likely."
            )
        worst = max(hidden, key=lambda row: row.soft_rank / row.soft_rank_unmasked)
        if worst.sinks and worst.soft_rank > 2 * worst.soft_rank_unmasked:
            apart = f"{worst.sinks} sinks and {worst.special} special tokens"
            everything = worst.tokens + worst.sinks + worst.special
            hiding = [str(row.layer) for row in hidden if row.soft_rank > 50 * row.soft_rank_unmasked]
            sentences.insert(
                0,
                f"Attention sinks: at layer {worst.layer} the soft rank of the hidden activations is "
                f"{worst.soft_rank:.1f} with {apart} of {everything:,} set apart, and "
                f"{worst.soft_rank_unmasked:.2f} with them left in. Layers where they hide over 98% of the "
                f"rank: {', '.join(hiding) or 'none'}.",
            )
        unsure = [str(row.layer) for row in hidden if row.soft_rank_spread > 0.1 * row.soft_rank]
        if unsure:
            sentences.append(
                f"Not settled: at layers {', '.join(unsure)} the soft rank of the hidden activations differs by "
                "more than a fifth between the halves of the documents."
            )
        if first.tokens < first.width:
            sentences.append(
                f"Few tokens: {first.tokens:,} for {first.width:,} neurons. No rank exceeds the number of tokens, "
                "and the debiased ratio is noisy: give more tokens."
            )
        return sentences

    def verdicts(self) -> list[Verdict]:
        before, hidden, after = self.site("in"), self.site("post"), self.site("out")
        n = len(hidden)
        if n < FEWEST_LAYERS:
            return []
        wider, learnt, narrower = ([], [], [])
        for end in ("soft_rank_low", "soft_rank_high"):  # equal where exact
            ends = [getattr(h, end) - h.soft_rank_spread for h in hidden]
            wider.append(sum(rank > x.soft_rank for rank, x in zip(ends, before, strict=True)))
            learnt.append(sum(rank > h.soft_rank_null for rank, h in zip(ends, hidden, strict=True)))
            narrower.append(sum(y.soft_rank < rank for rank, y in zip(ends, after, strict=True)))
        chosen = sum(y.soft_rank < y.soft_rank_null for y in after)
        return [
            Verdict(
                claim=2,
                rule=f"{RULE} the soft rank of h exceeds that of x by more than the document spread, and exceeds "
                "that of random weights on the same x; mixed if only the first holds, or if a sketch "
                "leaves both likely",
                measured=f"h above x in {_to(wider)} of {n} layers, h above random weights in {_to(learnt)} of "
                f"{n}",
                verdict=_agreed(_judge(beyond(w, n), beyond(l, n)) for w, l in zip(wider, learnt, strict=True)),
                against="An untrained random layer already raises the linear rank, up to 1.9 d for ReLU; and no "
                "smooth map can raise the dimension of the data manifold, however wide it is.",
            ),
            Verdict(
                claim=3,
                rule=f"{RULE} the soft rank of y is below that of h by more than the document spread, and "
                "below that of random values on the same h; mixed if only the first holds, or if a sketch "
                "leaves both likely",
                measured=f"y below h in {_to(narrower)} of {n} layers, y below random values in {chosen} of {n}",
                verdict=_agreed(_judge(beyond(w, n), beyond(chosen, n)) for w in narrower),
                against="y has only d_model dimensions, so part of the fall in rank is forced by the shape; a "
                "low rank does not show that what was dropped did not matter.",
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
                if any(row.sketch for row in rows):
                    bound = ([row.soft_rank_low for row in rows], [row.soft_rank_high for row in rows])
                    profile.fill_between(
                        layers,
                        *bound,
                        facecolor="none",
                        edgecolor=GREY,
                        hatch="///",
                        label="h, likely by the sketch",
                    )
                profile.plot(
                    layers, [row.soft_rank_null for row in rows], "--", color=GREY, label="h, random weights"
                )
        profile.set(title="Expand and contract", xlabel="layer", ylabel="soft rank (directions)", yscale="log")
        hidden = self.site("post")
        layers = [row.layer for row in hidden]
        sinks.plot(layers, [row.soft_rank for row in hidden], "o-", color=BLACK, label="sinks set apart")
        sinks.plot(layers, [row.soft_rank_unmasked for row in hidden], "s--", color=ORANGE, label="sinks left in")
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
        for axes in (profile, sinks, share):
            legend_below(axes)
        return figure


def check_documents(tokens: Tokens) -> None:
    """Refuse, before the model is run, text whose two halves cannot be compared.

    Raises:
        InputError: fewer than two documents.
    """
    if tokens.n_documents < 2:
        raise InputError(
            f"got {tokens.n} tokens of one document: ranks are compared between documents; "
            "give a corpus of several (a .txt has one a paragraph), and more tokens"
        )


def hidden_rank(
    model: Model,
    tokens: Tokens,
    *,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    budget: int = BUDGET,
    statistics: Mapping[str, Any] | None = None,
    **collecting: Any,
) -> HiddenRank:
    """Every rank of what each FFN reads, holds and writes, with nulls, sinks set apart.

    On a gated FFN, h is each neuron's contribution (h_i times the norm of its value) and up likewise: a
    neuron's scale alone is a gauge (see `FFN.canonical`). The null of h is the layer with random weights on
    the same inputs, each random neuron brought to the variance of the trained one: without that, a few
    random neurons that happen to meet the mean of x decide it, and two draws differ by a factor of ten.

    Where the covariances would take more than the budget, h and its null are sketched (`SketchedMoments`), and
    their ranks carry a bound.

    Args:
        layers: the layers to measure; all by default.
        seed: of the null's random weights, and of a sketch's test vectors.
        budget: bytes that all moments may take; see `moment_bytes`.
        statistics: what one `collect` over `probes(...)` gave, when several analyzers share a pass.
        collecting: passed to `collect` (batch, sink_factor, progress).

    Raises:
        InputError: a layer that is not there, a single document, or a budget that is too small.
    """
    chosen = {tap.layer for tap in choose_layers(model, layers)}
    measured = [ffn for ffn in ffns(model) if ffn.layer in chosen]
    check_documents(tokens)
    if statistics is None:
        statistics = collect(model, tokens, probes(measured, seed, budget), **collecting)
    rows = [row for ffn in measured for row in _layer_rows(ffn, statistics, seed)]
    return HiddenRank(rows, settings_of(model, tokens, seed, **collecting) | {"budget": budget})


def _judge(first: bool, second: bool) -> _Judgement:
    return "not supported" if not first else "supported" if second else "mixed"


def _agreed(judged: Iterable[_Judgement]) -> _Judgement:
    """What both ends of a bound say, else mixed."""
    low, high = judged
    return low if low == high else "mixed"


def _to(ends: list[int]) -> str:
    low, high = ends
    return str(low) if low == high else f"{low} to {high}"


def _bound(row: Row) -> str:
    if not row.sketch:
        return ""
    likely, proven = (row.soft_rank_low, row.soft_rank_high), (row.soft_rank_least, row.soft_rank_most)
    return "sketched: likely {:.0f} to {:.0f}, proven {:.0f} to {:.0f}; ".format(*likely, *proven)


def _error(row: Row) -> str:
    return f" ± {row.participation_ratio_error:.1%}" if row.sketch else ""


def _layer_rows(ffn: FFN, statistics: Mapping[str, Any], seed: int) -> list[Row]:
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

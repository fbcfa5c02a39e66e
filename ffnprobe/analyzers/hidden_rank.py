"""How many directions do activations use before, inside and after the expansion?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, ClassVar, Literal

import torch
from einops import einsum
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from .. import spectrum as sp
from ..corpus import Tokens
from ..errors import InputError
from ..ffn import FFN
from ..figure import BLACK, BLUE, GREEN, GREY, ORANGE, caption, legend_below, new_figure, styled
from ..models import Model, ffns
from ..result import FEWEST_LAYERS, Result, Verdict, beyond, column
from ..statistics import Count, Covariance, Moments
from ..stream import SITES, Probe, choose_layers, collect, settings_of

RULE = "supported if, in most layers (sign test, 5%),"
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
    numerical_rank: int = column("directions", "eigenvalues above rounding")
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
            f"soft rank of {middle.soft_rank:.0f} ± {middle.soft_rank_spread:.0f} (at endless tokens "
            f"{middle.soft_rank_extrapolated:.0f}; random weights {middle.soft_rank_null:.0f}) and a "
            f"participation ratio of {middle.participation_ratio_debiased:.0f} (random weights "
            f"{middle.participation_ratio_null:.0f}).",
        ]
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
        wider = sum(h.soft_rank - h.soft_rank_spread > x.soft_rank for h, x in zip(hidden, before, strict=True))
        learnt = sum(h.soft_rank - h.soft_rank_spread > h.soft_rank_null for h in hidden)
        narrower = sum(y.soft_rank < h.soft_rank - h.soft_rank_spread for y, h in zip(after, hidden, strict=True))
        chosen = sum(y.soft_rank < y.soft_rank_null for y in after)
        return [
            Verdict(
                claim=2,
                rule=f"{RULE} the soft rank of h exceeds that of x by more than the document spread, and exceeds "
                "that of random weights on the same x; mixed if only the first holds",
                measured=f"h above x in {wider} of {n} layers, h above random weights in {learnt} of {n}",
                verdict=_judge(beyond(wider, n), beyond(learnt, n)),
                against="An untrained random layer already raises the linear rank, up to 1.9 d for ReLU; and no "
                "smooth map can raise the dimension of the data manifold, however wide it is.",
            ),
            Verdict(
                claim=3,
                rule=f"{RULE} the soft rank of y is below that of h by more than the document spread, and "
                "below that of random values on the same h; mixed if only the first holds",
                measured=f"y below h in {narrower} of {n} layers, y below random values in {chosen} of {n}",
                verdict=_judge(beyond(narrower, n), beyond(chosen, n)),
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


def probes(layers: Sequence[FFN], seed: int = 0) -> dict[str, Probe]:
    """What `hidden_rank` needs of one pass over the tokens."""
    wanted: dict[str, Probe] = {}
    for ffn in layers:
        prefix = f"hidden_rank/{ffn.layer}"
        for site in _sites(ffn):
            probe = Probe(ffn.layer, site, Moments.about)
            if site in ("pre", "up"):
                # z is linear in x: d_model numbers tell its spectrum, for d_model^2 of work instead of d_mlp^2
                probe = Probe(ffn.layer, "in", Moments.about, of=_reading(ffn.canonical(), site))
            elif site == "post" and ffn.gated:
                probe = replace(probe, of=_scaling(ffn))
            wanted |= {f"{prefix}/{site}/{half}": replace(probe, half=half) for half in (0, 1)}
            wanted[f"{prefix}/{site}/dropped"] = replace(probe, kinds=("sink", "special"))
        null = ffn.canonical().randomised(seed)
        wanted[f"{prefix}/post/null"] = Probe(ffn.layer, "in", Moments.about, of=null.hidden)
        wanted[f"{prefix}/sinks"] = Probe(ffn.layer, "in", Count.about, kinds=("sink",))
    return wanted


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
    statistics: Mapping[str, Any] | None = None,
    **collecting: Any,
) -> HiddenRank:
    """Every rank of what each FFN reads, holds and writes, with nulls, sinks set apart.

    On a gated FFN, h is each neuron's contribution (h_i times the norm of its value) and up likewise: a
    neuron's scale alone is a gauge (see `FFN.canonical`). The null of h is the layer with random weights on
    the same inputs, each random neuron brought to the variance of the trained one: without that, a few
    random neurons that happen to meet the mean of x decide it, and two draws differ by a factor of ten.

    Args:
        layers: the layers to measure; all by default.
        seed: of the null's random weights.
        statistics: what one `collect` over `probes(...)` gave, when several analyzers share a pass.
        collecting: passed to `collect` (batch, sink_factor, progress).

    Raises:
        InputError: a layer that is not there, or a single document.
    """
    chosen = {tap.layer for tap in choose_layers(model, layers)}
    measured = [ffn for ffn in ffns(model) if ffn.layer in chosen]
    check_documents(tokens)
    if statistics is None:
        statistics = collect(model, tokens, probes(measured, seed), **collecting)
    rows = [row for ffn in measured for row in _layer_rows(ffn.canonical(), statistics, seed)]
    return HiddenRank(rows, settings_of(model, tokens, seed, **collecting))


def _judge(first: bool, second: bool) -> Literal["supported", "mixed", "not supported"]:
    return "not supported" if not first else "supported" if second else "mixed"


def _sites(ffn: FFN) -> list[str]:
    return [site for site in SITES if site != "up" or ffn.gated]


def _triangle(ffn: FFN, site: str) -> tuple[Float[Tensor, "k d_model"], Float[Tensor, " k"]]:
    """(A, b) such that A x + b is the pre-activation in an orthonormal basis of its own span."""
    matrix, bias = ffn.keys, ffn.key_bias
    if site == "pre" and ffn.gates is not None:
        matrix, bias = ffn.gates, ffn.gate_bias
    offset = matrix.new_zeros(len(matrix)) if bias is None else bias
    triangle = torch.linalg.qr(torch.cat([matrix, offset[:, None]], dim=1).double(), mode="r").R
    return triangle[:, :-1], triangle[:, -1]


def _reading(ffn: FFN, site: str) -> Callable[[Tensor], Tensor]:
    matrix, offset = (part.to(ffn.keys.dtype) for part in _triangle(ffn, site))
    return lambda x: x @ matrix.mT + offset


def _scaling(ffn: FFN) -> Callable[[Tensor], Tensor]:
    gauge = ffn.gauge
    return lambda hidden: hidden * gauge


def _layer_rows(ffn: FFN, statistics: Mapping[str, Any], seed: int) -> list[Row]:
    prefix, null = f"hidden_rank/{ffn.layer}", ffn.randomised(seed)
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
        lost = torch.tensor(soft).log() - torch.tensor(half_ranks).log().mean()  # by halving the tokens
        width = ffn.d_model if site in ("in", "out") else ffn.d_mlp
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
                soft_rank_extrapolated=min(width, soft * float(lost.exp())),
                soft_rank_spread=abs(half_ranks[0] - half_ranks[1]) / 2,
                erank_rv=sp.erank_rv(spectra[site]),
                stable_rank=sp.stable_rank(spectra[site]),
                rank_at_90=sp.rank_at_energy(spectra[site], 0.90),
                rank_at_99=sp.rank_at_energy(spectra[site], 0.99),
                numerical_rank=sp.numerical_rank(spectra[site]),
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
        trained = covariances["post"].centred.diagonal()
        scale = (trained / through.diagonal().clamp(min=torch.finfo(through.dtype).tiny)).sqrt()
        through = scale[:, None] * through * scale
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

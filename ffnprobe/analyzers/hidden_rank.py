"""How many directions do activations use before, inside and after the expansion?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, ClassVar, Literal

from matplotlib.figure import Figure

from ..corpus import Tokens
from ..errors import InputError
from ..figure import BLACK, BLUE, GREEN, GREY, ORANGE, caption, legend_below, new_figure, styled
from ..models import Model
from ..result import FEWEST_LAYERS, Result, Verdict, beyond
from ..stream import choose_ffns, collect, settings_of
from .rank_probes import BUDGET
from .rank_probes import moment_bytes as moment_bytes
from .rank_probes import probes as probes
from .rank_rows import Row as Row
from .rank_rows import layer_rows

RULE = "supported if, in most layers (sign test, 5%),"
_Judgement = Literal["supported", "mixed", "not supported"]
MARK = {
    "in": ("x, read", BLUE),
    "pre": ("z, pre-activation", ORANGE),
    "post": ("h, hidden", BLACK),
    "out": ("y, written", GREEN),
}


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
    measured = choose_ffns(model, layers)
    check_documents(tokens)
    if statistics is None:
        statistics = collect(model, tokens, probes(measured, seed, budget), **collecting)
    rows = [row for ffn in measured for row in layer_rows(ffn, statistics, seed)]
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

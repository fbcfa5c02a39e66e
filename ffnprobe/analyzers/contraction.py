"""What does the contraction keep of the hidden activation, and could something cheaper keep it?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, ClassVar

from matplotlib.figure import Figure

from ..corpus import Tokens
from ..errors import InputError
from ..ffn import FFN
from ..figure import BLACK, BLUE, GREEN, GREY, ORANGE, SKY, caption, legend_below, new_figure, styled
from ..forward import evenly
from ..intervene import check_causal
from ..models import Model
from ..result import FEWEST_LAYERS, Result, Verdict, beyond, column
from ..stream import choose_ffns, collect, settings_of
from .contraction_account import account
from .contraction_cuts import CUT, ENOUGH, Cuts, columns, cut
from .hidden_rank import check_documents
from .nested import CRITERIA
from .rank_probes import BUDGET
from .selectivity import PERMUTED, Selectivity, measure, merged
from .selectivity import probes as probes

COLOURS = (BLACK, BLUE, ORANGE, GREEN, SKY)


@dataclass(frozen=True)
class Row:
    layer: int = column("", "layer")
    d_model: int = column("dimensions", "width of what is written")
    d_mlp: int = column("neurons", "neurons of the layer")
    gated: bool = column("", "whether it has gates")
    parameters: int = column("", "of its matrices, without biases")
    flops: int = column("a token", "of its matrices; a product and its addition are two")
    tokens: int = column("tokens", "ordinary tokens measured: neither sinks nor special")
    sketch: int = column(
        "test vectors", "0: the covariance of h is exact; else h was sketched, and could not be cut"
    )
    selectivity: float = column("0..1", "share of the variance of h in the row space of the values, which is kept")
    selectivity_spread: float = column("0..1", "half the difference between the document halves")
    blind: float = column("0..1", "the same of an isotropic h: rank of the values / d_mlp, 1/r at full rank")
    permuted: float | None = column("0..1", "the same with the values of other neurons, mean over draws")
    permuted_sd: float | None = column("0..1", "standard deviation over draws")
    soft_rank: float = column("directions", "of h: exp of the entropy of the normalised eigenvalues")
    soft_rank_written: float = column("directions", "the same of what the layer writes")
    soft_rank_permuted: float | None = column("directions", "and of that with the values of other neurons")
    participation_ratio: float = column("directions", "of h: the hard rank")
    participation_ratio_written: float = column("directions", "the same of what the layer writes")
    participation_ratio_permuted: float | None = column("directions", "with the values of other neurons")
    loss: float | None = column("nats/token", "of the model; this and all below only where h was cut")
    ablated: float | None = column("nats/token", "added when h is set to its mean")
    ablated_se: float | None = column("nats/token", "its standard error over documents")
    enough: int | None = column("directions", "of h, fewest from which on 95% of that is kept")
    directions: list[int] = column("directions", "principal directions of h that are kept about its mean")
    directions_delta: list[float] = column("nats/token", "added to the loss, for each of them")
    directions_se: list[float] = column("nats/token", "standard errors over documents")
    neurons: list[int] = column("neurons", "neurons that are kept, the others at their means")
    random_delta: list[float] = column("nats/token", "added with random neurons kept, mean over draws")
    random_sd: list[float] = column("nats/token", "standard deviations over draws")
    contribution_delta: list[float] = column("nats/token", "added with the largest E|h| |value| kept")
    contribution_se: list[float] = column("nats/token", "standard errors over documents")
    variance_delta: list[float] = column("nats/token", "added with the largest variance of h kept")
    variance_se: list[float] = column("nats/token", "standard errors over documents")

    @property
    def speaks(self) -> bool:
        """Whether h was cut and the loss needs what it says beside its mean, beyond two standard errors."""
        return self.ablated is not None and self.ablated_se is not None and self.ablated > 2 * self.ablated_se

    def keeps(self, added: float) -> float:
        """What is left of the loss that h gains, when a cut adds so much; 1 of all of it, 0 that of the mean."""
        return 1 - added / self.ablated if self.ablated else float("nan")


@dataclass(frozen=True)
class Contraction(Result):
    name: ClassVar[str] = "contraction"
    question: ClassVar[str] = (
        "What does the contraction keep of the hidden activation, and could something cheaper keep it?"
    )
    row_type: ClassVar[type] = Row

    def findings(self) -> list[str]:
        rows = self.rows
        middle = sorted(rows, key=lambda row: row.selectivity)[len(rows) // 2]
        soft, written = (median(getattr(row, name) for row in rows) for name in ("soft_rank", "soft_rank_written"))
        sentences = [_selective(middle)]
        ranks = f"The contraction takes the soft rank from {soft:.0f} to {written:.0f} (median layer)"
        if null := [row.soft_rank_permuted for row in rows if row.soft_rank_permuted is not None]:
            ranks += f"; values of other neurons would leave {median(null):.0f}"
        sentences += [ranks + ".", *map(_cut_short, [row for row in rows if row.directions])]
        if middle.sketch:
            sentences.append(
                "The covariances of h were sketched: it has no principal directions to cut, and no null of other "
                "neurons. Choose fewer layers, or a larger budget."
            )
        first = rows[0]
        whole, factors, square, narrow, low = account(first.d_model, first.d_mlp, first.gated)
        sentences.append(
            f"Layer {first.layer} has {whole.parameters:,} parameters and takes {whole.flops:,} FLOPs a token, "
            f"{whole.parameters / square.parameters:.3g} times one {first.d_model} x {first.d_model} map, whose "
            f"rank {square.rank} is no smaller but which is linear; as many parameters in linear factors still "
            f"make a map of rank {factors.rank}. For the price of the square map an FFN has {narrow.rank} "
            f"neurons, and linear factors have rank {low.rank}."
        )
        if first.tokens < 10 * first.d_mlp:
            sentences.append(
                f"Few tokens: {first.tokens:,} for {first.d_mlp:,} neurons. Those on which the loss is measured "
                "are among them, so that principal directions seem to keep too much: give more tokens."
            )
        return sentences

    def verdicts(self) -> list[Verdict]:
        rows = [row for row in self.rows if row.blind < 1]
        n = len(rows)
        if n < FEWEST_LAYERS:
            return []
        chosen = sum(
            row.selectivity - row.selectivity_spread > max(row.blind, row.permuted or 0.0) for row in rows
        )
        cuts = [row for row in rows if row.speaks]
        enough = sum(row.enough is not None and row.enough <= row.d_model for row in cuts)
        held = bool(cuts) and enough == len(cuts)
        selects = beyond(chosen, n)
        return [
            Verdict(
                claim=3,
                rule="of layers that contract: supported if, in most layers (sign test, 5%), the contraction "
                "keeps more of the variance of h than of an isotropic one and than with the values of other "
                "neurons, by more than the document spread, and if d_model principal directions of h keep "
                f"{ENOUGH:.0%} of what the loss gains by h in every layer that was cut and gains any; mixed if "
                "one of the two holds",
                measured=f"above both nulls in {chosen} of {n} layers; d_model directions are enough in {enough} "
                f"of {len(cuts)} layers cut",
                verdict="supported" if selects and held else "mixed" if selects or held else "not supported",
                against="Values are sums of the h that they were trained on, so that some selectivity comes with "
                "gradient descent; what is kept need not be needed: with most singular directions of a late FFN "
                "matrix cut, a model can answer questions better, if at a slightly higher perplexity (Sharma et "
                "al., LASER, ICLR 2024).",
            )
        ]

    @styled
    def plot(self) -> Figure:
        cuts = [row for row in self.rows if row.speaks]
        about = caption(self.settings, *[f"losses on {self.settings['held_out']:,} tokens"] * bool(cuts))
        figure, axes = new_figure(4 if cuts else 2, about)
        at = [row.layer for row in self.rows]

        def by_layer(panel: Any, name: str, style: str, colour: str, label: str) -> None:
            panel.plot(at, [getattr(row, name) for row in self.rows], style, color=colour, label=label)

        kept, ranks = axes[:2]
        by_layer(kept, "selectivity", "o-", BLACK, "trained")
        by_layer(kept, "permuted", "s--", GREY, "values of other neurons")
        by_layer(kept, "blind", ":", GREY, "isotropic h: 1/r")
        kept.set(title="Variance of h that is kept", xlabel="layer", ylabel="share in the row space of the values")
        kept.set_ylim(0, 1.02)
        by_layer(ranks, "soft_rank", "o-", BLACK, "h")
        by_layer(ranks, "soft_rank_written", "o-", GREEN, "y, written")
        by_layer(ranks, "soft_rank_permuted", "s--", GREY, "y, values of other neurons")
        ranks.set(title="Rank before and after", xlabel="layer", ylabel="soft rank (directions)", yscale="log")
        if cuts:
            _draw_directions(axes[2], cuts)
            _draw_neurons(axes[3], cuts)
        for panel in axes:
            legend_below(panel)
        return figure


def contraction(
    model: Model,
    tokens: Tokens,
    *,
    layers: Sequence[int] | None = None,
    causal_layers: Sequence[int] | None = None,
    held_out: int = 1024,
    budget: int = BUDGET,
    seed: int = 0,
    statistics: Mapping[str, Any] | None = None,
    **collecting: Any,
) -> Contraction:
    """What of h reaches y, what the ranks of both are, and what the loss says when h is made smaller.

    Selectivity is tr(P C_h) / tr C_h, P the projector on the row space of the values, which has d_model dimensions
    at most: a layer no wider than that keeps everything. h is cut about its mean, at ordinary tokens alone, to its
    leading principal directions, or to some of its neurons. On a gated FFN each neuron is weighed by the norm of
    its value (see `FFN.canonical`). Directions, means and sizes are of all tokens, those held out among them.

    Args:
        layers: the layers to measure; all by default.
        causal_layers: those of which h is cut, some 26 passes each; four of them by default, () for none.
        held_out: tokens from the end of the corpus on which the loss is measured.
        budget: bytes of moments beyond which h is sketched; then it is not cut.
        seed: of permutations, random neurons and test vectors.
        statistics: what one `collect` over `probes(...)` gave, and over those of `hidden_rank` if without moments.
        collecting: passed to `collect` (batch, sink_factor, nonfinite, progress).

    Raises:
        InputError: a layer that is not there or not measured, a single document, too few tokens.
        ModelRefused: h is to be cut and the model does not predict the next token.
    """
    if causal_layers is None or causal_layers:
        check_causal(model)
    check_documents(tokens)
    measured = choose_ffns(model, layers)
    chosen = [ffn.layer for ffn in measured]
    to_cut = evenly(chosen, CUT) if causal_layers is None else list(causal_layers)
    if unknown := set(to_cut) - set(chosen):
        raise InputError(f"layer {min(unknown)} cannot be cut: choose among those measured, {chosen}")
    text = tokens.held_out(held_out)[1] if to_cut else tokens
    if statistics is None:
        statistics = collect(model, tokens, probes(measured, to_cut, seed, budget), **collecting)
    cuts: dict[int, Cuts] = {}
    covariances = {layer: merged(statistics, layer, "post").compute() for layer in to_cut}
    if exact := [ffn for ffn in measured if ffn.layer in to_cut and not covariances[ffn.layer].sketch]:
        sizes = {ffn.layer: statistics[f"contraction/{ffn.layer}/size"].compute().mean for ffn in exact}
        looking = {name: value for name, value in collecting.items() if name in ("sink_factor", "nonfinite")}
        cuts = cut(model, text, exact, covariances, sizes, seed, **looking)
    rows = [_row(ffn, measure(ffn, statistics, seed), cuts.get(ffn.layer)) for ffn in measured]
    settings = settings_of(model, tokens, seed, **collecting)
    settings |= {"held_out": held_out, "budget": budget, "permuted": PERMUTED, "weights": "raw"}
    return Contraction(rows, settings)


def _row(ffn: FFN, found: Selectivity, cuts: Cuts | None) -> Row:
    whole = account(ffn.d_model, ffn.d_mlp, ffn.gated)[0]
    ranks: dict[str, Any] = {}
    for of, pair in found.ranks.items():
        ranks[f"soft_rank{of}"], ranks[f"participation_ratio{of}"] = pair or (None, None)
    return Row(
        layer=ffn.layer,
        d_model=ffn.d_model,
        d_mlp=ffn.d_mlp,
        gated=ffn.gated,
        parameters=whole.parameters,
        flops=whole.flops,
        tokens=found.tokens,
        sketch=found.sketch,
        selectivity=found.share,
        selectivity_spread=found.spread,
        blind=found.blind,
        permuted=found.permuted and found.permuted[0],
        permuted_sd=found.permuted and found.permuted[1],
        **ranks,
        **columns(cuts),
    )


def _selective(row: Row) -> str:
    """One layer's selectivity, in words."""
    said = f"At layer {row.layer} (the median one) the contraction keeps {row.selectivity:.1%} "
    said += f"± {row.selectivity_spread:.1%} of the variance of h"
    if row.blind == 1:
        return said + f": no wider than d_model ({row.d_mlp:,} neurons), it keeps everything whatever h is."
    said += f"; of an isotropic h {row.blind:.1%}"
    if row.permuted is not None:
        said += f", with the values of other neurons {row.permuted:.1%} ± {row.permuted_sd:.1%}"
    return said + "."


def _cut_short(row: Row) -> str:
    """What the loss says of one layer's cuts."""
    said = f"Layer {row.layer}: h at its mean adds {row.ablated:+.3f} ± {row.ablated_se:.3f} nats a token"
    if not row.speaks:
        return said + ", which is nothing to keep."
    at_width = row.directions_delta[row.directions.index(min(row.d_model, row.d_mlp))]
    half = {criterion: row.keeps(getattr(row, f"{criterion}_delta")[0]) for criterion in CRITERIA}
    return (
        f"{said} to the loss; {row.enough:,} of {row.d_mlp:,} principal directions keep {ENOUGH:.0%} of that, "
        f"{min(row.d_model, row.d_mlp):,} keep {row.keeps(at_width):.1%}. {row.neurons[0]:,} neurons keep "
        f"{half['contribution']:.0%} if chosen by contribution, {half['variance']:.0%} by variance, "
        f"{half['random']:.0%} at random."
    )


def _draw_directions(panel: Any, rows: Sequence[Row]) -> None:
    for row, colour in zip(rows, COLOURS * len(rows), strict=False):
        share = [row.keeps(added) for added in row.directions_delta]
        panel.plot(row.directions, share, "o-", color=colour, label=f"layer {row.layer}")
    panel.axvline(rows[0].d_model, color=GREY, linestyle=":", label="d_model")
    panel.axhline(ENOUGH, color=GREY, linestyle="--", linewidth=0.8, label=f"{ENOUGH:.0%}")
    panel.set_xscale("log", base=2)
    panel.set(title="h cut to principal directions", xlabel="directions kept")
    low, high = panel.get_ylim()
    panel.set(ylabel="share of what h gains the loss", ylim=(min(-0.02, low), max(1.05, high)))


def _draw_neurons(panel: Any, rows: Sequence[Row]) -> None:
    for criterion, colour in CRITERIA.items():
        for i, row in enumerate(rows):
            share = [row.keeps(added) for added in getattr(row, f"{criterion}_delta")]
            label = criterion if i == 0 else None
            width = [kept / row.d_mlp for kept in row.neurons]
            panel.plot(width, share, "o-", color=colour, alpha=0.7, label=label)
    panel.set_xscale("log", base=2)
    panel.set(title="h cut to some neurons", xlabel="share of the neurons kept (a line a layer)")
    panel.set(ylabel="share of what h gains the loss")

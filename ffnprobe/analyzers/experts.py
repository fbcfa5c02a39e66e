"""How few of a layer's neurons does a token need, if they come in experts?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean, median
from typing import Any, ClassVar

from matplotlib.figure import Figure

from ..corpus import Tokens
from ..errors import InputError
from ..ffn import FFN
from ..figure import BLACK, BLUE, GREY, ORANGE, caption, legend_below, new_figure, styled
from ..intervene import check_causal, losses
from ..models import Model
from ..result import FEWEST_LAYERS, Result, Verdict, beyond, column
from ..statistics import Marginals, Sample
from ..stream import SINK_FACTOR, Probe, choose_ffns, collect, settings_of
from .kept_experts import (
    ARMS,
    CLUSTERS,
    NEURONS,
    ORACLE,
    RANDOM,
    ROUTER,
    changes,
    every_other,
    loss_rows,
    output_rows,
)
from .partition import Partition, partitions

LINE = {(CLUSTERS, ORACLE): ("o-", BLACK), (CLUSTERS, ROUTER): ("s-", BLUE), (NEURONS, ORACLE): ("^-", ORANGE)}
NULL = {ORACLE: ("o--", GREY), ROUTER: ("s:", GREY)}
ENOUGH, FEW, AT = 0.95, 0.3, 0.2  # of what is kept; of the claim; where clusters and random parts are compared


@dataclass(frozen=True)
class Row:
    layer: int | None = column("", "layer; none: all measured layers changed at once, which is where the loss is")
    expansion: float | None = column("", "d_mlp / d_model; none of all layers")
    partition: str = column(
        "",
        "clusters: equal parts of neurons whose gates (keys, if not gated) point the same way; random: parts of "
        "the same sizes; neurons: every neuron is an expert",
    )
    choice: str = column(
        "",
        "oracle: the experts without which y would change most; router: those with the highest product of x and "
        "their mean gate (key), biases added",
    )
    draw: int = column("", "of random parts")
    experts: int | None = column("experts", "of the layer; none of all layers")
    share: float = column("0..1", "of the experts that each token keeps, the others stay at their mean")
    kept: float = column("0..1", "share of the neurons that it keeps")
    r2: float | None = column("..1", "share of the output's variance that is kept")
    r2_se: float | None = column("", "its standard error over documents")
    delta_loss: float | None = column("nats/token", "what it adds to the next-token loss")
    delta_loss_se: float | None = column("nats/token", "its standard error over documents")
    gap_kept: float | None = column("..1", "1 - delta_loss / that of all experts at their mean")
    documents: int = column("documents", "measured, none of which the means are from")


@dataclass(frozen=True)
class Experts(Result):
    name: ClassVar[str] = "experts"
    question: ClassVar[str] = "How few of a layer's neurons does a token need, if they come in experts?"
    row_type: ClassVar[type] = Row

    @property
    def layers(self) -> list[int]:
        return sorted({row.layer for row in self.rows if row.layer is not None})

    def curve(self, partition: str, choice: str, measure: str) -> dict[float, float]:
        """The measure at each share of experts: the mean over draws, the median over layers."""
        rows = [r for r in self.rows if (r.partition, r.choice) == (partition, choice)]
        found: dict[float, dict[int | None, list[float]]] = {}
        for row in rows:
            if (value := getattr(row, measure)) is not None:
                found.setdefault(row.share, {}).setdefault(row.layer, []).append(value)
        return {share: median(map(fmean, by.values())) for share, by in sorted(found.items())}

    def fewest(self, partition: str, choice: str, measure: str) -> float:
        """The smallest share of experts measured that keeps 95%: of the output's variance (`r2`, median layer) or
        of the gap between the loss with all experts at their mean and the model's own (`gap_kept`)."""
        return min(share for share, kept in self.curve(partition, choice, measure).items() if kept >= ENOUGH)

    def findings(self) -> list[str]:
        sentences = []
        for partition, choice in ARMS:
            r2, gap, delta = (self.curve(partition, choice, m) for m in ("r2", "gap_kept", "delta_loss"))
            sentences.append(
                f"{partition}, {choice}: {AT:.0%} of the experts a token keep {r2[AT]:.1%} of the output's "
                f"variance (median layer). With all {len(self.layers)} layers changed at once they keep "
                f"{gap[AT]:.1%} of the loss gap ({delta[AT]:+.3f} nats a token). 95% of the variance is kept from "
                f"{self.fewest(partition, choice, 'r2'):.0%} of the experts on, 95% of the loss gap from "
                f"{self.fewest(partition, choice, 'gap_kept'):.0%} on."
            )
        return [
            *sentences,
            f"The loss gap is that of the layers' mean against the layers: {self.settings['ablated']:.3f} nats a "
            f"token over a loss of {self.settings['loss']:.3f}.",
        ]

    def verdicts(self) -> list[Verdict]:
        n = len(self.layers)
        if n < FEWEST_LAYERS:
            return []
        above = sum(self._above_every_draw(layer) for layer in self.layers)
        routed = self.fewest(CLUSTERS, ROUTER, "gap_kept")
        few, better = routed <= FEW, beyond(above, n)
        return [
            Verdict(
                claim=4,
                rule="clusters as experts. supported if a router by the mean key keeps 95% of the loss gap with "
                "at most 30% of the clusters, and if in most layers (sign test, 5%) 20% of the clusters, chosen "
                "by the oracle, keep more of the output's variance than every draw of random parts; mixed if only "
                "one holds",
                measured=f"95% of the loss gap from {routed:.0%} of the clusters on with the router, from "
                f"{self.fewest(CLUSTERS, ORACLE, 'gap_kept'):.0%} with the oracle, from "
                f"{self.fewest(RANDOM, ORACLE, 'gap_kept'):.0%} of random parts with the oracle; clusters are "
                f"above every random draw in {above} of {n} layers",
                verdict="supported" if few and better else "mixed" if few or better else "not supported",
                against="Random parts with an oracle do nearly as well: 95.9, 87.3 and 80.0 where clusters have "
                "96.3, 89.1 and 80.8 (T5-large; MoEfication, Zhang et al. 2022, cited second-hand).",
            )
        ]

    def _above_every_draw(self, layer: int) -> bool:
        at = [row for row in self.rows if (row.layer, row.choice, row.share) == (layer, ORACLE, AT)]
        (clusters,) = (row.r2 or 0 for row in at if row.partition == CLUSTERS)
        return all(clusters > (row.r2 or 0) for row in at if row.partition == RANDOM)

    @styled
    def plot(self) -> Figure:
        about = caption(
            self.settings, f"{self.settings['clusters']} experts a layer", "sinks and special tokens untouched"
        )
        figure, (variance, gap, by_layer) = new_figure(3, about)
        for (partition, choice), (mark, colour) in LINE.items():
            for axes, measure in ((variance, "r2"), (gap, "gap_kept")):
                curve = self.curve(partition, choice, measure)
                shares = [100 * share for share in curve]
                axes.plot(shares, list(curve.values()), mark, color=colour, label=f"{partition}, {choice}")
        for choice, (mark, colour) in NULL.items():
            for axes, measure in ((variance, "r2"), (gap, "gap_kept")):
                curve = self.curve(RANDOM, choice, measure)
                shares = [100 * share for share in curve]
                axes.plot(shares, list(curve.values()), mark, color=colour, label=f"random parts, {choice}")
        for (partition, choice), (mark, colour) in (LINE | {(RANDOM, c): NULL[c] for c in NULL}).items():
            rows = [r for r in self.rows if (r.partition, r.choice, r.share) == (partition, choice, AT)]
            r2 = [fmean(row.r2 or 0 for row in rows if row.layer == layer) for layer in self.layers]
            by_layer.plot(self.layers, r2, mark, color=colour, label=f"{partition}, {choice}")
        variance.set(title="Output kept (median layer)", ylabel="R² of the output")
        gap.set(title="Loss kept, all layers at once", ylabel="share of the loss gap")
        by_layer.set(title=f"Output kept by {AT:.0%} of the experts", xlabel="layer", ylabel="R² of the output")
        for axes in (variance, gap):
            axes.axhline(ENOUGH, color="#CCCCCC", linewidth=0.8)
            axes.set_xlabel("experts kept (% of them, for each token)")
        for axes in (variance, gap, by_layer):
            axes.set_ylim(max(-0.5, min(0, axes.get_ylim()[0])), 1.02)
            legend_below(axes)
        return figure


def probes(layers: Sequence[FFN], sample: int = 1024, seed: int = 0) -> dict[str, Probe]:
    """What `experts` needs of one pass: the mean of h in every other document, and x of a sample of the rest."""
    wanted = {}
    for ffn in layers:
        draw = partial(Sample.about, k=sample, seed=seed)
        wanted[f"experts/{ffn.layer}/mean"] = Probe(ffn.layer, "post", Marginals.about, block=(0, 2))
        wanted[f"experts/{ffn.layer}/in"] = Probe(ffn.layer, "in", draw, block=(1, 2))
    return wanted


def experts(
    model: Model,
    tokens: Tokens,
    *,
    layers: Sequence[int] | None = None,
    clusters: int = 40,
    draws: int = 2,
    sample: int = 1024,
    loss_tokens: int = 1024,
    seed: int = 0,
    statistics: Mapping[str, Any] | None = None,
    **collecting: Any,
) -> Experts:
    """Keep the best experts of each token and leave the others at their mean (MoEfication, Zhang et al. 2022).

    The means are those of every other document; what is kept of the output and of the loss is measured in the
    rest. For the loss all measured layers are changed at once, at ordinary tokens.

    Args:
        layers: the layers to measure; all by default.
        clusters: experts a layer, equal parts of its neurons; at most half as many as neurons.
        draws: random partitions of the same sizes; the loss is that of the first.
        sample: tokens the output is compared on. loss_tokens: so many for the loss, laid end to end.
        statistics: what one `collect` over `probes(...)` gave, when several analyzers share a pass.
        collecting: passed to `collect` (batch, sink_factor, progress).

    Raises:
        InputError: a layer that is not there, a number below 1, or too little text.
        ModelRefused: the model does not predict the next token.
    """
    if min(clusters, draws, sample, loss_tokens) < 1:
        raise InputError(f"got clusters={clusters}, draws={draws}, sample={sample}: give at least 1 of each")
    check_causal(model)
    measured = choose_ffns(model, layers)
    if statistics is None:
        statistics = collect(model, tokens, probes(measured, sample, seed), **collecting)
    document = tokens.document.flatten()
    cut: dict[int, dict[tuple[str, int], Partition]] = {}
    rows: list[dict[str, Any]] = []
    for ffn in measured:
        mean = statistics[f"experts/{ffn.layer}/mean"].compute().mean.float()
        cut[ffn.layer] = partitions(ffn, mean, min(clusters, ffn.d_mlp // 2), draws, seed)
        drawn = statistics[f"experts/{ffn.layer}/in"].compute()
        rows += output_rows(ffn.wide(), cut[ffn.layer], drawn.x, document[drawn.at.cpu()])
    text = every_other(tokens, loss_tokens)
    found = losses(model, text, changes(cut), sink_factor=collecting.get("sink_factor", SINK_FACTOR))
    rows += loss_rows(rows, found)
    settings = settings_of(model, tokens, seed, **collecting)
    settings |= {"arm": measured[0].arm, "clusters": clusters, "draws": draws, "sample": sample}
    settings |= {
        "loss_tokens": text.n,
        "weights": "raw",
        "loss": found.mean(),
        "ablated": found.delta("ablated")[0],
    }
    return Experts([Row(**row) for row in rows], settings)

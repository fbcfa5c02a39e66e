"""How does the rank of a trained layer's h grow with the neurons that are kept of it?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any, ClassVar

import torch
from matplotlib.figure import Figure
from torch import Tensor

from .. import spectrum as sp
from ..corpus import Tokens
from ..ffn import FFN
from ..figure import BLACK, BLUE, GREEN, GREY, ORANGE, caption, legend_below, new_figure, styled
from ..models import Model
from ..result import Result, column
from ..scaling import Scaling, fit_scaling
from ..statistics import Marginals, Moments
from ..stream import Probe, choose_ffns, collect, settings_of

CRITERIA = {"random": BLUE, "contribution": BLACK, "variance": ORANGE}
SHARES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
DRAWS = 3


@dataclass(frozen=True)
class Row:
    layer: int = column("", "layer")
    criterion: str = column("", "kept first: random neurons, the largest E|h| |value|, the largest variance of h")
    kept: int = column("neurons", "neurons kept")
    d_mlp: int = column("neurons", "neurons of the layer")
    tokens: int = column("tokens", "ordinary tokens measured: neither sinks nor special")
    variance_share: float = column("0..1", "variance of h that the kept neurons have")
    participation_ratio: float = column("directions", "hard rank of the kept neurons' h; random: of all subsets")
    soft_rank: float = column(
        "directions", "exp of the entropy of the normalised eigenvalues; random: mean of draws"
    )
    independent_soft_rank: float = column("directions", "soft rank had these neurons no correlations: the null")


@dataclass(frozen=True)
class Nested(Result):
    name: ClassVar[str] = "nested"
    question: ClassVar[str] = "How does the rank of a trained layer's h grow with the neurons that are kept of it?"
    row_type: ClassVar[type] = Row

    def fits(self, criterion: str, measure: str) -> list[Scaling]:
        """The laws of the kept width, a layer each."""
        layers = sorted({row.layer for row in self.rows})
        chosen = [[r for r in self.rows if (r.layer, r.criterion) == (layer, criterion)] for layer in layers]
        return [fit_scaling([r.kept for r in rows], [getattr(r, measure) for r in rows]) for rows in chosen]

    def findings(self) -> list[str]:
        return [
            f"Neurons kept by {criterion}: in the median layer the soft rank of h grows as their number to the "
            f"{_typical(self.fits(criterion, 'soft_rank'))}, the hard rank to the "
            f"{_typical(self.fits(criterion, 'participation_ratio'))}; without their correlations the soft rank "
            f"would grow to the {_typical(self.fits(criterion, 'independent_soft_rank'))}."
            for criterion in CRITERIA
        ]

    @styled
    def plot(self) -> Figure:
        figure, (soft, hard, share) = new_figure(3, caption(self.settings, "median layer", "sinks set apart"))
        for criterion, colour in CRITERIA.items():
            for axes, measure in ((soft, "soft_rank"), (hard, "participation_ratio"), (share, "variance_share")):
                kept, values = self._median(criterion, measure)
                axes.plot(kept, values, "o-", color=colour, label=criterion)
        kept, values = self._median("random", "independent_soft_rank")
        soft.plot(kept, values, "--", color=GREY, label="random, no correlations")
        for axes, title, label in (
            (soft, "Soft rank", "soft rank of h (directions)"),
            (hard, "Hard rank", "participation ratio of h (directions)"),
            (share, "Variance", "share of the variance of h"),
        ):
            axes.set_xscale("log", base=2)
            axes.set(title=title, xlabel="neurons kept", ylabel=label)
            legend_below(axes)
        for axes in (soft, hard):
            axes.plot(kept, kept, "-", color=GREEN, linewidth=0.6, label="every neuron its own")
            axes.set_yscale("log", base=2)
            legend_below(axes)
        share.set_ylim(0, 1.02)
        return figure

    def _median(self, criterion: str, measure: str) -> tuple[list[int], list[float]]:
        rows = [row for row in self.rows if row.criterion == criterion]
        kept = sorted({row.kept for row in rows})
        return kept, [median(getattr(row, measure) for row in rows if row.kept == k) for k in kept]


def probes(layers: Sequence[FFN]) -> dict[str, Probe]:
    """What `nested` needs of one pass over the tokens."""
    wanted = {}
    for ffn in layers:
        weighed = ffn.weighing

        def size(h: Tensor, weighed: Callable[[Tensor], Tensor] = weighed) -> Tensor:
            return weighed(h).abs()

        wanted[f"nested/{ffn.layer}/post"] = Probe(ffn.layer, "post", Moments.about, of=weighed)
        wanted[f"nested/{ffn.layer}/size"] = Probe(ffn.layer, "post", Marginals.about, of=size)
    return wanted


def nested(
    model: Model,
    tokens: Tokens,
    *,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    statistics: Mapping[str, Any] | None = None,
    **collecting: Any,
) -> Nested:
    """Ranks of h of 1/32 to all of a layer's neurons, kept at random, by contribution and by variance.

    What a narrower model would lose if it had to do with some of these neurons; not what one trained at that width
    has (see `expansion`). On a gated FFN each neuron is weighed by the norm of its value.

    Args:
        layers: the layers to measure; all by default.
        seed: of the random subsets.
        statistics: what one `collect` over `probes(...)` gave.
        collecting: passed to `collect` (batch, sink_factor, progress).

    Raises:
        InputError: a layer that is not there.
    """
    measured = choose_ffns(model, layers)
    if statistics is None:
        statistics = collect(model, tokens, probes(measured), **collecting)
    random = torch.Generator().manual_seed(seed)
    rows = [row for ffn in measured for row in _layer_rows(ffn, statistics, random)]
    return Nested(rows, settings_of(model, tokens, seed, **collecting))


def _layer_rows(ffn: FFN, statistics: Mapping[str, Any], random: torch.Generator) -> list[Row]:
    covariance = statistics[f"nested/{ffn.layer}/post"].compute()
    size = statistics[f"nested/{ffn.layer}/size"].compute().mean
    reach = size if ffn.gated else size * ffn.wide().values.norm(dim=1).to(size)
    d_mlp = ffn.d_mlp
    orders = {
        "random": [torch.randperm(d_mlp, generator=random) for _ in range(DRAWS)],
        "contribution": [reach.cpu().argsort(descending=True)],
        "variance": [covariance.variance.cpu().argsort(descending=True)],
    }
    C = covariance.centred.cpu()
    rows = []
    for criterion, several in orders.items():
        for kept in sorted({max(2, round(share * d_mlp)) for share in SHARES}):
            some = [C[order[:kept]][:, order[:kept]] for order in several]
            hard = [sp.subset_participation_ratio(C if criterion == "random" else c, kept) for c in some]
            rows.append(
                Row(
                    layer=ffn.layer,
                    criterion=criterion,
                    kept=kept,
                    d_mlp=d_mlp,
                    tokens=covariance.n,
                    variance_share=fmean(float(c.trace() / C.trace()) for c in some),
                    participation_ratio=fmean(hard),
                    soft_rank=fmean(sp.soft_rank(sp.eigenvalues(c)) for c in some),
                    independent_soft_rank=fmean(sp.soft_rank(c.diagonal()) for c in some),
                )
            )
    return rows


def _typical(laws: Sequence[Scaling]) -> str:
    exponent, low, high = (median(getattr(law, name) for law in laws) for name in ("exponent", "low", "high"))
    return f"{exponent:.3f} (OLS [{low:.3f}, {high:.3f}], N = {laws[0].n})"

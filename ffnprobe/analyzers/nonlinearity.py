"""How much of a feed-forward layer is an affine map of what it reads?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, ClassVar

from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from .. import spectrum as sp
from ..corpus import Tokens
from ..ffn import ACTIVATIONS
from ..figure import BLACK, BLUE, GREEN, GREY, ORANGE, caption, legend_below, new_figure, styled
from ..forward import evenly
from ..models import Model
from ..regression import AffineMap, Paired, fit, held_out
from ..result import FEWEST_LAYERS, Result, Verdict, beyond, column
from ..statistics import Moments
from ..stream import choose_ffns, collect, settings_of
from .affine_loss import NO_LOSS, Loss, affine_losses
from .affine_probes import HALVES, Beside, besides, everything, ordinary, writing, written
from .affine_probes import probes as probes
from .affine_ranks import affine_ranks
from .hidden_rank import check_documents
from .rank_probes import BUDGET


@dataclass(frozen=True)
class Row:
    layer: int = column("", "layer")
    tokens: int = column("tokens", "ordinary tokens measured: neither sinks nor special")
    apart: int = column("tokens", "sinks and special tokens, set apart")
    r2: float = column("..1", "R2 of the best affine map x -> y, on documents that it was not fitted on")
    r2_spread: float = column("0..", "half the difference between the document halves")
    r2_unmasked: float = column("..1", "the same with sinks and special tokens left in, fitted and judged")
    r2_null: float = column("..1", "with random weights of the same norms on the same x; mean over random values")
    linear_share: float = column("..1", "share of the variance of h that is affine in x, held out")
    linear_share_spread: float = column("0..", "half the difference between the document halves")
    linear_share_null: float = column("..1", "of random neurons of the same norms, at the trained variances")
    linear_share_gaussian: float = column("0..1", "closed form: one neuron on isotropic Gaussian x without bias")
    participation_ratio_linear: float | None = column("directions", "hard rank of the part of h affine in x")
    participation_ratio_nonlinear: float | None = column("directions", "hard rank of what is left of h, held out")
    participation_ratio: float | None = column("directions", "hard rank of h")
    soft_rank_in: float = column("directions", "soft rank of x, which that of the linear part cannot much exceed")
    soft_rank_linear: float | None = column("directions", "exp of the entropy of the eigenvalues, linear part")
    soft_rank_nonlinear: float | None = column("directions", "exp of the entropy of the eigenvalues, what is left")
    soft_rank: float | None = column("directions", "soft rank of h; none where its covariance did not fit")
    neurons: int = column("neurons", "neurons whose h was regressed")
    loss: float | None = column("nats/token", "next-token loss on odd documents; none where it was not measured")
    loss_affine: float | None = column("nats/token", "added if the affine map of even documents writes instead")
    loss_affine_se: float | None = column("nats/token", "its standard error over documents")
    loss_mean: float | None = column("nats/token", "added if the mean of even documents is written instead")
    loss_mean_se: float | None = column("nats/token", "its standard error over documents")

    @property
    def bent(self) -> bool:
        """An affine map leaves too much of what is written, by more than the document spread."""
        return self.r2 + self.r2_spread < ALMOST

    @property
    def costly(self) -> bool:
        """The loss rises by more than 2 standard errors with the affine map in place of the layer."""
        added, error = self.loss_affine, self.loss_affine_se
        return added is not None and error is not None and added > 2 * error


@dataclass(frozen=True)
class Nonlinearity(Result):
    name: ClassVar[str] = "nonlinearity"
    question: ClassVar[str] = "How much of a feed-forward layer is an affine map of what it reads?"
    row_type: ClassVar[type] = Row

    @property
    def replaced(self) -> list[Row]:
        """The layers whose replacement was judged by the loss."""
        return [row for row in self.rows if row.loss is not None]

    def _median(self, measure: str) -> float:
        values = [getattr(row, measure) for row in self.rows]
        return median(value for value in values if value is not None)

    def findings(self) -> list[str]:
        r2, null, unmasked = map(self._median, ("r2", "r2_null", "r2_unmasked"))
        share, random, closed = map(self._median, ("linear_share", "linear_share_null", "linear_share_gaussian"))
        lift = max(self.rows, key=lambda row: row.r2_unmasked - row.r2)
        sentences = [
            f"The best affine map explains {r2:.0%} of what a layer writes to documents that it was not fitted "
            f"on (median layer); of a layer with random weights on the same inputs {null:.0%}. With sinks and "
            f"special tokens left in it is {unmasked:.0%}; most is added at layer {lift.layer}: {lift.r2:.0%} to "
            f"{lift.r2_unmasked:.0%}.",
            f"Of the variance of the hidden activations {share:.0%} is affine in x (median layer), of random "
            f"neurons {random:.0%}; one neuron on isotropic Gaussian input {closed:.0%}.",
        ]
        if self.rows[0].soft_rank is not None:
            x, linear, rest, whole = map(
                self._median, ("soft_rank_in", "soft_rank_linear", "soft_rank_nonlinear", "soft_rank")
            )
            sentences.append(
                f"What the nonlinearity adds to h has a soft rank of {rest:.0f} (median layer), the part that is "
                f"affine in x {linear:.0f}, h itself {whole:.0f}, x {x:.0f}."
            )
        if self.replaced:
            affine, mean = self._median("loss_affine"), self._median("loss_mean")
            worst = max(self.replaced, key=lambda row: row.loss_affine or 0)
            sentences.insert(
                1,
                f"A layer that writes its affine map instead adds {affine:.3f} nats a token to the loss of "
                f"{self._median('loss'):.2f} (median of {len(self.replaced)} layers), its mean {mean:.3f}; the "
                f"affine map costs most at layer {worst.layer}: {worst.loss_affine:.3f} ± "
                f"{worst.loss_affine_se:.3f}.",
            )
        if few := [row for row in self.rows if row.tokens < 20 * self.settings["d_model"]]:
            sentences.append(
                f"Few tokens: {few[0].tokens:,} for maps of {self.settings['d_model']:,} inputs, each fitted on "
                "half of them. What they fit by chance counts against them: every R2 here is too low."
            )
        return sentences

    def verdicts(self) -> list[Verdict]:
        n, replaced = len(self.rows), self.replaced
        if n < FEWEST_LAYERS:
            return []
        bent, worse = sum(row.bent for row in self.rows), sum(row.costly for row in replaced)
        measured = (
            f"R2 below {ALMOST:g} in {bent} of {n} layers, {self._median('r2'):.2f} at the median one (random "
            f"weights {self._median('r2_null'):.2f}); "
            + (f"loss higher in {worse} of {len(replaced)} layers" if replaced else "no loss")
        )
        judged = [beyond(bent, n), beyond(worse, len(replaced)) if replaced else False]
        return [
            Verdict(
                claim=1,
                rule=RULE,
                measured=measured,
                verdict="supported" if all(judged) else "mixed" if any(judged) else "not supported",
                against=AGAINST,
            )
        ]

    @styled
    def plot(self) -> Figure:
        figure, (written, held, ranks, cost) = new_figure(4, caption(self.settings, "held out by document"))
        layers = [row.layer for row in self.rows]
        lines = (
            (written, "r2", "o-", BLACK, "sinks set apart"),
            (written, "r2_unmasked", "s--", ORANGE, "sinks left in"),
            (written, "r2_null", "--", GREY, "random weights"),
            (held, "linear_share", "o-", BLACK, "trained"),
            (held, "linear_share_null", "--", GREY, "random weights"),
            (held, "linear_share_gaussian", ":", GREY, "Gaussian x, closed form"),
            (ranks, "soft_rank_in", "o-", BLUE, "x, read"),
            (ranks, "soft_rank_linear", "^-", GREEN, "h, affine in x"),
            (ranks, "soft_rank_nonlinear", "v-", ORANGE, "h, the rest"),
            (ranks, "soft_rank", "o-", BLACK, "h, hidden"),
        )
        for axes, measure, mark, colour, label in lines:
            values = [getattr(row, measure) for row in self.rows]
            if None not in values:
                axes.plot(layers, values, mark, color=colour, label=label)
        for axes, measure in ((written, "r2"), (held, "linear_share")):
            middle, spread = ([getattr(r, name) for r in self.rows] for name in (measure, f"{measure}_spread"))
            low, high = ([m + sign * s for m, s in zip(middle, spread, strict=True)] for sign in (-1, 1))
            axes.fill_between(layers, low, high, color=BLACK, alpha=0.15, linewidth=0)
            least = min(*low, *(row.r2_unmasked for row in self.rows)) if axes is written else min(low)
            axes.set_ylim(max(-1, min(0, least)) - 0.02, 1.02)
        written.set(title="The layer as an affine map", ylabel="R² of y, held out")
        held.set(title="What of h is affine in x", ylabel="share of the variance of h")
        ranks.set(title="What the nonlinearity adds", ylabel="soft rank (directions)", yscale="log")
        for kind, what, mark, colour in (("affine", "affine map", "o-", BLACK), ("mean", "mean", "s--", ORANGE)):
            at = [row.layer for row in self.replaced]
            added, error = ([getattr(r, f"loss_{kind}{end}") for r in self.replaced] for end in ("", "_se"))
            cost.errorbar(at, added, error, fmt=mark, color=colour, label=f"by its {what}", capsize=2)
        cost.axhline(0, color=GREY, linewidth=0.8)
        cost.set(title="A layer replaced", ylabel="added loss (nats/token)")
        cost.set_yscale("symlog", linthresh=0.1)  # a first layer may cost nats, the others hundredths
        for axes in (written, held, ranks, cost):
            axes.set_xlabel("layer")
            legend_below(axes)
        return figure


# written before any pretrained model was measured
ALMOST = 0.9
RULE = (
    f"supported if, in most layers (sign test, 5%), the best affine map leaves more than {1 - ALMOST:.0%} of what "
    "the layer writes unexplained on documents that it was not fitted on, by more than the document spread, and "
    "the loss rises by more than 2 standard errors where that map replaces the layer; mixed if only one holds"
)
AGAINST = (
    "From layer to layer the residual stream changes almost linearly, with a similarity of 0.99 after the best "
    "linear map in GPT, LLaMA, OPT and BLOOM (Razzhigaev et al. 2024); random weights are no affine map either."
)


def nonlinearity(
    model: Model,
    tokens: Tokens,
    *,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    budget: int = BUDGET,
    loss_tokens: int = 2048,
    loss_layers: int = 8,
    statistics: Mapping[str, Any] | None = None,
    **collecting: Any,
) -> Nonlinearity:
    """The affine part of every layer, of what it holds (h) and of what it writes (y), judged on other documents.

    Each half of the documents, even and odd, gets the map of least squares of the other half; a map that was
    judged on its own tokens would explain d_model / tokens by chance. On a gated FFN h is each neuron's
    contribution (h_i times the norm of its value; see `FFN.canonical`). The null: random weights of the same norms
    on the same x, 128 neurons a layer, each at the variance of its trained one; what values that are random too
    would write of them is, on average, affine to the same degree, with neurons weighed by the norms of the values.

    Args:
        layers: the layers to measure; all by default.
        seed: of the null's random weights.
        budget: bytes that the moments may take; where they would take more, h is some of the neurons.
        loss_tokens: of odd documents, on which the loss is measured with a layer replaced by the map of the even
            ones; 0 leaves that out. loss_layers: layers that are replaced, one at a time, at most; spread evenly.
        statistics: what one `collect` over `probes(...)` gave, when several analyzers share a pass.
        collecting: passed to `collect` (batch, sink_factor, progress).

    Raises:
        InputError: a layer that is not there, a single document, or a budget that is too small.
    """
    measured = choose_ffns(model, layers)
    check_documents(tokens)
    if statistics is None:
        statistics = collect(model, tokens, probes(measured, seed, budget), **collecting)
    regressed = besides(measured, seed, budget)
    replaced = evenly([ffn.layer for ffn in measured], loss_layers) if loss_tokens else []
    maps = {b.ffn.layer: affine_map(b, statistics) for b in regressed if b.ffn.layer in replaced}
    added = affine_losses(model, tokens, maps, loss_tokens, **collecting)
    rows = [layer_row(b, statistics, added.get(b.ffn.layer, NO_LOSS)) for b in regressed]
    settings = settings_of(model, tokens, seed, **collecting)
    settings |= {"d_model": measured[0].d_model, "budget": budget, "weights": "raw"}
    settings |= {"loss_tokens": loss_tokens, "loss_layers": replaced}
    return Nonlinearity(rows, settings)


def affine_map(
    beside: Beside, statistics: Mapping[str, Any], half: int = 0
) -> tuple[AffineMap, Float[Tensor, " d_model"]]:
    """The best affine map x -> y on half of the documents, and the mean of y there."""
    part = ordinary(beside, statistics, half)
    y = written(beside, part, statistics, half)
    return _to_y(beside, fit(part), y), y.mean


def _to_y(beside: Beside, found: AffineMap, y: Paired) -> AffineMap:
    if not beside.whole:
        return fit(y)
    return AffineMap(found.weights[:, beside.of_hidden], found.offset[beside.of_hidden]).into(*writing(beside.ffn))


def layer_row(beside: Beside, statistics: Mapping[str, Any], added: Loss) -> Row:
    """What was measured of one layer."""
    ffn = beside.ffn
    parts = [ordinary(beside, statistics, half) for half in HALVES]
    maps = [fit(part) for part in parts]
    judged = held_out(parts, maps)
    ys = [written(beside, part, statistics, half) for half, part in enumerate(parts)]
    y = held_out(ys, [_to_y(beside, found, part) for found, part in zip(maps, ys, strict=True)])
    unmasked = [everything(beside, part, statistics, half) for half, part in enumerate(ys)]
    whole = held_out(unmasked, [fit(part) for part in unmasked])
    h, random = (judged.targets(which) for which in (beside.of_hidden, beside.of_random))
    variance = (h.n @ h.variance)[beside.random_like]
    reach = ffn.canonical().values.double().norm(dim=1)[beside.chosen[beside.random_like]]
    x = Moments(statistics[f"hidden_rank/{ffn.layer}/in/0"].state())
    x.merge(statistics[f"hidden_rank/{ffn.layer}/in/1"])
    return Row(
        layer=ffn.layer,
        tokens=x.n,
        apart=sum(part.n for part in unmasked) - x.n,
        r2=y.share,
        r2_spread=y.spread,
        r2_unmasked=whole.share,
        r2_null=random.weighted(variance * reach**2),
        linear_share=h.share,
        linear_share_spread=h.spread,
        linear_share_null=random.weighted(variance),
        linear_share_gaussian=sp.linear_share(ACTIVATIONS[ffn.activation], ffn.gated),
        soft_rank_in=sp.soft_rank(sp.eigenvalues(x.compute().centred)),
        neurons=beside.neurons,
        **affine_ranks(beside, parts, maps, statistics),
        **added,
    )

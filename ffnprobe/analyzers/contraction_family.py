"""What do contraction, pruning, FFN and attention matter as models differ in the expansion ratio alone?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..corpus import LENGTH, Corpus, pack
from ..errors import InputError
from ..figure import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, caption, legend_below, new_figure, styled
from ..models import Model, context_length, ffns, load_model, tokenizer_of
from ..result import Result, column
from .attention_share import attention_share
from .contraction import contraction

COLOURS = (BLACK, GREEN, BLUE, ORANGE)  # of arms
WIDTHS = (SKY, BLUE, GREEN, ORANGE, PURPLE, BLACK)  # of expansions


@dataclass(frozen=True)
class Row:
    model: str = column("", "which model")
    arm: str = column("", "models of one arm differ in the expansion alone: activation, and whether it is gated")
    layer: int = column("", "layer")
    d_mlp: int = column("neurons", "width of h")
    expansion: float = column("", "d_mlp / d_model")
    selectivity: float = column("0..1", "share of the variance of h that the contraction keeps")
    blind: float = column("0..1", "the same of an isotropic h")
    permuted: float = column("0..1", "the same with the values of other neurons")
    ablated: float = column("nats/token", "added to the loss when h is set to its mean")
    ablated_se: float = column("nats/token", "its standard error over documents")
    enough: int | None = column("directions", "of h, fewest from which on 95% of that is kept")
    neurons: list[int] = column("neurons", "neurons that are kept, the others at their means")
    random: list[float] = column("0..1", "share of it that random ones keep, for each of them")
    contribution: list[float] = column("0..1", "share that those with the largest E|h| |value| keep")
    ffn_delta: float = column("nats/token", "added to the loss when the FFN writes its mean")
    attention_delta: float = column("nats/token", "added to the loss when attention writes its mean")
    both_delta: float = column("nats/token", "added when both do")
    interaction: float = column("nats/token", "both - (FFN + attention); above 0 redundant, below 0 synergetic")
    interaction_se: float = column("nats/token", "its standard error over documents")
    loss: float = column("nats/token", "of the whole model on the tokens held out")

    @property
    def ffn_share(self) -> float:
        """Of the losses without FFN and without attention; noise may carry it out of 0..1."""
        return self.ffn_delta / (self.ffn_delta + self.attention_delta)


@dataclass(frozen=True)
class ContractionFamily(Result):
    name: ClassVar[str] = "contraction_family"
    question: ClassVar[str] = (
        "What do contraction, pruning, FFN and attention matter as models differ in the expansion ratio alone?"
    )
    row_type: ClassVar[type] = Row

    @property
    def arms(self) -> list[str]:
        """The one with the most models first."""
        arms = sorted({row.arm for row in self.rows})
        return sorted(arms, key=lambda arm: -len({row.d_mlp for row in self.rows if row.arm == arm}))

    def series(self, arm: str, measure: str) -> dict[float, float]:
        """The measure at each expansion: the median over layers."""
        rows = [row for row in self.rows if row.arm == arm]
        found = {row.expansion: [getattr(r, measure) for r in rows if r.d_mlp == row.d_mlp] for row in rows}
        return {r: median(found[r]) for r in sorted(found)}

    def findings(self) -> list[str]:
        sentences = []
        for arm in self.arms:
            kept, null, other = (self.series(arm, name) for name in ("selectivity", "blind", "permuted"))
            share, together = self.series(arm, "ffn_share"), self.series(arm, "interaction")
            each = (
                f"r = {r:.3g}: {kept[r]:.0%} of the variance of h kept (isotropic {null[r]:.0%}, values of other "
                f"neurons {other[r]:.0%}), FFN {share[r]:.0%} of the losses without FFN and without attention, "
                f"interaction {together[r]:+.3f}"
                for r in kept
            )
            sentences.append(f"{arm}: {'; '.join(each)} (median layers).")
        return sentences

    @styled
    def plot(self) -> Figure:
        about = caption(self.settings, "median layer", f"losses on {self.settings['held_out']:,} tokens")
        figure, (kept, pruned, share, together) = new_figure(4, about)
        for arm, colour in zip(self.arms, COLOURS, strict=False):
            for axes, measure in ((kept, "selectivity"), (share, "ffn_share"), (together, "interaction")):
                series = self.series(arm, measure)
                axes.plot(list(series), list(series.values()), "o-", color=colour, label=arm)
                rows = [row for row in self.rows if row.arm == arm]
                each = [getattr(row, measure) for row in rows]
                axes.plot([row.expansion for row in rows], each, ".", color=colour, alpha=0.4)
            null = self.series(arm, "permuted")
            kept.plot(list(null), list(null.values()), "s--", color=colour, alpha=0.5)
        null = self.series(self.arms[0], "blind")
        kept.plot(list(null), list(null.values()), ":", color=GREY, label="isotropic h")
        kept.plot([], [], "s--", color=GREY, label="values of other neurons")
        self._pruned(pruned)
        kept.set(title="Variance of h that is kept", ylabel="share in the row space of the values", ylim=(0, 1.02))
        share.axhline(0.5, color=GREY, linestyle="--", label="as much as attention")
        share.set(title="FFN beside attention", ylabel="FFN's share of both losses", ylim=(-0.02, 1.02))
        together.axhline(0, color=GREY, linestyle="--", label="each for itself")
        together.set_yscale("symlog", linthresh=0.01)
        together.set(title="Redundant above 0, synergetic below", ylabel="interaction (nats/token)")
        for axes in (kept, share, together):
            axes.set_xscale("log", base=2)
            axes.set_xlabel("expansion d_mlp / d_model (points: layers)")
        for axes in (kept, pruned, share, together):
            legend_below(axes)
        return figure

    def _pruned(self, axes: Axes) -> None:
        arm = self.arms[0]
        rows = [row for row in self.rows if row.arm == arm]
        widths = sorted({row.expansion for row in rows})
        for r, colour in zip(widths, WIDTHS, strict=False):
            some = [row for row in rows if row.expansion == r]
            for which, style in (("contribution", "o-"), ("random", "s:")):
                at = [r * kept / some[0].d_mlp for kept in some[0].neurons]
                values = [median(getattr(row, which)[i] for row in some) for i in range(len(at))]
                label = f"r = {r:.3g}" if which == "contribution" else None
                axes.plot(at, values, style, color=colour, alpha=1 if label else 0.5, label=label)
        axes.plot([], [], "s:", color=GREY, label="random neurons")
        axes.set_xscale("log", base=2)
        axes.set(title=f"Pruned, by contribution ({arm})", xlabel="neurons kept / d_model")
        axes.set_ylabel("share of what h gains the loss")


def contraction_family(
    specs: Sequence[str | Path],
    corpus: Corpus,
    *,
    tokens: int = 16_384,
    held_out: int = 2048,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    load: Callable[..., Model] = load_model,
    say: Callable[[str], None] = lambda line: None,
    **collecting: Any,
) -> ContractionFamily:
    """`contraction` and `attention_share` of all layers of models that differ in their expansion.

    Args:
        specs: what `load_model` takes.
        corpus: text that no model was trained on.
        tokens: of the corpus.
        held_out: of these, tokens on which losses are measured.
        layers: all by default.
        load: called with each spec.
        collecting: passed to `collect` (batch, sink_factor, nonfinite).

    Raises:
        InputError: fewer than two models.
    """
    if len(specs) < 2:
        raise InputError(f"got {len(specs)} model: give at least two that differ in the expansion")
    rows: list[Row] = []
    settings: dict[str, Any] = {}
    for spec in specs:
        say(f"measuring {spec}")
        model = load(spec)
        length = min(LENGTH, context_length(model))
        text = pack(corpus, tokenizer_of(model), tokens=tokens, length=length, seed=seed)
        shared: dict[str, Any] = {"held_out": held_out, "seed": seed, **collecting}
        chosen = list(layers) if layers is not None else [ffn.layer for ffn in ffns(model)]
        narrowed = contraction(model, text, layers=chosen, causal_layers=chosen, **shared)
        beside = attention_share(model, text, layers=chosen, **shared)
        settings = settings or dict(narrowed.settings) | {"model": ", ".join(Path(each).name for each in specs)}
        arm = ffns(model)[0].activation + (", gated" if ffns(model)[0].gated else "")
        for row, other in zip(narrowed.rows, beside.rows, strict=True):
            keeps: dict[str, Any] = {
                which: [row.keeps(added) for added in getattr(row, f"{which}_delta")]
                for which in ("random", "contribution")
            }
            names = ("ffn_delta", "attention_delta", "both_delta", "interaction", "interaction_se", "loss")
            same = ("layer", "d_mlp", "selectivity", "blind", "permuted", "ablated", "ablated_se", "enough")
            rows.append(
                Row(
                    model=Path(spec).name,
                    arm=arm,
                    expansion=row.d_mlp / row.d_model,
                    neurons=row.neurons,
                    **keeps,
                    **{name: getattr(row, name) for name in same},
                    **{name: getattr(other, name) for name in names},
                )
            )
    return ContractionFamily(rows, settings)

"""How many directions does the hidden layer use, as models differ in the expansion ratio alone?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any, ClassVar

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..corpus import LENGTH, Corpus, Tokens, pack
from ..errors import InputError
from ..figure import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, caption, legend_below, new_figure, styled
from ..models import Model, context_length, load_model, tokenizer_of
from ..result import Result, column
from ..stream import settings_of
from .expansion_controls import BLOCKS, MATCHED, RANDOM, STEP_0, SUBSET, TRAINED, controlled, subsets, untrained

COLOURS = (BLACK, GREEN, BLUE, ORANGE)  # of arms


@dataclass(frozen=True)
class Row:
    model: str = column("", "which model")
    arm: str = column("", "models of one arm differ in the expansion alone: activation, and whether it is gated")
    state: str = column(
        "",
        "trained; step 0: before training; random features: Gaussian keys of the trained norms on the trained x; "
        "matched: each at its trained variance; subset of the widest: so many neurons of the widest model, drawn",
    )
    seed: int = column("", "of the training")
    layer: int = column("", "layer")
    d_mlp: int = column("neurons", "width of h")
    expansion: float = column("", "d_mlp / d_model")
    loss: float | None = column(
        "nats/token", "next-token loss in the same documents, of trained and step 0; none of an encoder"
    )
    tokens: int = column("tokens", "ordinary tokens measured: neither sinks nor special")
    sinks: int = column("tokens", "attention sinks, set apart by norm")
    special: int = column("tokens", "special tokens, set apart")
    participation_ratio: float = column("directions", "(sum l)^2 / sum l^2 of the covariance of h: the hard rank")
    participation_ratio_debiased: float | None = column("directions", "the same, corrected for finite tokens")
    soft_rank: float = column("directions", "exp of the entropy of the normalised eigenvalues")
    soft_rank_extrapolated: float | None = column("directions", "soft rank at endless tokens, from half-samples")
    erank_rv: float = column("directions", "exp of the entropy of the singular values (Roy & Vetterli)")
    stable_rank: float = column("directions", "sum l / max l")
    rank_at_90: float = column("directions", "fewest with 90% of the variance; wants 50 tokens a dimension")
    rank_at_99: float = column("directions", "fewest with 99% of the variance; wants 50 tokens a dimension")
    numerical_rank: float = column("directions", "eigenvalues above rounding")
    participation_ratio_unmasked: float | None = column("directions", "with sinks and special tokens left in")
    soft_rank_unmasked: float | None = column("directions", "with sinks and special tokens left in")
    closed_form: float | None = column(
        "directions", "what random plain neurons have by 1 / (rho^2 / hard rank of x + 1 / d_mlp), x isotropic"
    )
    soft_rank_halves: list[float] = column("nats", "ln of the soft rank of each half-sample, less their mean")
    participation_ratio_halves: list[float] = column("nats", "the same of the hard rank")


@dataclass(frozen=True)
class Expansion(Result):
    name: ClassVar[str] = "expansion"
    question: ClassVar[str] = (
        "How many directions does the hidden layer use, as models differ in the expansion ratio alone?"
    )
    row_type: ClassVar[type] = Row

    @property
    def arms(self) -> list[str]:
        return sorted({row.arm for row in self.rows}, key=lambda arm: -len(self.series(arm, TRAINED, "soft_rank")))

    def series(self, arm: str, state: str, measure: str) -> dict[int, float]:
        """The measure at each width: the median over layers and seeds."""
        rows = self._rows(arm, state)
        widths = sorted({row.d_mlp for row in rows})
        found = {width: [getattr(row, measure) for row in rows if row.d_mlp == width] for width in widths}
        return {width: median(values) for width, values in found.items() if None not in values}

    def findings(self) -> list[str]:
        sentences = []
        for arm in self.arms:
            soft, hard = (self.series(arm, TRAINED, m) for m in ("soft_rank", "participation_ratio"))
            null = self.series(arm, null_of(arm), "soft_rank")
            loss = self.series(arm, TRAINED, "loss")
            narrow, wide = min(soft), max(soft)
            if narrow == wide:
                continue
            sentences.append(
                f"{arm}: {wide / narrow:.3g} times the width multiplies the soft rank of h by "
                f"{soft[wide] / soft[narrow]:.2f} ({soft[narrow]:.1f} to {soft[wide]:.1f}, median layer) and the "
                f"hard rank by {hard[wide] / hard[narrow]:.2f} ({hard[narrow]:.1f} to {hard[wide]:.1f}); random "
                f"features on the same inputs multiply the soft rank by {null[wide] / null[narrow]:.2f}."
            )
            if loss:
                sentences[-1] += f" The loss goes from {loss[narrow]:.3f} to {loss[wide]:.3f} nats a token."
            subset = self.series(arm, SUBSET, "soft_rank")
            if narrow in subset:
                sentences.append(
                    f"{arm}: {narrow} neurons drawn from the {wide} of the widest model have a soft rank of "
                    f"{subset[narrow]:.1f}; the model that was trained with {narrow} has {soft[narrow]:.1f}."
                )
        return sentences

    @styled
    def plot(self) -> Figure:
        learnt = any(row.loss is not None for row in self.rows)
        figure, panels = new_figure(
            3 + learnt, caption(self.settings, "median layer", "sinks and special tokens set apart")
        )
        arm = self.arms[0]
        for axes, measure, title in (
            (panels[0], "soft_rank", "Soft rank"),
            (panels[1], "participation_ratio", "Hard rank"),
        ):
            self._ranks(axes, arm, measure)
            axes.set_yscale("log", base=2)
            axes.set(title=f"{title} ({arm})", ylabel="rank of h (directions)")
        for arm, colour in zip(self.arms, COLOURS, strict=False):
            for state, mark in ((TRAINED, "o-"), (null_of(arm), "^--")):
                share = {width: rank / width for width, rank in self.series(arm, state, "soft_rank").items()}
                self._draw(panels[2], arm, share, mark, color=colour, label=f"{arm}, {state}")
            if learnt:
                self._draw(panels[3], arm, self.series(arm, TRAINED, "loss"), "o-", color=colour, label=arm)
        panels[2].set(title="Share of the width in use", ylabel="soft rank of h / d_mlp", ylim=(0, 1))
        if learnt:
            panels[3].set(title="Held-out loss", ylabel="loss (nats/token)")
        for axes in panels:
            axes.set_xscale("log", base=2)
            axes.set_xlabel("expansion, d_mlp / d_model")
            legend_below(axes)
        return figure

    def _ranks(self, axes: Axes, arm: str, measure: str) -> None:
        trained = self.series(arm, TRAINED, measure)
        self._draw(
            axes, arm, {w: float(w) for w in trained}, "-", color="#CCCCCC", label="ceiling: every neuron its own"
        )
        layers = [[getattr(row, measure) for row in self._rows(arm, TRAINED) if row.d_mlp == w] for w in trained]
        x = [self._ratio(arm)[width] for width in trained]
        band = ([*map(min, layers)], [*map(max, layers)])
        axes.fill_between(x, *band, color=BLACK, alpha=0.12, linewidth=0, label="all layers")
        shown = {
            STEP_0: (ORANGE, "s--"),
            null_of(arm): (GREY, "^--"),
            SUBSET: (BLUE, "v:"),
            TRAINED: (BLACK, "o-"),
        }
        for state, (colour, mark) in shown.items():
            self._draw(axes, arm, self.series(arm, state, measure), mark, color=colour, label=state)
        if measure == "participation_ratio":
            closed = self.series(arm, RANDOM, "closed_form")
            self._draw(axes, arm, closed, ":", color=PURPLE, label="closed form, isotropic x")
        # 95% over documents, from the half-samples of the median layer
        spread = [
            1.96
            * median(_rms(getattr(row, f"{measure}_halves")) for row in self._rows(arm, TRAINED) if row.d_mlp == w)
            for w in trained
        ]
        reach = [
            [rank * (1 - math.exp(-e)), rank * (math.exp(e) - 1)]
            for rank, e in zip(trained.values(), spread, strict=True)
        ]
        axes.errorbar(
            x, list(trained.values()), [*zip(*reach, strict=True)], fmt="none", color=BLACK, capsize=2, linewidth=1
        )

    def _draw(self, axes: Axes, arm: str, series: dict[int, float], mark: str, **style: Any) -> None:
        if series:
            axes.plot([self._ratio(arm)[width] for width in series], list(series.values()), mark, **style)

    def _rows(self, arm: str, state: str) -> list[Row]:
        return [row for row in self.rows if (row.arm, row.state) == (arm, state)]

    def _ratio(self, arm: str) -> dict[int, float]:
        return {row.d_mlp: row.expansion for row in self._rows(arm, TRAINED)}


def expansion(
    specs: Sequence[str | Path],
    corpus: Corpus,
    *,
    tokens: int = 16_384,
    seed: int = 0,
    load: Callable[..., Model] = load_model,
    say: Callable[[str], None] = lambda line: None,
    **collecting: Any,
) -> Expansion:
    """Every rank of h of models that differ in their expansion, with the controls that tell why it grows.

    Models of one activation form an arm. Beside each trained model stand random features on its own inputs
    (Gaussian keys with the norms of the trained ones; once more with each at its trained variance) and, for the
    models trained by us, the model before training; beside each arm, random subsets of the widest model's neurons:
    they tell whether a wider model has other features or only more of the same. The soft and the hard rank also
    come for 14 half-samples of the documents, balanced by a Hadamard matrix (McCarthy 1966), whose spread
    is that of the whole sample.

    Args:
        specs: what `load_model` takes; a folder that holds a `training.json` is of our family.
        corpus: text that no model was trained on.
        tokens: of the corpus, at most 64 of a document; for the loss four times as many, at most 256 of each.
        seed: of the sample, the random features and the subsets.
        load: called with each spec.
        collecting: passed to `collect` (batch, sink_factor).

    Raises:
        InputError: fewer than two models, or documents fewer than 16.
    """
    if len(specs) < 2:
        raise InputError(f"got {len(specs)} model: give at least two that differ in the expansion")
    rows: list[Row] = []
    settings: dict[str, Any] = {}
    widest: dict[str, tuple[int, str | Path]] = {}
    for spec in specs:
        say(f"measuring {spec}")
        model, text, longer = _loaded(load, spec, corpus, tokens, seed)
        settings = settings or settings_of(model, text, seed, **collecting) | {
            "model": ", ".join(Path(spec).name for spec in specs)
        }
        rows += [Row(**row) for row in controlled(model, text, longer, spec, seed, collecting)]
        rows += [Row(**row) for row in untrained(model, text, longer, spec, collecting)]
        here = (rows[-1].d_mlp, spec)
        widest[rows[-1].arm] = max(widest.get(rows[-1].arm, here), here, key=lambda pair: pair[0])
    for arm, (d_mlp, spec) in widest.items():
        if narrower := sorted({row.d_mlp for row in rows if row.arm == arm} - {d_mlp}):
            say(f"drawing neurons of {spec}")
            model, text, _ = _loaded(load, spec, corpus, tokens, seed)
            rows += [Row(**row) for row in subsets(model, text, spec, narrower, seed, collecting)]
    return Expansion(rows, settings)


def _rms(values: Sequence[float]) -> float:
    return math.sqrt(fmean(value**2 for value in values)) if values else 0.0


def null_of(arm: str) -> str:
    """Random gated units are decided by the few that meet the mean of x, unless each is brought to a variance."""
    return MATCHED if arm.endswith("gated") else RANDOM


def _loaded(
    load: Callable[..., Model], spec: str | Path, corpus: Corpus, n: int, seed: int
) -> tuple[Model, Tokens, Tokens]:
    """The model, tokens for its ranks, and more of each document for its loss."""
    model = load(spec)
    length = min(LENGTH, context_length(model))
    tokens = pack(corpus, tokenizer_of(model), tokens=n, length=length, seed=seed)
    if tokens.n_documents < 2 * BLOCKS:
        raise InputError(f"got {tokens.n_documents} documents: half-samples need {2 * BLOCKS}; give more tokens")
    longer = pack(corpus, tokenizer_of(model), tokens=4 * n, length=length, per_document=length, seed=seed)
    return model, tokens, longer

"""Over how many directions does a layer pass gradients, and how much more passes with it than without?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from .. import spectrum as sp
from ..corpus import Tokens
from ..errors import InputError
from ..ffn import ACTIVATIONS, FFN
from ..figure import BLACK, GREY, ORANGE, caption, legend_below, new_figure, styled
from ..models import Model
from ..result import FEWEST_LAYERS, Result, Verdict, beyond, column
from ..statistics import Sample
from ..stream import Probe, choose_ffns, collect, settings_of
from .gradient_passage import Passed, gradient_norms
from .jacobian import Exact, hutchinson, jacobian

EXACT = 1024  # d_model up to which the Jacobian itself is made
VECTORS = 64  # random ones beyond
QUANTILES = tuple(i / 16 for i in range(17))


@dataclass(frozen=True)
class Row:
    layer: int = column("", "layer")
    tokens: int = column("tokens", "ordinary tokens at which the Jacobian was taken")
    rank: float = column(
        "0..1", "participation ratio of JJ' over d_model, J = dy/dx of the FFN alone; mean of tokens"
    )
    rank_sd: float = column("0..1", "standard deviation over tokens")
    rank_null: float = column("0..1", "the same with random weights of the same norms, at the same tokens")
    rank_closed: float = column("0..1/2", "closed form at Gaussian weights and pre-activations: 1 / (2 + k / r)")
    gain: float = column("", "root mean square of J's singular values: |dy| / |dx| in a random direction")
    gain_null: float = column("", "the same with random weights")
    singular_values: list[float] = column(
        "", "of J, at 17 even quantiles from the smallest; mean of tokens; empty beyond the exact width"
    )
    condition: float | None = column("1..", "cond(I + J); median of tokens; none beyond the exact width")
    condition_null: float | None = column("1..", "the same with random weights")
    sequences: int = column("sequences", "sequences of the gradient norms; 0 where there is no next-token loss")
    gradient: float | None = column("1/norm", "norm of the loss's gradient behind the block, over ordinary tokens")
    passed: float | None = column("ratio", "norm of the gradient at the block's input over that behind it")
    passed_se: float | None = column("ratio", "standard error over sequences; none of a single one")
    passed_off: float | None = column("ratio", "the same with the FFN's output multiplied by 0")
    passed_null: float | None = column("ratio", "the same with random weights of the same norms")
    more: float | None = column("ratio", "passed - passed_off")
    more_se: float | None = column("ratio", "its standard error over sequences")

    @property
    def passes_more(self) -> bool:
        """More of the gradient passes with the FFN on than off, by more than 2 standard errors."""
        return self.more is not None and self.more > 2 * (self.more_se or 0)

    @property
    def beats_random(self) -> bool:
        """More passes than with random weights of the same norms."""
        return self.passed is not None and self.passed_null is not None and self.passed > self.passed_null


@dataclass(frozen=True)
class GradientFlow(Result):
    name: ClassVar[str] = "gradient_flow"
    question: ClassVar[str] = (
        "Over how many directions does a layer pass gradients, and how much more passes with it than without?"
    )
    row_type: ClassVar[type] = Row

    @property
    def judged(self) -> list[Row]:
        """The layers whose gradient norms were taken."""
        return [row for row in self.rows if row.sequences]

    def findings(self) -> list[str]:
        rank, null, closed = (
            median(getattr(r, m) for r in self.rows) for m in ("rank", "rank_null", "rank_closed")
        )
        sentences = [
            f"The Jacobian of a layer spreads over {rank:.2f} d_model directions (participation ratio of JJ', "
            f"median layer); with random weights at the same tokens over {null:.2f}, at Gaussian initialisation "
            f"over {closed:.2f}."
        ]
        if known := [r for r in self.rows if r.condition is not None and r.condition_null is not None]:
            worst = max(known, key=lambda r: r.condition or 0)
            typical, random = _median(known, "condition"), _median(known, "condition_null")
            sentences.append(
                f"cond(I + J), J of the FFN alone: {typical:.3g} (median layer), with random weights "
                f"{random:.3g}; largest at layer {worst.layer}: {worst.condition:.3g}."
            )
        if judged := self.judged:
            on, off, random = (
                median(getattr(r, m) for r in judged) for m in ("passed", "passed_off", "passed_null")
            )
            sentences.append(
                f"Of the gradient's norm behind a block {on:.2f} arrives before it, {off:.2f} with the FFN off, "
                f"{random:.2f} with random weights in it (median layer); clearly more with the FFN on "
                f"than off in {sum(row.passes_more for row in judged)} of {len(judged)} layers."
            )
        return sentences

    def verdicts(self) -> list[Verdict]:
        judged = self.judged
        n = len(judged)
        if n < FEWEST_LAYERS:
            return []
        more, learnt = sum(row.passes_more for row in judged), sum(row.beats_random for row in judged)
        return [
            Verdict(
                claim=6,
                rule=RULE,
                measured=f"clearly more with the FFN on than off in {more} of {n} layers, more than with random "
                f"weights in {learnt} of {n}",
                verdict=("supported" if beyond(learnt, n) else "mixed") if beyond(more, n) else "not supported",
                against=AGAINST,
            )
        ]

    @styled
    def plot(self) -> Figure:
        about = (f"J of the FFN alone, at {self.rows[0].tokens} tokens a layer",)
        figure, (rank, spectrum, condition, passed) = new_figure(4, caption(self.settings, *about))
        layers = [row.layer for row in self.rows]
        middle, sd = ([getattr(row, m) for row in self.rows] for m in ("rank", "rank_sd"))
        rank.errorbar(layers, middle, sd, fmt="o-", color=BLACK, capsize=2, label="trained ± sd of tokens")
        rank.plot(layers, [row.rank_null for row in self.rows], "--", color=GREY, label="random weights")
        rank.plot(layers, [row.rank_closed for row in self.rows], ":", color=GREY, label="Gaussian, closed form")
        rank.set(title="Directions of the Jacobian", ylabel="participation ratio of JJ' / d_model", ylim=(0, None))
        for row, colour in zip(*_ends(self.rows), strict=True):
            if row.singular_values:
                spectrum.plot(QUANTILES, row.singular_values, "o-", color=colour, label=f"layer {row.layer}")
        spectrum.set(title="Its singular values", xlabel="quantile", ylabel="singular value", yscale="log")
        for measure, mark, colour, label in (
            ("condition", "o-", BLACK, "trained"),
            ("condition_null", "--", GREY, "random weights"),
        ):
            known = [(r.layer, getattr(r, measure)) for r in self.rows if getattr(r, measure) is not None]
            condition.plot(*zip(*known, strict=True) if known else ([], []), mark, color=colour, label=label)
        condition.set(title="Beside the residual path", ylabel="cond(I + J)", yscale="log")
        at = [row.layer for row in self.judged]
        for measure, mark, colour, label in (
            ("passed", "o-", BLACK, "FFN on"),
            ("passed_off", "s--", ORANGE, "FFN off"),
            ("passed_null", "--", GREY, "random weights"),
        ):
            passed.plot(at, [getattr(row, measure) for row in self.judged], mark, color=colour, label=label)
        passed.set(title="Gradient through the block", ylabel="norm at the input / norm behind", yscale="log")
        for axes in (rank, spectrum, condition, passed):
            if axes is not spectrum:
                axes.set_xlabel("layer")
            legend_below(axes)
        return figure


# written before any pretrained model was measured
RULE = (
    "of the first half of the claim: supported if, in most layers (sign test, 5%), the gradient keeps more of its "
    "norm through the block with the FFN on than off, by more than 2 standard errors, and more than with random "
    "weights of the same norms; mixed if only the first holds"
)
AGAINST = (
    "Skip connections alone carry the gradient (He et al. 2016, identity mappings), a larger norm may as well "
    "explode, and at initialisation J has at most half of d_model directions, however wide the layer."
)


def probes(layers: Sequence[FFN], sampled: int = 8, seed: int = 0) -> dict[str, Probe]:
    """What `gradient_flow` needs of one pass over the tokens: a few inputs of each layer."""

    def make(sample: Tensor) -> Sample:
        return Sample.about(sample, sampled, seed)

    return {f"gradient_flow/{ffn.layer}/in": Probe(ffn.layer, "in", make) for ffn in layers}


def gradient_flow(
    model: Model,
    tokens: Tokens,
    *,
    layers: Sequence[int] | None = None,
    sampled: int = 8,
    gradient_tokens: int = 1024,
    seed: int = 0,
    statistics: Mapping[str, Any] | None = None,
    **collecting: Any,
) -> GradientFlow:
    """The Jacobian of every layer at a few ordinary tokens, and the gradient that passes its block.

    J is that of the FFN alone, y = f(x): without the norm before it, which would divide it by the norm of the
    residual stream, and without a norm behind. Exact up to d_model 1024; beyond, its rank comes from 64 random
    vectors (Hutchinson), without singular values. The gradient norms are of the whole block, norms included: with
    the FFN off, its output is multiplied by 0.

    Args:
        layers: the layers to measure; all by default.
        sampled: tokens a layer at which the Jacobian is taken.
        gradient_tokens: about as many tokens, in whole sequences, for the gradient norms; 0 leaves them out.
        seed: of the sample and of the random weights.
        statistics: what one `collect` over `probes(...)` gave, when several analyzers share a pass.
        collecting: passed to `collect` (batch, sink_factor, progress).

    Raises:
        InputError: a layer that is not there, or a number of tokens below 1.
    """
    if sampled < 1:
        raise InputError(f"got sampled={sampled}: give at least 1 token a layer")
    measured = choose_ffns(model, layers)
    if statistics is None:
        statistics = collect(model, tokens, probes(measured, sampled, seed), **collecting)
    passed: dict[int, Passed] = {}
    if gradient_tokens and model.cfg.attention_dir == "causal":
        some = tokens.sequences(slice(max(1, gradient_tokens // tokens.ids.shape[1])))
        random = {ffn.layer: ffn.randomised(seed) for ffn in measured}
        passed = gradient_norms(model, some, random, **collecting)
    rows = [
        Row(
            layer=ffn.layer,
            **jacobian_numbers(ffn, statistics[f"gradient_flow/{ffn.layer}/in"].compute().x, seed),
            **_gradient_numbers(passed.get(ffn.layer)),
        )
        for ffn in measured
    ]
    settings = settings_of(model, tokens, seed, **collecting)
    settings |= {"sampled": sampled, "gradient_tokens": gradient_tokens, "weights": "raw"}
    return GradientFlow(rows, settings | {"exact": EXACT, "vectors": VECTORS})


def jacobian_numbers(ffn: FFN, x: Float[Tensor, "n d_model"], seed: int, most: int = EXACT) -> dict[str, Any]:
    """Of one layer and of its null at some tokens: exact where d_model is at most `most`."""
    x = x.double()
    trained, null = ffn.to(torch.float64), ffn.canonical().randomised(seed).to(torch.float64)
    found: dict[str, Any] = {
        "tokens": len(x),
        "rank_closed": sp.random_jacobian_rank(ffn.expansion, ACTIVATIONS[ffn.activation], ffn.gated),
        "singular_values": [],
        "condition": None,
        "condition_null": None,
    }
    for layer, end in ((trained, ""), (null, "_null")):
        if ffn.d_model > most:
            generator = torch.Generator().manual_seed(1_000_003 * seed + ffn.layer)
            pairs = [hutchinson(layer, token, VECTORS, generator) for token in x]
            ranks, squares = torch.tensor(pairs, dtype=torch.float64).T
        else:
            each = [Exact(jacobian(layer, token)) for token in x]
            ranks, squares = torch.tensor([(one.rank, one.gain) for one in each], dtype=torch.float64).T
            found[f"condition{end}"] = median(one.condition for one in each)
            if not end:
                mean = torch.stack([one.singular for one in each]).mean(0)
                found["singular_values"] = torch.quantile(mean, torch.tensor(QUANTILES).to(mean)).tolist()
        found[f"rank{end}"] = float(ranks.mean()) / ffn.d_model
        found[f"gain{end}"] = float((squares.mean() / ffn.d_model).sqrt())
        if not end:
            found["rank_sd"] = float(ranks.std(correction=0)) / ffn.d_model
    return found


def _gradient_numbers(found: Passed | None) -> dict[str, Any]:
    names = ("gradient", "passed", "passed_se", "passed_off", "passed_null", "more", "more_se")
    if found is None:
        return dict.fromkeys(names) | {"sequences": 0}
    on, off, random = (
        (part / found.behind).nan_to_num(nan=1.0).tolist() for part in (found.on, found.off, found.random)
    )
    more = [a - b for a, b in zip(on, off, strict=True)]
    numbers = fmean(found.behind.tolist()), fmean(on), _se(on), fmean(off), fmean(random), fmean(more), _se(more)
    return dict(zip(names, numbers, strict=True)) | {"sequences": len(on)}


def _median(rows: Sequence[Row], measure: str) -> float:
    return median(getattr(row, measure) for row in rows)


def _se(values: list[float]) -> float | None:
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def _ends(rows: Sequence[Row]) -> tuple[list[Row], list[str]]:
    """First, middle and last layer, and their colours."""
    places = sorted({0, len(rows) // 2, len(rows) - 1})
    return [rows[i] for i in places], [ORANGE, BLACK, GREY][: len(places)]

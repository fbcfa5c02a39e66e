"""Does a layer answer with one of a few vectors: how much of its output does a code of the token tell?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, ClassVar

from matplotlib.figure import Figure

from ..corpus import Tokens
from ..errors import InputError
from ..ffn import FFN
from ..figure import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, caption, legend_below, new_figure, styled
from ..forward import evenly
from ..models import Model
from ..result import FEWEST_LAYERS, Result, Verdict, beyond, column
from ..statistics import Sample
from ..stream import Probe, choose_ffns, collect, settings_of
from .codebooks import Halves
from .coded_layer import AFFINE, FEWEST_CODES, KEPT, OF_H, OF_X, RIDGE, SIGNS, STRONGEST, TOP, coded_rows

CODES = {OF_X: ("o", BLACK), OF_H: ("s", BLUE), STRONGEST: ("^", GREEN), SIGNS: ("v", PURPLE)}
SPREAD = 6  # layers that are measured where none are named


@dataclass(frozen=True)
class Row:
    layer: int = column("", "layer")
    expansion: float = column("", "d_mlp / d_model")
    d_mlp: int = column("neurons", "neurons of the layer")
    code: str = column(
        "",
        "k-means of x, of h (weighed by the norms of the values if gated), or of signs: which pre-activations are "
        "positive; strongest neuron: argmax |h_i| |v_i|; beside them the affine map of x, and top neurons: the "
        "largest |h_i| |v_i| of each token, all others at their means",
    )
    size: int | None = column("", "codewords there are; of top neurons, how many; none of the affine map")
    r2: float = column("..1", "share of the output's variance told, in documents it was not fitted on")
    r2_se: float = column("", "its standard error over documents")
    random: float | None = column(
        "..1",
        "the same of a null: as many random tokens as centres (for the strongest neuron, of x, and as many as it "
        "has codewords in use), or random neurons of each token; none of the affine map",
    )
    permuted: float | None = column(
        "..1",
        "the same with codes, or outputs of the affine map, permuted over the fit tokens; none of top neurons",
    )
    perplexity: float | None = column("codewords", "exp of the entropy of codewords over test tokens")
    dead: float | None = column("0..1", "share of the codewords that no test token has")
    unseen: float | None = column("0..1", "share of the test tokens with a codeword that no fit token has")
    softness: float = column(
        "neurons", "exp of the entropy of h_i² |v_i|² / sum of a token, the layer's median token"
    )
    softness_null: float = column("neurons", "the same were all contributions Gaussian of one variance")
    fit_tokens: int = column("tokens", "ordinary tokens the codes and their outputs are fitted on")
    tokens: int = column("tokens", "ordinary tokens, of other documents, they are tested on")
    documents: int = column("documents", "of the test tokens")


@dataclass(frozen=True)
class Quantization(Result):
    name: ClassVar[str] = "quantization"
    question: ClassVar[str] = (
        "Does a layer answer with one of a few vectors: how much of its output does a code of the token tell?"
    )
    row_type: ClassVar[type] = Row

    @property
    def layers(self) -> list[int]:
        return sorted({row.layer for row in self.rows})

    def of(self, code: str, layer: int | None = None) -> list[Row]:
        """The rows of one code, of one layer or of all, smallest code first."""
        rows = [row for row in self.rows if row.code == code and layer in (None, row.layer)]
        return sorted(rows, key=lambda row: (row.size or 0, row.layer))

    def finest(self, code: str, layer: int) -> Row:
        """The row of the largest code of at most d_mlp codewords that was fitted."""
        return self.of(code, layer)[-1]

    def best(self, layer: int) -> Row:
        """The code, of any kind and size, that tells most of the layer's output."""
        return max((row for code in CODES for row in self.of(code, layer)), key=lambda row: row.r2)

    def findings(self) -> list[str]:
        sentences = []
        affine = _median(self.of(AFFINE), "r2")
        for code in CODES:
            rows = [self.finest(code, layer) for layer in self.layers]
            sentences.append(
                f"{code}, {_range([row.size or 0 for row in rows])} codewords: {_median(rows, 'r2'):.1%} "
                f"(± {_median(rows, 'r2_se'):.1%}, median layer) of the output's variance in other documents; the "
                f"null {_median(rows, 'random'):.1%}, permuted {_median(rows, 'permuted'):.1%}, the affine map of "
                f"x {affine:.1%}. Perplexity {_median(rows, 'perplexity'):.0f}, dead {_median(rows, 'dead'):.0%}."
            )
        top = {k: [row for row in self.of(TOP) if row.size == k] for k in KEPT}
        told = (
            f"{k}: {_median(rows, 'r2'):.1%} ({_median(rows, 'random'):.1%})" for k, rows in top.items() if rows
        )
        return [
            *sentences,
            f"The strongest neurons of each token, all others at their means (in brackets as many random ones): "
            f"{', '.join(told)}.",
            f"A token is written by {_median(self.rows, 'softness'):.0f} neurons (exp-entropy of contributions, "
            f"median layer; {_median(self.rows, 'softness_null'):.0f} were they Gaussian; 1 of a one-hot code).",
        ]

    def verdicts(self) -> list[Verdict]:
        n = len(self.layers)
        if n < FEWEST_LAYERS:
            return []
        best = [self.best(layer) for layer in self.layers]
        affine = [self.of(AFFINE, layer)[0] for layer in self.layers]
        lookup = sum(
            row.r2 - row.r2_se > max(map_.r2 + map_.r2_se, 0.5) for row, map_ in zip(best, affine, strict=True)
        )
        above = sum(row.r2 - 2 * row.r2_se > (row.random or 0) for row in best)
        return [
            Verdict(
                claim=4,
                rule="quantisation. In a layer, of all codes of at most d_mlp codewords the best one is taken. "
                "supported if in most layers (sign test, 5%) it tells over half of the output's variance in other "
                "documents, and more than the affine map of x does, by a standard error each; mixed if in most "
                "layers it only tells more than its random codebook, by 2 standard errors",
                measured=f"more than half and than the affine map in {lookup} of {n} layers, more than a random "
                f"codebook in {above}; median R² {_median(best, 'r2'):.3f}, random {_median(best, 'random'):.3f}, "
                f"affine {_median(affine, 'r2'):.3f}",
                verdict="supported" if beyond(lookup, n) else "mixed" if beyond(above, n) else "not supported",
                against="A layer's output is a composition: in 68% of cases or more it predicts a token that none "
                "of its memories does (Geva et al. 2021). Any smooth map of clustered inputs can be quantised.",
            )
        ]

    @styled
    def plot(self) -> Figure:
        figure, (by_size, by_layer, top) = new_figure(
            3, caption(self.settings, "tested on other documents", "sinks set apart")
        )
        for code, (mark, colour) in CODES.items():
            rows = self.of(code)
            sizes = sorted({row.size or 0 for row in rows})
            at = [[row for row in rows if row.size == size] for size in sizes]
            by_size.plot(sizes, [_median(some, "r2") for some in at], f"{mark}-", color=colour, label=code)
            null = [_median(some, "random") for some in at]
            if len(sizes) > 1:
                by_size.plot(sizes, null, ":", color=colour, linewidth=1)
            finest = [self.finest(code, layer) for layer in self.layers]
            by_layer.errorbar(
                self.layers,
                [row.r2 for row in finest],
                [2 * row.r2_se for row in finest],
                fmt=f"{mark}-",
                color=colour,
                label=code,
                capsize=2,
            )
        by_size.plot([], [], ":", color=GREY, label="its random codebook")
        affine = self.of(AFFINE)
        for axes in (by_size, top):
            axes.axhline(_median(affine, "r2"), color=ORANGE, linestyle="--", label=AFFINE)
        by_layer.plot(self.layers, [row.r2 for row in affine], "D--", color=ORANGE, label=AFFINE)
        finest = [self.finest(OF_X, layer) for layer in self.layers]
        by_layer.plot(self.layers, [row.random for row in finest], ":", color=GREY, label="random codebook of x")
        kept = sorted({row.size or 0 for row in self.of(TOP)})
        at = [[row for row in self.of(TOP) if row.size == k] for k in kept]
        top.plot(kept, [_median(some, "r2") for some in at], "o-", color=BLACK, label="strongest of each token")
        top.plot(kept, [_median(some, "random") for some in at], "--", color=GREY, label="random ones")
        by_size.set(title="Told by a code (median layer)", xlabel="codewords", ylabel="R² of the output")
        by_layer.set(title="With the most codewords", xlabel="layer", ylabel="R² of the output (± 2 se)")
        top.set(
            title="Told by a few neurons (median layer)", xlabel="neurons of each token", ylabel="R² of the output"
        )
        for axes in (by_size, top):
            axes.set_xscale("log", base=2)
        for axes in (by_size, by_layer, top):
            axes.set_ylim(min(0, *(row.r2 for row in self.rows)) - 0.05, 1.02)
            legend_below(axes)
        return figure


def probes(layers: Sequence[FFN], sample: int = 4096, seed: int = 0) -> dict[str, Probe]:
    """What `quantization` needs of one pass: x of a sample of tokens of every other document, and of the rest."""
    draw = partial(Sample.about, k=sample, seed=seed)
    return {
        f"quantization/{ffn.layer}/{half}": Probe(ffn.layer, "in", draw, block=(half, 2))
        for ffn in layers
        for half in (0, 1)
    }


def quantization(
    model: Model,
    tokens: Tokens,
    *,
    layers: Sequence[int] | None = None,
    sample: int = 4096,
    seed: int = 0,
    statistics: Mapping[str, Any] | None = None,
    **collecting: Any,
) -> Quantization:
    """How much of a layer's output y is E[y | code of the token]: R² = 1 - E|y - E[y | code]|² / Var y.

    Codes and their outputs are fitted on a sample of every other document and tested on the others. Only x is
    kept of the stream: h and y follow from it.

    Args:
        layers: the layers to measure; by default six, spread evenly.
        sample: at most so many tokens to fit on, and to test on. Near so many codewords each has one token, and
            tells nothing of others; larger codes are left out.
        seed: of the sample, of k-means and of the nulls.
        statistics: what one `collect` over `probes(...)` gave, when several analyzers share a pass.
        collecting: passed to `collect` (batch, sink_factor, progress).

    Raises:
        InputError: a layer that is not there, or fewer than 32 tokens in a half of the documents.
    """
    measured = choose_ffns(model, layers)
    if layers is None:
        measured = evenly(measured, SPREAD)
    if statistics is None:
        statistics = collect(model, tokens, probes(measured, sample, seed), **collecting)
    document = tokens.document.flatten()
    rows: list[Row] = []
    for ffn in measured:
        fit, test = (statistics[f"quantization/{ffn.layer}/{half}"] for half in (0, 1))
        if min(fit.n, test.n) < 2 * FEWEST_CODES:
            raise InputError(
                f"layer {ffn.layer}: {fit.n} and {test.n} tokens in the halves of the documents: give more text"
            )
        fit, test = fit.compute(), test.compute()
        halves = Halves(fit.x, test.x)
        rows += [Row(**row) for row in coded_rows(ffn, halves, document[test.at.cpu()], seed)]
    settings = settings_of(model, tokens, seed, **collecting)
    settings |= {"arm": measured[0].arm, "layers": [ffn.layer for ffn in measured]}
    settings |= {"sample": sample, "ridge": RIDGE, "weights": "raw"}
    return Quantization(rows, settings)


def _median(rows: Sequence[Row], measure: str) -> float:
    return median(value for row in rows if (value := getattr(row, measure)) is not None)


def _range(values: Sequence[int]) -> str:
    return f"{min(values):,}" if min(values) == max(values) else f"{min(values):,} to {max(values):,}"

"""How far does a layer act on a sum of two inputs other than on each of them?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any, ClassVar

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ..corpus import Tokens
from ..ffn import FFN
from ..figure import BLACK, BLUE, GREEN, GREY, ORANGE, caption, legend_below, new_figure, styled
from ..models import Model
from ..regression import HeldOut, Paired, cross_fitted
from ..result import FEWEST_LAYERS, Result, Verdict, beyond, column
from ..statistics import QuadraticMoments, Sample
from ..stream import Probe, choose_ffns, collect, settings_of
from .affine_probes import HALVES, SITES, Beside, besides, ordinary, written
from .affine_probes import probes as affine_probes
from .bilinear import bilinear
from .hidden_rank import check_documents
from .interaction_index import JUDGED, SCALES, at_judged, index_numbers
from .rank_probes import BUDGET

SAMPLED = 128  # tokens of the index


@dataclass(frozen=True)
class Row:
    layer: int = column("", "layer")
    tokens: int = column("tokens", "ordinary tokens measured: neither sinks nor special")
    r2_linear: float = column("..1", "held-out R2 of y on all of x")
    share: float = column("..1", "held-out R2 that products of the leading components of x add to that")
    share_spread: float = column("0..", "half the difference between the document halves")
    share_null: float = column("..1", "the same of random neurons of the same norms, at the trained variances")
    components_linear: float = column("..1", "held-out R2 of y on the leading components alone")
    components_share: float = column("..1", "R2 that their products add to that")
    components_share_null: float = column("..1", "the same of random neurons")
    index: list[float] = column(
        "0..", "|f(x+a+b) - f(x+a) - f(x+b) + f(x)| over |f(x+a) - f(x)| and |f(x+b) - f(x)|, rms, by scale"
    )
    index_spread: float = column("0..", "half the difference between halves of the sample, at the judged scale")
    index_directions: list[float] = column("0..", "the same with a and b random directions of the same norms")
    index_weights: list[float] = column("0..", "the same points, but random weights of the same norms")
    bilinear_output: float | None = column("directions", "hard rank of the bilinear tensor along its output")
    bilinear_output_null: float | None = column("directions", "the same of Gaussian weights of the same norms")
    bilinear_input: float | None = column("directions", "hard rank of the bilinear tensor along its input")
    bilinear_input_null: float | None = column("directions", "the same of Gaussian weights")
    bilinear_top: float | None = column("directions", "hard rank of what its top output direction multiplies")
    bilinear_top_null: float | None = column("directions", "the same of Gaussian weights")

    @property
    def multiplies(self) -> bool:
        """Products explain what no affine map does, by more than the document spread and than random neurons'."""
        return self.share - self.share_spread > max(0.0, self.share_null)

    @property
    def interacts(self) -> bool:
        """Two changes at once do more together than with random weights, by more than the spread of the sample."""
        return at_judged(self.index) - self.index_spread > at_judged(self.index_weights)


@dataclass(frozen=True)
class Interactions(Result):
    name: ClassVar[str] = "interactions"
    question: ClassVar[str] = "How far does a layer act on a sum of two inputs other than on each of them?"
    row_type: ClassVar[type] = Row

    def _median(self, of: Callable[[Row], float]) -> float:
        return median(map(of, self.rows))

    def findings(self) -> list[str]:
        rows, middle = self.rows, self._median
        k = self.settings["components"]
        real, directions, weights = (
            middle(lambda row, name=name: at_judged(getattr(row, name)))  # type: ignore[misc]
            for name in ("index", "index_directions", "index_weights")
        )
        sentences = [
            f"Products of the {k} leading components of x explain {middle(lambda r: r.share):.1%} of what a layer "
            f"writes beyond the {middle(lambda r: r.r2_linear):.0%} that is affine in all of x (held out, median "
            f"layer); of random neurons {middle(lambda r: r.share_null):.1%}. On those components alone: "
            f"{middle(lambda r: r.components_linear):.0%} affine and {middle(lambda r: r.components_share):.1%} "
            "more by products.",
            f"What two changes do together but not one by one is {real:.2f} of what they do one by one, along "
            "half the difference of real tokens (median layer); along random directions of the same norms "
            f"{directions:.2f}, with random weights {weights:.2f}.",
        ]
        if rows[0].bilinear_output is not None:
            output, null, entering, enter_null = (
                median(getattr(row, f"bilinear_{name}") for row in rows)
                for name in ("output", "output_null", "input", "input_null")
            )
            sentences.append(
                f"The bilinear tensor of gates, keys and values spreads over {output:.0f} directions that it "
                f"writes and {entering:.0f} that it reads (participation ratio, median layer); of Gaussian "
                f"weights {null:.0f} and {enter_null:.0f}."
            )
        return sentences

    def verdicts(self) -> list[Verdict]:
        n = len(self.rows)
        if n < FEWEST_LAYERS:
            return []
        products, index = sum(row.multiplies for row in self.rows), sum(row.interacts for row in self.rows)
        judged = beyond(products, n), beyond(index, n)
        return [
            Verdict(
                claim=5,
                rule=RULE,
                measured=f"products beyond random neurons in {products} of {n} layers, index above random weights "
                f"in {index} of {n}",
                verdict="supported" if all(judged) else "mixed" if any(judged) else "not supported",
                against=AGAINST,
            )
        ]

    @styled
    def plot(self) -> Figure:
        gated = self.rows[0].bilinear_output is not None
        about = caption(self.settings, f"{self.settings['components']} components", "held out by document")
        figure, panels = new_figure(3 + gated, about)
        products, index, scale = panels[:3]
        layers = [row.layer for row in self.rows]
        for measure, mark, colour, label in (
            ("share", "o-", BLACK, "beyond all of x"),
            ("share_null", "--", GREY, "beyond all of x, random neurons"),
            ("components_share", "s-", BLUE, "beyond the components"),
            ("components_share_null", ":", BLUE, "beyond the components, random"),
        ):
            products.plot(layers, [getattr(row, measure) for row in self.rows], mark, color=colour, label=label)
        products.set(title="Products of components", ylabel="added R² of y, held out")
        for measure, mark, colour, label in (
            ("index", "o-", BLACK, "differences of tokens"),
            ("index_directions", "s--", ORANGE, "random directions"),
            ("index_weights", "--", GREY, "random weights"),
        ):
            by_scale = [getattr(row, measure) for row in self.rows]
            index.plot(layers, [at_judged(values) for values in by_scale], mark, color=colour, label=label)
            typical = [median(values) for values in zip(*by_scale, strict=True)]
            scale.plot(SCALES, typical, mark, color=colour, label=label)
        index.set(title="Two changes at once", ylabel="interaction / linear terms", ylim=(0, None))
        scale.set(title="By size (median layer)", ylabel="interaction / linear terms", ylim=(0, None))
        scale.set_xlabel("size of the changes (differences of tokens)")
        if gated:
            parts = (("output", GREEN, "written"), ("input", BLUE, "read"), ("top", ORANGE, "by its top output"))
            for name, colour, label in parts:
                for end, mark in (("", "o-"), ("_null", "--")):
                    ranks = [getattr(row, f"bilinear_{name}{end}") for row in self.rows]
                    shown = label + (", Gaussian" if end else "")
                    panels[3].plot(layers, ranks, mark, color=colour, label=shown)
            panels[3].set(title="Gate x key tensor", ylabel="participation ratio (directions)", yscale="log")
        for axes in panels:
            if axes is not scale:
                axes.set_xlabel("layer")
            legend_below(axes)
        return figure


# written before any pretrained model was measured
RULE = (
    "supported if, in most layers (sign test, 5%), products of the leading components of x explain what the layer "
    "writes beyond the best affine map of all of x, held out by document, by more than the document spread and "
    f"than they do for random neurons; and two changes of {JUDGED:g} token differences interact more than with "
    "random weights; mixed if only one holds"
)
AGAINST = (
    "First-order effects alone find circuits better than exact patching did (attribution patching, Syed et al. "
    "2023), and any nonlinear layer, random ones too, lets features interact."
)


def probes(layers: Sequence[FFN], seed: int = 0, budget: int = BUDGET, components: int = 16) -> dict[str, Probe]:
    """What `interactions` needs of one pass over the tokens: all of `nonlinearity`'s, by its names, and more."""
    wanted = affine_probes(layers, seed, budget)
    for beside in besides(layers, seed, budget):
        ffn = beside.ffn
        make = partial(QuadraticMoments.about, d=ffn.d_model, k=components)
        for half in HALVES:
            products = Probe(ffn.layer, SITES, make, of=beside, block=(half, 2))
            wanted[f"interactions/{ffn.layer}/products/{half}"] = products
        wanted[f"interactions/{ffn.layer}/in"] = Probe(
            ffn.layer, "in", partial(Sample.about, k=SAMPLED, seed=seed)
        )
    return wanted


def interactions(
    model: Model,
    tokens: Tokens,
    *,
    layers: Sequence[int] | None = None,
    components: int = 16,
    seed: int = 0,
    budget: int = BUDGET,
    statistics: Mapping[str, Any] | None = None,
    **collecting: Any,
) -> Interactions:
    """What of a layer is quadratic in what it reads, and what two changes do together beyond what each does alone.

    Products z_i z_j, i <= j, squares among them, are of the leading principal components of x in the pilot sample.
    The changes are differences of two other ordinary tokens each, at the size given by the scale. A sum x + a + b
    is no token: at scale 1 it lies well outside of what the layer was trained on.

    Args:
        layers: the layers to measure; all by default.
        components: leading components of x.
        seed: of random weights and directions, and of the sample of tokens.
        budget: bytes that the moments of regressions may take.
        statistics: what one `collect` over `probes(...)` gave, when several analyzers share a pass.
        collecting: passed to `collect` (batch, sink_factor, progress).

    Raises:
        InputError: a layer that is not there, a single document, or a budget that is too small.
    """
    measured = choose_ffns(model, layers)
    check_documents(tokens)
    if statistics is None:
        statistics = collect(model, tokens, probes(measured, seed, budget, components), **collecting)
    rows = []
    for beside in besides(measured, seed, budget):
        ffn = beside.ffn
        x = statistics[f"interactions/{ffn.layer}/in"].compute().x
        numbers = _regressions(beside, statistics) | index_numbers(ffn, x, seed) | _bilinear_numbers(ffn, seed)
        rows.append(Row(layer=ffn.layer, **numbers))
    settings = settings_of(model, tokens, seed, **collecting)
    settings |= {"components": components, "scales": list(SCALES), "sampled": SAMPLED, "budget": budget}
    return Interactions(rows, settings | {"weights": "raw"})


def _regressions(beside: Beside, statistics: Mapping[str, Any]) -> dict[str, Any]:
    d, parts = beside.ffn.d_model, [_joint(beside, statistics, half) for half in HALVES]
    products = len(parts[0].input_mean) - d
    basis = statistics[f"interactions/{beside.ffn.layer}/products/0"].basis
    everything = torch.eye(d + products).to(basis)
    leading = torch.block_diag(basis, everything[d:, d:])

    def of(matrix: Tensor) -> HeldOut:
        return cross_fitted([part.of(matrix) for part in parts])

    linear, quadratic = of(everything[:, :d]), cross_fitted(parts)
    few, few_quadratic = of(leading[:, : basis.shape[1]]), of(leading)
    y, random = slice(0, d), slice(d, None)
    hidden = [ordinary(beside, statistics, half) for half in HALVES]
    own = [part.n * part.variance[beside.of_hidden][beside.random_like] for part in hidden]
    weights = torch.stack(own).sum(0)

    def null(judged: HeldOut) -> float:
        return judged.targets(random).weighted(weights)

    gains = [1 - more.error[:, y].sum(1) / more.variance[:, y].sum(1) for more in (quadratic, linear)]
    gain = gains[0] - gains[1]
    return {
        "tokens": sum(part.n for part in parts),
        "r2_linear": linear.targets(y).share,
        "share": quadratic.targets(y).share - linear.targets(y).share,
        "share_spread": float(gain.max() - gain.min()) / 2,
        "share_null": null(quadratic) - null(linear),
        "components_linear": few.targets(y).share,
        "components_share": few_quadratic.targets(y).share - few.targets(y).share,
        "components_share_null": null(few_quadratic) - null(few),
    }


def _joint(beside: Beside, statistics: Mapping[str, Any], half: int) -> Paired:
    """[x | products] beside [y | h of random neurons], on half of the documents."""
    x = ordinary(beside, statistics, half)
    found = statistics[f"interactions/{beside.ffn.layer}/products/{half}"].compute()
    m, d = len(found.covariance), beside.ffn.d_model
    products, with_x, with_targets = found.covariance.split([m, d, len(x.mean)], dim=1)
    both = replace(
        x,
        input_mean=torch.cat([x.input_mean, found.input_mean]),
        inputs=torch.cat([torch.cat([x.inputs, with_x.T], dim=1), torch.cat([with_x, products], dim=1)]),
        cross=torch.cat([x.cross, with_targets]),
    )
    y, random = written(beside, both, statistics, half), both.targets(beside.of_random)
    return replace(
        both,
        mean=torch.cat([y.mean, random.mean]),
        cross=torch.cat([y.cross, random.cross], dim=1),
        variance=torch.cat([y.variance, random.variance]),
    )


def _bilinear_numbers(ffn: FFN, seed: int) -> dict[str, float | None]:
    numbers: dict[str, float | None] = {}
    for layer, end in ((ffn, ""), (ffn.canonical().randomised(seed), "_null")):
        found = bilinear(layer)
        for name in ("output", "input", "top"):
            numbers[f"bilinear_{name}{end}"] = found and getattr(found, name)
    return numbers

"""Does more width give finer quantisation and more clusters, in models that differ in the width alone?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any, ClassVar

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..errors import InputError
from ..figure import BLACK, BLUE, GREEN, GREY, ORANGE, caption, legend_below, new_figure, styled
from ..result import Result, Verdict, column
from ..scaling import Scaling, fit_scaling
from .coded_layer import FEWEST_CODES, OF_H, OF_X
from .experts import AT, Experts
from .kept_experts import CLUSTERS, ORACLE, RANDOM
from .quantization import Quantization

FINEST_X, FINEST_H = "lost to d_mlp codewords of x", "lost to d_mlp codewords of h"
EQUAL = "lost to equal codewords of x"
SATURATED = "codewords of x at saturation"
PARTS = f"lost to {AT:.0%} of the clusters"
MEASURES = {FINEST_X: BLACK, FINEST_H: BLUE, EQUAL: GREEN, SATURATED: BLACK, PARTS: ORANGE}
ENOUGH = 0.95  # of the largest R² over sizes: where it saturates
FEWEST_WIDTHS = 6  # below, no rule is applied


@dataclass(frozen=True)
class Row:
    model: str = column("", "which model")
    arm: str = column("", "models of one arm differ in the expansion alone: activation, and whether it is gated")
    layer: int = column("", "layer")
    d_mlp: int = column("neurons", "neurons of the layer")
    expansion: float = column("", "d_mlp / d_model")
    measure: str = column(
        "",
        "lost to ...: 1 - R² of the output in other documents, with a k-means codebook of d_mlp codewords, of as "
        "many as the narrowest model of the arm has neurons, or with a fifth of the clusters of neurons, chosen "
        "by an oracle; codewords at saturation: the fewest with 95% of the largest R² of up to d_mlp codewords",
    )
    value: float = column("", "1 - R², or codewords")
    null: float = column("", "the same with random tokens as centres; with random parts of the neurons")


@dataclass(frozen=True)
class Laws:
    """How a measure, its null and their ratio go with the width: a law a layer, of which the median is told."""

    measure: list[Scaling]
    null: list[Scaling]
    ratio: list[Scaling]

    @property
    def widths(self) -> int:
        return self.measure[0].n

    def below(self, of: str) -> bool:
        """Is the exponent below 0: the upper end of its 95% interval, median layer?"""
        return median(law.high for law in getattr(self, of)) < 0

    def above(self, of: str) -> bool:
        """Is it above 0: the lower end?"""
        return median(law.low for law in getattr(self, of)) > 0

    def written(self, of: str) -> str:
        laws = getattr(self, of)
        exponent, low, high = (median(getattr(law, name) for law in laws) for name in ("exponent", "low", "high"))
        return f"{exponent:+.3f} [{low:+.3f}, {high:+.3f}]"


@dataclass(frozen=True)
class QuantizationFamily(Result):
    name: ClassVar[str] = "quantization_family"
    question: ClassVar[str] = (
        "Does more width give finer quantisation and more clusters, in models that differ in the width alone?"
    )
    row_type: ClassVar[type] = Row

    @property
    def arms(self) -> list[str]:
        """The one with the most widths first."""
        return sorted({row.arm for row in self.rows}, key=lambda arm: -len(self.curve(arm, FINEST_X, "value")))

    def curve(self, arm: str, measure: str, of: str) -> dict[float, float]:
        """By expansion, the median over layers of the value or of its null."""
        rows = self._rows(arm, measure)
        ratios = sorted({row.expansion for row in rows})
        return {r: median(getattr(row, of) for row in rows if row.expansion == r) for r in ratios}

    def laws(self, arm: str, measure: str) -> Laws:
        rows = self._rows(arm, measure)
        layers = [[row for row in rows if row.layer == layer] for layer in sorted({row.layer for row in rows})]

        def fitted(of: str) -> list[Scaling]:
            return [
                fit_scaling([row.d_mlp for row in some], [_number(row, of) for row in some]) for some in layers
            ]

        return Laws(*(fitted(of) for of in ("value", "null", "ratio")))

    def unsaturated(self, arm: str) -> float:
        """The share of layers in which R² still grows at d_mlp codewords."""
        rows = self._rows(arm, SATURATED)
        return sum(row.value == row.d_mlp for row in rows) / len(rows)

    def findings(self) -> list[str]:
        sentences = []
        for arm in self.arms:
            for measure in MEASURES:
                value, null = (self.curve(arm, measure, of) for of in ("value", "null"))
                narrow, wide = min(value), max(value)
                if narrow == wide:
                    continue
                laws = self.laws(arm, measure)
                sentences.append(
                    f"{arm}, {measure}: {value[narrow]:.3g} at an expansion of {narrow:g}, {value[wide]:.3g} "
                    f"at {wide:g} (median layer); null {null[narrow]:.3g} and {null[wide]:.3g}. Exponent of the "
                    f"width {laws.written('measure')}, of the null {laws.written('null')}, of their ratio "
                    f"{laws.written('ratio')} (OLS 95%, N = {laws.widths})."
                )
            sentences.append(
                f"{arm}: R² does not saturate below d_mlp codewords in {self.unsaturated(arm):.0%} of the layers; "
                "where it does not, their number at saturation is only the largest that was tried."
            )
        return sentences

    def verdicts(self) -> list[Verdict]:
        return [verdict for arm in self.arms for verdict in self._judged(arm)]

    def _judged(self, arm: str) -> Iterator[Verdict]:
        if len(self.curve(arm, FINEST_X, "value")) < FEWEST_WIDTHS:
            return
        finer, more = self.laws(arm, FINEST_X), self.laws(arm, SATURATED)
        falls, faster = finer.below("measure"), finer.below("ratio")
        yield Verdict(
            claim=4,
            rule="finer quantisation. supported if what is lost to a codebook of x of d_mlp codewords falls with "
            "the width, and falls faster than with random codebooks of as many (95% intervals of both exponents, "
            "median layer, are below 0); mixed if it only falls: more codewords always tell more",
            measured=f"{arm}: exponents of the width {finer.written('measure')}, of the ratio to random codebooks "
            f"{finer.written('ratio')}, N = {finer.widths}",
            verdict="not supported" if not falls else "supported" if faster else "mixed",
            against="The number of codewords grows with the width by construction, and more of them tell more of "
            "any smooth map; that neurons are codewords does not follow.",
        )
        if self.unsaturated(arm) > 0.5:
            return  # what grows is the largest codebook that was tried
        grows, beyond_null = more.above("measure"), more.above("ratio")
        yield Verdict(
            claim=4,
            rule="more clusters. supported if the number of codewords at which R² saturates grows with the width, "
            "and grows faster than that of random codebooks (95% intervals of both exponents, median layer, are "
            "above 0); mixed if it only grows; no verdict where most layers do not saturate below d_mlp (which "
            "was added when that was seen)",
            measured=f"{arm}: exponents of the width {more.written('measure')}, of the ratio to random codebooks "
            f"{more.written('ratio')}, N = {more.widths}; none seen below d_mlp in {self.unsaturated(arm):.0%} of "
            "the layers",
            verdict="not supported" if not grows else "supported" if beyond_null else "mixed",
            against="Saturation is looked for among at most d_mlp codewords, and ends where codewords run out of "
            "tokens: with few tokens it grows with neither.",
        )

    @styled
    def plot(self) -> Figure:
        arm = self.arms[0]
        figure, (finer, more, parts) = new_figure(3, caption(self.settings, f"{arm}, median layer"))
        for measure in (FINEST_X, FINEST_H, EQUAL):
            self._draw(finer, arm, measure)
        self._draw(more, arm, SATURATED)
        ratios = {row.expansion: float(row.d_mlp) for row in self._rows(arm, SATURATED)}
        most = sorted(ratios.items())
        more.plot(*zip(*most, strict=True), "-", color="#CCCCCC", label="d_mlp, the most")
        self._draw(parts, arm, PARTS)
        finer.set(title="Lost to a codebook", ylabel="1 - R² of the output")
        more.set(title="Codewords at saturation", ylabel="codewords with 95% of the largest R²")
        parts.set(title="Lost to a fifth of the neurons", ylabel="1 - R² of the output")
        more.set_yscale("log", base=2)
        for axes in (finer, more, parts):
            axes.set_xscale("log", base=2)
            axes.set_xlabel("expansion, d_mlp / d_model")
            axes.plot([], [], ":", color=GREY, label="its null, at random")
            legend_below(axes)
        for axes in (finer, parts):
            axes.set_ylim(0, max(1.02, axes.get_ylim()[1]))
        return figure

    def _draw(self, axes: Axes, arm: str, measure: str) -> None:
        value, null = (self.curve(arm, measure, of) for of in ("value", "null"))
        rows = self._rows(arm, measure)
        band = [[row.value for row in rows if row.expansion == r] for r in value]
        colour = MEASURES[measure]
        axes.fill_between(list(value), [*map(min, band)], [*map(max, band)], color=colour, alpha=0.1, linewidth=0)
        axes.plot(list(value), list(value.values()), "o-", color=colour, label=measure.removeprefix("lost to "))
        axes.plot(list(null), list(null.values()), ":", color=colour, linewidth=1.2)

    def _rows(self, arm: str, measure: str) -> list[Row]:
        return [row for row in self.rows if (row.arm, row.measure) == (arm, measure)]


def quantization_family(coded: Sequence[Quantization], kept: Sequence[Experts]) -> QuantizationFamily:
    """What codes and experts keep of the output, against the width: both results of each member of a family.

    Args:
        coded, kept: of the same models in the same order, each of one arm and of all layers.

    Raises:
        InputError: fewer than two models, or other models in one than in the other.
    """
    names = [str(result.settings["model"]) for result in coded]
    if len(names) < 2 or names != [result.settings["model"] for result in kept]:
        others = [str(result.settings["model"]) for result in kept]
        raise InputError(f"got quantization of {names}, experts of {others}: give both of at least two models")
    narrowest: dict[str, int] = {}
    for result in coded:
        arm, width = str(result.settings["arm"]), min(row.d_mlp for row in result.rows)
        narrowest[arm] = min(narrowest.get(arm, width), width)
    rows = [
        row
        for one, other in zip(coded, kept, strict=True)
        for row in _model_rows(one, other, narrowest[str(one.settings["arm"])])
    ]
    settings = {**coded[0].settings, "model": ", ".join(names)}
    return QuantizationFamily(rows, {name: settings[name] for name in settings if name not in ("arm", "layers")})


def _model_rows(coded: Quantization, kept: Experts, narrowest: int) -> Iterator[Row]:
    for layer in coded.layers:
        of_x = coded.of(OF_X, layer)
        about: dict[str, Any] = {
            "model": coded.settings["model"],
            "arm": coded.settings["arm"],
            "layer": layer,
            "d_mlp": of_x[0].d_mlp,
            "expansion": of_x[0].expansion,
        }
        finest = {FINEST_X: coded.finest(OF_X, layer), FINEST_H: coded.finest(OF_H, layer)}
        # an exact equal may be missing where d_mlp is no power of two
        finest[EQUAL] = max((row for row in of_x if (row.size or 0) <= narrowest), key=lambda row: row.size or 0)
        for measure, row in finest.items():
            yield Row(**about, measure=measure, value=1 - row.r2, null=1 - (row.random or 0))
        sizes = [row.size or FEWEST_CODES for row in of_x]
        told = [[row.r2 for row in of_x], [row.random or 0 for row in of_x]]
        yield Row(**about, measure=SATURATED, value=saturation(sizes, told[0]), null=saturation(sizes, told[1]))
        at = [row for row in kept.rows if (row.layer, row.choice, row.share) == (layer, ORACLE, AT)]
        lost = {
            part: fmean(1 - (row.r2 or 0) for row in at if row.partition == part) for part in (CLUSTERS, RANDOM)
        }
        yield Row(**about, measure=PARTS, value=lost[CLUSTERS], null=lost[RANDOM])


def saturation(sizes: Sequence[int], told: Sequence[float], enough: float = ENOUGH) -> float:
    """The smallest size that tells 95% of the most told.

    >>> saturation([16, 32, 64, 128], [0.1, 0.5, 0.6, 0.61])
    64.0
    """
    least = max(told) - (1 - enough) * abs(max(told))
    return float(next(size for size, r2 in zip(sizes, told, strict=True) if r2 >= least))


def _number(row: Row, of: str) -> float:
    return row.value / row.null if of == "ratio" else getattr(row, of)

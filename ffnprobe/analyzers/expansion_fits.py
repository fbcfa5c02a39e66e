"""With which power of the width do the ranks of h grow, and does that exceed what is to be expected?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import ClassVar

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..errors import InputError
from ..figure import BLACK, BLUE, GREEN, GREY, ORANGE, caption, legend_below, new_figure, styled
from ..result import Result, Verdict, beyond, column
from ..scaling import SATURATES, exponent, fit_scaling
from ..shipped import shipped
from .expansion import Expansion, null_of
from .expansion_controls import MATCHED, RANDOM, STEP_0, SUBSET, TRAINED

SOFT, HARD, GAP = "soft_rank", "participation_ratio", "soft_rank / participation_ratio"
MEASURES = (
    SOFT,
    HARD,
    GAP,
    "participation_ratio_debiased",
    "soft_rank_extrapolated",
    "erank_rv",
    "stable_rank",
    "rank_at_90",
    "rank_at_99",
    "numerical_rank",
    "loss",
)
FEWEST_WIDTHS = 6  # below, no rule is applied
GPT2_EXPANSION = 4.0  # where local exponents part
RESAMPLES = 4000


@dataclass(frozen=True)
class Row:
    arm: str = column("", "activation, and whether it is gated")
    state: str = column("", "trained, step 0, or a control; see expansion")
    measure: str = column("", "which rank of h; a ratio of ranks has the difference of their exponents")
    widths: int = column("", "number of widths fitted")
    seeds: int = column("", "trainings of each width, the fewest")
    layers: int = column("", "layers")
    exponent: float = column("", "b of ln rank = ln A + b ln d_mlp, fitted layer by layer: the median layer")
    low: float = column("", "lower end of the 95% t-interval of least squares, median layer")
    high: float = column("", "its upper end")
    resampled_low: float = column("", "2.5% of b over resampled seeds, documents (where known) and layers")
    resampled_high: float = column("", "97.5% of it")
    theil_sen: float = column("", "median slope over all pairs of widths, median layer")
    theil_sen_low: float = column("", "lower end of its 95% interval, median layer")
    theil_sen_high: float = column("", "its upper end")
    below: float = column("", "b of expansions up to 4, median layer")
    above: float = column("", "b of expansions from 4 on, median layer")
    ceiling: float = column(
        "directions", "R_inf of 1/R = 1/R_inf + 1/(k d_mlp), median layer; inf where none is seen"
    )
    ceiling_wins_by: float = column("AICc", "that the law with the ceiling is better than the power, median layer")
    below_null: list[int] = column("neurons", "widths at which the median layer is below random features")


@dataclass(frozen=True)
class ExpansionFits(Result):
    name: ClassVar[str] = "expansion_fits"
    question: ClassVar[str] = (
        "With which power of the width do the ranks of h grow, and does that exceed what is to be expected?"
    )
    row_type: ClassVar[type] = Row

    @property
    def arms(self) -> list[str]:
        """The arm with the most widths first."""
        return sorted(
            {row.arm for row in self.rows}, key=lambda arm: -max(r.widths for r in self.rows if r.arm == arm)
        )

    def get(self, arm: str, state: str, measure: str) -> Row:
        return next(r for r in self.rows if (r.arm, r.state, r.measure) == (arm, state, measure))

    def findings(self) -> list[str]:
        sentences = []
        for arm in self.arms:
            for measure, words in ((SOFT, "soft rank"), (HARD, "hard rank")):
                sentences.append(
                    f"{arm}: the {words} of h grows as d_mlp to the {_written(self.get(arm, TRAINED, measure))}; "
                    f"random features {_written(self.get(arm, null_of(arm), measure))}; published for GPT-2 160M "
                    f"with ReLU² {_written_published(measure)}."
                )
            sentences += [f"{arm}: {sentence}" for sentence in self._decisions(arm)]
        return sentences

    def _decisions(self, arm: str) -> list[str]:
        """The three rules, fixed before the numbers were seen."""
        soft, gap, hard = (self.get(arm, TRAINED, measure) for measure in (SOFT, GAP, HARD))
        if soft.widths < FEWEST_WIDTHS:
            return [f"{soft.widths} widths; no rule is applied to fewer than {FEWEST_WIDTHS}."]
        null = self.get(arm, null_of(arm), GAP)
        replicated = gap.resampled_low > max(0.0, null.exponent)
        saturating = [row.measure for row in (soft, hard) if row.ceiling_wins_by > SATURATES]
        return [
            f"the soft rank {'grows' if replicated else 'is not shown to grow'} faster than the hard rank beyond "
            f"random features: difference of the exponents {_written(gap)}, of random features "
            f"{_written(null)} (rule: its 95% interval is above 0 and above that of random features).",
            f"by the hard rank, width is under-used at d_mlp {_listed(hard.below_null)}; by the soft rank, at "
            f"{_listed(soft.below_null)} (rule: below random features at equal width).",
            f"a ceiling is {'seen in the ' + ' and the '.join(saturating) if saturating else 'not seen'}: it is "
            f"better than the power by AICc {soft.ceiling_wins_by:.1f} (soft), {hard.ceiling_wins_by:.1f} (hard; "
            f"rule: by more than {SATURATES:g}).",
        ]

    def verdicts(self) -> list[Verdict]:
        verdicts = []
        for arm in self.arms:
            known = {row.measure: row for row in self.rows if (row.arm, row.state) == (arm, TRAINED)}
            soft, loss = known[SOFT], known.get("loss")
            if (n := soft.widths) < FEWEST_WIDTHS or loss is None:
                continue
            above = n - len(soft.below_null)
            grows, learnt = soft.resampled_low > 0 and loss.high < 0, beyond(above, n)
            verdicts.append(
                Verdict(
                    claim=2,
                    rule="supported if, over models that differ in the width alone, the soft rank of h grows with "
                    "it and the held-out loss falls with it (95% intervals of their exponents), and the soft rank "
                    "is above that of random features at most widths (sign test, 5%); mixed if only the first "
                    "two hold",
                    measured=f"{arm}: exponents of d_mlp: soft rank {_written(soft)}, loss {_written(loss)}; "
                    f"above random features at {above} of {n} widths",
                    verdict="not supported" if not grows else "supported" if learnt else "mixed",
                    against="A wider layer of random features has a higher rank too, up to 1.9 times that of its "
                    "input; and more parameters lower the loss wherever they are put.",
                )
            )
        return verdicts

    @styled
    def plot(self) -> Figure:
        figure, (exponents, local) = new_figure(2, caption(self.settings, "median layer, 95% intervals"))
        figure.set_figwidth(10)
        arm = self.arms[0]
        shown = ((TRAINED, BLACK), (STEP_0, ORANGE), (RANDOM, GREY), (MATCHED, GREEN), (SUBSET, BLUE))
        _forest(exponents, [row for row in self.rows if row.arm == arm], dict(shown))
        exponents.set(
            title=f"Exponent of d_mlp ({arm})", xlabel="b of rank = A d_mlp^b (thick: resampled, thin: OLS)"
        )
        for (state, colour), measure, line in ((s, m, l) for s in shown for m, l in ((SOFT, "o-"), (HARD, "^--"))):
            row = next((r for r in self.rows if (r.arm, r.state, r.measure) == (arm, state, measure)), None)
            if row:
                name = f"{state}, {'soft' if measure == SOFT else 'hard'}"
                local.plot([0, 1], [row.below, row.above], line, color=colour, label=name)
        local.set_xticks([0, 1], ["up to 4", "from 4 on"])
        local.set(title="Local exponent", xlabel="expansion d_mlp / d_model", ylabel="b", xlim=(-0.2, 1.2))
        legend_below(local)
        return figure


def expansion_fits(measured: Expansion, seed: int = 0) -> ExpansionFits:
    """Both laws of `scaling.fit_scaling` for every rank of every arm and control, with resampled intervals.

    Each layer is fitted by itself and the median layer is given. The resampling draws trainings (for each width),
    half-samples of the documents (the same at every width and layer) and layers (the same at every width), not
    widths; the t-interval takes the widths as drawn.

    Raises:
        InputError: no arm has two widths.
    """
    frame = measured.to_frame()
    rows = []
    for (arm, state), group in frame.groupby(["arm", "state"], sort=False):
        for measure in MEASURES:
            values = group.assign(value=_values(group, measure), off=_off(group, measure)).dropna(subset=["value"])
            if values.d_mlp.nunique() > 1:
                rows.append(
                    _fit(str(arm), str(state), measure, values, _null_values(frame, str(arm), measure), seed)
                )
    if not rows:
        raise InputError("no arm has two widths: give models that differ in the expansion alone")
    return ExpansionFits(rows, dict(measured.settings) | {"resamples": RESAMPLES})


def _values(frame: pd.DataFrame, measure: str) -> pd.Series:
    return frame[SOFT] / frame[HARD] if measure == GAP else frame[measure].astype(float)


def _off(frame: pd.DataFrame, measure: str) -> pd.Series:
    """ln of the measure in each half-sample, less their mean; 0 where they are not known."""
    soft, hard = (frame[f"{name}_halves"].map(np.asarray) for name in (SOFT, HARD))
    known = {SOFT: soft, HARD: hard, GAP: soft - hard}.get(measure)
    unknown = pd.Series([np.zeros(1)] * len(frame), frame.index)
    return unknown if known is None else known.where(known.map(len) > 0, unknown)


def _null_values(frame: pd.DataFrame, arm: str, measure: str) -> pd.Series:
    null = frame[(frame.arm == arm) & (frame.state == null_of(arm))]
    return null.assign(value=_values(null, measure)).groupby("d_mlp").value.median()


def _fit(arm: str, state: str, measure: str, values: pd.DataFrame, null: pd.Series, seed: int) -> Row:
    widths = np.array(sorted(values.d_mlp.unique()))
    ratio = values.drop_duplicates("d_mlp").set_index("d_mlp").expansion.loc[widths].to_numpy()
    layers = sorted(values.layer.unique())
    # width -> [seeds, layers] and [seeds, layers, half-samples]
    logs, off = [], []
    for width in widths:
        here = values[values.d_mlp == width].sort_values(["seed", "model", "layer"])
        logs.append(np.log(here.value.to_numpy()).reshape(-1, len(layers)))
        off.append(np.stack(list(here.off)).reshape(*logs[-1].shape, -1))
    ranks = np.exp(np.stack([of.mean(0) for of in logs]))  # [widths, layers]
    laws = [fit_scaling(widths, ranks[:, i]) for i in range(len(layers))]
    drawn = _resampled(np.log(widths), logs, off, np.random.default_rng(seed))
    typical = values.groupby("d_mlp").value.median()
    return Row(
        arm=arm,
        state=state,
        measure=measure,
        widths=len(widths),
        seeds=min(map(len, logs)),
        layers=len(layers),
        resampled_low=float(np.quantile(drawn, 0.025)),
        resampled_high=float(np.quantile(drawn, 0.975)),
        below=median(exponent(widths[ratio <= GPT2_EXPANSION], r[ratio <= GPT2_EXPANSION]) for r in ranks.T),
        above=median(exponent(widths[ratio >= GPT2_EXPANSION], r[ratio >= GPT2_EXPANSION]) for r in ranks.T),
        below_null=[int(w) for w in widths if w in null.index and typical[w] < null[w]],
        **{
            name: median(getattr(law, name) for law in laws)
            for name in (
                "exponent",
                "low",
                "high",
                "theil_sen",
                "theil_sen_low",
                "theil_sen_high",
                "ceiling",
                "ceiling_wins_by",
            )
        },
    )


def _resampled(
    x: np.ndarray, logs: Sequence[np.ndarray], off: Sequence[np.ndarray], random: np.random.Generator
) -> np.ndarray:
    """The median layer's exponent in RESAMPLES draws of trainings, half-samples and layers."""
    n_layers, n_halves = off[0].shape[1:]
    half = random.integers(n_halves, size=RESAMPLES)
    layer = random.integers(n_layers, size=(RESAMPLES, n_layers))
    y = []
    for values, deviation in zip(logs, off, strict=True):
        training = random.integers(len(values), size=(RESAMPLES, len(values)))
        drawn = values[training] + deviation[training, :, half[:, None]]  # [resamples, seeds, layers]
        y.append(np.take_along_axis(drawn.mean(1), layer, axis=1))
    centred = x - x.mean()
    slopes = np.einsum("w, w r l -> r l", centred, np.stack(y)) / (centred**2).sum()
    return np.median(slopes, axis=1)


def published() -> pd.DataFrame:
    """d_mlp, soft_rank and participation_ratio of Jha & Reagen 2026 (GPT-2 160M, ReLU²)."""
    return pd.read_csv(shipped("reference/rank_by_width.csv", "the published table", "get the file again"))


def _written(row: Row) -> str:
    resampled = f"[{row.resampled_low:.3f}, {row.resampled_high:.3f}]"
    return f"{row.exponent:.3f} {resampled} (OLS [{row.low:.3f}, {row.high:.3f}], N = {row.widths})"


def _written_published(measure: str) -> str:
    law = fit_scaling(published().d_mlp, published()[measure])
    return f"{law.exponent:.3f} [{law.low:.3f}, {law.high:.3f}] (OLS, N = {law.n})"


def _listed(widths: Sequence[int]) -> str:
    return ", ".join(map(str, widths)) or "no width"


def _forest(axes: Axes, rows: Sequence[Row], colours: dict[str, str]) -> None:
    """A line a measure and state: the exponent, its resampled interval thick, that of least squares thin."""
    names: list[str] = []
    for measure, words in ((SOFT, "soft rank"), (HARD, "hard rank"), (GAP, "soft less hard")):
        for row in (r for state in colours for r in rows if (r.state, r.measure) == (state, measure)):
            y, colour = len(names), colours[row.state]
            axes.plot([row.low, row.high], [y, y], "-", color=colour, linewidth=0.8)
            axes.plot([row.resampled_low, row.resampled_high], [y, y], "-", color=colour, linewidth=3)
            axes.plot(row.exponent, y, "o", color=colour, markersize=5)
            names.append(f"{words}, {row.state}")
        if measure != GAP:
            law = fit_scaling(published().d_mlp, published()[measure])
            axes.plot([law.low, law.high], [len(names)] * 2, "-", color="#CC79A7", linewidth=0.8)
            axes.plot(law.exponent, len(names), "D", color="#CC79A7", markersize=5)
            names.append(f"{words}, published (GPT-2 160M, ReLU²)")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.axvline(0, color=GREY, linewidth=0.8)

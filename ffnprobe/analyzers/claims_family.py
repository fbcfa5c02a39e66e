"""How do nonlinearity, interactions and gradients change, as models differ in the expansion ratio alone?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, ClassVar, NamedTuple

from matplotlib.figure import Figure

from ..corpus import LENGTH, Corpus, Tokens, pack
from ..errors import InputError
from ..figure import BLACK, GREEN, GREY, ORANGE, caption, legend_below, new_figure, styled
from ..models import Model, context_length, ffns, load_model, tokenizer_of
from ..result import FEWEST_LAYERS, Result, Verdict, beyond, column
from ..stream import collect, settings_of
from .expansion_controls import before_training
from .gradient_flow import AGAINST as AGAINST_GRADIENTS
from .gradient_flow import RULE as RULE_GRADIENTS
from .gradient_flow import gradient_flow
from .gradient_flow import probes as gradient_probes
from .interaction_index import at_judged
from .interactions import AGAINST as AGAINST_INTERACTIONS
from .interactions import RULE as RULE_INTERACTIONS
from .interactions import interactions
from .interactions import probes as interaction_probes
from .nonlinearity import AGAINST as AGAINST_NONLINEARITY
from .nonlinearity import RULE as RULE_NONLINEARITY
from .nonlinearity import nonlinearity

# title, axis, null
PANELS = {
    "r2": ("The layer as an affine map", "R² of y, held out", "random weights"),
    "loss_affine": ("Replaced by that map", "added loss (nats/token)", "by its mean"),
    "share": ("Products of components", "added R² of y, held out", "random neurons"),
    "index": ("Two changes at once", "interaction / linear terms", "random weights"),
    "rank": ("Directions of the Jacobian", "participation ratio / d_model", "random weights"),
    "passed": ("Gradient through the block", "norm with the FFN on / off", "random weights"),
}
# the measures whose criterion must hold in most layers, all of them or the first, and the rule
CLAIMS = {
    1: (("r2", "loss_affine"), False, RULE_NONLINEARITY, AGAINST_NONLINEARITY),
    5: (("share", "index"), False, RULE_INTERACTIONS, AGAINST_INTERACTIONS),
    6: (("passed", "passed_random"), True, RULE_GRADIENTS, AGAINST_GRADIENTS),
}


@dataclass(frozen=True)
class Row:
    model: str = column("", "which model")
    arm: str = column("", "models of one arm differ in the expansion alone: activation, and whether it is gated")
    layer: int = column("", "layer")
    d_mlp: int = column("neurons", "width of h")
    expansion: float = column("", "d_mlp / d_model")
    measure: str = column(
        "",
        "r2, linear_share, soft_rank_nonlinear, loss_affine, share, index, rank, condition: columns of "
        "nonlinearity, interactions and gradient_flow (index at the judged scale); rank_closed: rank beside its "
        "closed form; passed: gradient norm with the FFN on over off; passed_random: on over random weights",
    )
    value: float = column("", "of the trained model")
    null: float | None = column("", "random weights or neurons; of loss_affine: the mean in place of the layer")
    step_0: float | None = column("", "of the model before training; none of a model that is not ours")
    holds: bool | None = column("", "the layer meets the criterion of the verdict; none where there is no such")


@dataclass(frozen=True)
class ClaimsFamily(Result):
    name: ClassVar[str] = "claims_family"
    question: ClassVar[str] = (
        "How do nonlinearity, interactions and gradients change, as models differ in the expansion ratio alone?"
    )
    row_type: ClassVar[type] = Row

    @property
    def arms(self) -> list[str]:
        return sorted({row.arm for row in self.rows}, key=lambda arm: -len(self.series(arm, "r2", "value")))

    def series(self, arm: str, measure: str, of: str) -> dict[float, float]:
        """A measure, its null or its value at step 0 at each expansion: the median over layers."""
        rows = [row for row in self.rows if (row.arm, row.measure) == (arm, measure)]
        found = {
            r: [getattr(x, of) for x in rows if x.expansion == r] for r in sorted({x.expansion for x in rows})
        }
        return {r: median(values) for r, values in found.items() if None not in values}

    def findings(self) -> list[str]:
        arm = self.arms[0]
        sentences = []
        for measure, (title, unit, null) in PANELS.items():
            trained = self.series(arm, measure, "value")
            if len(trained) > 1:
                low, high = min(trained), max(trained)
                by_null, before = (self.series(arm, measure, of) for of in ("null", "step_0"))
                more = f"; {null} {by_null[low]:.3g} to {by_null[high]:.3g}" if by_null else ""
                more += f"; before training {before[low]:.3g} to {before[high]:.3g}" if before else ""
                sentences.append(
                    f"{title}, {arm}, expansion {low:g} to {high:g}: {unit} {trained[low]:.3g} to "
                    f"{trained[high]:.3g} (median layer){more}."
                )
        return sentences

    def verdicts(self) -> list[Verdict]:
        return [verdict for claim in CLAIMS if (verdict := self._verdict(claim))]

    def _verdict(self, claim: int) -> Verdict | None:
        measures, ordered, rule, against = CLAIMS[claim]
        counts, judged = [], []
        for measure in measures:
            holds = [row.holds for row in self.rows if row.measure == measure]
            k, n = sum(map(bool, holds)), len(holds)
            counts.append(f"{measure}: {k} of {n}{self._trend(measure)}")
            judged.append(n >= FEWEST_LAYERS and beyond(k, n))
        if not any(row.measure in measures for row in self.rows):
            return None
        some = judged[0] if ordered else any(judged)
        return Verdict(
            claim=claim,
            rule=f"the layers of all models together, which are not independent: {rule}",
            measured="; ".join(counts),
            verdict="supported" if all(judged) else "mixed" if some else "not supported",
            against=against,
        )

    def _trend(self, measure: str) -> str:
        """Whether it grows with the width, which no rule asks for: the median layer of the two ends."""
        arm = self.arms[0]
        series = self.series(arm, measure, "value")
        low, high = min(series, default=0.0), max(series, default=0.0)
        if low == high:
            return ""
        return f" ({series[low]:.3g} at expansion {low:g}, {series[high]:.3g} at {high:g}, {arm})"

    @styled
    def plot(self) -> Figure:
        figure, panels = new_figure(len(PANELS), caption(self.settings, "median layer"), rows=2)
        for axes, (measure, (title, label, null)) in zip(panels, PANELS.items(), strict=True):
            for arm, colour in zip(self.arms, (BLACK, GREEN, ORANGE), strict=False):
                for of, mark, shown in (
                    ("value", "o-", "trained"),
                    ("null", "^--", null),
                    ("step_0", "s:", "before training"),
                ):
                    if (series := self.series(arm, measure, of)) and (of == "value" or arm == self.arms[0]):
                        style = {"color": {"null": GREY, "step_0": ORANGE}.get(of, colour)}
                        axes.plot(*zip(*series.items(), strict=True), mark, label=f"{arm}, {shown}", **style)
            axes.set_xscale("log", base=2)
            axes.set(title=title, xlabel="expansion, d_mlp / d_model", ylabel=label)
            legend_below(axes)
        return figure


class _Number(NamedTuple):
    value: float
    null: float | None = None
    holds: bool | None = None


def claims_family(
    specs: Sequence[str | Path],
    corpus: Corpus,
    *,
    tokens: int = 16_384,
    seed: int = 0,
    load: Callable[..., Model] = load_model,
    say: Callable[[str], None] = lambda line: None,
    **collecting: Any,
) -> ClaimsFamily:
    """`nonlinearity`, `interactions` and `gradient_flow` of every model, and of ours before training too.

    Args:
        specs: what `load_model` takes; a folder that holds a `training.json` is of our family.
        corpus: text that no model was trained on.
        tokens: of the corpus, at most 64 of a document.
        seed: of the sample and of all random weights.
        load: called with each spec.
        collecting: passed to `collect` (batch, sink_factor).

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
        text = pack(
            corpus, tokenizer_of(model), tokens=tokens, length=min(LENGTH, context_length(model)), seed=seed
        )
        settings = settings or settings_of(model, text, seed, **collecting)
        start = before_training(model, spec)
        first = _measured(start, text, seed, 0, collecting) if start else {}
        by_layer = {ffn.layer: ffn for ffn in ffns(model)}
        for (layer, measure), found in _measured(model, text, seed, 2048, collecting).items():
            ffn, before = by_layer[layer], first.get((layer, measure))
            rows.append(
                Row(
                    model=Path(spec).name,
                    arm=ffn.activation + (", gated" if ffn.gated else ""),
                    layer=layer,
                    d_mlp=ffn.d_mlp,
                    expansion=ffn.expansion,
                    measure=measure,
                    step_0=before and before.value,
                    **found._asdict(),
                )
            )
    names = ", ".join(Path(spec).name for spec in specs)
    return ClaimsFamily(rows, settings | {"model": names, "weights": "raw"})


def _measured(
    model: Model, text: Tokens, seed: int, loss_tokens: int, collecting: dict[str, Any]
) -> dict[tuple[int, str], _Number]:
    """Every measure of every layer."""
    layers = ffns(model)
    wanted = interaction_probes(layers, seed) | gradient_probes(layers, seed=seed)
    shared: dict[str, Any] = {"seed": seed, **collecting, "statistics": collect(model, text, wanted, **collecting)}
    found: dict[tuple[int, str], _Number] = {}
    for row in nonlinearity(model, text, loss_tokens=loss_tokens, loss_layers=len(layers), **shared).rows:
        found[row.layer, "r2"] = _Number(row.r2, row.r2_null, row.bent)
        found[row.layer, "linear_share"] = _Number(row.linear_share, row.linear_share_null)
        if row.soft_rank_nonlinear is not None:
            found[row.layer, "soft_rank_nonlinear"] = _Number(row.soft_rank_nonlinear)
        if row.loss_affine is not None:
            found[row.layer, "loss_affine"] = _Number(row.loss_affine, row.loss_mean, row.costly)
    for row in interactions(model, text, **shared).rows:
        found[row.layer, "share"] = _Number(row.share, row.share_null, row.multiplies)
        found[row.layer, "index"] = _Number(at_judged(row.index), at_judged(row.index_weights), row.interacts)
    for row in gradient_flow(model, text, **shared).rows:
        found[row.layer, "rank"] = _Number(row.rank, row.rank_null)
        found[row.layer, "rank_closed"] = _Number(row.rank, row.rank_closed)
        if row.condition is not None:
            found[row.layer, "condition"] = _Number(row.condition, row.condition_null)
        if row.passed is not None:
            found[row.layer, "passed"] = _Number(
                row.passed / row.passed_off, row.passed_null / row.passed_off, row.passes_more
            )
            found[row.layer, "passed_random"] = _Number(row.passed / row.passed_null, None, row.beats_random)
    return found

"""What is each neuron for: does it promote tokens, detect one, count positions, set the confidence, or nothing?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from math import ceil
from statistics import fmean, median
from typing import Any, ClassVar

from matplotlib.figure import Figure
from scipy.stats import chi2

from ..corpus import Tokens
from ..figure import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, caption, legend_below, new_figure, styled
from ..models import Model, foldings, tokenizer_of
from ..result import FEWEST_LAYERS, Result, Verdict, beyond
from ..stream import choose_ffns, collect, settings_of
from ..unembedding import unembedding
from .detectors import chance
from .memories import word
from .roles import ROLES, Read, Row, Rules, layer_rows, probes, vocabulary_roles
from .vocabulary_moments import Vocabulary

RULES = Rules()
RANDOM = 4096  # Gaussian values of the null: their length changes nothing, so one draw serves all layers

MARK = {
    "prediction": ("o-", BLACK),
    "suppression": ("s-", ORANGE),
    "partition": ("^-", BLUE),
    "entropy": ("o-", BLACK),
    "positional": ("s-", ORANGE),
    "sink_writer": ("^-", BLUE),
    "dead": ("D-", PURPLE),
}


@dataclass(frozen=True)
class LayerRoles:
    """The share of one layer's neurons that have each role, and the share that chance gives it."""

    layer: int
    share: dict[str, float]
    null: dict[str, float]
    detectors: int
    against: float  # of the detectors
    against_alike: float


@dataclass(frozen=True)
class NeuronRoles(Result):
    name: ClassVar[str] = "neuron_roles"
    question: ClassVar[str] = "What is each neuron for?"
    row_type: ClassVar[type] = Row
    table: ClassVar[str | None] = "neurons"

    def sets(self) -> dict[str, dict[int, list[int]]]:
        """The neurons of each role, by layer, for `knockout`. The dead have nothing to lose."""
        found: dict[str, dict[int, list[int]]] = {}
        for row in self.rows:
            for role in ROLES:
                if getattr(row, role) and role != "dead":
                    found.setdefault(role.replace("_", " "), {}).setdefault(row.layer, []).append(row.neuron)
        return found

    def layers(self) -> list[LayerRoles]:
        """Shares by layer."""
        return [self._summary(layer, list(rows)) for layer, rows in groupby(self.rows, key=lambda row: row.layer)]

    def _summary(self, layer: int, rows: Sequence[Row]) -> LayerRoles:
        null, cells = dict(self.settings["null"]), self.settings["ranges"]
        # twice n times the counted information of independent variables is chi-squared
        floor = 2 * rows[0].tokens * self.settings["rules"]["information"] + cells - 1
        null |= {"positional": float(chi2.sf(floor, cells - 1)), "dead": 0.0}
        null["sink_writer"] = fmean(row.sink_chance for row in rows)
        found = [row for row in rows if row.detector]
        return LayerRoles(
            layer=layer,
            share={role: fmean(getattr(row, role) for row in rows) for role in ROLES},
            null=null,
            detectors=len(found),
            against=fmean(row.against for row in found) if found else float("nan"),
            against_alike=fmean(row.against_alike for row in found) if found else float("nan"),
        )

    def findings(self) -> list[str]:
        layers, n = self.layers(), len(self.rows)

        def said(role: str) -> str:
            most = max(layers, key=lambda layer: layer.share[role])
            null = fmean(layer.null[role] for layer in layers)
            count = sum(getattr(row, role) for row in self.rows)
            return (
                f"{count:,} ({count / n:.2%}, by chance {null:.2%}; most in layer {most.layer}: "
                f"{most.share[role]:.1%})"
            )

        found = [row for row in self.rows if row.detector]
        writes = (
            f" {fmean(row.against for row in found):.0%} of them write against it; of tokens as frequent they "
            f"lower {fmean(row.against_alike for row in found):.0%}."
            if found
            else ""
        )
        fewest = min(row.tokens for row in self.rows)
        return [
            f"Of {n:,} neurons, {said('prediction')} promote a few tokens, {said('suppression')} suppress a few, "
            f"{said('partition')} set many apart from many; chance: Gaussian values.",
            f"{said('detector')} are triggered by at most {self.settings['rules']['tokens']} tokens (GELU, gated: "
            f"a variant of the published measure); chance: random tokens.{writes}",
            f"{said('positional')} know the position, {said('entropy')} are large in late layers and move no "
            f"logit against another, {said('sink_writer')} write at attention sinks above all.",
            f"{sum(row.dead for row in self.rows):,} were never active on {fewest:,} or more ordinary tokens: "
            f"each is active on fewer than {3 / fewest:.2g} of them (95%). The median neuron writes with one sign "
            f"at {median(row.one_sign for row in self.rows):.0%} of its triggers.",
        ]

    def verdicts(self) -> list[Verdict]:
        layers = self.layers()
        if len(layers) < FEWEST_LAYERS:
            return []
        legible = fmean(
            any(getattr(row, role) for role in ("prediction", "suppression", "partition", "detector"))
            for row in self.rows
        )
        null = self.settings["null"]["legible"]
        above = sum(
            _above(
                layer.share["prediction"] + layer.share["suppression"],
                layer.null["prediction"] + layer.null["suppression"],
                len(self.rows) / len(layers),
            )
            and _above(layer.share["detector"], layer.null["detector"], len(self.rows) / len(layers))
            for layer in layers
        )
        more = beyond(above, len(layers))
        return [
            Verdict(
                claim=4,
                rule="supported if, beyond chance, over half of all neurons detect, promote, suppress or part "
                "tokens, and in more than half of the layers (binomial test, 5%) both detectors and neurons that "
                "promote or suppress exceed chance by 2 sd; mixed if only the latter holds",
                measured=f"{legible:.1%} of the neurons have such a role (by chance {null:.1%}); both exceed "
                f"chance in {above} of {len(layers)} layers",
                verdict="supported" if more and legible - null > 0.5 else "mixed" if more else "not supported",
                against="Over 80% of token detectors write against their own trigger, and some layers of OPT-66b "
                "have over 70% dead neurons (Voita et al. 2023); positional, entropy and sink neurons retrieve no "
                "text.",
            )
        ]

    @styled
    def plot(self) -> Figure:
        layers = self.layers()
        at = [layer.layer for layer in layers]
        figure, (writes, reads, others) = new_figure(3, caption(self.settings, "folded weights"))

        def draw(axes, roles: Sequence[str]) -> None:
            for role in roles:
                mark, colour = MARK[role]
                label = role.replace("_", " ")
                axes.plot(at, [100 * layer.share[role] for layer in layers], mark, color=colour, label=label)
                null = [100 * layer.null[role] for layer in layers]
                axes.plot(at, null, "--", color=colour, linewidth=0.8)
            axes.plot([], [], "--", color=GREY, linewidth=0.8, label="by chance")
            axes.set(xlabel="layer", ylabel="share of neurons (%)", yscale="symlog")
            axes.set_yscale("symlog", linthresh=0.1)
            axes.set_ylim(0, 100)

        draw(writes, ("prediction", "suppression", "partition"))
        draw(others, ("entropy", "positional", "sink_writer", "dead"))
        reads.plot(at, [100 * layer.share["detector"] for layer in layers], "o-", color=BLACK, label="detectors")
        reads.plot(
            at,
            [100 * layer.null["detector"] for layer in layers],
            "--",
            color=BLACK,
            linewidth=0.8,
            label="random tokens",
        )
        several = [layer for layer in layers if layer.detectors >= 10]
        there = [layer.layer for layer in several]
        reads.plot(
            there,
            [100 * layer.against for layer in several],
            "s-",
            color=ORANGE,
            label="of them, write against it",
        )
        reads.plot(
            there,
            [100 * layer.against_alike for layer in several],
            "--",
            color=GREEN,
            label="against tokens alike",
        )
        reads.set(xlabel="layer", ylabel="share of neurons, of detectors (%)", ylim=(0, 100))
        writes.set_title("Values that speak")
        reads.set_title("Token detectors")
        others.set_title("Neurons that retrieve no text")
        for axes in (writes, reads, others):
            legend_below(axes)
        return figure


def _above(share: float, null: float, n: float) -> bool:
    """By 2 sd of chance; what no draw of the null shows may still happen once in as many."""
    null = max(null, 1 / RANDOM)
    return share > null + 2 * (null * (1 - null) / n) ** 0.5


def neuron_roles(
    model: Model,
    tokens: Tokens,
    *,
    layers: Sequence[int] | None = None,
    rules: Rules = RULES,
    triggers: int = 20,
    ranges: int = 32,
    seed: int = 0,
    statistics: Mapping[str, Any] | None = None,
    **collecting: Any,
) -> NeuronRoles:
    """Every neuron's roles, each by a published rule or a variant of it, from folded weights and its activity.

    prediction, suppression, partition (Gurnee et al. 2024): moments over the vocabulary of the cosine of value and
    token. The skew of a gated value is that of the direction which it writes at its strongest trigger; the other
    moments have no sign. entropy (Stolfo et al. 2024): a late layer, a strength above the layer's median, and a
    logit variance below half of that of random directions. detector (Voita et al. 2023, whose measure is of all
    activations of ReLU): at most 5 tokens cover 95% of the 20 strongest triggers. positional (Voita et al. 2023):
    firing and range of positions share more than 0.05 nats, in the sequence as it was packed: where documents
    have one length, a neuron that knows where documents begin is positional too. dead: never a positive
    pre-activation, which on GELU and SiLU is a convention. sink writer: mean contribution at attention sinks 10
    times its own and the layer's mean at ordinary tokens. A neuron may have several roles, or none.

    Args:
        layers: the layers to measure; all by default.
        rules: where each role begins.
        triggers: strongest contexts a neuron. ranges: of positions, of equal length.
        statistics: what one `collect` over `probes(...)` gave, when several analyzers share a pass.
        collecting: passed to `collect` (batch, sink_factor, progress).

    Raises:
        InputError: a layer that is not there.
        ModelRefused: values cannot be read in the vocabulary, or no norm can be folded.
    """
    measured = choose_ffns(model, layers)
    vocabulary, around = Vocabulary.of(unembedding(model)), foldings(model)
    if statistics is None:
        statistics = collect(model, tokens, probes(measured, tokens.ids.shape[1], triggers, ranges), **collecting)
    tokenizer, n_layers = tokenizer_of(model), len(model.blocks)
    words = [word(tokenizer, i) for i in range(len(vocabulary.rows))]
    late = n_layers - ceil(rules.late * n_layers)
    using = Read(tokens, vocabulary, words, rules, triggers, late)
    rows = [row for ffn in measured for row in layer_rows(ffn.folded(around[ffn.layer]), statistics, using)]
    settings = settings_of(model, tokens, seed, **collecting)
    settings |= {"triggers": triggers, "ranges": min(ranges, tokens.ids.shape[1]), "rules": asdict(rules)}
    settings |= {"weights": "folded", "vocabulary": "folded", "null": _chance(using, seed), "late": late}
    return NeuronRoles(rows, settings | {"null_share": _null_share(using)})


def _chance(using: Read, seed: int) -> dict[str, float]:
    """Shares of Gaussian values, and of neurons with random triggers, that have a role."""
    values, rules = using.vocabulary.random(RANDOM, seed), using.rules
    found = vocabulary_roles(using.vocabulary.spread(values), rules)
    still = using.vocabulary.logit_variance(values) < rules.logit_variance
    detector = chance(using.tokens, using.triggers, rules.tokens, rules.covered, seed)
    speak = (found["prediction"] | found["suppression"] | found["partition"]).double().mean()
    return {role: float(which.double().mean()) for role, which in found.items()} | {
        "entropy": float(still.double().mean()) / 2,  # half of them are above the median
        "detector": detector,
        "legible": 1 - (1 - float(speak)) * (1 - detector),
    }


def _null_share(using: Read) -> float:
    return using.rules.directions(using.vocabulary.rows.shape[1]) / using.vocabulary.dimensions

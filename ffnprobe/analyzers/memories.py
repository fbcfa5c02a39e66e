"""What triggers each key, and what does its value write?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, ClassVar

import torch
from jaxtyping import Int
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedTokenizerBase

from ..corpus import Tokens, context
from ..ffn import FFN
from ..figure import BLACK, BLUE, GREY, ORANGE, caption, legend_below, new_figure, styled
from ..models import Model, output_gain, tokenizer_of
from ..result import FEWEST_LAYERS, Result, Verdict, beyond, column
from ..statistics import FiringRate, TopActivations
from ..stream import Probe, choose_ffns, collect, settings_of
from ..unembedding import unembedding
from ..vocabulary import read_values

GROUPS = (8, 32)  # positions in a document at which a new group begins


@dataclass(frozen=True)
class Row:
    layer: int = column("", "layer")
    neuron: int = column("", "neuron")
    firing_rate: float = column(
        "0..1", "share of ordinary tokens with a positive pre-activation (the gate's, when gated)"
    )
    tokens: int = column("tokens", "ordinary tokens seen: neither sinks nor special")
    contribution: float = column("", "hidden activation times the norm of the value, at the strongest trigger")
    key_value_cosine: float = column("-1..1", "cosine of key and value; of random ones 0 ± 1 / sqrt(d_model)")
    gate_value_cosine: float | None = column("0..1", "|cosine| of gate and value: its sign is a gauge")
    position: int = column("", "of the strongest trigger in its document, from 0")
    triggers: list[dict] = column("", "strongest contexts: at (token index), contribution, before, token, after")
    purity: float = column("0..1", "share of the triggers that are their commonest token")
    next_token: str = column("", "what follows the strongest trigger; empty where the document ends")
    promotes: list[str] = column(
        "", "vocabulary tokens that the value raises most at its trigger, strongest first"
    )
    suppresses: list[str] = column("", "tokens that it lowers most")
    agrees: bool = column("", "the token raised most is the one that follows the strongest trigger")
    agrees_shuffled: float = column(
        "0..1", "the chance of that under a random pairing of the layer's values with its keys"
    )
    agrees_chance: float = column("0..1", "the chance that it is a random ordinary token of the text")


@dataclass(frozen=True)
class LayerMemory:
    """One layer's agreement between triggers and values, beside shuffled values."""

    layer: int
    agreement: float
    shuffled: float
    shuffled_sd: float
    chance: float
    firing_rate: float
    silent: float
    purity: float
    key_value_cosine: float
    cosine_low: float  # 5% of the neurons are below
    cosine_high: float

    @property
    def above_shuffled(self) -> bool:
        return self.agreement > self.shuffled + 2 * self.shuffled_sd


@dataclass(frozen=True)
class Memories(Result):
    name: ClassVar[str] = "memories"
    question: ClassVar[str] = "What triggers each key, and what does its value write?"
    row_type: ClassVar[type] = Row

    def layers(self) -> list[LayerMemory]:
        """Rates by layer, over the layer's neurons."""
        return [_layer_memory(layer, list(rows)) for layer, rows in groupby(self.rows, key=lambda row: row.layer)]

    def by_position(self, groups: Sequence[int] = GROUPS) -> list[tuple[str, float, float]]:
        """Positions, and of the neurons with their strongest trigger there the share that agrees, and its null."""
        found = []
        for first, stop in zip([0, *groups], [*groups, None], strict=True):
            rows = [row for row in self.rows if first <= row.position and (stop is None or row.position < stop)]
            if rows:
                name = f"{first}+" if stop is None else f"{first}-{stop - 1}"
                agree, shuffled = sum(row.agrees for row in rows), sum(row.agrees_shuffled for row in rows)
                found.append((name, agree / len(rows), shuffled / len(rows)))
        return found

    def findings(self) -> list[str]:
        layers, fewest = self.layers(), min(row.tokens for row in self.rows)
        best = max(layers, key=lambda layer: layer.agreement - layer.shuffled)
        above = sum(layer.above_shuffled for layer in layers)
        silent = sum(row.firing_rate == 0 for row in self.rows)
        agreement = (
            f"most often at layer {best.layer}: {best.agreement:.2%} of its neurons, with shuffled values "
            f"{best.shuffled:.2%} ± {best.shuffled_sd:.2%}; above shuffled by 2 sd in {above} of {len(layers)} "
            "layers."
        )
        return [
            "Key and value agree (the token that the value raises most follows the strongest trigger) "
            + (agreement if above else f"no more often than with shuffled values in any of {len(layers)} layers."),
            "By the trigger's position in its document, agree: "
            + ", ".join(f"{name} {share:.2%} (shuffled {null:.2%})" for name, share, null in self.by_position())
            + ".",
            f"Cosine of key and value, mean of a layer's neurons: {layers[0].key_value_cosine:+.3f} at layer "
            f"{layers[0].layer}, {layers[-1].key_value_cosine:+.3f} at layer {layers[-1].layer}; of one pair of "
            f"random vectors 0 ± {self.settings['cosine_null_sd']:.3f}.",
            f"{silent:,} of {len(self.rows):,} neurons never had a positive pre-activation on {fewest:,} or more "
            f"ordinary tokens: it is positive on fewer than {3 / fewest:.2g} of all such tokens (95%).",
        ]

    def verdicts(self) -> list[Verdict]:
        layers = self.layers()
        above, n = sum(layer.above_shuffled for layer in layers), len(layers)
        if n < FEWEST_LAYERS:
            return []
        return [
            Verdict(
                claim=4,
                rule="mixed if the agreement rate exceeds that of shuffled values by 2 sd in more than a tenth of "
                "the layers (binomial test, 5%); never more, because width as memory, and quantisation, are not "
                "measured here",
                measured=f"above shuffled in {above} of {n} layers; at the best layer "
                f"{max(layer.agreement for layer in layers):.2%} of the neurons agree",
                verdict="mixed" if beyond(above, n, 0.1) else "not supported",
                against="Over 80% of token detectors write against their own trigger (Voita et al. 2023); "
                "positional, entropy and sink neurons retrieve no text; editing neurons rarely changes the answer "
                "(Niu et al. 2024).",
            )
        ]

    @styled
    def plot(self) -> Figure:
        layers = self.layers()
        at = [layer.layer for layer in layers]
        figure, (agree, fire, pure, cosine) = new_figure(
            4, caption(self.settings, "vocabulary " + self.settings["vocabulary"])
        )
        null = torch.tensor([layer.shuffled for layer in layers])
        sd = torch.tensor([layer.shuffled_sd for layer in layers])
        agree.plot(at, [100 * layer.agreement for layer in layers], "o-", color=BLACK, label="trained")
        agree.plot(at, 100 * null, "--", color=GREY, label="shuffled values ± 2 sd")
        agree.plot(at, [100 * layer.chance for layer in layers], ":", color=GREY, label="random token")
        agree.fill_between(
            at, 100 * (null - 2 * sd).clamp(min=0), 100 * (null + 2 * sd), color=GREY, alpha=0.25, linewidth=0
        )
        agree.set(
            title="Key and value agree",
            xlabel="layer",
            ylabel="agreement rate (% of neurons)",
            ylim=(0, None),
        )
        fire.plot(at, [layer.firing_rate for layer in layers], "o-", color=BLUE, label="mean firing rate")
        fire.plot(
            at,
            [layer.silent for layer in layers],
            "s--",
            color=ORANGE,
            label="never positive (share of neurons)",
        )
        fire.set(title="How often keys match", xlabel="layer", ylabel="share", ylim=(0, 1))
        pure.plot(at, [layer.purity for layer in layers], "o-", color=BLACK, label="trained")
        pure.axhline(self.settings["purity_null"], color=GREY, linestyle="--", label="random tokens")
        pure.set(
            title="Triggers are one token",
            xlabel="layer",
            ylabel="commonest token's share of triggers",
            ylim=(0, 1),
        )
        cosine.plot(at, [layer.key_value_cosine for layer in layers], "o-", color=BLACK, label="mean of neurons")
        low, high = [layer.cosine_low for layer in layers], [layer.cosine_high for layer in layers]
        cosine.fill_between(at, low, high, color=BLACK, alpha=0.12, linewidth=0, label="5% to 95% of neurons")
        null_sd = 1.645 * self.settings["cosine_null_sd"]
        cosine.axhspan(-null_sd, null_sd, color=GREY, alpha=0.25, linewidth=0, label="5% to 95% of random vectors")
        cosine.set(title="Keys against values", xlabel="layer", ylabel="cosine of key and value")
        for axes in (agree, fire, pure, cosine):
            legend_below(axes)
        return figure


def probes(layers: Sequence[FFN], triggers: int = 5) -> dict[str, Probe]:
    """What `memories` needs of one pass over the tokens."""
    wanted = {}
    for ffn in layers:
        top = partial(TopActivations.about, k=triggers, by_magnitude=ffn.gated)
        wanted[f"memories/{ffn.layer}/top"] = Probe(ffn.layer, "post", top)
        wanted[f"memories/{ffn.layer}/rate"] = Probe(ffn.layer, "pre", FiringRate.about)
    return wanted


def memories(
    model: Model,
    tokens: Tokens,
    *,
    layers: Sequence[int] | None = None,
    triggers: int = 5,
    readings: int = 8,
    seed: int = 0,
    statistics: Mapping[str, Any] | None = None,
    **collecting: Any,
) -> Memories:
    """Every neuron's strongest contexts and its value read in the vocabulary (Geva et al. 2021, 2022).

    Values are read through the unembedding with the final norm's gain folded in (and the gain of a norm behind
    the FFN, where there is one), in the direction in which the neuron writes at its strongest trigger; so nothing
    here changes when a gated neuron's key and value swap signs or scales. Triggers are ordinary tokens: neither
    attention sinks nor special.

    Args:
        layers: the layers to measure; all by default.
        triggers: contexts a neuron. readings: vocabulary tokens a neuron and direction.
        statistics: what one `collect` over `probes(...)` gave, when several analyzers share a pass.
        collecting: passed to `collect` (batch, sink_factor, progress).

    Raises:
        InputError: a layer that is not there.
    """
    measured = choose_ffns(model, layers)
    if statistics is None:
        statistics = collect(model, tokens, probes(measured, triggers), **collecting)
    vocabulary, tokenizer = unembedding(model), tokenizer_of(model)
    words = [word(tokenizer, i) for i in range(len(vocabulary))]
    shown: dict[int, dict] = {}

    def window(at: int) -> dict:
        if at not in shown:
            found = context(tokens, tokenizer, at)
            shown[at] = {"at": at, "before": found.before, "token": found.token, "after": found.after}
        return shown[at]

    rows = [
        row
        for ffn in measured
        for row in _layer_rows(
            ffn, tokens, statistics, vocabulary, words, window, readings, output_gain(model, ffn.layer)
        )
    ]
    settings = settings_of(model, tokens, seed, **collecting)
    settings |= {"triggers": triggers, "readings": readings, "vocabulary": "folded", "weights": "raw"}
    settings |= {"cosine_null_sd": model.cfg.d_model**-0.5}
    return Memories(rows, settings | {"purity_null": _purity_of_chance(tokens, triggers, seed)})


def _layer_rows(ffn: FFN, tokens: Tokens, statistics, vocabulary, words, window, readings: int, gain) -> list[Row]:
    top = statistics[f"memories/{ffn.layer}/top"].compute()
    rate = statistics[f"memories/{ffn.layer}/rate"].compute().cpu()
    activation, at = top.activation.cpu(), top.at.cpu()
    ffn = ffn.wide()
    values = ffn.values if gain is None else ffn.values * gain
    written = values * torch.where(activation[:, :1] < 0, -1.0, 1.0).to(values)
    raised, lowered = read_values(written, vocabulary, readings)
    following = _next_tokens(tokens, at[:, 0])
    agrees = raised[:, 0] == following
    votes = torch.bincount(raised[:, 0], minlength=len(vocabulary)).double() / len(raised)
    shuffled = torch.where(following < 0, 0.0, votes[following.clamp(min=0)])
    ordinary = torch.bincount(tokens.ids[~tokens.special], minlength=len(vocabulary)).double()
    chance = float(votes @ ordinary / ordinary.sum())
    position = tokens.position.flatten()[at[:, 0]].tolist()
    cosine = cosine_similarity(ffn.keys, ffn.values, dim=1)
    across = None if ffn.gates is None else cosine_similarity(ffn.gates, ffn.values, dim=1).abs().tolist()
    contribution = activation * ffn.values.norm(dim=1, keepdim=True).cpu()
    if ffn.gated:
        contribution = contribution.abs()  # which sign the key has is a gauge
    places, ids = at.tolist(), tokens.ids.flatten()[at].tolist()
    return [
        Row(
            layer=ffn.layer,
            neuron=i,
            firing_rate=float(rate[i]),
            tokens=statistics[f"memories/{ffn.layer}/rate"].n,
            contribution=float(contribution[i, 0]),
            key_value_cosine=float(cosine[i]),
            gate_value_cosine=None if across is None else across[i],
            position=position[i],
            triggers=[
                {**window(at), "contribution": size}
                for at, size in zip(places[i], contribution[i].tolist(), strict=True)
            ],
            purity=Counter(ids[i]).most_common(1)[0][1] / len(ids[i]),
            next_token=words[following[i]] if following[i] >= 0 else "",
            promotes=[words[token] for token in raised[i].tolist()],
            suppresses=[words[token] for token in lowered[i].tolist()],
            agrees=bool(agrees[i]),
            agrees_shuffled=float(shuffled[i]),
            agrees_chance=chance,
        )
        for i in range(ffn.d_mlp)
    ]


def word(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """The token's text, or its raw name where it is a part of a character."""
    text = str(tokenizer.decode([token]))
    return str(tokenizer.convert_ids_to_tokens(token)) if "\ufffd" in text else text


def _next_tokens(tokens: Tokens, at: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """The token after each index, -1 where the document or the corpus ends."""
    ids, document = tokens.ids.flatten(), tokens.document.flatten()
    after = (at + 1).clamp(max=len(ids) - 1)
    return torch.where((document[after] == document[at]) & (after > at), ids[after], -1)


def _layer_memory(layer: int, rows: list[Row]) -> LayerMemory:
    n = len(rows)
    mean = lambda values: sum(values) / n  # noqa: E731
    shuffled, cosines = mean([row.agrees_shuffled for row in rows]), sorted(row.key_value_cosine for row in rows)
    return LayerMemory(
        layer=layer,
        agreement=mean([row.agrees for row in rows]),
        shuffled=shuffled,
        chance=mean([row.agrees_chance for row in rows]),
        # agreements of a random pairing are rare and nearly independent
        shuffled_sd=(mean([row.agrees_shuffled * (1 - row.agrees_shuffled) for row in rows]) / n) ** 0.5,
        firing_rate=mean([row.firing_rate for row in rows]),
        silent=mean([row.firing_rate == 0 for row in rows]),
        purity=mean([row.purity for row in rows]),
        key_value_cosine=mean(cosines),
        cosine_low=cosines[n // 20],
        cosine_high=cosines[-1 - n // 20],
    )


def _purity_of_chance(tokens: Tokens, triggers: int, seed: int, draws: int = 2000) -> float:
    ordinary = tokens.ids[~tokens.special]
    generator = torch.Generator().manual_seed(seed)
    drawn = ordinary[torch.randint(len(ordinary), (draws, triggers), generator=generator)]
    return sum(Counter(row).most_common(1)[0][1] for row in drawn.tolist()) / (draws * triggers)

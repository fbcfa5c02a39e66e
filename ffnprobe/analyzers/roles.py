"""Which roles does a neuron have, and by which rule?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..corpus import Tokens
from ..ffn import FFN
from ..result import column
from ..statistics import FiringByPosition, Magnitudes, TopActivations
from ..stream import Probe
from .detectors import against, alike, commonest, covering
from .vocabulary_moments import Spread, Vocabulary

ROLES = (
    "prediction",
    "suppression",
    "partition",
    "entropy",
    "detector",
    "positional",
    "sink_writer",
    "dead",
)


@dataclass(frozen=True)
class Rules:
    """Where each role begins. What a source gives is its number; what it leaves open is ours."""

    kurtosis: float = 10  # above: prediction (skew > 0) or suppression (skew < 0); Gurnee et al. 2024
    variance: float = 0.005  # above: partition; Gurnee et al. 2024
    logit_variance: float = 0.5  # below, of random directions, and large, in late layers: entropy
    late: float = 0.25  # share of the layers that are late
    covered: float = 0.95  # of the triggers, by a detector's tokens; Voita et al. 2023, of all activations
    tokens: int = 5  # of a detector, at the most; Voita et al. 2023
    information: float = 0.05  # nats of position, above: positional; Voita et al. 2023
    sink: float = 10  # times a neuron's own and the layer's mean contribution, above: sink writer
    null_space: float = 1 / 64  # share of the directions that is the effective null space: 12 of GPT-2's 768

    def directions(self, d_model: int) -> int:
        """Of the effective null space."""
        return max(1, round(self.null_space * d_model))


@dataclass(frozen=True)
class Row:
    layer: int = column("", "layer")
    neuron: int = column("", "neuron")
    variance: float = column("", "over the vocabulary, of the cosine of value and token")
    skew: float = column("", "of these cosines, in the direction written at the strongest trigger, if gated")
    kurtosis: float = column("", "of these cosines, not excess; NaN where nothing varies")
    logit_variance: float = column("ratio", "over the vocabulary, of a unit value; 1 in the mean of random ones")
    null_share: float = column("0..1", "share of the squared value in the effective null space of the unembedding")
    strength: float = column("", "norm of the value; gated: times that of the key, because the two share a scale")
    trigger: str = column("", "commonest token among the triggers")
    trigger_tokens: int | None = column(
        "tokens", "least number of distinct ones that cover the triggers; none where too few triggers are active"
    )
    one_sign: float = column(
        "0..1", "share of the triggers at which it writes as at the strongest, not the opposite"
    )
    against: bool = column("", "it lowers the logit of its commonest trigger token, written as there")
    against_alike: float = column("0..1", "the share that it lowers of tokens as frequent as that one")
    firing_rate: float = column(
        "0..1", "share of ordinary tokens with a positive pre-activation (gated: the gate's)"
    )
    tokens: int = column("tokens", "ordinary tokens seen: neither sinks nor special")
    information: float = column("nats", "mutual information of firing and position, corrected for its bias")
    contribution: float = column("", "mean |activation| times the norm of the value, at ordinary tokens")
    sink_contribution: float = column("", "the same at attention sinks; NaN where there are none")
    sink_chance: float = column("0..1", "bound on the chance that as many ordinary tokens make it a sink writer")
    prediction: bool = column("", "its value raises few tokens far above all others")
    suppression: bool = column("", "its value lowers few tokens far below all others")
    partition: bool = column("", "its value sets many tokens apart from many others")
    entropy: bool = column("", "large in a late layer, and hardly moves one logit against another")
    detector: bool = column("", "a few tokens are nearly all of its triggers")
    positional: bool = column("", "whether it fires depends on the position")
    sink_writer: bool = column("", "its contribution at sinks is far above that at ordinary tokens")
    dead: bool = column("", "its pre-activation was never positive at an ordinary token")


def probes(layers: Sequence[FFN], length: int, triggers: int = 20, ranges: int = 32) -> dict[str, Probe]:
    """What `neuron_roles` needs of one pass over sequences of this length."""
    wanted = {}
    by_position = partial(FiringByPosition.about, length=length, ranges=ranges)
    for ffn in layers:
        top = partial(TopActivations.about, k=triggers, by_magnitude=ffn.gated)
        name = f"neuron_roles/{ffn.layer}"
        wanted[f"{name}/top"] = Probe(ffn.layer, "post", top)
        wanted[f"{name}/position"] = Probe(ffn.layer, "pre", by_position)
        wanted[f"{name}/ordinary"] = Probe(ffn.layer, "post", Magnitudes.about)
        wanted[f"{name}/sinks"] = Probe(ffn.layer, "post", Magnitudes.about, kinds=("sink",))
    return wanted


@dataclass(frozen=True)
class Read:
    """What the rows of every layer are read with."""

    tokens: Tokens
    vocabulary: Vocabulary
    words: Sequence[str]
    rules: Rules
    triggers: int
    late: int  # the first layer that counts as late


def vocabulary_roles(spread: Spread, rules: Rules) -> dict[str, Bool[Tensor, " n"]]:
    """The roles that a value's cosines with the vocabulary tell."""
    peaked = spread.kurtosis > rules.kurtosis
    return {
        "prediction": peaked & (spread.skew > 0),
        "suppression": peaked & (spread.skew < 0),
        "partition": spread.variance > rules.variance,
    }


def layer_rows(ffn: FFN, statistics: Mapping[str, Any], using: Read) -> Iterator[Row]:
    """The rows of one folded layer."""
    columns = _of_weights(ffn, statistics, using) | _of_triggers(ffn, statistics, using)
    columns |= _of_activity(ffn, statistics, using.rules)
    rules = using.rules
    large = columns["strength"] > columns["strength"].median()
    columns["entropy"] = large & (columns["logit_variance"] < rules.logit_variance) & (ffn.layer >= using.late)
    columns["detector"] = (columns["trigger_tokens"] <= rules.tokens) & ~columns["dead"]
    columns["positional"] = columns["information"] > rules.information
    lists = {name: part.tolist() for name, part in columns.items()}
    seen = statistics[f"neuron_roles/{ffn.layer}/position"].n
    for i, values in enumerate(zip(*lists.values(), strict=True)):
        row = dict(zip(lists, values, strict=True))
        row["trigger"] = using.words[row["trigger"]]
        row["trigger_tokens"] = row["trigger_tokens"] if row["trigger_tokens"] <= using.triggers else None
        yield Row(layer=ffn.layer, neuron=i, tokens=seen, **row)


def _of_weights(ffn: FFN, statistics: Mapping[str, Any], using: Read) -> dict[str, Tensor]:
    strongest = statistics[f"neuron_roles/{ffn.layer}/top"].compute().activation[:, 0]
    # which sign a gated value has is a gauge; which it writes with at its strongest trigger is not
    written = _written(ffn, strongest) if ffn.gated else ffn.values
    spread, strength = using.vocabulary.spread(written), ffn.values.norm(dim=1)
    columns = {
        **spread._asdict(),
        **vocabulary_roles(spread, using.rules),
        "logit_variance": using.vocabulary.logit_variance(written),
        "null_share": using.vocabulary.null_share(written, using.rules.directions(ffn.d_model)),
        "strength": strength * ffn.keys.norm(dim=1) if ffn.gated else strength,
    }
    return {name: part.cpu() for name, part in columns.items()}


def _written(ffn: FFN, activation: Float[Tensor, " d_mlp"]) -> Float[Tensor, "d_mlp d_model"]:
    """The values with the signs of these activations; one that is 0 writes nothing: its sign is a convention."""
    sign = activation.sign().to(ffn.values)
    return ffn.values * torch.where(sign == 0, ffn.gauge.sign(), sign)[:, None]


def _of_triggers(ffn: FFN, statistics: Mapping[str, Any], using: Read) -> dict[str, Tensor]:
    top = statistics[f"neuron_roles/{ffn.layer}/top"].compute()
    activation, ids = top.activation.cpu(), using.tokens.ids.flatten()[top.at.cpu()]
    active = (activation != 0 if ffn.gated else activation > 0).sum(1)
    token = commonest(ids)
    there = torch.where(ids == token[:, None], activation, 0).sum(1)
    near = alike(using.tokens, token)
    lowers, lowers_alike = against(_written(ffn, there).cpu(), token, near, using.vocabulary.rows)
    return {
        "trigger": token,
        "trigger_tokens": torch.where(active == using.triggers, covering(ids, using.rules.covered), ids.numel()),
        "one_sign": (activation.sign() == activation[:, :1].sign()).double().mean(1),
        "against": lowers,
        "against_alike": lowers_alike,
    }


def _of_activity(ffn: FFN, statistics: Mapping[str, Any], rules: Rules) -> dict[str, Tensor]:
    ordinary, sinks, position = (statistics[f"neuron_roles/{ffn.layer}/{part}"] for part in _ACTIVITY)
    firing, size = position.compute(), ordinary.compute()
    positive, norms = firing.positive.sum(0), ffn.values.double().norm(dim=1)
    mean, sd = size.mean * norms, size.variance.sqrt() * norms
    floor = rules.sink * torch.maximum(mean, mean.mean())
    at_sinks = sinks.compute().mean * norms if sinks.n else torch.full_like(mean, torch.nan)
    columns = {
        "firing_rate": positive.double() / firing.n,
        "dead": positive == 0,
        "information": firing.information(),
        "contribution": mean,
        "sink_contribution": at_sinks,
        # Cantelli's bound for the mean of as many independent tokens
        "sink_chance": sd**2 / (sd**2 + sinks.n * (floor - mean) ** 2) if sinks.n else torch.zeros_like(mean),
        "sink_writer": at_sinks > floor,
    }
    return {name: part.cpu() for name, part in columns.items()}


_ACTIVITY = ("ordinary", "sinks", "position")

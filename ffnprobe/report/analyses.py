"""Which analyses is a report made of, and what does each of them need?"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..analyzers import (
    AttentionShare,
    ClusterLabels,
    Contraction,
    Experts,
    GradientFlow,
    HiddenRank,
    Interactions,
    Knockout,
    Memories,
    MemoryUse,
    NeuronClusters,
    NeuronMap,
    NeuronRoles,
    Nonlinearity,
    Quantization,
    SVDDirections,
    WeightRank,
    attention_share,
    cluster_labels,
    contraction,
    experts,
    gradient_flow,
    hidden_rank,
    interactions,
    knockout,
    memories,
    memory_use,
    neuron_clusters,
    neuron_map,
    neuron_roles,
    nonlinearity,
    quantization,
    svd_directions,
    weight_rank,
)
from ..analyzers.affine_probes import probes as affine_probes
from ..analyzers.cluster_labels import probes as label_probes
from ..analyzers.experts import probes as expert_probes
from ..analyzers.gradient_flow import probes as gradient_probes
from ..analyzers.interactions import probes as interaction_probes
from ..analyzers.knockout import probes as knockout_probes
from ..analyzers.memories import probes as memory_probes
from ..analyzers.neuron_views import BUDGET as CO_ACTIVATION
from ..analyzers.neuron_views import NEURONS, half_name, within
from ..analyzers.neuron_views import probes as cluster_probes
from ..analyzers.quantization import probes as quantization_probes
from ..analyzers.rank_probes import probes as rank_probes
from ..analyzers.roles import probes as role_probes
from ..analyzers.selectivity import probes as contraction_probes
from ..corpus import Tokens
from ..errors import InputError, ModelRefused
from ..ffn import FFN
from ..forward import choose_layers, evenly
from ..intervene import check_causal, predictable
from ..models import Model, ffns, foldings
from ..result import Result
from ..shards import Placed, Work
from ..statistics import Statistic
from ..stream import Probe
from ..unembedding import unembedding, why_illegible
from .settings import Settings

HELD_OUT = 512  # tokens on which losses are compared; the scripts of analyses/ take more
SAMPLED = 2048  # tokens of each half of the documents on which codes are compared
FEW = 5  # layers of what takes a minute a layer
LABELLED = 3  # layers of which clusters are labelled


@dataclass(frozen=True)
class Inputs:
    """What an analysis may use: the work, what one pass has collected, and the results before it."""

    work: Work
    settings: Settings
    layers: Sequence[int] | None
    statistics: Mapping[str, Statistic]
    results: Mapping[str, Result] = field(default_factory=dict)

    @property
    def measured(self) -> tuple[Model, Any]:
        """Model and tokens."""
        return self.work.model, self.work.tokens

    @property
    def shared(self) -> dict[str, Any]:
        """Arguments of every analyzer."""
        return {"layers": self.layers, "seed": self.settings.seed}

    @property
    def collecting(self) -> dict[str, Any]:
        """And of those that run the model themselves."""
        return self.shared | {name: getattr(self.settings, name) for name in ("batch", "sink_factor", "nonfinite")}

    @property
    def streamed(self) -> dict[str, Any]:
        """And of those that read what the pass has collected."""
        return self.collecting | {"statistics": Placed(self.statistics, self.work.devices())}


def _nothing(layers: Sequence[FFN], settings: Settings, tokens: Tokens) -> dict[str, Probe]:
    return {}


@dataclass(frozen=True)
class Analysis:
    """One analysis of the report.

    `why_not` says why a model does not allow it, `too_little` why its tokens do not, None where they do.
    `uses` are the analyzers whose statistics it reads beside its own; its probes hold theirs.
    `most_layers` are those that take more time, all of them if None; 0: the time does not grow with the layers.
    """

    kind: type[Result]
    run: Callable[[Inputs], Result]
    probes: Callable[[Sequence[FFN], Settings, Tokens], dict[str, Probe]] = _nothing
    why_not: Callable[[Model], str | None] = lambda model: None
    too_little: Callable[[Tokens], str | None] = lambda tokens: None
    uses: tuple[str, ...] = ()
    most_layers: int | None = None

    def layers_more(self, layers: int, timed: int) -> int:
        """How many layers more than those that were timed take time, of so many."""
        most = layers if self.most_layers is None else min(layers, self.most_layers)
        return max(0, most - timed)


def _no_loss(model: Model) -> str | None:
    try:
        check_causal(model)
    except ModelRefused as error:
        return str(error)
    return None


def _unfoldable(model: Model) -> str | None:
    try:
        unembedding(model), foldings(model)
    except ModelRefused as error:
        return str(error)
    return None


def _losses(of: Inputs) -> int:
    """Tokens on which the losses of an analyzer that has more to say are compared; 0 where they cannot be."""
    refused = _no_loss(of.work.model) or _one_document(of.work.tokens)
    return 0 if refused else HELD_OUT


def _no_shares(model: Model) -> str | None:
    return _no_loss(model) or why_illegible(model)


def inner(layers: Sequence[int]) -> list[int]:
    """Two of the few layers, neither the first nor the last: for what costs dozens of passes a layer."""
    return evenly(layers, FEW)[1::2] if len(layers) > 2 else list(layers)


def _few(of: Inputs) -> list[int]:
    return evenly([tap.layer for tap in choose_layers(of.work.model, of.layers)], FEW)


def _cut(of: Inputs) -> list[int]:
    return inner([tap.layer for tap in choose_layers(of.work.model, of.layers)])


def _co_active(layers: Sequence[FFN], n: int) -> list[FFN]:
    """At most n of the layers whose co-activation is kept."""
    return evenly(within(layers, NEURONS, CO_ACTIVATION), n)


def _at_co_active(of: Inputs, n: int) -> dict[str, Any]:
    """Arguments of an analyzer of those layers."""
    kept = [ffn.layer for ffn in ffns(of.work.model) if half_name(ffn.layer, 0) in of.statistics]
    return of.streamed | {"layers": evenly(kept, n)}


def _sets(of: Inputs) -> dict[str, dict[int, list[int]]] | None:
    """The neurons of each role, if any was found; else what `knockout` takes by itself."""
    roles = of.results.get("neuron_roles")
    return (isinstance(roles, NeuronRoles) and roles.sets()) or None


def _held_out(tokens: Tokens) -> int:
    """Tokens on which losses are compared: of a small corpus a quarter."""
    return min(HELD_OUT, tokens.n // 4)


def _few_tokens(tokens: Tokens) -> str | None:
    """Codes are fitted on every other document and tested on the rest; of each at least 32 ordinary tokens."""
    document = torch.unique_consecutive(tokens.document, return_inverse=True)[1]
    halves = [int(((document % 2 == half) & ~tokens.special).sum()) for half in (0, 1)]
    return None if min(halves) >= 64 else f"the halves of the documents have {halves} tokens: give more text"


def _one_document(tokens: Tokens) -> str | None:
    try:
        _, test = tokens.held_out(_held_out(tokens))
    except InputError as error:
        return str(error)
    predicted = test.document[:, 1:][predictable(test)].unique()
    return None if len(predicted) > 1 else "the text that is held out is of one document: give more text"


# in the order of the page; the first findings of the first three lead it
ANALYSES: Mapping[str, Analysis] = {
    "hidden_rank": Analysis(
        HiddenRank,
        lambda of: hidden_rank(*of.measured, budget=of.settings.budget, **of.streamed),
        lambda layers, settings, _: rank_probes(layers, settings.seed, settings.budget),
    ),
    "nonlinearity": Analysis(
        Nonlinearity,
        lambda of: nonlinearity(
            *of.measured, budget=of.settings.budget, loss_tokens=2 * _losses(of), loss_layers=6, **of.streamed
        ),
        lambda layers, settings, _: affine_probes(layers, settings.seed, settings.budget),
        uses=("hidden_rank",),
        most_layers=11,  # losses, most of its time, are compared at six
    ),
    "interactions": Analysis(
        Interactions,
        lambda of: interactions(*of.measured, budget=of.settings.budget, **of.streamed),
        lambda layers, settings, _: interaction_probes(layers, settings.seed, settings.budget),
        uses=("hidden_rank", "nonlinearity"),
    ),
    "contraction": Analysis(
        Contraction,
        lambda of: contraction(
            *of.measured,
            causal_layers=_cut(of),
            held_out=_held_out(of.work.tokens),
            budget=of.settings.budget,
            **of.streamed,
        ),
        lambda layers, settings, _: (
            rank_probes(layers, settings.seed, settings.budget)
            | contraction_probes(layers, evenly([ffn.layer for ffn in layers], FEW), budget=None)
        ),
        _no_loss,
        _one_document,
        uses=("hidden_rank",),
        most_layers=2,
    ),
    "memories": Analysis(
        Memories,
        lambda of: memories(*of.measured, **of.streamed),
        lambda layers, *_: memory_probes(layers),
        why_illegible,
    ),
    "memory_use": Analysis(
        MemoryUse, lambda of: memory_use(*of.measured, sample=512, **of.collecting), why_not=why_illegible
    ),
    "neuron_roles": Analysis(
        NeuronRoles,
        lambda of: neuron_roles(*of.measured, **of.streamed),
        lambda layers, _, tokens: role_probes(layers, tokens.ids.shape[1]),
        _unfoldable,
    ),
    "svd_directions": Analysis(
        SVDDirections, lambda of: svd_directions(of.work.model, **of.shared), why_not=why_illegible
    ),
    "knockout": Analysis(
        Knockout,
        lambda of: knockout(*of.measured, _sets(of), held_out=_held_out(of.work.tokens), draws=2, **of.streamed),
        lambda layers, *_: knockout_probes(layers),
        _no_loss,
        _one_document,
        most_layers=0,
    ),
    "quantization": Analysis(
        Quantization,
        lambda of: quantization(*of.measured, **of.streamed | {"layers": _few(of)}, sample=SAMPLED),
        lambda layers, settings, _: quantization_probes(evenly(layers, FEW), SAMPLED, settings.seed),
        too_little=_few_tokens,
        most_layers=FEW,
    ),
    "experts": Analysis(
        Experts,
        lambda of: experts(*of.measured, loss_tokens=HELD_OUT, draws=1, **of.streamed | {"layers": _few(of)}),
        lambda layers, settings, _: expert_probes(evenly(layers, FEW), seed=settings.seed),
        _no_loss,
        _one_document,
        most_layers=FEW,
    ),
    "attention_share": Analysis(
        AttentionShare,
        lambda of: attention_share(*of.measured, held_out=_held_out(of.work.tokens), sample=2048, **of.collecting),
        why_not=_no_shares,
        too_little=_one_document,
    ),
    "gradient_flow": Analysis(
        GradientFlow,
        lambda of: gradient_flow(*of.measured, gradient_tokens=min(512, _losses(of)), **of.streamed),
        lambda layers, settings, _: gradient_probes(layers, seed=settings.seed),
    ),
    "weight_rank": Analysis(WeightRank, lambda of: weight_rank(of.work.model, **of.shared)),
    "neuron_clusters": Analysis(
        NeuronClusters,
        lambda of: neuron_clusters(*of.measured, **of.streamed),
        lambda layers, settings, _: cluster_probes(layers, seed=settings.seed),
        most_layers=0,  # most of its time goes into a few layers, by which the rest is set
    ),
    "cluster_labels": Analysis(
        ClusterLabels,
        lambda of: cluster_labels(*of.measured, of.settings.text(), **_at_co_active(of, LABELLED)),
        lambda layers, settings, _: label_probes(_co_active(layers, LABELLED), seed=settings.seed),
        why_illegible,
        uses=("neuron_clusters",),
        most_layers=0,
    ),
    "neuron_map": Analysis(
        NeuronMap,
        lambda of: neuron_map(*of.measured, **_at_co_active(of, 1)),
        lambda layers, settings, _: cluster_probes(_co_active(layers, 1), seed=settings.seed),
        uses=("neuron_clusters",),
        most_layers=0,
    ),
}


def choose_analyzers(only: str | None, skip: str | None) -> tuple[str, ...] | None:
    """The analyzers that `--only a,b` or `--skip a,b` leave, in the order of the page; None for all.

    Raises:
        InputError: a name that is not there, both at once, or nothing left.
    """
    if only is not None and skip is not None:
        raise InputError("got both --only and --skip: give one of them")
    if only is None and skip is None:
        return None
    named = [name.strip() for name in (only or skip or "").split(",") if name.strip()]
    if unknown := [name for name in named if name not in ANALYSES]:
        raise InputError(f"analyzer {unknown[0]!r} is unknown: choose from {', '.join(ANALYSES)}")
    left = tuple(name for name in ANALYSES if (name in named) == (only is not None))
    if not left:
        raise InputError("no analyzer is left: name at least one")
    return left


def analyses_of(
    settings: Settings, model: Model, tokens: Tokens, say: Callable[[str], None] = lambda line: None
) -> dict[str, Analysis]:
    """The analyses that were asked for and that model and tokens allow."""
    chosen = {}
    for name in settings.analyzers or ANALYSES:
        if reason := ANALYSES[name].why_not(model) or ANALYSES[name].too_little(tokens):
            say(f"{name} is left out: {reason}")
        else:
            chosen[name] = ANALYSES[name]
    return chosen


def measure(
    settings: Settings,
    work: Work,
    statistics: dict[str, Statistic],
    layers: Sequence[int] | None,
    say: Callable[[str], None],
) -> Iterator[tuple[str, Result]]:
    """Run the analyses in their order; what was collected for one goes from `statistics` when it is done."""
    results: dict[str, Result] = {}
    left = list(analyses_of(settings, work.model, work.tokens))
    for i, name in enumerate(left):
        started = time.perf_counter()
        results[name] = ANALYSES[name].run(Inputs(work, settings, layers, statistics, results))
        say(f"measured {name} in {time.perf_counter() - started:.0f} s")
        yield name, results[name]
        needed = {of for later in left[i + 1 :] for of in (later, *ANALYSES[later].uses)}
        for done in [of for of in statistics if of.partition("/")[0] not in needed]:
            del statistics[done]  # the covariances are by far the most of the memory

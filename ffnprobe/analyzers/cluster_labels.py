"""What do the neurons of a cluster share: tokens that trigger them, tokens that they write, or a topic?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from matplotlib.figure import Figure
from scipy.stats import hypergeom
from torch import Tensor

from ..clustering import restarts
from ..corpus import Corpus, Tokens
from ..errors import InputError
from ..ffn import FFN
from ..figure import GREY, caption, legend_below, new_figure, styled
from ..models import Model, output_gain, tokenizer_of
from ..result import Result, column
from ..statistics import TopActivations
from ..stream import Probe, choose_ffns, collect, settings_of
from ..unembedding import unembedding
from .cluster_figure import MARK
from .cluster_quality import best, permuted
from .hidden_rank import check_documents
from .memories import read_values, word
from .neuron_views import BUDGET, NEURONS, VIEWS, drawn, views_of, vocabulary_metric, vocabulary_root
from .neuron_views import probes as half_probes

KINDS = {"trigger": "trigger tokens", "value": "tokens they write", "document": "topics of their triggers"}
LEVEL = 0.05  # of the corrected p-value


@dataclass(frozen=True)
class Row:
    layer: int = column("", "layer")
    view: str = column("", "what the clusters are of: keys, gates, values, vocabulary, co-activation")
    cluster: int = column("", "cluster")
    size: int = column("neurons", "neurons of the cluster")
    kind: str = column(
        "", "trigger: token of a strong trigger, value: token raised, document: label of its triggers"
    )
    label: str = column(
        "", "what stands out most in the cluster; empty where no two of its neurons share anything"
    )
    inside: int = column("neurons", "neurons of the cluster that have it")
    overall: int = column("neurons", "neurons of all clusters that have it")
    neurons: int = column("neurons", "neurons clustered")
    p: float = column("0..1", "hypergeometric: of so many or more, if the cluster were drawn at random")
    p_corrected: float = column("0..1", "p times the tests of this layer, view and kind (Bonferroni)")
    tests: int = column("tests", "clusters times what at least two neurons have")
    named_random: float = column("0..1", "share of clusters below 5% after correction, when dealt out at random")

    @property
    def named(self) -> bool:
        """Below 5% after correction."""
        return self.p_corrected < LEVEL


@dataclass(frozen=True)
class ClusterLabels(Result):
    name: ClassVar[str] = "cluster_labels"
    question: ClassVar[str] = (
        "What do the neurons of a cluster share: tokens that trigger them, tokens that they write, or a topic?"
    )
    row_type: ClassVar[type] = Row

    def of(self, view: str, kind: str) -> list[Row]:
        """The rows of one view and one kind of label, in the order of the layers."""
        return [row for row in self.rows if row.view == view and row.kind == kind]

    def findings(self) -> list[str]:
        sentences = []
        for kind, words in KINDS.items():
            shares = [
                f"{view} {fmean(row.named for row in rows):.0%} ({fmean(row.named_random for row in rows):.1%})"
                for view in VIEWS
                if (rows := self.of(view, kind))
            ]
            if shares:
                sentences.append(
                    f"Clusters whose neurons share {words} beyond chance (hypergeometric, corrected, 5%; in "
                    f"brackets random clusters): {', '.join(shares)}."
                )
        if best_named := sorted(self.of("co-activation", "trigger"), key=lambda row: row.p_corrected)[:3]:
            shown = (f"{row.label!r} at layer {row.layer} ({row.inside} of {row.size})" for row in best_named)
            sentences.append(f"The most alike clusters of co-activation answer to {', '.join(shown)}.")
        return sentences

    @styled
    def plot(self) -> Figure:
        kinds = [kind for kind in KINDS if any(row.kind == kind for row in self.rows)]
        figure, panels = new_figure(len(kinds), caption(self.settings, f"{self.settings['clusters']} clusters"))
        for axes, kind in zip(panels, kinds, strict=True):
            for view, (mark, colour) in MARK.items():
                if not (rows := self.of(view, kind)):
                    continue
                layers = sorted({row.layer for row in rows})
                each = [[row for row in rows if row.layer == layer] for layer in layers]
                axes.plot(layers, [fmean(r.named for r in some) for some in each], mark, color=colour, label=view)
                random = [fmean(r.named_random for r in some) for some in each]
                axes.plot(layers, random, "--", color=GREY, alpha=0.6, linewidth=1)
            axes.plot([], [], "--", color=GREY, label="random clusters")
            axes.set(title=f"Shared {KINDS[kind]}", xlabel="layer", ylabel="share of clusters, p < 5% corrected")
            axes.set_ylim(-0.02, 1.02)
            legend_below(axes)
        return figure


def probes(
    layers: Sequence[FFN],
    *,
    triggers: int = 5,
    neurons: int = NEURONS,
    budget: int = BUDGET,
    seed: int = 0,
) -> dict[str, Probe]:
    """What `cluster_labels` needs of one pass: co-activation, and triggers in the other half of the documents."""
    wanted = half_probes(layers, neurons=neurons, budget=budget, seed=seed)
    for ffn in layers:
        top = partial(TopActivations.about, k=triggers, by_magnitude=ffn.gated)
        wanted[f"cluster_labels/{ffn.layer}/top"] = Probe(ffn.layer, "post", top, block=(1, 2))
    return wanted


def cluster_labels(
    model: Model,
    tokens: Tokens,
    corpus: Corpus | None = None,
    *,
    layers: Sequence[int] | None = None,
    clusters: int = 32,
    triggers: int = 5,
    readings: int = 8,
    seeds: int = 5,
    permutations: int = 20,
    neurons: int = NEURONS,
    budget: int = BUDGET,
    seed: int = 0,
    statistics: Mapping[str, Any] | None = None,
    **collecting: Any,
) -> ClusterLabels:
    """What each cluster of each view has in common, with a p-value corrected for the number of tests.

    Clusters of co-activation are made of one half of the documents and triggers are those of the other half, so
    that a shared trigger is no tautology. It is one where values, or values in the vocabulary, are clustered and
    the tokens that they write are compared: those clusters are labelled, not tested.

    Tokens carry no labels, only the number of their document: topics (or authors) come from the corpus that the
    tokens were packed from. A neuron has a topic where at least half of its triggers do.

    Args:
        corpus: what the tokens were packed from; without it, or if it has no labels, there are no topics.
        clusters: at most a quarter of the layer's neurons.
        triggers: strongest tokens a neuron. readings: tokens that its value raises most, at its strongest trigger.
        permutations: random clusters of the same sizes, named by the same test.

    Raises:
        InputError: a layer that is not there, another corpus than that of the tokens, or a single document.
        ModelRefused: values cannot be read in the vocabulary.
    """
    check_documents(tokens)
    topics = _topics(tokens, corpus)
    measured = choose_ffns(model, layers)
    keep: dict[str, Any] = {"triggers": triggers, "neurons": neurons, "budget": budget, "seed": seed}
    if statistics is None:
        statistics = collect(model, tokens, probes(measured, **keep), **collecting)
    vocabulary, root, tokenizer = unembedding(model), vocabulary_root(model), tokenizer_of(model)
    words = [word(tokenizer, i) for i in range(len(vocabulary))]
    rows: list[Row] = []
    for ffn in measured:
        chosen = drawn(ffn, neurons, seed)
        pick = torch.arange(ffn.d_mlp) if chosen is None else chosen
        top = statistics[f"cluster_labels/{ffn.layer}/top"].compute()
        at, sign = top.at.cpu()[pick], torch.where(top.activation.cpu()[pick, :1] < 0, -1.0, 1.0)
        gain = output_gain(model, ffn.layer)
        values = (ffn.wide().values if gain is None else ffn.wide().values * gain)[pick]
        raised, _ = read_values(values * sign.to(values), vocabulary, readings)
        has = {"trigger": _having(tokens.ids.flatten()[at].tolist(), words)}
        has["value"] = _having(raised.tolist(), words)
        if topics:
            has["document"] = _having(_most(tokens.document.flatten()[at].tolist(), topics))
        generator = torch.Generator().manual_seed(1_000_003 * seed + ffn.layer)
        for view, seen in views_of(ffn, chosen, vocabulary_metric(model, ffn.layer, root), statistics).items():
            k = min(clusters, max(2, len(pick) // 4))
            labels = best(restarts(seen.rows, k, range(seed, seed + seeds), signed=seen.signed)).labels
            random = permuted(labels, permutations, generator)
            for kind, having in has.items():
                rows += _rows(ffn.layer, view, kind, having, labels, random)
    settings = settings_of(model, tokens, seed, **collecting) | keep | {"clusters": clusters, "readings": readings}
    settings |= {"seeds": seeds, "permutations": permutations, "weights": "raw", "vocabulary": "folded"}
    return ClusterLabels(rows, settings | {"topics": sorted(set(topics.values()))})


class Having(NamedTuple):
    """Which neuron has what; only what two or more neurons have."""

    neuron: Bool[Tensor, "n things"]
    names: list[str]


class Enrichment(NamedTuple):
    """For each cluster, what stands out most in it."""

    thing: Int[Tensor, " k"]
    inside: Int[Tensor, " k"]
    p: Float[Tensor, " k"]
    tests: int


def enrichment(having: Bool[Tensor, "n things"], labels: Int[Tensor, " n"]) -> Enrichment:
    """The thing of least p in each cluster: hypergeometric, of as many neurons or more having it.

    A single neuron shares nothing: what fewer than two of a cluster have counts as a test, with p = 1.
    """
    member = torch.nn.functional.one_hot(labels)
    inside = (member.T.double() @ having.double()).long()
    p = torch.ones(inside.shape, dtype=torch.float64)
    cluster, thing = (inside >= 2).nonzero(as_tuple=True)
    overall, sizes = having.sum(dim=0), member.sum(dim=0)
    parts = (part.numpy() for part in (inside[cluster, thing] - 1, overall[thing], sizes[cluster]))
    found, n_thing, n_cluster = parts
    p[cluster, thing] = torch.from_numpy(np.asarray(hypergeom.sf(found, len(labels), n_thing, n_cluster)))
    if not p.shape[1]:
        none = torch.zeros(len(p), dtype=torch.int64)
        return Enrichment(none, none, torch.ones(len(p), dtype=torch.float64), 0)
    least, thing = p.min(dim=1)
    return Enrichment(thing, inside.gather(1, thing[:, None])[:, 0], least, p.numel())


def _rows(
    layer: int, view: str, kind: str, having: Having, labels: Int[Tensor, " n"], random: Sequence[Tensor]
) -> list[Row]:
    found = enrichment(having.neuron, labels)
    shares = ((e := enrichment(having.neuron, some)).p * e.tests < LEVEL for some in random)
    chance = fmean(float(share.double().mean()) for share in shares)
    overall, sizes = having.neuron.sum(dim=0).tolist(), labels.bincount().tolist()
    return [
        Row(
            layer=layer,
            view=view,
            cluster=i,
            size=sizes[i],
            kind=kind,
            label=having.names[thing] if inside >= 2 else "",
            inside=inside if inside >= 2 else 0,
            overall=overall[thing] if inside >= 2 else 0,
            neurons=len(labels),
            p=p,
            p_corrected=min(1.0, p * found.tests),
            tests=found.tests,
            named_random=chance,
        )
        for i, (thing, inside, p) in enumerate(
            zip(found.thing.tolist(), found.inside.tolist(), found.p.tolist(), strict=True)
        )
    ]


def _having(things: Sequence[Iterable[Any]], words: Sequence[str] | None = None) -> Having:
    """From what each neuron has; `words` name what is given as a number."""
    sets = [set(some) for some in things]
    counts = Counter(thing for some in sets for thing in some)
    kept = {thing: i for i, thing in enumerate(sorted(t for t, n in counts.items() if n >= 2))}
    neuron = torch.zeros(len(sets), len(kept), dtype=torch.bool)
    for i, some in enumerate(sets):
        neuron[i, [kept[thing] for thing in some if thing in kept]] = True
    return Having(neuron, [str(thing) if words is None else words[thing] for thing in kept])


def _most(documents: Sequence[Sequence[int]], topics: Mapping[int, str]) -> list[set[str]]:
    """The topics of at least half of each neuron's documents."""
    counts = (Counter(topics.get(i, "") for i in some) for some in documents)
    return [{topic for topic, n in each.items() if topic and 2 * n >= each.total()} for each in counts]


def _topics(tokens: Tokens, corpus: Corpus | None) -> dict[int, str]:
    """The label of each document that has one."""
    if corpus is None:
        return {}
    if corpus.sha256 != tokens.settings.get("corpus_sha256", corpus.sha256):
        raise InputError(f"the tokens are not of corpus {corpus.name}: give the one that they were packed from")
    return {i: label for i in tokens.document.unique().tolist() if (label := corpus.documents[i].label)}

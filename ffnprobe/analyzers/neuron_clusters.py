"""Do neurons form groups, do the groups come back, and do neurons that read alike write alike?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, ClassVar

from matplotlib.figure import Figure

from ..clustering import ALGORITHMS
from ..corpus import Tokens
from ..errors import InputError
from ..ffn import FFN
from ..figure import styled
from ..forward import evenly
from ..models import Model
from ..result import FEWEST_LAYERS, Result, Verdict, beyond
from ..stream import choose_ffns, collect, settings_of
from .cluster_figure import draw
from .cluster_quality import Judge
from .cluster_rows import Row as Row
from .cluster_rows import at_most, choose, layer_rows, measure
from .hidden_rank import check_documents
from .neuron_views import (
    BUDGET,
    NEURONS,
    VIEWS,
    View,
    drawn,
    half_name,
    views_of,
    vocabulary_metric,
    vocabulary_root,
)
from .neuron_views import probes as probes

CANDIDATES = (8, 16, 32, 64)
REPLICATES = 0.25  # AMI: a quarter of what two equal clusterings share


@dataclass(frozen=True)
class NeuronClusters(Result):
    name: ClassVar[str] = "neuron_clusters"
    question: ClassVar[str] = (
        "Do neurons form groups, do the groups come back, and do neurons that read alike write alike?"
    )
    row_type: ClassVar[type] = Row

    def view(self, view: str, algorithm: str = "spherical") -> list[Row]:
        """The rows of one view at the number of clusters chosen for it, in the order of the layers."""
        return [row for row in self.rows if row.view == view and row.algorithm == algorithm and row.chosen]

    @property
    def reading(self) -> list[Row]:
        """The rows of what says when a neuron speaks: gates, or the keys of a plain layer."""
        return self.view("gates") or self.view("keys")

    def findings(self) -> list[str]:
        sentences, active, reading = [], self.view("co-activation"), self.reading
        if active:
            back, chance = ([getattr(row, "replication" + end) for row in active] for end in ("", "_permuted"))
            sentences.append(
                f"Clusters of co-activation ({active[0].clusters}) come back in the other half of the documents: "
                f"AMI {median(back):.2f} in the median of {len(active)} layers (best of "
                f"{active[0].permutations} random pairings {median(chance):.3f}). There, two neurons of a cluster "
                f"correlate by {median(row.coherence for row in active):.3f}, of random clusters by up to "
                f"{median(row.coherence_permuted for row in active):.3f}; silhouette "
                f"{median(row.silhouette for row in active):.3f}, of independent neurons "
                f"{active[0].silhouette_null:.3f}."
            )
        pairs = _with_values(reading)
        sentences.append(
            f"Clusters of {reading[0].view} and of values agree (AMI) at {median(ami for ami, _ in pairs):.3f} in "
            f"the median layer, above the best of {reading[0].permutations} random pairings in "
            f"{sum(ami > chance for ami, chance in pairs)} of {len(pairs)} layers."
        )
        stable = (
            f"{view} {median(row.stability or 0.0 for row in rows):.2f} in {rows[0].clusters} clusters (Gaussian "
            f"{median(row.stability_null or 0.0 for row in rows):.2f})"
            for view in VIEWS
            if (rows := self.view(view))
        )
        sentences.append(f"Stability over seeds (ARI, median layer): {', '.join(stable)}.")
        if 0 < len(active) < len(reading):
            sentences.append(
                f"Co-activation was measured at {len(active)} of {len(reading)} layers, to keep within a budget "
                f"of {self.settings['budget']:,} bytes."
            )
        if self.settings["drawn"]:
            sentences.append(
                f"Of wider layers, {self.settings['neurons']:,} neurons drawn at random were clustered."
            )
        return sentences

    def verdicts(self) -> list[Verdict]:
        active = self.view("co-activation")
        n, layers = len(active), {row.layer for row in active}
        if n < FEWEST_LAYERS:
            return []
        back = [(row.replication or 0.0, row.replication_permuted or 0.0) for row in active]
        alike = _with_values([row for row in self.reading if row.layer in layers])
        large = [sum(ami > max(chance, REPLICATES) for ami, chance in pairs) for pairs in (back, alike)]
        some = [sum(ami > chance for ami, chance in pairs) for pairs in (back, alike)]
        strong, weak = [beyond(k, n) for k in large], [beyond(k, n) for k in some]
        return [
            Verdict(
                claim=4,
                rule="feature families: supported if, in most layers (sign test, 5%), the co-activation clusters "
                f"of one half of the documents agree with those of the other at an AMI above {REPLICATES}, and "
                "the clusters of what neurons read (gates, or keys) agree with those of what they write at an "
                f"AMI above {REPLICATES}, both above every random pairing; mixed if only one of the two does, or "
                "if both are above every random pairing but not that large",
                measured=f"document halves agree so in {large[0]} of {n} layers (above random pairings in "
                f"{some[0]}), reading and writing in {large[1]} (above random pairings in {some[1]})",
                verdict="supported" if all(strong) else "mixed" if any(strong) or all(weak) else "not supported",
                against="Where an oracle routes, random partitions are nearly as good experts as clusters "
                "(MoEfication, T5-large: 80.0 against 80.8 with the fewest experts, quoted second-hand); clusters "
                "that come back may be those of a few frequent tokens.",
            )
        ]

    @styled
    def plot(self) -> Figure:
        return draw({view: self.view(view) for view in VIEWS}, self.rows, self.settings)


def _with_values(rows: Sequence[Row]) -> list[tuple[float, float]]:
    """Agreement with the clusters of the values, and the best of random pairings."""
    pairs = (pair for row in rows if (pair := row.with_view("values")))
    return [(pair["ami"], pair["permuted"]) for pair in pairs]


def neuron_clusters(
    model: Model,
    tokens: Tokens,
    *,
    layers: Sequence[int] | None = None,
    candidates: Sequence[int] = CANDIDATES,
    algorithms: Sequence[str] = ALGORITHMS,
    seeds: int = 5,
    permutations: int = 20,
    scouts: int = 3,
    co_activity: str = "magnitudes",
    neurons: int = NEURONS,
    budget: int = BUDGET,
    seed: int = 0,
    statistics: Mapping[str, Any] | None = None,
    **collecting: Any,
) -> NeuronClusters:
    """Cluster every layer's neurons by what they read, what they write and when they are active, and compare.

    Gates, and the keys of plain FFNs, are clustered by cosine; keys of gated FFNs by |cosine|, and so are
    their values, because (key, value) -> (-key, -value) leaves a gated FFN as it is. Co-activation is the
    correlation of |h|: clusters are made of one half of the documents and judged in the other. `vocabulary` is
    the values by their logits over all tokens, through the folded unembedding.

    How many clusters a view has is chosen at a few layers (`scouts`) among the candidates: where clusterings from
    different seeds agree most beyond those of Gaussian rows. All layers are then clustered by spherical k-means
    (or k-lines), the middle scout by the other algorithms as well.

    Args:
        layers: the layers to measure; all by default.
        candidates: numbers of clusters; at most a quarter of a layer's neurons is used.
        algorithms: any of spherical, balanced, spectral, agglomerative; spherical is always there.
        seeds: clusterings a view; the best by fit is compared across views.
        permutations: random pairings behind each agreement.
        co_activity: magnitudes (correlation of |h|), or counts (of tokens on which two neurons are active).
        neurons: of a layer with more of them, so many are drawn at random.
        budget: bytes of co-activation; of too many layers, some are left without it.
        statistics: what one `collect` over `probes(...)` gave, when several analyzers share a pass.
        collecting: passed to `collect` (batch, sink_factor, progress).

    Raises:
        InputError: a layer or an algorithm that is not there, or a single document.
    """
    if wrong := [name for name in algorithms if name not in ALGORITHMS]:
        raise InputError(f'algorithm "{wrong[0]}" is unknown: choose from {", ".join(ALGORITHMS)}')
    if min(candidates, default=0) < 2 or seeds < 2:
        raise InputError(
            f"got candidates {list(candidates)}, seeds {seeds}: give numbers of clusters and seeds from 2"
        )
    check_documents(tokens)
    measured = choose_ffns(model, layers)
    keep: dict[str, Any] = {"co_activity": co_activity, "neurons": neurons, "budget": budget, "seed": seed}
    if statistics is None:
        statistics = collect(model, tokens, probes(measured, **keep), **collecting)
    root = vocabulary_root(model)

    def views(ffn: FFN) -> dict[str, View]:
        metric = vocabulary_metric(model, ffn.layer, root)
        return views_of(ffn, drawn(ffn, neurons, seed), metric, statistics, co_activity)

    active = [ffn for ffn in measured if half_name(ffn.layer, 0) in statistics]
    scouting = {ffn.layer for ffn in evenly(active or measured, scouts)}
    judge = Judge(range(seed, seed + seeds), permutations, seed)
    trials = [
        measure(judge, ffn.layer, name, view, "spherical", k)[0]
        for ffn in measured
        if ffn.layer in scouting
        for name, view in views(ffn).items()
        for k in sorted({at_most(k, view) for k in candidates})
    ]
    clusters, rows = choose(trials), list[Row]()
    (compared,) = evenly(sorted(scouting), 1)
    for ffn in measured:
        seen, others = views(ffn), [name for name in algorithms if name != "spherical" and ffn.layer == compared]
        rows += (
            row for name in ("spherical", *others) for row in layer_rows(judge, ffn.layer, seen, name, clusters)
        )
    done = {(row.layer, row.view, row.clusters) for row in rows}
    rows += (row for row in trials if (row.layer, row.view, row.clusters) not in done)
    settings = settings_of(model, tokens, seed, **collecting) | keep
    settings |= {"weights": "raw", "vocabulary": "folded", "candidates": list(candidates), "clusters": clusters}
    settings |= {"seeds": seeds, "permutations": permutations, "algorithms": list(algorithms)}
    settings |= {"scouts": sorted(scouting), "drawn": any(ffn.d_mlp > neurons for ffn in measured)}
    return NeuronClusters(rows, settings)

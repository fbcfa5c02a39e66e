"""Do neurons form groups, and do neurons that read alike write alike?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score
from torch import Tensor

from ..clustering import spherical_kmeans
from ..ffn import FFN
from ..figure import BLUE, GREEN, GREY, ORANGE, caption, legend_below, new_figure, styled
from ..models import Model, describe, ffns
from ..result import Result, column
from ..stream import choose_layers

MARK = {"keys": ("o-", BLUE), "gates": ("^-", ORANGE), "values": ("s-", GREEN)}


@dataclass(frozen=True)
class Row:
    layer: int = column("", "layer")
    view: str = column("", "keys, gates or values of the layer's neurons")
    clusters: int = column("clusters", "clusters asked for")
    signed: bool = column("", "by cosine; no: by |cosine|, where a sign is a gauge (keys, values of gated FFNs)")
    stability: float = column(
        "ARI", "agreement of clusterings from different seeds, mean over pairs: 0 chance, 1 equal"
    )
    stability_null: float = column("ARI", "the same for Gaussian rows of that shape")
    fit: float = column("cosine", "mean |cosine| of a row to its cluster's centre, best seed")
    fit_null: float = column("cosine", "the same for Gaussian rows of that shape")
    largest: float = column("0..1", "share of the neurons in the largest cluster, best seed")
    agreement_with_values: float | None = column(
        "AMI", "agreement with the clusters of the values: 0 chance, 1 equal"
    )
    agreement_permuted: float | None = column("AMI", "largest agreement over random pairings")
    permutations: int = column("draws", "random pairings drawn")


@dataclass(frozen=True)
class NeuronClusters(Result):
    name: ClassVar[str] = "neuron_clusters"
    question: ClassVar[str] = "Do neurons form groups, and do neurons that read alike write alike?"
    row_type: ClassVar[type] = Row

    def view(self, view: str) -> list[Row]:
        """The rows of one view, in the order of the layers."""
        return [row for row in self.rows if row.view == view]

    def findings(self) -> list[str]:
        reading = self.view("gates") or self.view("keys")
        first, n = reading[0], len(reading)
        pairs = [(row.agreement_with_values or 0.0, row.agreement_permuted or 0.0) for row in reading]
        agreement = median(found for found, _ in pairs)
        above = sum(found > permuted for found, permuted in pairs)
        stable = (
            f"{view} {median(row.stability for row in rows):.2f} (Gaussian "
            f"{median(row.stability_null for row in rows):.2f})"
            for view in MARK
            if (rows := self.view(view))
        )
        return [
            f"Clusters of {first.view} and of values agree (AMI) at {agreement:.3f} in the median layer, above "
            f"the best of {first.permutations} random pairings in {above} of {n} layers.",
            f"Stability over seeds (ARI, median layer, {first.clusters} clusters): {', '.join(stable)}.",
        ]

    @styled
    def plot(self) -> Figure:
        figure, (stable, agree) = new_figure(2, caption(self.settings, f"{self.rows[0].clusters} clusters"))
        for view, (mark, colour) in MARK.items():
            rows = self.view(view)
            if not rows:
                continue
            layers = [row.layer for row in rows]
            stable.plot(layers, [row.stability for row in rows], mark, color=colour, label=view)
            stable.plot(layers, [row.stability_null for row in rows], "--", color=colour, alpha=0.45, linewidth=1)
            if view != "values":
                agree.plot(
                    layers,
                    [row.agreement_with_values for row in rows],
                    mark,
                    color=colour,
                    label=f"{view} and values",
                )
        stable.plot([], [], "--", color=GREY, label="Gaussian rows")
        reading = self.view("gates") or self.view("keys")
        null = [row.agreement_permuted for row in reading]
        agree.plot([row.layer for row in reading], null, "--", color=GREY, label="best random pairing")
        stable.set(
            title="Stable over seeds",
            xlabel="layer",
            ylabel="adjusted Rand index",
            ylim=(min(0, stable.get_ylim()[0]), 1),
        )
        agree.set(title="Read alike, write alike?", xlabel="layer", ylabel="adjusted mutual information")
        for axes in (stable, agree):
            legend_below(axes)
        return figure


def neuron_clusters(
    model: Model,
    *,
    layers: Sequence[int] | None = None,
    clusters: int = 32,
    seeds: int = 5,
    permutations: int = 20,
    seed: int = 0,
) -> NeuronClusters:
    """Cluster every layer's neurons by what they read and by what they write, and compare.

    Gates, and the keys of plain FFNs, are clustered by cosine; keys of gated FFNs by |cosine|, and so are
    their values, because (key, value) -> (-key, -value) leaves a gated FFN as it is.

    Args:
        layers: the layers to measure; all by default.
        clusters: at most a quarter of a layer's neurons.
        seeds: clusterings a view; the best by fit is compared across views.
        permutations: random pairings behind the null of the agreement.

    Raises:
        InputError: a layer that is not there.
    """
    chosen = {tap.layer for tap in choose_layers(model, layers)}
    nulls: dict = {}  # by shape: Gaussian rows know nothing of the layer
    rows = [
        row
        for ffn in ffns(model)
        if ffn.layer in chosen
        for row in _layer_rows(
            ffn, min(clusters, max(2, ffn.d_mlp // 4)), range(seed, seed + seeds), permutations, nulls
        )
    ]
    settings = {"clusters": clusters, "seeds": seeds, "permutations": permutations, "seed": seed}
    return NeuronClusters(rows, {"model": describe(model)["name"], "weights": "raw", **settings})


@dataclass(frozen=True)
class _Clustering:
    labels: Int[Tensor, " n"]
    fit: float
    stability: float


def _cluster(rows: Float[Tensor, "n d"], clusters: int, seeds: Sequence[int], signed: bool) -> _Clustering:
    runs = [spherical_kmeans(rows, clusters, seed=seed, signed=signed) for seed in seeds]
    pairs = [adjusted_rand_score(a.numpy(), b.numpy()) for (a, _), (b, _) in combinations(runs, 2)]
    labels, fit = max(runs, key=lambda run: run[1])
    return _Clustering(labels, fit, float(np.mean(pairs)) if pairs else float("nan"))


def _layer_rows(ffn: FFN, clusters: int, seeds: Sequence[int], permutations: int, nulls: dict) -> list[Row]:
    matrices = {"keys": ffn.keys, "gates": ffn.gates, "values": ffn.values}
    views = {view: rows.detach().float().cpu() for view, rows in matrices.items() if rows is not None}
    signed = {view: view == "gates" or not ffn.gated for view in views}
    found = {view: _cluster(rows, clusters, seeds, signed[view]) for view, rows in views.items()}
    generator = torch.Generator().manual_seed(1_000_003 * seeds[0] + ffn.layer)
    for sign in set(signed.values()):
        if (ffn.values.shape, sign) not in nulls:
            gaussian = torch.randn(ffn.values.shape, generator=generator)
            nulls[ffn.values.shape, sign] = _cluster(gaussian, clusters, seeds, sign)
    null = {sign: nulls[ffn.values.shape, sign] for sign in signed.values()}
    values = found["values"].labels.numpy()
    shuffled = [values[torch.randperm(len(values), generator=generator).numpy()] for _ in range(permutations)]
    return [
        Row(
            layer=ffn.layer,
            view=view,
            clusters=clusters,
            signed=signed[view],
            stability=clustering.stability,
            stability_null=null[signed[view]].stability,
            fit=clustering.fit,
            fit_null=null[signed[view]].fit,
            largest=float(torch.bincount(clustering.labels).max() / len(clustering.labels)),
            agreement_with_values=_agreement(clustering, values) if view != "values" else None,
            agreement_permuted=max(_agreement(clustering, other) for other in shuffled)
            if view != "values"
            else None,
            permutations=permutations,
        )
        for view, clustering in found.items()
    ]


def _agreement(clustering: _Clustering, labels: np.ndarray) -> float:
    return float(adjusted_mutual_info_score(clustering.labels.numpy(), labels))

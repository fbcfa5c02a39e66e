"""What is measured of the views of one layer, clustered one way, and how many clusters should a view have?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ..result import column
from .cluster_quality import Agreement, Judge, agreement, best, coherence, permuted
from .neuron_views import View


@dataclass(frozen=True)
class Row:
    layer: int = column("", "layer")
    view: str = column("", "keys, gates, values, vocabulary (values as tokens) or co-activation of the neurons")
    algorithm: str = column("", "spherical (k-means, or k-lines), balanced, spectral or agglomerative")
    clusters: int = column("clusters", "clusters asked for")
    chosen: bool = column("", "this is the number of clusters that was chosen for the view, by stability")
    neurons: int = column("neurons", "neurons clustered: all of the layer, or a random subset")
    signed: bool = column("", "by cosine; no: by |cosine|, where a sign is a gauge (keys, values of gated FFNs)")
    stability: float | None = column(
        "ARI",
        "agreement of clusterings from different seeds, mean over pairs: 0 chance, 1 equal; none without seeds",
    )
    stability_null: float | None = column("ARI", "the same for Gaussian rows of that shape")
    silhouette: float = column("-1..1", "mean silhouette; of co-activation, in the other half of the documents")
    silhouette_null: float = column("-1..1", "the same for Gaussian rows of that shape, clustered too")
    coherence: float = column(
        "-1..1", "mean similarity of two neurons of a cluster, measured where the silhouette is"
    )
    coherence_null: float = column("-1..1", "the same for Gaussian rows of that shape, clustered too")
    coherence_permuted: float = column("-1..1", "largest coherence of random clusters of the same sizes")
    largest: float = column("0..1", "share of the neurons in the largest cluster")
    replication: float | None = column("AMI", "agreement of the clusters of the two halves of the documents")
    replication_permuted: float | None = column("AMI", "largest over random pairings")
    agreement: list[dict] = column(
        "", "with each other view's clusters: view, ami, permuted (largest random pairing)"
    )
    permutations: int = column("draws", "random pairings, and random clusters, drawn")

    def with_view(self, view: str) -> dict[str, Any] | None:
        """Agreement with another view's clusters; None where there is no such view."""
        return next((other for other in self.agreement if other["view"] == view), None)


def at_most(k: int, view: View) -> int:
    """A quarter of the neurons: clusters of fewer than four say little."""
    return min(k, max(2, len(view.rows) // 4))


def choose(trials: Sequence[Row]) -> dict[str, int]:
    """For each view, the number of clusters that is stable furthest beyond Gaussian rows, in the median scout."""

    beyond_null: dict[str, dict[int, list[float]]] = {}
    for row in trials:
        beyond = (row.stability or 0.0) - (row.stability_null or 0.0)
        beyond_null.setdefault(row.view, {}).setdefault(row.clusters, []).append(beyond)
    return {view: max(tried, key=lambda k: median(tried[k])) for view, tried in beyond_null.items()}


def measure(judge: Judge, layer: int, name: str, view: View, algorithm: str, k: int) -> tuple[Row, Tensor]:
    """A row without its agreement with other views, and the labels."""
    found, null = judge.quality(view, k, algorithm), judge.null(view, k, algorithm)
    generator = torch.Generator().manual_seed(1_000_003 * judge.seed + layer)
    random = permuted(found.labels, judge.permutations, generator)
    back: Agreement | None = None
    if view.again is not None:
        again = best(judge.cluster(view.again, view.signed, k, algorithm)).labels
        back = agreement(found.labels, again, judge.permutations, generator)
    row = Row(
        layer=layer,
        view=name,
        algorithm=algorithm,
        clusters=k,
        chosen=False,
        neurons=len(view.rows),
        signed=view.signed,
        stability=found.stability,
        stability_null=null.stability,
        silhouette=found.silhouette,
        silhouette_null=null.silhouette,
        coherence=found.coherence,
        coherence_null=null.coherence,
        coherence_permuted=max(coherence(view.scored, labels) for labels in random),
        largest=float(found.labels.bincount().max() / len(found.labels)),
        replication=back.ami if back else None,
        replication_permuted=back.permuted if back else None,
        agreement=[],
        permutations=judge.permutations,
    )
    return row, found.labels


def layer_rows(
    judge: Judge, layer: int, seen: Mapping[str, View], algorithm: str, clusters: Mapping[str, int]
) -> list[Row]:
    """One row a view at the numbers of clusters chosen, with the agreement of each two views."""
    found = {
        name: measure(judge, layer, name, view, algorithm, at_most(clusters[name], view))
        for name, view in seen.items()
    }
    generator = torch.Generator().manual_seed(1_000_003 * judge.seed + layer)
    pairs = {
        frozenset(pair): agreement(found[pair[0]][1], found[pair[1]][1], judge.permutations, generator)
        for pair in combinations(found, 2)
    }
    return [
        replace(
            row,
            chosen=True,
            agreement=[
                {"view": other, **asdict(pairs[frozenset((name, other))])} for other in found if other != name
            ],
        )
        for name, (row, _) in found.items()
    ]

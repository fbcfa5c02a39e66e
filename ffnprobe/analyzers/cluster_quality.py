"""How good is a clustering of neurons, and how good would chance be?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.metrics import silhouette_score
from sklearn.metrics.cluster import expected_mutual_information
from torch import Tensor

from ..clustering import Clustering, cluster
from .neuron_views import View


@dataclass(frozen=True, eq=False)
class Quality:
    """One view of one layer, clustered by one algorithm into k clusters."""

    labels: Int[Tensor, " n"]  # of the seed that fits best
    stability: float | None
    silhouette: float
    coherence: float


@dataclass
class Judge:
    """Clusters views and remembers what Gaussian rows of their kind give."""

    seeds: Sequence[int]
    permutations: int
    seed: int
    _nulls: dict[tuple, View] = field(default_factory=dict)
    _judged: dict[tuple, Quality] = field(default_factory=dict)

    def cluster(self, rows: Float[Tensor, "n d"], signed: bool, k: int, algorithm: str) -> list[Clustering]:
        """One clustering a seed."""
        return cluster(rows, k, algorithm, seeds=self.seeds, signed=signed)

    def quality(self, view: View, k: int, algorithm: str) -> Quality:
        """Cluster a view and judge the clusters by the similarities that it is scored with."""
        runs = self.cluster(view.rows, view.signed, k, algorithm)
        labels = best(runs).labels
        return Quality(labels, stability(runs), silhouette(view.scored, labels), coherence(view.scored, labels))

    def null(self, view: View, k: int, algorithm: str) -> Quality:
        """The same of the view's null, which is drawn once for all views of its kind."""
        if view.kind not in self._nulls:
            self._nulls[view.kind] = view.null(torch.Generator().manual_seed(self.seed))
        if (key := (*view.kind, k, algorithm)) not in self._judged:
            self._judged[key] = self.quality(self._nulls[view.kind], k, algorithm)
        return self._judged[key]


def best(runs: Sequence[Clustering]) -> Clustering:
    """The clustering that fits best."""
    return max(runs, key=lambda run: run.fit)


def stability(runs: Sequence[Clustering]) -> float | None:
    """`adjusted_rand`, mean over pairs of clusterings; None of a single one."""
    pairs = [adjusted_rand(a.labels, b.labels) for a, b in combinations(runs, 2)]
    return float(np.mean(pairs)) if pairs else None


def adjusted_rand(one: Int[Tensor, " n"], other: Int[Tensor, " n"]) -> float:
    """Pairs of neurons that both clusterings join, beyond chance (Hubert & Arabie 1985): 0 chance, 1 equal.

    scikit-learn's takes a hundred times as long for a small layer.

    >>> adjusted_rand(torch.tensor([0, 0, 1, 1]), torch.tensor([5, 5, 2, 2]))
    1.0
    """
    table = _table(one, other)
    both, first, second = (_pairs(sizes) for sizes in (table, table.sum(axis=1), table.sum(axis=0)))
    chance, most = first * second / max(1, len(one) * (len(one) - 1) / 2), (first + second) / 2
    return 1.0 if most == chance else float((both - chance) / (most - chance))


def _table(one: Int[Tensor, " n"], other: Int[Tensor, " n"]) -> np.ndarray:
    """Neurons in each cluster of the one and of the other."""
    height, width = int(one.max()) + 1, int(other.max()) + 1
    table = (one * width + other).bincount(minlength=height * width).view(height, width).numpy()
    return table[table.any(axis=1)][:, table.any(axis=0)]


def _pairs(sizes: np.ndarray) -> float:
    return float((sizes * (sizes - 1) / 2).sum())


def _entropy(sizes: np.ndarray) -> float:
    share = sizes[sizes > 0] / sizes.sum()
    return float(-(share * np.log(share)).sum())


def silhouette(similarity: Float[Tensor, "n n"], labels: Int[Tensor, " n"]) -> float:
    """Mean silhouette at distance 1 - similarity (Rousseeuw 1987), in [-1, 1]; NaN where it is not defined."""
    if not 2 <= len(labels.unique()) < len(labels):
        return float("nan")
    distance = (1 - similarity).clamp(min=0).fill_diagonal_(0)
    return float(silhouette_score(distance.numpy(), labels.numpy(), metric="precomputed"))


def coherence(similarity: Float[Tensor, "n n"], labels: Int[Tensor, " n"]) -> float:
    """Mean similarity of two different neurons of one cluster; NaN where every cluster is a single one.

    >>> coherence(torch.tensor([[1.0, 0.5, 0.1], [0.5, 1.0, 0.0], [0.1, 0.0, 1.0]]), torch.tensor([0, 0, 1]))
    0.5
    """
    member = torch.nn.functional.one_hot(labels).to(similarity)
    sizes = member.sum(dim=0)
    pairs = float((sizes * (sizes - 1)).sum())
    together = float(((similarity @ member) * member).sum() - similarity.trace())
    return together / pairs if pairs else float("nan")


def permuted(labels: Int[Tensor, " n"], permutations: int, generator: torch.Generator) -> list[Int[Tensor, " n"]]:
    """The labels dealt out to the neurons at random, so many times."""
    return [labels[torch.randperm(len(labels), generator=generator)] for _ in range(permutations)]


@dataclass(frozen=True)
class Agreement:
    """Adjusted mutual information of two clusterings, and the largest over random pairings of the neurons."""

    ami: float
    permuted: float


def agreement(
    one: Int[Tensor, " n"], other: Int[Tensor, " n"], permutations: int, generator: torch.Generator
) -> Agreement:
    """(I - E I) / (mean entropy - E I): 0 chance, 1 equal (Vinh, Epps & Bailey 2010).

    What chance gives, E I, depends on the sizes of the clusters alone, which no pairing changes.
    """
    table = _table(one, other)
    alone = _entropy(table.sum(axis=0)) + _entropy(table.sum(axis=1))
    chance = expected_mutual_information(table, len(one))
    if alone / 2 - chance < 1e-12:  # a single cluster, or each neuron its own: they cannot differ
        return Agreement(1.0, 1.0)

    def adjusted(labels: Int[Tensor, " n"]) -> float:
        return float((alone - _entropy(_table(one, labels)) - chance) / (alone / 2 - chance))

    drawn = [adjusted(labels) for labels in permuted(other, permutations, generator)]
    return Agreement(adjusted(other), max(drawn, default=float("nan")))

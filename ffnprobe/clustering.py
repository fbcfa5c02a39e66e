"""Which rows point the same way? Spherical k-means, k-lines where a sign means nothing, and three other ways."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import AgglomerativeClustering
from sklearn.manifold import spectral_embedding
from torch import Tensor

ALGORITHMS = ("spherical", "balanced", "spectral", "agglomerative")
BLOCKS = 8  # rows move in as many turns: all at once, they would change places for ever
TOLERANCE = 1e-2  # a pass that improves the objective by less, relatively, is the last one
PASSES = 50
SEEDING = 8  # rows a cluster among which the first centres are looked for


@dataclass(frozen=True, eq=False)
class Clustering:
    """Labels in [0, k), and how well they fit: larger is better among clusterings by one algorithm."""

    labels: Int[Tensor, " n"]
    fit: float
    centres: Float[Tensor, "k d"] | None = None  # unit vectors; none where a graph was cut


def cluster(
    rows: Float[Tensor, "n d"], k: int, algorithm: str, *, seeds: Sequence[int] = (0,), signed: bool = True
) -> list[Clustering]:
    """One clustering a seed by any of `ALGORITHMS`; spectral and agglomerative give one.

    Raises:
        ValueError: k is not in [1, n], or there is no such algorithm.
    """
    match algorithm:
        case "spherical":
            return restarts(rows, k, seeds, signed=signed)
        case "balanced":
            return balanced(rows, k, seeds, signed=signed)
        case "spectral":
            return [spectral(similarity(rows, signed), k, seeds)]
        case "agglomerative":
            return [agglomerative(similarity(rows, signed), k)]
    raise ValueError(f'algorithm "{algorithm}" is unknown: choose from {", ".join(ALGORITHMS)}')


def similarity(rows: Float[Tensor, "n d"], signed: bool = True) -> Float[Tensor, "n n"]:
    """Cosine of every pair of rows, or |cosine|."""
    unit = _unit(rows)
    cosine = unit @ unit.mT
    return cosine if signed else cosine.abs()


def spherical_kmeans(
    rows: Float[Tensor, "n d"], k: int, *, seed: int = 0, signed: bool = True, tolerance: float = TOLERANCE
) -> tuple[Int[Tensor, " n"], float]:
    """One clustering of `restarts`: labels in [0, k) and the objective, in [0, 1]."""
    (found,) = restarts(rows, k, [seed], signed=signed, tolerance=tolerance)
    return found.labels, found.fit


def restarts(
    rows: Float[Tensor, "n d"],
    k: int,
    seeds: Sequence[int],
    *,
    signed: bool = True,
    tolerance: float = TOLERANCE,
) -> list[Clustering]:
    """Cluster the directions of the rows, once for each seed (Dhillon & Modha 2001).

    The objective is the mean cosine (or |cosine|) of a row to its cluster's centre. Each row moves to where the
    objective gains most, its own pull on its centre taken off first (Hartigan's rule; Dhillon, Guan & Kogan
    2002): in hundreds of dimensions a row is so large a part of its centre that moving to the nearest centre
    moves nothing, whatever the start. A result from which no row wants to move is one in which every row is
    with its nearest centre as well.

    Args:
        k: clusters, in [1, n]; none stays empty.
        seeds: all are computed side by side, each as if alone.
        signed: by cosine; False clusters lines, by |cosine|: a row and its negative are one.

    Raises:
        ValueError: k is not in [1, n].
    """
    _check(len(rows), k)
    unit = _unit(rows)
    state = _State.begin(unit, _spread(unit, k, signed, seeds), signed)
    found: dict[int, Clustering] = {}
    running, before = torch.arange(len(seeds)), state.objective()
    for done in range(PASSES):
        moved = state.sweep(unit)
        now = state.objective()
        last = (moved == 0) | (now - before < tolerance * before) | (done == PASSES - 1)
        for i in last.nonzero().flatten().tolist():
            found[int(running[i])] = state.clustering(i)
        running, before, state = running[~last], now[~last], state.subset(~last)
        if not len(running):
            break
    return [found[i] for i in range(len(seeds))]


def balanced(
    rows: Float[Tensor, "n d"], k: int, seeds: Sequence[int] = (0,), *, signed: bool = True
) -> list[Clustering]:
    """Clusters of n // k rows, or one more: the best assignment to the centres, and again while it gains.

    Raises:
        ValueError: k is not in [1, n].
    """
    unit = _unit(rows)
    return [_balance(unit, k, start, signed) for start in restarts(rows, k, seeds, signed=signed)]


def _balance(unit: Float[Tensor, "n d"], k: int, start: Clustering, signed: bool) -> Clustering:
    labels, centres, fit, before = start.labels, torch.as_tensor(start.centres), 0.0, -1.0
    # the clusters that were the largest get the rows that remain
    places = torch.full((k,), len(unit) // k)
    places[torch.bincount(labels, minlength=k).argsort(descending=True)[: len(unit) % k]] += 1
    column = torch.arange(k).repeat_interleave(places)
    while fit - before > TOLERANCE * abs(before):
        cosine = unit @ centres.mT
        gain = cosine if signed else cosine.abs()
        place = linear_sum_assignment(gain[:, column].double().cpu().numpy(), maximize=True)[1]
        labels = column[torch.from_numpy(place)]
        own = cosine.gather(1, labels[:, None])
        sums = _sums(unit * _signs(own, signed), labels, k)
        centres = torch.nn.functional.normalize(sums, dim=1)
        fit, before = float(sums.norm(dim=1).sum()) / len(unit), fit
    return Clustering(labels, fit, centres)


def spectral(similarity: Float[Tensor, "n n"], k: int, seeds: Sequence[int] = (0,)) -> Clustering:
    """Clusters of the graph whose weights are the similarities above 0 (Ng, Jordan & Weiss 2001).

    Each row of the k leading eigenvectors is brought to unit length, and the rows are clustered by `restarts`, of
    which the best is taken: all seeds share the eigenvectors, so that even of noise they would agree.
    scikit-learn's KMeans waits for its own threads where the cores are shared.
    """
    _check(len(similarity), k)
    # a trace of every edge: a graph in several pieces has no unique embedding
    graph = (similarity.clamp(min=0) + 1e-6).double().cpu().numpy()
    place = spectral_embedding(graph, n_components=k, drop_first=False, random_state=0)
    best = max(restarts(torch.from_numpy(place).float(), k, seeds), key=lambda run: run.fit)
    return Clustering(best.labels, best.fit)  # centres of the embedding are none of the rows


def agglomerative(similarity: Float[Tensor, "n n"], k: int) -> Clustering:
    """Average linkage; it has no seed."""
    _check(len(similarity), k)
    distance = (1 - similarity).double().cpu().numpy()
    found = AgglomerativeClustering(k, metric="precomputed", linkage="average").fit(distance)
    return Clustering(torch.from_numpy(found.labels_).long(), 0.0)


def _check(n: int, k: int) -> None:
    if not 1 <= k <= n:
        raise ValueError(f"cannot make {k} clusters of {n} rows: choose 1 to {n}")


def _unit(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    return torch.nn.functional.normalize(rows, dim=1).contiguous()  # rows are gathered: columns would be slow


def _sums(unit: Float[Tensor, "n d"], labels: Int[Tensor, " n"], k: int) -> Float[Tensor, "k d"]:
    return unit.new_zeros(k, unit.shape[1]).index_add_(0, labels, unit)


def _signs(cosine: Tensor, signed: bool) -> Tensor:
    """What a row is multiplied by before it is added to a centre."""
    return torch.ones_like(cosine) if signed else torch.where(cosine < 0, -1.0, 1.0).to(cosine)


@dataclass(eq=False)
class _State:
    """Several clusterings of the same rows on their way, s of them side by side: one matrix product serves all."""

    labels: Int[Tensor, "n s"]
    signs: Float[Tensor, "n s"]
    sums: Float[Tensor, "s k d"]  # of each cluster's rows times their signs
    signed: bool

    @classmethod
    def begin(cls, unit: Float[Tensor, "n d"], centres: Float[Tensor, "s k d"], signed: bool) -> _State:
        """Every row with the nearest centre."""
        cosine = (unit @ centres.flatten(0, 1).mT).unflatten(1, centres.shape[:2])
        labels = (cosine if signed else cosine.abs()).argmax(dim=2)
        signs = _signs(_of(cosine, labels), signed)
        k = centres.shape[1]
        runs = zip(labels.unbind(1), signs.unbind(1), strict=True)
        sums = torch.stack([_sums(unit * sign[:, None], own, k) for own, sign in runs])
        state = cls(labels, signs, sums, signed)
        state.fill(unit)
        return state

    def subset(self, keep: Tensor) -> _State:
        return _State(self.labels[:, keep], self.signs[:, keep], self.sums[keep], self.signed)

    def objective(self) -> Float[Tensor, " s"]:
        return self.sums.norm(dim=2).sum(dim=1) / len(self.labels)

    def clustering(self, i: int) -> Clustering:
        centres = torch.nn.functional.normalize(self.sums[i], dim=1)
        return Clustering(self.labels[:, i].clone(), float(self.objective()[i]), centres)

    def sweep(self, unit: Float[Tensor, "n d"]) -> Int[Tensor, " s"]:
        """Let every row move once; how many did, in each clustering."""
        moved = torch.zeros(len(self.sums), dtype=torch.int64, device=unit.device)
        for turn in range(BLOCKS):
            rows = slice(turn, None, BLOCKS)
            moved += self._turn(unit[rows], self.labels[rows], self.signs[rows])
        self.fill(unit)
        return moved

    def _turn(self, unit: Tensor, labels: Tensor, signs: Tensor) -> Tensor:
        """Move these rows, all at once; their labels and signs are changed in place."""
        flat, square = self.sums.flatten(0, 1), unit.square().sum(dim=1)[:, None]
        dot = (unit @ flat.mT).unflatten(1, self.sums.shape[:2])
        norm = self.sums.square().sum(dim=2)  # squared
        # a row's own cluster is taken without it
        own, lone = _of(dot, labels), labels[..., None]
        less = norm[torch.arange(len(norm), device=norm.device), labels] - 2 * signs * own + square
        own = own - signs * square
        dot.scatter_(2, lone, own[..., None])
        reach = dot if self.signed else dot.abs()
        gain = _gain(reach, norm, square[..., None])
        gain.scatter_(2, lone, _gain(own if self.signed else own.abs(), less.clamp(min=0), square)[..., None])
        if (empty := self._sizes() == 0).any():
            gain.masked_fill_(empty, -torch.inf)  # or every row would want to be alone
        new = gain.argmax(dim=2)
        turned, ahead = _signs(_of(dot, new), self.signed), _of(gain, new) - _of(gain, labels)
        before, old, now = self.objective(), (labels, signs), (new, turned)
        move = (new != labels) | (turned != signs)
        self._move(unit, move, old, now)
        if (worse := self.objective() < before).any():
            # too many went to one place at a time: there, only the one that gains most may
            self._move(unit, move & worse, now, old)
            goal = new + torch.arange(len(worse), device=new.device) * self.sums.shape[1]
            most = gain.new_zeros(self.sums.shape[:2]).flatten()
            most.scatter_reduce_(0, goal.flatten(), (ahead * move).flatten(), "amax")
            some = move & (ahead == most[goal])
            self._move(unit, some & worse, old, now)
            move = torch.where(worse, some, move)
        labels.copy_(torch.where(move, new, labels))
        signs.copy_(torch.where(move, turned, signs))
        return move.sum(dim=0)

    def _move(self, unit: Tensor, move: Tensor, old: tuple[Tensor, Tensor], now: tuple[Tensor, Tensor]) -> None:
        """Take rows out of the sums of their old labels, with their old signs, and into those of the new ones."""
        row, run = move.nonzero(as_tuple=True)
        flat, part, first = self.sums.flatten(0, 1), unit[row], run * self.sums.shape[1]
        for (labels, signs), way in ((old, -1), (now, 1)):
            signed = part if self.signed else signs[row, run, None] * part
            flat.index_add_(0, first + labels[row, run], signed, alpha=way)

    def _sizes(self) -> Tensor:
        k = self.sums.shape[1]
        return torch.stack([torch.bincount(labels, minlength=k) for labels in self.labels.unbind(1)])

    def fill(self, unit: Float[Tensor, "n d"]) -> None:
        """Give each empty cluster the row that fits its own least."""
        for run, cluster in (self._sizes() == 0).nonzero().tolist():
            labels = self.labels[:, run]
            centres = torch.nn.functional.normalize(self.sums[run], dim=1)
            fit = (unit * centres[labels]).sum(dim=1) * self.signs[:, run]
            fit[torch.bincount(labels, minlength=len(centres))[labels] == 1] = torch.inf
            row = int(fit.argmin())
            self.sums[run, labels[row]] -= self.signs[row, run] * unit[row]
            self.sums[run, cluster] = unit[row]
            self.labels[row, run], self.signs[row, run] = cluster, 1.0


def _gain(reach: Tensor, norm: Tensor, square: Tensor) -> Tensor:
    """|sum + row| - |sum| from their product and squared norms, written so that no digits cancel."""
    more = torch.add(square, reach, alpha=2)
    root = torch.add(norm, more).clamp_(min=0).sqrt_().add_(norm.sqrt())
    return more.div_(root.clamp_(min=1e-20))


def _of(values: Tensor, labels: Tensor) -> Tensor:
    """Of each row [n s k], what is at its label [n s]."""
    return values.gather(2, labels[..., None])[..., 0]


def _spread(unit: Float[Tensor, "n d"], k: int, signed: bool, seeds: Sequence[int]) -> Float[Tensor, "s k d"]:
    """First centres by greedy k-means++ (Arthur & Vassilvitskii 2007) among a few random rows a cluster."""
    m, trials = min(len(unit), max(SEEDING * k, 256)), 8 + int(math.log(k))
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    some = torch.stack([torch.randperm(len(unit), generator=one)[:m] for one in generators]).to(unit.device)
    draws = torch.stack([torch.rand(k, trials, generator=one) for one in generators]).to(unit)
    rows, each = unit[some], torch.arange(len(seeds), device=unit.device)
    cosine = rows @ rows.mT
    distance = (1 - (cosine if signed else cosine.abs())).clamp(min=1e-12)
    nearest, chosen = distance[:, 0], [torch.zeros_like(each)]
    for j in range(1, k):
        heap = nearest.cumsum(dim=1)
        tried = torch.searchsorted(heap, draws[:, j] * heap[:, -1:]).clamp(max=m - 1)
        left = torch.minimum(nearest[:, None], distance[each[:, None], tried])
        best = left.sum(dim=2).argmin(dim=1)
        chosen.append(tried[each, best])
        nearest = left[each, best]
    return rows[each[:, None], torch.stack(chosen, dim=1)]

"""How fast are spherical k-means and k-lines beside scikit-learn's KMeans on the same unit vectors?

python benchmarks/clustering.py [--rounds N]
"""

from __future__ import annotations

import argparse
from statistics import median

import torch
from bench import machine, seconds, table
from sklearn.cluster import KMeans
from torch import Tensor

from ffnprobe.clustering import restarts

N, D, K, SEEDS = 3072, 768, 64, 5  # GPT-2 small's keys


def data() -> dict[str, Tensor]:
    """Unit vectors: without groups, with groups that overlap and that do not, and with a falling spectrum."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(N, D, generator=generator)
    centres = torch.randn(K, D, generator=generator)[torch.randint(K, (N,), generator=generator)]
    rows = {
        "Gaussian": noise,
        "64 groups that overlap": noise + 0.3 * centres,
        "64 groups": noise + centres,
        "variance falling as 1/i": noise * torch.arange(1, D + 1) ** -0.5,
    }
    return {name: torch.nn.functional.normalize(x, dim=1) for name, x in rows.items()}


def inertia(unit: Tensor, labels: Tensor) -> float:
    """KMeans's own objective: the sum of squared distances to the means."""
    sums = torch.zeros(K, D).index_add_(0, labels, unit)
    sizes = torch.bincount(labels, minlength=K).clamp(min=1)
    return len(unit) - float((sums.square().sum(1) / sizes).sum())


def cosine(unit: Tensor, labels: Tensor) -> float:
    """Ours: the mean cosine of a row to its cluster's direction."""
    return float(torch.zeros(K, D).index_add_(0, labels, unit).norm(dim=1).sum()) / len(unit)


def compare(unit: Tensor, rounds: int) -> list[str]:
    """Seconds of each, in turn, and what ours reaches of both objectives beyond theirs."""
    found: dict[str, Tensor] = {}

    def kmeans(_: int) -> None:
        found["theirs"] = torch.from_numpy(
            KMeans(K, n_init=SEEDS, random_state=0).fit(unit.numpy()).labels_
        ).long()

    def spherical(_: int) -> None:
        found["ours"] = max(restarts(unit, K, range(SEEDS)), key=lambda run: run.fit).labels

    def k_lines(_: int) -> None:
        restarts(unit, K, range(SEEDS), signed=False)

    taken = [[seconds(run, i) for run in (kmeans, spherical, k_lines)] for i in range(rounds + 1)][1:]
    usual, fast, fast_lines = (median(each) for each in zip(*taken, strict=True))
    more = (of(unit, found["ours"]) / of(unit, found["theirs"]) - 1 for of in (inertia, cosine))
    times = (f"{time:.2f} ({usual / time:.1f} x)" for time in (fast, fast_lines))
    return [f"{usual:.2f}", *times, *(f"{share:+.1%}" for share in more)]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--rounds", type=int, default=5)
    rounds = arguments.parse_args().rounds
    print(machine())
    print(f"\n{N} x {D}, {K} clusters, {SEEDS} starts, medians of {rounds} rounds, in turn in one process\n")
    lines = [[name, *compare(unit, rounds)] for name, unit in data().items()]
    head = ("rows", "KMeans, s", "spherical k-means, s", "k-lines, s", "inertia", "mean cosine")
    print(table(head, lines), flush=True)


if __name__ == "__main__":
    main()

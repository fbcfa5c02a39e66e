"""Planted groups are found by every algorithm, noise has none, and what is free changes nothing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score

from ffnprobe.clustering import ALGORITHMS, balanced, cluster, restarts, similarity, spherical_kmeans

GROUPS = 6


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def directions(seed: int = 0, d: int = 16, each: int = 8) -> torch.Tensor:
    """Rows in 6 tight groups; row i is of group i % 6."""
    centres = torch.linalg.qr(gaussian(d, GROUPS, seed=seed)).Q.T
    return centres.repeat(each, 1) + 0.02 * gaussian(GROUPS * each, d, seed=seed + 1)


PLANTED = torch.arange(48) % GROUPS


def agree(one: torch.Tensor, other: torch.Tensor) -> float:
    return adjusted_rand_score(one.numpy(), other.numpy())


def turned(rows: torch.Tensor, seed: int) -> torch.Tensor:
    """The same lines: other lengths, other signs."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.exp(2 * torch.randn(len(rows), 1, generator=generator))
    return rows * scale * (2 * torch.randint(2, (len(rows), 1), generator=generator) - 1)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_planted_groups_are_found_from_every_seed(algorithm, signed):
    rows = directions() if signed else turned(directions(), 3)
    for run in cluster(rows, GROUPS, algorithm, seeds=range(5), signed=signed):
        assert agree(run.labels, PLANTED) == 1


@pytest.mark.parametrize("signed", [True, False])
def test_clusterings_of_noise_from_different_seeds_agree_by_chance(signed):
    one, other = restarts(gaussian(600, 400), 16, [0, 1], signed=signed)
    assert abs(agree(one.labels, other.labels)) < 0.05


def test_rows_at_right_angles_do_not_all_go_where_there_is_room():
    runs = restarts(torch.eye(480) + 0.01 * gaussian(480, 480), 40, [0, 1, 2])
    assert all(abs(agree(one.labels, other.labels)) < 0.05 for one in runs for other in runs if one is not other)
    assert all(run.labels.bincount().max() < 24 for run in runs)  # 12 each is best


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(ALGORITHMS))
def test_order_sign_and_scale_of_the_rows_change_no_cluster(seed, algorithm):
    rows, order = directions(), torch.randperm(48, generator=torch.Generator().manual_seed(seed))
    (run,) = cluster(turned(rows, seed)[order], GROUPS, algorithm, seeds=[seed], signed=False)
    assert agree(run.labels, PLANTED[order]) == 1
    (run,) = cluster(rows[order] * torch.linspace(0.1, 10, 48)[:, None], GROUPS, algorithm, seeds=[seed])
    assert agree(run.labels, PLANTED[order]) == 1


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6))
def test_lines_of_noise_ignore_signs_and_scales_too(seed):
    rows = gaussian(60, 7, seed=seed)
    assert torch.equal(
        spherical_kmeans(rows, 5, signed=False)[0], spherical_kmeans(turned(rows, seed), 5, signed=False)[0]
    )


def test_cosines_tell_a_direction_from_its_opposite_and_lines_do_not():
    rows = torch.cat([directions(), -directions()])
    both = spherical_kmeans(rows, 2 * GROUPS)[0]
    assert agree(both, torch.cat([PLANTED, PLANTED + GROUPS])) == 1
    assert agree(spherical_kmeans(rows, GROUPS, signed=False)[0], torch.cat([PLANTED, PLANTED])) == 1


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 60), st.data())
def test_balanced_clusters_differ_by_one_row_at_most(n, data):
    k = data.draw(st.integers(1, n))
    (run,) = balanced(gaussian(n, 5, seed=n), k, signed=data.draw(st.booleans()))
    sizes = run.labels.bincount(minlength=k)
    assert sizes.sum() == n and sizes.max() - sizes.min() <= (n % k > 0)


@pytest.mark.parametrize("seed", [11, 169, 189])
def test_balanced_clusters_are_assigned_again_while_that_gains(seed):
    rows = gaussian(60, 3, seed=seed) + torch.tensor([2.0, 0.0, 0.0])  # most point one way: sizes start unequal
    (run,) = balanced(rows, 4)
    unit, column = torch.nn.functional.normalize(rows, dim=1), torch.arange(60) % 4
    _, place = linear_sum_assignment((unit @ run.centres.T)[:, column], maximize=True)
    again = torch.zeros(4, 3).index_add_(0, column[torch.from_numpy(place)], unit).norm(dim=1).sum() / 60
    assert run.fit <= again * (1 + 1e-6) and again < 1.01 * run.fit


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.booleans(), st.data())
def test_no_cluster_stays_empty_even_where_rows_are_equal(n, signed, data):
    rows = gaussian(n, 3, seed=n)[torch.arange(n) // data.draw(st.integers(1, 4))]
    k = data.draw(st.integers(1, n))
    labels, fit = spherical_kmeans(rows, k, signed=signed)
    assert labels.bincount(minlength=k).min() > 0 and -1e-6 <= fit <= 1 + 1e-5


@pytest.mark.parametrize("signed", [True, False])
def test_no_row_would_gain_by_moving_and_each_is_with_its_nearest_centre(signed):
    unit = torch.nn.functional.normalize(gaussian(80, 4, seed=2).double(), dim=1)
    (run,) = restarts(unit, 5, [0], signed=signed, tolerance=0.0)

    def objective(labels: torch.Tensor) -> float:
        parts = [unit[labels == k] for k in range(5)]
        if signed:
            return sum(float(part.sum(0).norm()) for part in parts) / 80
        # the best line of a cluster, from many starts: all signs are too many to try
        total = 0.0
        for part in parts:
            sign = torch.where(part @ part.T < 0, -1.0, 1.0).double()
            for _ in range(20):
                sign = torch.where((sign @ part) @ part.T < 0, -1.0, 1.0).double()
            total += float((sign @ part).norm(dim=1).max()) if len(part) else 0.0
        return total / 80

    assert run.fit == pytest.approx(objective(run.labels), abs=1e-9 if signed else 1e-3)
    cosine = unit @ run.centres.T
    assert torch.equal((cosine if signed else cosine.abs()).argmax(dim=1), run.labels)
    if signed:
        for i in range(80):
            for k in range(5):
                moved = run.labels.clone()
                moved[i] = k
                assert objective(moved) <= run.fit + 1e-9


def test_the_objective_is_above_that_of_moving_to_the_nearest_centre_until_none_moves():
    unit = torch.nn.functional.normalize(gaussian(400, 200), dim=1)
    fits = []
    for seed in range(3):
        centres = unit[torch.randperm(400, generator=torch.Generator().manual_seed(seed))[:10]]
        for _ in range(100):
            labels = (unit @ centres.T).argmax(dim=1)
            sums = torch.zeros(10, 200).index_add_(0, labels, unit)
            centres = torch.nn.functional.normalize(sums, dim=1)
        fits.append(float(sums.norm(dim=1).sum()) / 400)
    assert max(run.fit for run in restarts(unit, 10, range(3))) > 1.02 * max(fits)


def test_a_seed_gives_the_same_alone_and_beside_others():
    rows = gaussian(100, 9)
    together = restarts(rows, 7, [3, 1, 2])
    for seed, run in zip([3, 1, 2], together, strict=True):
        assert torch.equal(run.labels, restarts(rows, 7, [seed])[0].labels)


def test_a_row_of_zeros_is_put_somewhere():
    rows = torch.cat([directions(), torch.zeros(2, 16)])
    assert agree(spherical_kmeans(rows, GROUPS)[0][:48], PLANTED) == 1


def test_similarity_is_the_cosine():
    rows = gaussian(5, 3)
    assert float(similarity(rows)[1, 3]) == pytest.approx(float(torch.cosine_similarity(rows[1], rows[3], dim=0)))
    assert torch.equal(similarity(rows, signed=False), similarity(rows).abs())


def test_spectral_clusters_are_those_of_the_best_seed():
    rows = gaussian(60, 20)
    (best,) = cluster(rows, 6, "spectral", seeds=range(6))
    fits = [cluster(rows, 6, "spectral", seeds=[seed])[0].fit for seed in range(6)]
    assert best.fit == pytest.approx(max(fits)) and min(fits) < max(fits) - 1e-3


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_more_clusters_than_rows_are_refused(algorithm):
    with pytest.raises(ValueError, match="choose 1 to 3"):
        cluster(torch.eye(3), 4, algorithm)


def test_an_unknown_algorithm_is_refused():
    with pytest.raises(ValueError, match='"means" is unknown: choose from spherical'):
        cluster(torch.eye(3), 2, "means")

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ffnprobe import spectrum as sp
from ffnprobe.ffn import ACTIVATIONS, FFN
from ffnprobe.statistics import Moments

RANKS = [sp.participation_ratio, sp.soft_rank, sp.erank_rv, sp.stable_rank]
SPECTRA = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=30).map(torch.tensor)


@pytest.mark.parametrize("rank", RANKS)
def test_equal_values_have_as_many_directions_as_there_are(rank):
    assert rank(torch.full((7,), 3.0)) == pytest.approx(7)


@pytest.mark.parametrize("rank", RANKS)
def test_one_direction_is_one_direction(rank):
    assert rank(torch.tensor([0.0, 5.0, 0.0])) == pytest.approx(1)


def test_ranks_of_a_spectrum_worked_out_by_hand():
    spectrum = torch.tensor([2.0, 1.0, 1.0])
    assert sp.participation_ratio(spectrum) == pytest.approx(16 / 6)
    assert sp.soft_rank(spectrum) == pytest.approx(2**1.5)
    assert sp.stable_rank(spectrum) == pytest.approx(2)
    assert sp.rank_at_energy(spectrum, 0.5) == 1
    assert sp.rank_at_energy(spectrum, 0.51) == 2
    assert sp.rank_at_energy(spectrum, 1.0) == 3
    assert sp.erank_rv(spectrum**2) == pytest.approx(2**1.5)  # its singular values are 2, 1, 1


@given(SPECTRA)
def test_hard_rank_is_at_most_soft_rank_is_at_most_the_number_of_directions(spectrum):
    assert sp.stable_rank(spectrum) <= sp.participation_ratio(spectrum) * (1 + 1e-9)
    assert sp.participation_ratio(spectrum) <= sp.soft_rank(spectrum) * (1 + 1e-9)
    assert sp.soft_rank(spectrum) <= len(spectrum) * (1 + 1e-9)


@given(SPECTRA, st.sampled_from([1e-6, 1e6]))
def test_scaling_changes_no_rank(spectrum, scale):
    for rank in (*RANKS, sp.numerical_rank, sp.early_enrichment):
        assert rank(spectrum.double() * scale) == pytest.approx(rank(spectrum), rel=1e-5, abs=1e-9)


def test_renyi_orders_are_the_named_ranks():
    spectrum = torch.tensor([5.0, 3.0, 1.0, 0.5])
    assert sp.renyi_rank(spectrum, 2.0) == pytest.approx(sp.participation_ratio(spectrum))
    assert sp.renyi_rank(spectrum, 1 + 1e-6) == pytest.approx(sp.soft_rank(spectrum), rel=1e-5)
    assert sp.renyi_rank(spectrum, math.inf) == pytest.approx(sp.stable_rank(spectrum))


def test_early_enrichment_runs_from_flat_to_one_direction():
    assert sp.early_enrichment(torch.ones(8)) == pytest.approx(0)
    assert sp.early_enrichment(torch.eye(8)[0]) == pytest.approx(7 / 8)


def test_divergence_is_nought_for_equal_spectra_and_ln_2_for_disjoint_ones():
    one = torch.tensor([3.0, 1.0, 0.0])
    assert sp.spectrum_divergence(one, 10 * one.flip(0)) == pytest.approx(0, abs=1e-12)
    # one direction against a flat spectrum of d tends to ln 2
    assert sp.spectrum_divergence(torch.eye(10_000)[0], torch.ones(10_000)) == pytest.approx(math.log(2), rel=2e-3)


def test_a_zero_or_nan_spectrum_is_refused():
    for bad in (torch.zeros(3), torch.tensor([1.0, math.nan])):
        with pytest.raises(ValueError, match="positive finite sum"):
            sp.soft_rank(bad)


def test_eigenvalues_are_the_squares_of_singular_values():
    x = torch.randn(50, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.linalg.svdvals(x) ** 2
    assert torch.allclose(sp.gram_eigenvalues(x), expected)
    assert torch.allclose(sp.gram_eigenvalues(x.T), expected)


@pytest.mark.parametrize(
    ("name", "share"), [("relu", 0.734), ("gelu", 0.724), ("silu", 0.799), ("relu2", 0.509), ("tanh", 0.931)]
)
def test_linear_share_is_the_published_one(name, share):
    assert sp.linear_share(ACTIVATIONS[name]) == pytest.approx(share, rel=0.02)


def sample(spectrum: torch.Tensor, n: int, mean: float = 0.0, seed: int = 0) -> Moments:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, len(spectrum), dtype=torch.float64, generator=generator) * spectrum.sqrt()
    moments = Moments.about(torch.zeros(1, len(spectrum)))
    moments.update(x + mean * spectrum.sqrt(), torch.arange(n))
    return moments


@pytest.mark.parametrize(("d", "n"), [(100, 400), (100, 100), (200, 1600)])
def test_isotropic_gaussian_has_the_closed_form_ranks(d, n):
    found = sp.eigenvalues(sample(torch.ones(d), n).compute().centred)
    hard, soft = sp.isotropic_ranks(d, n)
    assert sp.participation_ratio(found) == pytest.approx(hard, rel=0.02)
    assert sp.soft_rank(found) == pytest.approx(soft, rel=0.02 if n == d else 0.01)
    assert sp.stable_rank(found) == pytest.approx(d / (1 + math.sqrt(d / n)) ** 2, rel=0.05)


@pytest.mark.parametrize("n", [32, 1024])
def test_debiased_participation_ratio_finds_the_planted_spectrum(n):
    spectrum = torch.arange(1, 301, dtype=torch.float64) ** -0.7
    truth = sp.participation_ratio(spectrum)
    assert truth == pytest.approx(86.27, abs=0.01)
    estimates = [sample(spectrum, n, mean=3.0, seed=seed).participation_ratio() for seed in range(20)]
    naive = sp.participation_ratio(sp.eigenvalues(sample(spectrum, n, mean=3.0).compute().centred))
    # harmonic: it is 1 / PR whose noise is even on both sides
    assert 20 / sum(1 / estimate for estimate in estimates) == pytest.approx(truth, rel=0.05)
    assert naive < 0.95 * truth


def test_debiased_participation_ratio_is_the_brute_force_over_distinct_tokens():
    x = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 2
    moments = Moments.about(x[:2])
    moments.update(x, torch.arange(7))
    top = bottom = 0.0
    for i in range(7):
        for j in range(7):
            for k in range(7):
                for m in range(7):
                    if len({i, j, k, m}) == 4:
                        # independent differences: E (u.u)(v.v) and E (u.v)^2 are tr(C)^2, tr(C^2)
                        u, v = x[i] - x[j], x[k] - x[m]
                        top += float((u @ u) * (v @ v))
                        bottom += float((u @ v) ** 2)
    assert moments.participation_ratio() == pytest.approx(top / bottom, rel=1e-9)


@pytest.mark.parametrize("r", [0.5, 1, 2, 4, 8, 16])
@pytest.mark.parametrize("name", ["relu", "gelu"])
def test_random_features_have_the_closed_form_rank(name, r):
    d, n = 64, 20_000
    generator = torch.Generator().manual_seed(0)
    keys = torch.nn.functional.normalize(torch.randn(int(r * d), d, generator=generator), dim=1)
    layer = FFN(layer=0, keys=keys, values=keys, activation=name)
    hidden = layer.hidden(torch.randn(n, d, generator=generator))
    moments = Moments.about(hidden[:500])
    moments.update(hidden, torch.arange(n))
    expected = sp.random_feature_rank(float(d), int(r * d), ACTIVATIONS[name])
    assert moments.participation_ratio() == pytest.approx(expected, rel=0.03)


def test_random_relu_features_are_the_tabled_ones():
    found = [sp.random_feature_rank(64.0, int(r * 64), torch.relu) for r in (0.5, 1, 2, 4, 8, 16)]
    assert found == pytest.approx([25.2, 41.6, 61.6, 81.2, 96.5, 106.5], rel=0.01)


def test_the_rank_of_a_random_subset_is_the_mean_over_subsets():
    random = torch.Generator().manual_seed(0)
    basis = torch.randn(200, 60, generator=random, dtype=torch.float64)
    covariance = basis @ torch.diag(torch.arange(1.0, 61.0, dtype=torch.float64) ** -0.7) @ basis.T
    for k in (40, 100, 160, 200):
        draws = [torch.randperm(200, generator=random)[:k] for _ in range(1000)]
        ranks = [sp.participation_ratio(sp.eigenvalues(covariance[some][:, some])) for some in draws[:300]]
        traces = [
            (covariance[some][:, some].trace() ** 2, covariance[some][:, some].square().sum()) for some in draws
        ]
        trace, square = (torch.stack(part).mean() for part in zip(*traces, strict=True))
        found = sp.subset_participation_ratio(covariance, k)
        assert found == pytest.approx(float(trace / square), rel=0.01)
        # a mean of ratios, not a ratio of means: the two part where k is not far above the rank
        assert found == pytest.approx(sum(ranks) / len(ranks), rel=0.01 if k > 40 else 0.02)
    assert found == pytest.approx(sp.participation_ratio(sp.eigenvalues(covariance)))


def test_subsets_of_independent_coordinates_have_all_their_directions():
    assert [sp.subset_participation_ratio(torch.eye(9), k) for k in (1, 4, 9)] == pytest.approx([1, 4, 9])

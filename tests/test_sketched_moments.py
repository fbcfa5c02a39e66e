"""A sketch is held to what was proven of it, and its guesses to the truth."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ffnprobe import spectrum as sp
from ffnprobe.statistics import Moments, SketchedMoments
from ffnprobe.statistics.partial_spectrum import completed, extremes, likely_soft_ranks

D = 200
PLACE = torch.arange(1, D + 1, dtype=torch.float64)
FALLS = {
    "flat": torch.ones(D).double(),
    "power 0.7": PLACE**-0.7,
    "power 1.5": PLACE**-1.5,
    "exponential": torch.exp(-PLACE / 30),
    "spikes": torch.where(PLACE < 9, 50.0, 1.0).double(),
    "step": torch.where(PLACE < 50, 1.0, 0.01).double(),
}


def drawn(spectrum: torch.Tensor, n: int = 2000, seed: int = 0, mean: float = 0.0) -> torch.Tensor:
    """Rows whose neurons are no eigenvectors."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, len(spectrum), dtype=torch.float64, generator=generator) * spectrum.sqrt()
    basis = torch.linalg.qr(torch.randn(len(spectrum), len(spectrum), dtype=torch.float64, generator=generator)).Q
    return x @ basis + mean


def fed(statistic, x: torch.Tensor):
    for part in x.split(700):
        statistic.update(part, torch.arange(len(part)))
    return statistic


def low_rank(rank: int, n: int = 300, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(size, dtype=torch.float64, generator=generator) for size in ((n, rank), (rank, D)))
    return left @ right + 5


def test_data_of_no_more_directions_than_test_vectors_is_recovered():
    x = low_rank(20)
    exact, sketch = fed(Moments.about(x[:50]), x), fed(SketchedMoments.about(x[:50], k=32), x)
    for centred in (True, False):
        truth, found = exact.compute().spectrum(centred), sketch.compute().spectrum(centred)
        assert torch.allclose(found.values, truth.values, rtol=1e-8, atol=1e-8 * float(truth.values[0]))
        assert found.unresolved < 1e-12
        assert found.participation_ratio == pytest.approx(truth.participation_ratio, rel=1e-8)
        assert found.soft_rank_bound == pytest.approx(truth.soft_rank_bound, rel=1e-8)
        assert found.soft_rank_range == pytest.approx(truth.soft_rank_range, rel=1e-8)
    assert sketch.participation_ratio() == pytest.approx(exact.participation_ratio(), rel=1e-8)
    variance = torch.linspace(0, 3, D).double()
    truth, found = (statistic.compute().scaled(variance) for statistic in (exact, sketch))
    assert torch.allclose(found, truth, rtol=1e-8, atol=1e-8 * float(truth[0]))


def test_rounding_is_not_taken_for_directions():
    x = low_rank(8).float()
    truth = fed(Moments.about(x[:50].double()), x.double()).compute().spectrum()
    found = fed(SketchedMoments.about(x[:50], k=64), x).compute().spectrum()
    assert torch.allclose(found.values, truth.values, atol=1e-5 * float(truth.values[0]))
    assert found.unresolved < 1e-5
    assert found.soft_rank_bound == pytest.approx(truth.soft_rank_bound, rel=1e-3)


def test_mean_and_variance_are_exact():
    x = drawn(FALLS["power 1.5"], mean=3.0)
    exact = fed(Moments.about(x[:50]), x).compute()
    sketch = fed(SketchedMoments.about(x[:50], k=16), x).compute()
    assert torch.allclose(sketch.mean, exact.mean)
    assert torch.allclose(sketch.variance, exact.variance)


@pytest.mark.parametrize("fall", FALLS)
@pytest.mark.parametrize("centred", [True, False])
def test_every_eigenvalue_lies_between_the_sketch_and_its_bound(fall, centred):
    spectrum = FALLS[fall]
    x = drawn(spectrum, mean=100 * float(spectrum.mean().sqrt())).float()
    truth = fed(Moments.about(x[:50].double()), x.double()).compute().spectrum(centred).values
    covariance = fed(SketchedMoments.about(x[:50], k=32), x).compute()
    least = torch.nn.functional.pad(covariance.least(centred), (0, D - 32))
    missing, rounding = truth.sum() - least.sum(), 1e-5 * truth.sum()
    assert (least <= truth + rounding).all()
    assert (truth <= least + missing + rounding).all()
    found = covariance.spectrum(centred)
    assert found.unresolved == pytest.approx(float(missing / truth.sum()), abs=1e-5)
    assert found.soft_rank_bound[0] <= sp.soft_rank(truth) * (1 + 1e-3)
    assert sp.soft_rank(truth) <= found.soft_rank_bound[1] * (1 + 1e-3)
    assert found.values.sum() == pytest.approx(float(truth.sum()), rel=1e-5)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=12), st.data())
def test_the_extremes_hold_every_spectrum_between_them(shares, data):
    spectrum = torch.tensor(sorted([1.0, *shares], reverse=True)).double()
    kept = torch.tensor(data.draw(st.lists(st.floats(0, 1), min_size=len(spectrum), max_size=len(spectrum))))
    least = (spectrum * kept.double()).sort(descending=True).values
    least = least[: data.draw(st.integers(1, len(spectrum)))]
    steep, flat = extremes(least, float(spectrum.sum()), len(spectrum))
    for extreme in (steep, flat):
        assert float(extreme.sum()) == pytest.approx(float(spectrum.sum()))
        assert (extreme[: len(least)] >= least - 1e-12).all()
    for rank in (sp.soft_rank, sp.participation_ratio, sp.stable_rank):
        assert rank(steep) <= rank(spectrum) * (1 + 1e-9)
        assert rank(spectrum) <= rank(flat) * (1 + 1e-9)


@pytest.mark.parametrize("fall", FALLS)
def test_the_likely_range_holds_the_soft_rank(fall):
    x = drawn(FALLS[fall])
    truth = sp.soft_rank(fed(Moments.about(x[:50]), x).compute().spectrum().values)
    for seed in range(8):
        found = fed(SketchedMoments.about(x[:50], k=64, seed=seed), x).compute().spectrum()
        (least, most), (low, high) = found.soft_rank_bound, found.soft_rank_range
        assert least <= low <= truth <= high <= most
        assert high - low < 0.6 * (most - least)
        assert low <= sp.soft_rank(found.values) <= high
        assert sp.soft_rank(found.values) == pytest.approx(truth, rel=0.15)


def test_the_range_of_soft_ranks_in_closed_form():
    anything = {1: 2.0}  # every spectrum obeys this law
    low, high = likely_soft_ranks(anything, 1.0, 100, (0.1, 0.0))
    assert low == pytest.approx(10, rel=0.02)  # ten equal ones have the least entropy with sum p² = 0.1
    p = (1 + 891**0.5) / 100  # one large and 99 equal ones the greatest: p² + (1 - p)² / 99 = 0.1
    greatest = sp.soft_rank(torch.tensor([p, *[(1 - p) / 99] * 99]))
    assert greatest <= high < 1.7 * greatest  # the programme knows parts of an eigenvalue too
    assert likely_soft_ranks({50: 1.0}, 1.0, 100, (0.1, 0.0)) is None


@pytest.mark.parametrize("fall", FALLS)
def test_the_participation_ratio_errs_as_it_says(fall):
    x = drawn(FALLS[fall], n=600)
    truth = fed(Moments.about(x[:50]), x).compute().spectrum().participation_ratio
    off = []
    for seed in range(40):
        found = fed(SketchedMoments.about(x[:50], k=48, seed=seed), x).compute().spectrum()
        off.append(abs(found.participation_ratio / truth - 1) / max(found.participation_ratio_error, 1e-12))
    assert sum(z < 3 for z in off) >= 38
    assert fall == "flat" or sum(z > 0.3 for z in off) >= 15  # and no better than it says


def test_the_debiased_ratio_is_that_of_the_exact_moments():
    x = drawn(FALLS["power 0.7"], n=400, mean=1.0)
    exact, sketch = fed(Moments.about(x[:20]), x), fed(SketchedMoments.about(x[:20], k=64), x)
    naive = exact.compute().spectrum().participation_ratio
    assert exact.participation_ratio() > 1.1 * naive
    assert sketch.participation_ratio() == pytest.approx(exact.participation_ratio(), rel=0.05)


@pytest.mark.parametrize("fall", ["power 0.7", "exponential"])
def test_the_completed_spectrum_keeps_the_trace_and_the_law(fall):
    l, k = FALLS[fall], 32
    test = torch.randn(D, k, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    seen = l[:, None] * test
    least = sp.eigenvalues(seen @ torch.linalg.solve(test.mT @ seen, seen.mT))[:k]
    found = completed(least, float(l.sum()), D)
    blur = float(l.sum() - least.sum()) / k
    assert found.shape == (D,) and (found >= 0).all() and (found.diff() <= 0).all()
    assert float(found.sum()) == pytest.approx(float(l.sum()))
    assert float((found / (found + blur)).sum()) == pytest.approx(k, rel=1e-6)
    assert float((l / (l + blur)).sum()) == pytest.approx(k, rel=0.02)  # the law itself


def test_a_scale_is_that_of_the_tokens():
    x, scale = drawn(FALLS["exponential"], mean=2.0), torch.linspace(0.5, 3, D).double()
    one = fed(SketchedMoments.about(x[:50], k=32, scale=scale), x).compute()
    other = fed(SketchedMoments.about((x * scale)[:50], k=32), x * scale).compute()
    assert torch.allclose(one.mean, other.mean) and torch.allclose(one.product, other.product)


def test_random_weights_are_brought_to_other_variances():
    x = drawn(FALLS["power 0.7"])
    exact = fed(Moments.about(x[:50]), x).compute()
    variance = exact.variance * torch.linspace(0.7, 1.3, D).double() ** 2
    variance[3] *= 3000  # a neuron that the pilot took for a small one
    truth = exact.scaled(variance)
    found = fed(SketchedMoments.about(x[:50], k=64), x).compute().scaled(variance)
    assert float(found.sum()) == pytest.approx(float(variance.sum()))
    assert sp.soft_rank(found) == pytest.approx(sp.soft_rank(truth), rel=0.05)
    assert sp.participation_ratio(found) == pytest.approx(sp.participation_ratio(truth), rel=0.05)


def test_sketches_by_other_test_vectors_do_not_merge():
    x = drawn(FALLS["flat"], n=20)
    with pytest.raises(ValueError, match="'seed' differs"):
        SketchedMoments.about(x, k=8, seed=1).merge(SketchedMoments.about(x, k=8, seed=2))


def test_a_sketch_names_what_is_not_finite():
    sketch = fed(SketchedMoments.about(torch.zeros(1, 9), k=8), torch.full((3, 9), torch.inf))
    with pytest.raises(ValueError, match="not finite"):
        sketch.compute()

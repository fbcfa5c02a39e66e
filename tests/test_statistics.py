"""The laws that every statistic obeys, run on every subclass there is."""

import pytest
import scipy.stats
import torch

import ffnprobe.statistics
from ffnprobe.statistics import (
    IN_CACHE,
    CoActivation,
    Count,
    CrossMoments,
    FiringByPosition,
    FiringRate,
    Magnitudes,
    Marginals,
    Moments,
    QuadraticMoments,
    Sample,
    SketchedMoments,
    Statistic,
    TopActivations,
    triangle,
)
from ffnprobe.statistics.base import add

WIDTH, N = 5, 12
GENERATOR = torch.Generator().manual_seed(0)
# coarse values far from zero: ties are common, and a lost shift shows
X = (torch.randn(N, WIDTH, generator=GENERATOR, dtype=torch.float64) * 2).round() + torch.tensor(
    [30.0, 0, -7, 0, 1]
)
AT = torch.randperm(1000, generator=GENERATOR)[:N].sort().values

MAKERS = {
    CoActivation: lambda: CoActivation.about(X[:3], share=0.5, keep="both"),
    Count: lambda: Count.about(X[:3]),
    FiringByPosition: lambda: FiringByPosition.about(X[:3], length=30, ranges=7),
    CrossMoments: lambda: CrossMoments.about(X[:3], d=2),
    FiringRate: lambda: FiringRate.about(X[:3]),
    Magnitudes: lambda: Magnitudes.about(X[:3]),
    Marginals: lambda: Marginals.about(X[:3]),
    Moments: lambda: Moments.about(X[:3]),
    Sample: lambda: Sample.about(X[:3], k=4, seed=3),
    QuadraticMoments: lambda: QuadraticMoments.about(X[:3], d=2, k=2),
    SketchedMoments: lambda: SketchedMoments.about(X[:3], k=8),
    TopActivations: lambda: TopActivations.about(X[:3], k=4, by_magnitude=True),
}


def subclasses(kind: type) -> set[type]:
    return {kind for child in kind.__subclasses__() for kind in {child, *subclasses(child)}}


ALL = sorted(subclasses(Statistic), key=lambda kind: kind.__name__)


def test_every_statistic_is_held_to_the_laws():
    public = {
        kind
        for kind in vars(ffnprobe.statistics).values()
        if isinstance(kind, type) and issubclass(kind, Statistic)
    }
    assert set(ALL) == public - {Statistic} == set(MAKERS)


@pytest.fixture(params=ALL, ids=lambda kind: kind.__name__)
def make(request):
    return MAKERS[request.param]


def fed(make, *parts: slice) -> Statistic:
    statistic = make()
    for part in parts:
        statistic.update(X[part], AT[part])
    return statistic


def same(one: Statistic, other: Statistic) -> bool:
    a, b = meant(one), meant(other)
    return a.keys() == b.keys() and all(torch.allclose(a[k].double(), b[k].double(), rtol=1e-12) for k in a)


def meant(one: Statistic) -> dict[str, torch.Tensor]:
    """The state, without what stands below the diagonal of a triangle."""
    state = one.state()
    for name in {"S", "both"} & state.keys():
        state[name] = triangle.square(state[name], WIDTH)
    return state


def values(computed) -> list[torch.Tensor]:
    parts = vars(computed).values() if hasattr(computed, "__dict__") else [computed]
    return [torch.as_tensor(part).double() for part in parts]


@pytest.mark.parametrize("cut", [0, 1, N - 1, N])
def test_splitting_a_batch_changes_nothing(make, cut):
    assert same(fed(make, slice(0, cut), slice(cut, N)), fed(make, slice(0, N)))


def test_a_batch_beyond_the_cache_is_the_sum_of_its_parts(make):
    x, at = X.repeat(25, 1), torch.arange(25 * N)
    assert len(x) > 2 * IN_CACHE and len(x) % IN_CACHE
    one, other = make(), make()
    one.update(x, at)
    for some, places in zip(x.split(100), at.split(100), strict=True):
        other.update(some, places)
    assert same(one, other)


@pytest.mark.parametrize("cut", [0, 1, N - 1, N])
def test_merge_equals_update(make, cut):
    one, other = fed(make, slice(0, cut)), fed(make, slice(cut, N))
    one.merge(other)
    assert same(one, fed(make, slice(0, N)))


def test_merge_commutes(make):
    a, b = slice(0, 5), slice(5, N)
    one, other = fed(make, a), fed(make, b)
    one.merge(fed(make, b))
    other.merge(fed(make, a))
    assert same(one, other)


def test_merge_associates(make):
    a, b, c = slice(0, 2), slice(2, 7), slice(7, N)
    left = fed(make, a)
    left.merge(fed(make, b))
    left.merge(fed(make, c))
    tail = fed(make, b)
    tail.merge(fed(make, c))
    right = fed(make, a)
    right.merge(tail)
    assert same(left, right)


def test_empty_is_the_identity(make):
    one = fed(make, slice(0, N))
    one.merge(make())
    other = make()
    other.merge(fed(make, slice(0, N)))
    assert same(one, fed(make, slice(0, N)))
    assert same(other, fed(make, slice(0, N)))


def test_merge_never_touches_the_other(make):
    one, other = make(), fed(make, slice(0, 5))
    before = other.state()
    one.merge(other)
    one.update(X[5:], AT[5:])
    one.merge(fed(make, slice(0, 3)))
    assert all(torch.equal(before[k], v) for k, v in other.state().items())


def test_compute_is_never_stale(make):
    one = fed(make, slice(0, 5))
    one.compute()
    one.merge(fed(make, slice(5, N)))
    again, fresh = values(one.compute()), values(fed(make, slice(0, N)).compute())
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(again, fresh, strict=True))


def test_the_state_round_trips_and_is_a_copy(make):
    one = fed(make, slice(0, 5))
    state = one.state()
    again = type(one)(state)
    one.update(X[5:], AT[5:])
    assert all(torch.equal(v, state[k]) for k, v in again.state().items())
    again.update(X[5:], AT[5:])
    assert same(one, again)


def test_too_few_tokens_are_refused(make):
    if make is not MAKERS[Count]:
        with pytest.raises(ValueError, match="needs at least"):
            make().compute()


def test_unlike_statistics_do_not_merge():
    with pytest.raises(ValueError, match="merge like with like"):
        MAKERS[Moments]().merge(MAKERS[Count]())
    with pytest.raises(ValueError, match="'shift' differs"):
        MAKERS[Moments]().merge(Moments.about(X[3:9]))


@pytest.mark.parametrize("width", [1, 2, 5, 9, 40])
def test_moments_are_torchs_covariance(width):
    x = torch.randn(30, width, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) + 100
    moments = Moments.about(x[:4])
    moments.update(x, torch.arange(30))
    found = moments.compute()
    assert torch.allclose(found.mean, x.mean(0))
    assert torch.allclose(found.centred, torch.cov(x.T, correction=0).view(width, width))
    assert torch.allclose(found.uncentred, x.T @ x / 30)


def test_moments_in_float32_survive_a_mean_of_a_hundred_deviations():
    x = torch.randn(4000, 90, generator=torch.Generator().manual_seed(3)) + 100
    moments = Moments.about(x[:256])
    for part in x.split(1000):
        moments.update(part, torch.arange(len(part)))
    exact = torch.cov(x.double().T, correction=0)
    assert torch.allclose(moments.compute().centred, exact, atol=1e-5)


def test_half_precision_is_promoted_before_it_is_squared():
    x = torch.full((4, 2), 300.0, dtype=torch.float16)  # 300² overflows float16
    x[0] = 0
    moments = Moments.about(torch.zeros(1, 2))
    moments.update(x, torch.arange(4))
    assert torch.allclose(moments.compute().uncentred, torch.full((2, 2), 67_500.0, dtype=torch.float64))


def test_moments_name_what_is_not_finite():
    moments = Moments.about(X[:3])
    moments.update(torch.full((3, WIDTH), torch.nan), torch.arange(3))
    with pytest.raises(ValueError, match="not finite"):
        moments.compute()


def test_firing_rate_counts_positives_only():
    rate = FiringRate.about(torch.zeros(1, 3))
    rate.update(torch.tensor([[1.0, 0.0, -1.0], [2.0, -0.0, 3.0]]), torch.arange(2))
    assert rate.compute().tolist() == [1.0, 0.0, 0.5]


def test_firing_by_position_is_the_slow_count_and_its_information_that_of_sklearn():
    from sklearn.metrics import mutual_info_score

    generator = torch.Generator().manual_seed(5)
    x, at = torch.randn(500, 4, generator=generator), torch.randperm(900, generator=generator)[:500]
    x[:, 1] = (at % 30 < 15).float()  # says which half
    x[:, 2], x[:, 3] = -1, 1  # never and always
    statistic = FiringByPosition.about(x[:1], length=30, ranges=7)
    for rows in torch.arange(500).split(211):
        statistic.update(x[rows], at[rows])
    found, place = statistic.compute(), [int(a) % 30 * 7 // 30 for a in at]
    for i in range(7):
        there = torch.tensor([p == i for p in place])
        assert int(found.tokens[i]) == int(there.sum())
        assert found.positive[i].tolist() == (x[there] > 0).sum(0).tolist()
    counted = [mutual_info_score((x[:, j] > 0).tolist(), place) for j in range(4)]
    information = found.information()
    assert float(information[0]) == pytest.approx(counted[0] - 6 / 1000)  # (7 - 1)(2 - 1) / 2n
    assert float(information[1]) == pytest.approx(counted[1], abs=0.01) and float(information[1]) > 0.5
    assert information[2:].tolist() == pytest.approx([0, 0], abs=1e-12)  # what never changes says nothing


def test_information_of_firing_that_knows_no_position_is_zero_in_the_mean():
    x = torch.randn(2000, 300, generator=torch.Generator().manual_seed(6))
    statistic = FiringByPosition.about(x[:1], length=64)
    statistic.update(x, torch.arange(2000))
    information = statistic.compute().information()
    assert abs(float(information.mean())) < 4 * (2 * 31) ** 0.5 / 4000 / 300**0.5
    assert float(information.min()) < 0 < float(information.max())


def test_magnitudes_are_the_mean_and_the_variance_of_sizes():
    x = torch.randn(300, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(7)) * 3 - 1
    magnitudes = Magnitudes.about(x[:1])
    magnitudes.update(x, torch.arange(300))
    found = magnitudes.compute()
    assert torch.allclose(found.mean, x.abs().mean(0))
    assert torch.allclose(found.variance, x.abs().var(0, correction=0))


@pytest.mark.parametrize("by_magnitude", [False, True])
def test_top_activations_are_the_brute_force_sort(by_magnitude):
    generator = torch.Generator().manual_seed(4)
    x = (torch.randn(200, 6, generator=generator) * 3).round() / 2  # many ties, zeros of both signs
    at = torch.randperm(5000, generator=generator)[:200]
    top = TopActivations.about(x[:1], k=7, by_magnitude=by_magnitude)
    for rows in torch.randperm(200, generator=generator).split(33):
        top.update(x[rows], at[rows])
    found = top.compute()
    for neuron in range(6):
        order = sorted(
            range(200),
            key=lambda i: (-(abs(x[i, neuron]) if by_magnitude else x[i, neuron]).item(), at[i].item()),
        )[:7]
        assert found.at[neuron].tolist() == at[order].tolist()
        assert found.activation[neuron].tolist() == x[order, neuron].tolist()


def test_top_activations_of_fewer_tokens_than_places():
    top = TopActivations.about(torch.zeros(1, 2), k=5)
    top.update(torch.tensor([[1.0, -2.0], [-3.0, -1.0]]), torch.tensor([8, 2**31 - 1]))
    assert top.compute().activation.tolist() == [[1.0, -3.0], [-1.0, -2.0]]
    assert top.compute().at.tolist() == [[8, 2**31 - 1], [2**31 - 1, 8]]


def test_top_activations_refuse_an_index_that_does_not_fit():
    with pytest.raises(ValueError, match="split the corpus"):
        TopActivations.about(X[:1]).update(X[:1], torch.tensor([2**31]))


@pytest.mark.parametrize("n", [4, 300])  # fewer and more rows than go at a time
def test_marginals_are_scipys_moments(n):
    x = torch.randn(n, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).exp() - 40
    marginals = Marginals.about(x[:3])
    marginals.update(x, torch.arange(n))
    found = marginals.compute()
    assert torch.allclose(found.mean, x.mean(0))
    assert torch.allclose(found.variance, x.var(0, correction=0))
    assert torch.allclose(found.skewness, torch.from_numpy(scipy.stats.skew(x.numpy())))
    assert torch.allclose(found.kurtosis, torch.from_numpy(scipy.stats.kurtosis(x.numpy(), fisher=False)))


def test_marginals_know_the_gaussian_the_uniform_and_the_coin():
    n = 200_000
    generator = torch.Generator().manual_seed(6)
    x = torch.stack(
        [torch.randn(n, generator=generator), torch.rand(n, generator=generator), torch.arange(n) % 2.0], dim=1
    )
    marginals = Marginals.about(x[:100])
    marginals.update(x, torch.arange(n))
    found = marginals.compute()
    assert torch.allclose(found.variance, torch.tensor([1, 1 / 12, 1 / 4], dtype=torch.float64), rtol=0.01)
    assert torch.allclose(found.kurtosis, torch.tensor([3, 9 / 5, 1], dtype=torch.float64), rtol=0.02)
    assert found.skewness.abs().max() < 0.02


def test_marginals_scale_with_faint_neurons_whose_fourth_powers_float32_cannot_hold():
    x = torch.randn(500, 3, generator=torch.Generator().manual_seed(7)) * torch.tensor([1.0, 1e-12, 1e12])
    marginals = Marginals.about(x[:100])
    marginals.update(x, torch.arange(500))
    found = marginals.compute()
    assert torch.allclose(found.variance, x.double().var(0, correction=0), rtol=1e-5, atol=0)
    expected = scipy.stats.kurtosis(x.double().numpy(), fisher=False)
    assert torch.allclose(found.kurtosis, torch.from_numpy(expected), rtol=1e-4)


@pytest.mark.parametrize("d", [1, 40, 127, 128, 257, 600])
@pytest.mark.parametrize("n", [1, 300])
def test_counts_are_exact_at_every_width(n, d):
    active = torch.rand(n, d, generator=torch.Generator().manual_seed(d)) > 0.5
    assert torch.equal(triangle.square(triangle.counts(active), d), (active.T.long() @ active.long()).int())


@pytest.mark.parametrize("width", [1, 7, 40])
def test_co_activation_counts_pairs_as_a_loop_does(width):
    x = torch.randn(150, width, generator=torch.Generator().manual_seed(8))
    co = CoActivation.about(x[:50], share=0.3)
    for part in x.split(37):
        co.update(part, torch.arange(len(part)))
    threshold = torch.quantile(x[:50].abs(), 0.7, dim=0)
    active = (x.abs() > threshold).long()
    found = co.compute()
    for i in range(width):
        for j in range(width):
            assert found.both[i, j] == (active[:, i] * active[:, j]).sum()
    assert torch.equal(found.active, active.sum(0))
    if width > 1:
        expected = torch.corrcoef(active.double().T)
        assert torch.allclose(found.correlation(), expected)


def test_scale_and_sign_of_a_neuron_do_not_change_who_is_active_with_it():
    x = torch.randn(200, 5, generator=torch.Generator().manual_seed(9))
    gauge = torch.tensor([2.0, -1.0, 0.5, -4.0, 1.0])
    one, other = CoActivation.about(x[:60]), CoActivation.about(x[:60] * gauge)
    one.update(x, torch.arange(200))
    other.update(x * gauge, torch.arange(200))
    assert torch.equal(one.compute().both, other.compute().both)


@pytest.mark.parametrize("keep", ["magnitudes", "both"])
def test_co_activation_correlates_magnitudes_as_torch_does(keep):
    x = (torch.randn(150, 40, generator=torch.Generator().manual_seed(8)) - 4) * torch.logspace(-6, 6, 40)
    co = CoActivation.about(x[:50], keep=keep)
    for part in x.split(37):
        co.update(part, torch.arange(len(part)))
    assert torch.allclose(
        co.compute().magnitude_correlation(), torch.corrcoef(x.abs().double().T), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("level", [0.0, 0.3, -2.7])
def test_a_neuron_that_has_fallen_still_since_the_pilot_correlates_with_none(level):
    x = torch.randn(1000, 3, generator=torch.Generator().manual_seed(8))
    co = CoActivation.about(x[:60], keep="magnitudes")
    x[:, 1] = level
    for part in x.split(300):
        co.update(part, torch.arange(len(part)))
    found = co.compute().magnitude_correlation()
    assert found[1].isnan().all() and found[:, 1].isnan().all()
    assert abs(float(found[0, 2]) - float(x[:, [0, 2]].abs().T.corrcoef()[0, 1])) < 1e-5


@pytest.mark.parametrize(("kept", "asked"), [("counts", "magnitudes"), ("magnitudes", "counts")])
def test_co_activation_says_what_it_did_not_keep_and_keeps_no_room_for_it(kept, asked):
    co = CoActivation.about(X, keep=kept)
    co.update(X, AT)
    found = co.compute()
    with pytest.raises(ValueError, match=f'keep="{asked}" or "both"'):
        found.magnitude_correlation() if asked == "magnitudes" else found.correlation()
    assert sum(len(co.tensors()[name]) for name in ("both", "S")) == triangle.size(WIDTH)
    with pytest.raises(ValueError, match='keep "all" is unknown'):
        CoActivation.about(X, keep="all")


def test_a_dead_neuron_is_never_active():
    co = CoActivation.about(torch.zeros(4, 2))
    co.update(torch.tensor([[0.0, 1.0], [0.0, -1.0], [0.0, 0.0]]), torch.arange(3))
    assert co.compute().both.tolist() == [[0, 0], [0, 2]]


@pytest.mark.parametrize("d", [1, 7, 256, 257, 600, 1030])
def test_a_triangle_is_kept_and_given_back(d):
    x = torch.randn(20, d, dtype=torch.float64, generator=torch.Generator().manual_seed(10))
    kept = torch.zeros(triangle.size(d), dtype=torch.float64)
    kept += 2 * triangle.gram(x)
    assert torch.allclose(triangle.square(kept, d), 2 * x.T @ x)
    if d > 1000:
        assert len(kept) < 0.6 * d * d


def test_top_activations_of_a_long_stream_are_those_of_the_whole():
    generator = torch.Generator().manual_seed(11)
    x = torch.relu(torch.randn(2000, 5, generator=generator) - 1).mul(8).round()  # mostly 0, many ties
    x[:, 4] = 0  # a dead neuron keeps its first tokens
    whole, parts = (TopActivations.about(x[:1], k=6) for _ in range(2))
    whole.update(x, torch.arange(2000))
    for rows in torch.arange(2000).split(100):
        parts.update(x[rows], rows)
    assert torch.equal(whole.compute().at, parts.compute().at)
    assert torch.equal(whole.compute().activation, parts.compute().activation)
    assert whole.compute().at[4].tolist() == list(range(6))


def test_top_activations_keep_what_is_just_above_the_floor():
    x = 1 + torch.rand(1000, 4, generator=torch.Generator().manual_seed(12)) / 100  # all within 1% of each other
    top = TopActivations.about(x[:1], k=9)
    for rows in torch.arange(1000).split(100):
        top.update(x[rows], rows)
    assert torch.equal(top.compute().activation, x.sort(0, descending=True).values[:9].T)


def test_a_sample_is_without_replacement_even_and_the_same_for_every_site():
    n, k = 20_000, 500
    at = torch.arange(n)
    x = at[:, None].double()
    samples = [Sample.about(x[:1], k=k, seed=seed) for seed in (0, 0, 1)]
    for rows in at.split(999):
        samples[0].update(x[rows], rows)
        samples[2].update(x[rows], rows)
    samples[1].update(-x, at)
    found, other, reseeded = (sample.compute() for sample in samples)
    assert torch.equal(found.at, other.at) and torch.equal(found.x[:, 0].long(), found.at)
    assert len(found.at.unique()) == k
    # a tenth of the stream has a tenth of the sample, up to 4 sd
    tenths = torch.bincount(found.at // (n // 10), minlength=10)
    assert (tenths - k / 10).abs().max() < 4 * (k * 0.1 * 0.9) ** 0.5
    assert len(set(found.at.tolist()) & set(reseeded.at.tolist())) < 30  # 12.5 by chance


def test_a_sample_of_a_short_stream_is_all_of_it():
    sample = Sample.about(X[:1], k=50)
    sample.update(X, AT)
    assert sorted(sample.compute().at.tolist()) == AT.tolist() and len(sample.compute().x) == N


@pytest.mark.parametrize("n", [0, 1, 5, 2**18 + 3])
def test_parts_add_up_in_the_wider_precision(n):
    part = torch.rand(n, generator=torch.Generator().manual_seed(11))
    to = torch.full((n,), 1e9, dtype=torch.float64)
    add(to, part)
    assert torch.equal(to, 1e9 + part.double())

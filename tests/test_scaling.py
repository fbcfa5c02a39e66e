import math

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t

from ffnprobe.analyzers.expansion_fits import published
from ffnprobe.scaling import exponent, fit_scaling

D = np.array([64, 128, 256, 512, 1024, 2048])


@pytest.mark.parametrize(
    ("measure", "expected"),
    [("soft_rank", (0.661, 0.5465, 0.775)), ("participation_ratio", (0.289, -0.115, 0.693))],
)
def test_the_published_points_give_the_published_exponents(measure, expected):
    law = fit_scaling(published().d_mlp, published()[measure])
    assert (law.exponent, law.low, law.high) == pytest.approx(expected, abs=5e-4)


def test_the_published_points_are_no_worse_with_a_ceiling():
    assert all(fit_scaling(published().d_mlp, published()[m]).ceiling_wins_by > 0 for m in published().columns[1:])


@pytest.mark.parametrize("b", [-0.5, 0.0, 0.37, 1.0])
def test_a_power_is_found_whatever_its_unit(b):
    for unit in (1e-3, 1, 700):
        law = fit_scaling(D, unit * D**b)
        assert (law.exponent, law.low, law.high, law.theil_sen) == pytest.approx((b,) * 4, abs=1e-9)


def test_a_ceiling_is_found_and_wins():
    law = fit_scaling(D, 1 / (1 / 300 + 1 / (0.7 * D)))
    assert (law.ceiling, law.slope) == pytest.approx((300, 0.7), rel=1e-4)
    assert law.ceiling_wins_by > 2


def test_of_a_power_without_noise_no_ceiling_wins():
    assert fit_scaling(D, D**0.5).ceiling_wins_by < -2
    assert (law := fit_scaling(D, 0.3 * D)).ceiling == math.inf and law.slope == pytest.approx(0.3, rel=1e-3)


def test_the_interval_is_the_textbooks():
    x, y = np.log(D), np.log(D**0.6 * np.array([1.1, 0.9, 1.05, 1.0, 0.8, 1.2]))
    b, a = np.polyfit(x, y, 1)
    error = math.sqrt(((y - a - b * x) ** 2).sum() / (len(x) - 2) / ((x - x.mean()) ** 2).sum())
    law = fit_scaling(D, np.exp(y))
    assert (law.exponent, law.high - law.exponent) == pytest.approx((b, t.ppf(0.975, 4) * error))


def test_theil_sen_is_the_median_slope_and_shrugs_off_an_outlier():
    ranks = D**0.6
    ranks[3] = 1e6
    slopes = [math.log(ranks[j] / ranks[i]) / math.log(D[j] / D[i]) for i in range(6) for j in range(i + 1, 6)]
    law = fit_scaling(D, ranks)
    assert law.theil_sen == pytest.approx(np.median(slopes)) == pytest.approx(0.6)


def test_aicc_is_that_of_the_residuals():
    y = np.log(D**0.6 * np.array([1.1, 0.9, 1.05, 1.0, 0.8, 1.2]))
    squares = (np.poly1d(np.polyfit(np.log(D), y, 1))(np.log(D)) - y) @ (
        np.poly1d(np.polyfit(np.log(D), y, 1))(np.log(D)) - y
    )
    assert fit_scaling(D, np.exp(y)).aicc_power == pytest.approx(6 * math.log(squares / 6) + 6 + 24 / 2)


def test_few_widths_have_no_criterion_and_two_no_interval():
    law = fit_scaling([2, 4], [1, 2])
    assert law.exponent == pytest.approx(1) and math.isnan(law.low) and math.isnan(law.ceiling_wins_by)
    assert math.isnan(exponent([4], [2])) and math.isnan(exponent([], []))


@pytest.mark.parametrize(
    ("widths", "ranks", "said"),
    [([2, 2], [1, 1], "at least two"), ([2, 4], [0, 1], "positive"), ([2, 4], [1, math.inf], "finite")],
)
def test_what_has_no_law_is_refused(widths, ranks, said):
    with pytest.raises(ValueError, match=said):
        fit_scaling(widths, ranks)


def test_the_published_table_is_whole():
    assert published().d_mlp.tolist() == [768, 1536, 2304, 3072, 3840, 4608, 5376, 6144]
    assert isinstance(published(), pd.DataFrame)

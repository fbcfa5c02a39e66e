import math
from collections.abc import Callable

import numpy as np
import pytest

from ffnprobe.analyzers.expansion import Expansion, Row
from ffnprobe.analyzers.expansion_controls import MATCHED, ONLY_TRAINED, RANDOM, TRAINED
from ffnprobe.analyzers.expansion_fits import GAP, HARD, RESAMPLES, SOFT, ExpansionFits, expansion_fits
from ffnprobe.errors import InputError

WIDTHS = (64, 128, 256, 512, 1024, 2048)
Rank = Callable[[int, int], float]  # of width and layer


def row(state: str, width: int, layer: int, soft: float, hard: float, **more) -> Row:
    ranks = dict.fromkeys(("erank_rv", "stable_rank", "rank_at_90", "rank_at_99", "numerical_rank"), soft)
    facts = {"model": f"x{width}", "arm": "gelu", "seed": 0, "tokens": 9, "sinks": 0, "special": 0}
    return Row(
        **ONLY_TRAINED
        | facts
        | {"state": state, "layer": layer, "d_mlp": width, "expansion": width / 128, **ranks}
        | {"soft_rank": soft, "participation_ratio": hard, "participation_ratio_debiased": hard}
        | more
    )


def planted(soft: Rank, hard: Rank, null: Rank, null_hard: Rank, loss: Rank = lambda w, l: w**-0.1, **more):
    rows = []
    for width in WIDTHS:
        for layer in range(5):
            own = {"loss": loss(width, 0)} | {name: of(width, layer) for name, of in more.items()}
            rows.append(row(TRAINED, width, layer, soft(width, layer), hard(width, layer), **own))
            for state in (RANDOM, MATCHED):
                rows.append(row(state, width, layer, null(width, layer), null_hard(width, layer)))
    return Expansion(rows, {"model": "planted", "seed": 0})


def power(b: float, scale: float = 1.0) -> Rank:
    return lambda width, layer: scale * (layer + 1) * width ** (b + 0.01 * (layer - 2))


def test_planted_exponents_are_found_in_the_median_layer():
    fits = expansion_fits(planted(power(0.7), power(0.3), power(0.5), power(0.4)))
    soft, hard, gap = (fits.get("gelu", TRAINED, measure) for measure in (SOFT, HARD, GAP))
    assert [r.exponent for r in (soft, hard, gap)] == pytest.approx([0.7, 0.3, 0.4])
    assert (soft.low, soft.high, soft.theil_sen, soft.below, soft.above) == pytest.approx((0.7,) * 5)
    assert (soft.widths, soft.seeds, soft.layers) == (6, 1, 5)
    assert fits.get("gelu", RANDOM, SOFT).exponent == pytest.approx(0.5)
    assert 0.67 < soft.resampled_low <= 0.7 <= soft.resampled_high < 0.73  # layers alone differ


def test_the_interval_is_that_of_the_documents_where_they_alone_differ():
    random = np.random.default_rng(0)
    off = {width: random.normal(0, 0.05, 14) for width in WIDTHS}
    off = {width: (o - o.mean()).tolist() for width, o in off.items()}
    same: Rank = lambda width, layer: width**0.6  # noqa: E731
    halves: Rank = lambda width, layer: off[width]  # noqa: E731
    measured = planted(same, same, same, same, soft_rank_halves=halves, participation_ratio_halves=halves)
    soft = expansion_fits(measured).get("gelu", TRAINED, SOFT)
    x = np.log(WIDTHS) - np.log(WIDTHS).mean()
    slopes = 0.6 + x @ np.array([off[w] for w in WIDTHS]) / (x @ x)
    expected = np.quantile(np.repeat(slopes, 1000), [0.025, 0.975])
    assert (soft.resampled_low, soft.resampled_high) == pytest.approx(expected, abs=0.002)
    assert expected[1] - expected[0] > 0.02


def test_the_interval_is_that_of_the_trainings_where_they_alone_differ():
    random = np.random.default_rng(1)
    noise = random.normal(0, 0.1, (3, len(WIDTHS)))
    rows = [
        row(state, width, 0, width**0.6 * math.exp(noise[seed, i]), 1.0, seed=seed, model=f"{seed}")
        for state in (TRAINED, RANDOM, MATCHED)
        for seed in range(3)
        for i, width in enumerate(WIDTHS)
    ]
    soft = expansion_fits(Expansion(rows, {"model": "planted", "seed": 0})).get("gelu", TRAINED, SOFT)
    x = np.log(WIDTHS) - np.log(WIDTHS).mean()
    weights = x / (x @ x)
    deviation = math.sqrt((weights**2 * noise.var(0) / 3).sum())
    assert soft.seeds == 3 and soft.exponent == pytest.approx(0.6 + weights @ noise.mean(0))
    assert soft.resampled_high - soft.resampled_low == pytest.approx(2 * 1.96 * deviation, rel=0.1)


CEILING: Rank = lambda width, layer: 1 / (1 / 90 + 1 / width)  # noqa: E731


@pytest.mark.parametrize(
    ("ranks", "said"),
    [
        ((power(0.7), power(0.3), power(0.5), power(0.4)), "the soft rank grows faster"),
        ((power(0.7), power(0.3), power(0.7), power(0.2)), "is not shown to grow faster"),
        ((power(0.3), power(0.3), power(0.2), power(0.3)), "is not shown to grow faster"),
        (
            (power(0.7), power(0.3), power(0.7, 2), power(0.3, 0.5)),
            "by the hard rank, width is under-used at d_mlp no",
        ),
        (
            (power(0.7), power(0.3), power(0.7, 2), power(0.3, 0.5)),
            "by the soft rank, at 64, 128, 256, 512, 1024, 2048",
        ),
        ((power(0.7), power(0.3), power(0.5), power(0.4)), "a ceiling is not seen"),
        ((CEILING, power(0.3), power(0.5), power(0.4)), "a ceiling is seen in the soft_rank:"),
    ],
)
def test_the_three_rules(ranks, said):
    assert said in " ".join(expansion_fits(planted(*ranks)).findings())


@pytest.mark.parametrize(
    ("measured", "verdict"),
    [
        (planted(power(0.7), power(0.3), power(0.6, 0.9), power(0.4)), "supported"),
        (planted(power(0.7), power(0.3), power(0.7, 1.1), power(0.4)), "mixed"),
        (planted(power(-0.1), power(0.3), power(0.1, 0.1), power(0.4)), "not supported"),
        (planted(power(0.7), power(0.3), power(0.6, 0.9), power(0.4), loss=lambda w, l: w**0.1), "not supported"),
    ],
)
def test_the_verdict_follows_from_the_rule(measured, verdict):
    (given,) = expansion_fits(measured).verdicts()
    assert (given.claim, given.verdict) == (2, verdict)


def test_few_widths_get_their_exponents_but_no_rule():
    measured = planted(power(0.7), power(0.3), power(0.5), power(0.4))
    few = Expansion([r for r in measured.rows if r.d_mlp < 1024], measured.settings)
    fits = expansion_fits(few)
    assert fits.verdicts() == [] and "no rule is applied to fewer than 6" in fits.findings()[-1]
    with pytest.raises(InputError, match="two widths"):
        expansion_fits(Expansion([r for r in measured.rows if r.d_mlp == 64], measured.settings))


def test_what_is_not_a_number_comes_back_from_disk_as_it_is(tmp_path):
    measured = planted(power(0.7), power(0.3), power(0.5), power(0.4))
    few = expansion_fits(Expansion([r for r in measured.rows if r.d_mlp < 256], measured.settings))
    again = ExpansionFits.load(few.save(tmp_path / "t.parquet"))
    assert math.isnan(again.rows[0].low) and math.isnan(again.rows[0].above) and again.findings() == few.findings()


def test_every_exponent_is_said_with_its_interval_null_and_n():
    first, second, *_ = expansion_fits(planted(power(0.7), power(0.3), power(0.5), power(0.4))).findings()
    for sentence in (first, second):
        assert sentence.count("N = 6") == 2 and sentence.count("[") == 5 and "N = 8" in sentence


def test_the_same_table_gives_the_same_fits_and_comes_back_from_disk(tmp_path):
    measured = planted(power(0.7), power(0.3), power(0.5), power(0.4))
    fits = expansion_fits(measured)
    again = ExpansionFits.load(fits.save(tmp_path / "t.parquet"))
    assert again.findings() == fits.findings() == expansion_fits(measured).findings()
    assert len(again.plot().axes) == 2 and again.settings["resamples"] == RESAMPLES

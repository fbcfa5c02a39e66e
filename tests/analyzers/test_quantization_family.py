from dataclasses import replace

import pytest
from recipes import tokens_of

from ffnprobe import experts, quantization, quantization_family
from ffnprobe.analyzers.coded_layer import OF_X
from ffnprobe.analyzers.experts import Experts
from ffnprobe.analyzers.kept_experts import CLUSTERS, ORACLE, RANDOM
from ffnprobe.analyzers.quantization import Quantization
from ffnprobe.analyzers.quantization_family import (
    EQUAL,
    FINEST_X,
    MEASURES,
    PARTS,
    SATURATED,
    QuantizationFamily,
    saturation,
)
from ffnprobe.errors import InputError

WIDTHS = (64, 128, 256, 512, 1024, 2048)


@pytest.fixture(scope="module")
def measured(gpt2):
    text = tokens_of(gpt2, sequences=12)
    return quantization(gpt2, text, layers=[0, 1]), experts(gpt2, text, layers=[0, 1], clusters=10, draws=2)


def family(
    measured, exponent: float, null: float, widths=WIDTHS, parts: float = -0.1, cap=10**6
) -> QuantizationFamily:
    """Members in which what is lost to codes, and to random ones, goes with these powers of the width."""
    coded, kept = [], []
    for width in widths:
        settings = {"model": f"x{width}", "arm": "gelu", "seed": 0}
        sizes = [2**b for b in range(4, 12) if 2**b <= width]

        def at(size: int, power: float, most: float = cap * width**0.5) -> float:
            return 1 - 0.9 * (min(size, most) / 64) ** power

        one, other = (result.rows for result in measured)
        rows = [
            replace(
                row, size=size, r2=at(size, exponent), random=at(size, null), d_mlp=width, expansion=width / 128
            )
            for code in ("k-means of x", "k-means of h")
            for row in one
            if (row.code, row.size) == (code, 16)
            for size in sizes
        ]
        coded.append(Quantization(rows, settings))
        told = {CLUSTERS: 1 - 0.5 * (width / 64) ** -0.1, RANDOM: 0.5}
        rows = [replace(row, r2=told.get(row.partition, 0.9)) for row in other if row.layer is not None]
        kept.append(Experts(rows, settings))
    return quantization_family(coded, kept)


def test_planted_powers_are_found(measured):
    found = family(measured, -0.2, -0.1)
    finest, parts = found.laws("gelu", FINEST_X), found.laws("gelu", PARTS)
    for laws, expected in ((finest, (-0.2, -0.1, -0.1)), (parts, (-0.1, 0.0, -0.1))):
        for of, power in zip(("measure", "null", "ratio"), expected, strict=True):
            assert [law.exponent for law in getattr(laws, of)] == pytest.approx([power, power], abs=1e-6)
    assert found.curve("gelu", EQUAL, "value") == pytest.approx({w / 128: 0.9 for w in WIDTHS})
    assert {row.measure for row in found.rows} == set(MEASURES)


@pytest.mark.parametrize(
    ("exponent", "null", "verdict"),
    [(-0.2, -0.1, "supported"), (-0.1, -0.2, "mixed"), (0.01, 0.02, "not supported")],
)
def test_finer_is_what_falls_faster_than_random_codebooks(measured, exponent, null, verdict):
    assert family(measured, exponent, null).verdicts()[0].verdict == verdict
    assert family(measured, exponent, null, widths=WIDTHS[:5]).verdicts() == []


def test_clusters_are_judged_only_where_saturation_is_seen(measured):
    assert family(measured, -0.2, -0.1).unsaturated("gelu") == 1
    assert len(family(measured, -0.2, -0.1).verdicts()) == 1
    seen = family(measured, -0.2, -0.2, cap=3)
    assert seen.unsaturated("gelu") == 0
    assert seen.verdicts()[1].verdict == "mixed"  # random codebooks saturate at as many


def test_saturation_is_the_first_size_within_5_percent_of_the_most():
    assert saturation([16, 32, 64], [0.9, 0.94, 1.0]) == 64
    assert saturation([16, 32, 64], [0.9, 0.96, 1.0]) == 32
    assert saturation([16, 32, 64], [0.5, 0.4, 0.1]) == 16
    assert saturation([16, 32], [-0.5, -0.2]) == 32


def test_the_table_holds_what_both_results_say(measured):
    coded, kept = (
        [replace(result, settings=dict(result.settings) | {"model": name}) for name in ("a", "b")]
        for result in measured
    )
    found = quantization_family(coded, kept)
    for row in (row for row in found.rows if row.layer == 1):
        of_x = coded[0].of(OF_X, 1)
        if row.measure == FINEST_X:
            assert (row.value, row.null) == (1 - of_x[-1].r2, 1 - of_x[-1].random) and of_x[-1].size == row.d_mlp
        if row.measure == PARTS:
            at = [r for r in kept[0].rows if (r.layer, r.choice, r.share) == (1, ORACLE, 0.2)]
            (value,) = (r.r2 for r in at if r.partition == CLUSTERS)
            nulls = [r.r2 for r in at if r.partition == RANDOM]
            assert row.value == 1 - value and row.null == pytest.approx(1 - sum(nulls) / 2) and len(nulls) == 2
        if row.measure == SATURATED:
            assert row.value in [r.size for r in of_x]


def test_both_results_of_the_same_models_are_wanted(measured):
    coded, kept = ([replace(r, settings={"model": "a", "arm": "gelu"})] for r in measured)
    for pair in ((coded, kept), (coded * 2, kept), (coded * 2, [replace(kept[0], settings={"model": "b"})] * 2)):
        with pytest.raises(InputError, match="give both of at least two models"):
            quantization_family(*pair)


def test_it_travels_and_is_drawn(measured, tmp_path):
    found = family(measured, -0.2, -0.1)
    again = QuantizationFamily.load(found.save(tmp_path / "table.parquet"))
    assert again.findings() == found.findings()
    assert found.plot().axes[0].get_ylabel() == "1 - R² of the output"

"""Where exact covariances do not fit, `hidden_rank` says nearly the same, and how nearly."""

import math
import re
from dataclasses import fields

import pytest
import torch
import zoo

from ffnprobe import hidden_rank
from ffnprobe.analyzers.hidden_rank import HiddenRank, Row, moment_bytes, probes
from ffnprobe.analyzers.rank_probes import BUDGET, plan_moments
from ffnprobe.errors import InputError
from ffnprobe.models import ffns, load_model
from ffnprobe.statistics import Count, SketchedMoments
from ffnprobe.stream import collect

WIDE = {"gpt2": {"n_inner": 300}, "llama": {"intermediate_size": 300}}
OF_THE_SKETCH = {"sketch", "unresolved", "numerical_rank", "participation_ratio_error"}


@pytest.fixture(scope="module", params=WIDE)
def wide(request, tmp_path_factory):
    """A model whose hidden layer is wider than the 60 tokens of the tests, and so of lower rank than 64."""
    folder = tmp_path_factory.mktemp("wide")
    return load_model(zoo.save(request.param, folder, **WIDE[request.param]), device="cpu")


def smallest(layers) -> int:
    """The least budget, from the words of the refusal."""
    with pytest.raises(InputError, match="do not fit into a budget of 1 bytes") as refusal:
        plan_moments(layers, 1)
    return int(re.search(r"at least ([\d,]+)", str(refusal.value))[1].replace(",", ""))


def test_the_plan_is_the_most_that_fits(wide):
    layers = ffns(wide)
    least = smallest(layers)
    assert plan_moments(layers, least) == 64
    with pytest.raises(InputError, match=f"at least {least:,}, or fewer layers"):
        plan_moments(layers, least - 1)
    exact = moment_bytes(layers)
    assert plan_moments(layers) == plan_moments(layers, exact) == 0
    assert plan_moments(layers, exact - 1) in (64, 128)
    assert [plan_moments(layers, budget) for budget in range(least, exact, 100_000)] == sorted(
        plan_moments(layers, budget) for budget in range(least, exact, 100_000)
    )


@pytest.mark.parametrize("sketched", [False, True])
def test_the_bytes_are_those_of_the_statistics(wide, tokens, sketched):
    layers = ffns(wide)
    budget = smallest(layers) if sketched else BUDGET
    found = collect(wide, tokens(wide, sequences=1), probes(layers, 0, budget)).values()
    moments = [statistic for statistic in found if not isinstance(statistic, Count)]
    assert any(isinstance(statistic, SketchedMoments) for statistic in moments) == sketched
    stored = sum(tensor.nbytes for statistic in moments for tensor in statistic.tensors().values())
    assert moment_bytes(layers, budget) == stored + (300 * 64 * 4 if sketched else 0)


def test_a_sketch_that_resolves_all_says_what_exact_moments_say(wide, tokens):
    text = tokens(wide, sequences=1)
    budget = smallest(ffns(wide))
    exact, sketched = hidden_rank(wide, text), hidden_rank(wide, text, budget=budget)
    assert sketched.settings["budget"] == budget and exact.settings["budget"] == BUDGET
    for a, b in zip(exact.rows, sketched.rows, strict=True):
        assert (a.sketch, b.sketch) == (0, 64 if a.site == "post" else 0)
        assert a.unresolved == a.participation_ratio_error == 0
        assert a.soft_rank_low == a.soft_rank_high == a.soft_rank_least == a.soft_rank_most == a.soft_rank
        assert b.unresolved < 1e-5 and b.participation_ratio_error < 1e-3
        assert (b.numerical_rank is None) == (b.site == "post")
        for name in {field.name for field in fields(Row)} - OF_THE_SKETCH:
            one, other = getattr(a, name), getattr(b, name)
            if isinstance(one, float) and not math.isnan(one):
                # the roots of eigenvalues at the rounding of float32 count, and a sketch has none
                rel = 0.01 if name == "erank_rv" else 1e-3
                assert other == pytest.approx(one, rel=rel, abs=1e-3), (a.site, name)
            elif isinstance(one, int):
                assert other == pytest.approx(one, abs=1), (a.site, name)


def test_the_range_holds_the_exact_soft_rank(wide, tokens):
    text = tokens(wide, sequences=8)
    exact, sketched = hidden_rank(wide, text), hidden_rank(wide, text, budget=smallest(ffns(wide)))
    for a, b in zip(exact.site("post"), sketched.site("post"), strict=True):
        assert b.unresolved > 1e-6
        assert b.soft_rank_least <= b.soft_rank_low <= a.soft_rank <= b.soft_rank_high <= b.soft_rank_most
        assert b.soft_rank == pytest.approx(a.soft_rank, rel=0.1)
        assert b.soft_rank_null == pytest.approx(a.soft_rank_null, rel=0.1)
        error = max(5 * b.participation_ratio_error, 0.01)
        assert b.participation_ratio_debiased == pytest.approx(a.participation_ratio_debiased, rel=error)


def test_the_null_is_sketched_near_the_variances_of_h(wide, tokens):
    layers = ffns(wide)
    found = collect(wide, tokens(wide), probes(layers, 0, smallest(layers)))
    for layer in range(len(layers)):
        trained, null = (found[f"hidden_rank/{layer}/post/{part}"].compute() for part in ("0", "null"))
        assert (null.variance / trained.variance).log().abs().median() < 0.3


def test_no_number_changes_with_the_gauge_of_a_neuron(tmp_path, tokens):
    one = zoo.build("llama", intermediate_size=300)
    other = zoo.build("llama", intermediate_size=300)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in other.model.layers:
            a = torch.exp(torch.randn(300, generator=generator)) * torch.randn(300, generator=generator).sign()
            layer.mlp.up_proj.weight *= a[:, None]
            layer.mlp.down_proj.weight /= a
    one, other = (load_model(hf, tokenizer=zoo.tokenizer(), device="cpu") for hf in (one, other))
    budget = smallest(ffns(one))
    results = (hidden_rank(model, tokens(model), budget=budget) for model in (one, other))
    for a, b in zip(*(result.rows for result in results), strict=True):
        for name, value in vars(a).items():
            close = isinstance(value, float) and not math.isnan(value)
            assert value == (pytest.approx(getattr(b, name), rel=2e-3, abs=2e-3) if close else getattr(b, name))


def test_the_table_round_trips(wide, tokens, tmp_path):
    result = hidden_rank(wide, tokens(wide, sequences=1), layers=[0], budget=smallest(ffns(wide)[:1]))
    again = HiddenRank.load(result.save(tmp_path / "t.parquet"))
    assert [r.numerical_rank for r in again.rows] == [r.numerical_rank for r in result.rows]
    assert str(result.to_frame()["numerical_rank"].dtype) == "Int64"
    assert again.findings() == result.findings()


def layer_rows(low: float, high: float) -> list[Row]:
    numbers = {name: 1.0 if "float" in kind else 1 for name, kind in Row.__annotations__.items()}
    exact = {"sketch": 0, "unresolved": 0.0, "participation_ratio_error": 0.0}
    hidden = {"sketch": 64, "unresolved": 0.4, "participation_ratio_error": 0.02}
    hidden |= {"soft_rank_low": low, "soft_rank_high": high, "soft_rank_least": 2.0, "soft_rank_most": 90.0}
    sites = (("in", 10.0, 1.0, exact), ("post", 20.0, 5.0, hidden), ("out", 9.0, 9.5, exact))
    return [
        Row(**{**numbers, **more, "layer": layer, "site": site, "soft_rank": soft, "soft_rank_null": null})
        for layer in range(6)
        for site, soft, null, more in sites
    ]


def test_the_findings_print_the_bound_beside_the_number():
    said = " ".join(HiddenRank(layer_rows(15.0, 25.0), {}).findings())
    assert "soft rank of 20 ± 1 (sketched: likely 15 to 25, proven 2 to 90; at endless" in said
    assert "± 2.0%" in said and "64 test vectors, which leave 40% of its variance unresolved" in said
    assert "soft rank by 1.50 to 2.50" in said


@pytest.mark.parametrize(
    ("low", "high", "expected", "counts"),
    [
        (15.0, 25.0, "supported", "h above x in 6 of 6"),
        (9.0, 25.0, "mixed", "h above x in 0 to 6 of 6"),
        (7.0, 10.5, "not supported", "h above x in 0 of 6"),
    ],
)
def test_a_verdict_is_one_that_the_whole_range_bears(low, high, expected, counts):
    verdict = HiddenRank(layer_rows(low, high), {}).verdicts()[0]
    assert verdict.verdict == expected and counts in verdict.measured


def test_the_figure_draws_the_range():
    figure = HiddenRank(layer_rows(15.0, 25.0), {"model": "m", "seed": 0}).plot()
    labels = [text.get_text() for axes in figure.axes for text in (axes.get_legend().get_texts())]
    assert "h, likely by the sketch" in labels

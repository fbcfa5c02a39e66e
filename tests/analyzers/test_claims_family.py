import pytest

from ffnprobe import claims_family, gradient_flow, interactions, load_corpus, load_model, nonlinearity, pack
from ffnprobe.analyzers.claims_family import ClaimsFamily
from ffnprobe.analyzers.interaction_index import at_judged
from ffnprobe.errors import InputError
from ffnprobe.family import MEMBERS
from ffnprobe.models import tokenizer_of
from ffnprobe.shipped import shipped

pytestmark = pytest.mark.slow  # a quarter of a minute


@pytest.fixture(scope="module")
def corpus():
    return load_corpus(shipped("tiny/heldout.jsonl", "the held-out text", "it comes with ffnprobe"))


@pytest.fixture(scope="module")
def family(corpus, folder_of):
    return claims_family(["tiny-x0.5", folder_of("gpt2")], corpus, tokens=1024)


def test_every_measure_is_that_of_its_analyzer_before_and_after_training(family, corpus):
    model = load_model("tiny-x0.5")
    start = load_model(MEMBERS["tiny-x0.5"].at_step_0(0), tokenizer=tokenizer_of(model))
    text = pack(corpus, tokenizer_of(model), tokens=1024, length=256, seed=0)
    row, before = (nonlinearity(m, text, layers=[1]).rows[0] for m in (model, start))
    found = {r.measure: r for r in family.rows if (r.model, r.layer) == ("tiny-x0.5", 1)}

    def numbers(measure):
        return found[measure].value, found[measure].null, found[measure].step_0

    assert numbers("r2") == pytest.approx((row.r2, row.r2_null, before.r2), abs=1e-4)
    assert numbers("loss_affine")[:2] == pytest.approx((row.loss_affine, row.loss_mean), abs=1e-4)
    assert numbers("loss_affine")[2] is None and found["r2"].holds == row.bent
    one, other = interactions(model, text, layers=[1]).rows[0], interactions(start, text, layers=[1]).rows[0]
    index = at_judged(one.index), at_judged(one.index_weights), at_judged(other.index)
    assert numbers("index") == pytest.approx(index, abs=1e-4)
    assert numbers("share") == pytest.approx((one.share, one.share_null, other.share), abs=1e-4)
    flow = gradient_flow(model, text, layers=[1]).rows[0]
    assert numbers("rank")[:2] == pytest.approx((flow.rank, flow.rank_null), abs=1e-4)
    assert numbers("passed")[:2] == pytest.approx(
        (flow.passed / flow.passed_off, flow.passed_null / flow.passed_off), abs=1e-3
    )
    assert found["passed"].holds == flow.passes_more and found["passed_random"].holds == flow.beats_random


def test_a_model_that_is_not_ours_has_no_step_0(family, tmp_path):
    rows = [row for row in family.rows if row.model == "gpt2"]
    assert rows and all(row.step_0 is None and row.expansion == 3 for row in rows)
    assert ClaimsFamily.load(family.save(tmp_path / "t.parquet")).rows == tuple(family.rows)
    assert len(family.plot().axes) == 6


def test_the_verdict_takes_the_layers_of_all_models_together():
    def found(**holds):
        return ClaimsFamily(
            [
                ClaimsFamily.row_type(f"m{i}", "relu", layer, 9, 1.0 + i, measure, 0.5, 0.4, None, layer < least)
                for i in range(3)
                for layer in range(4)
                for measure, least in holds.items()
            ],
            {},
        )

    def verdicts(**holds):
        return {v.claim: v.verdict for v in found(**holds).verdicts()}

    assert verdicts(r2=4, loss_affine=4) == {1: "supported"}  # 12 of 12
    assert verdicts(r2=4, loss_affine=3) == {1: "mixed"}  # 9 of 12 is no majority at 5%
    assert verdicts(share=1, index=4, passed=1, passed_random=4) == {5: "mixed", 6: "not supported"}
    assert verdicts(passed=4, passed_random=1) == {6: "mixed"}
    measured = found(r2=4, loss_affine=3).verdicts()[0].measured
    assert measured.startswith("r2: 12 of 12 (0.5 at expansion 1, 0.5 at 3, relu); loss_affine: 9 of 12 (")


def test_one_model_is_no_family(corpus):
    with pytest.raises(InputError, match="at least two"):
        claims_family(["tiny-x4"], corpus)


def test_the_median_is_over_layers():
    rows = [
        ClaimsFamily.row_type("m", "relu", layer, 9, 2.0, "r2", value, None, None, None)
        for layer, value in enumerate((0.1, 0.2, 0.9))
    ]
    assert ClaimsFamily(rows, {}).series("relu", "r2", "value") == {2.0: 0.2}
    assert ClaimsFamily(rows, {}).series("relu", "r2", "null") == {}

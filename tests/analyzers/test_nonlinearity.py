from dataclasses import replace

import pytest
import torch
from test_regression import halves, paired

from ffnprobe import nonlinearity
from ffnprobe import spectrum as sp
from ffnprobe.analyzers.affine_loss import NO_LOSS, held_out_text
from ffnprobe.analyzers.affine_probes import Beside, affine_bytes, plan_neurons, probes
from ffnprobe.analyzers.nonlinearity import Nonlinearity, affine_map, layer_row
from ffnprobe.errors import InputError
from ffnprobe.ffn import FFN
from ffnprobe.intervene import Change, losses
from ffnprobe.models import ffns
from ffnprobe.regression import cross_fitted
from ffnprobe.stream import capture, collect

FLOATS = 1e-4  # activations are float32


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request, model_of):
    return model_of(request.param)


def seen(model, text, layer: int, sites=("in", "post", "out")):
    """Rows of a layer, which of them are ordinary, and the half that each one's document is in."""
    batches = [batch[layer] for batch in capture(model, text, sites, layers=[layer])]
    rows = {site: torch.cat([a.sites[site] for a in batches]).double() for site in sites}
    return rows, torch.cat([a.kept for a in batches]), text.document.flatten() % 2


def test_every_number_is_that_of_least_squares_on_all_rows(model, tokens):
    text, layer = tokens(model, sequences=24), 1
    (row,) = nonlinearity(model, text, layers=[layer]).rows
    sites, kept, half = seen(model, text, layer)
    x, y, ffn = sites["in"], sites["out"], ffns(model)[layer]
    h = sites["post"] * ffn.gauge.double()

    def parts(target, use):
        return [paired(x[use & (half == i)], target[use & (half == i)]) for i in (0, 1)]

    ordinary, every = cross_fitted(parts(y, kept)), cross_fitted(parts(y, kept | True))
    assert row.tokens == int(kept.sum()) and row.apart == int((~kept).sum()) > 0
    assert (row.r2, row.r2_spread) == pytest.approx((ordinary.share, ordinary.spread), abs=FLOATS)
    assert row.r2_unmasked == pytest.approx(every.share, abs=FLOATS)
    assert abs(row.r2_unmasked - row.r2) > 10 * FLOATS  # else the mask is not tested
    held = cross_fitted(parts(h, kept))
    assert (row.linear_share, row.linear_share_spread) == pytest.approx((held.share, held.spread), abs=FLOATS)
    # what is left, by the slow way: residuals of every token under the map of the other half
    said, left = [], []
    for i in (0, 1):
        mine, others = kept & (half == i), kept & (half != i)
        lines = torch.cat([x, torch.ones(len(x), 1)], dim=1)
        found = torch.linalg.lstsq(lines[others], h[others]).solution
        said.append((lines @ found)[mine])
        left.append((h - lines @ found)[mine])

    def ranks(several):
        n = sum(map(len, several))
        covariance = sum(len(s) / n * torch.cov(s.T, correction=0) for s in several)
        spectrum = sp.eigenvalues(covariance)
        return sp.soft_rank(spectrum), sp.participation_ratio(spectrum)

    for name, several in (
        ("_linear", said),
        ("_nonlinear", left),
        ("", [h[kept & (half == i)] for i in (0, 1)]),
    ):
        found = getattr(row, f"soft_rank{name}"), getattr(row, f"participation_ratio{name}")
        assert found == pytest.approx(ranks(several), rel=2e-3)
    found, mean = affine_map(Beside(ffn, ffn.d_mlp, 0), collect(model, text, probes([ffn])), half=1)
    direct = paired(x[kept & (half == 1)], y[kept & (half == 1)])
    assert torch.allclose(found(direct.input_mean), direct.mean, atol=1e-5)
    assert torch.allclose(mean, direct.mean, atol=1e-5)


def test_random_neurons_are_those_of_the_null_on_the_same_inputs(model, tokens):
    text = tokens(model, sequences=24)
    (row,) = nonlinearity(model, text, layers=[0]).rows
    sites, kept, half = seen(model, text, 0)
    x, ffn = sites["in"], ffns(model)[0]
    # fewer neurons than the null has: it is the whole layer with random weights
    beside = Beside(ffn, ffn.d_mlp, 0)
    assert beside.random.keys.norm(dim=1) == pytest.approx(ffn.canonical().keys.norm(dim=1), rel=1e-5)
    cosine = torch.nn.functional.cosine_similarity(beside.random.keys, ffn.canonical().keys)
    assert cosine.abs().max() < 0.99 and cosine.abs().mean() < 0.4  # and they are not the trained ones
    h, null = (f(x.float()).double() for f in (ffn.canonical().hidden, beside.random.hidden))
    judged, trained = (cross_fitted([paired(x[m], t[m]) for m in (kept & (half == i) for i in (0, 1))])
                       for t in (null, h))  # fmt: skip
    variance = trained.n @ trained.variance
    each = judged.each
    assert row.linear_share_null == pytest.approx(float(variance @ each / variance.sum()), abs=1e-3)
    weight = variance * ffn.canonical().values.double().norm(dim=1) ** 2
    assert row.r2_null == pytest.approx(float(weight @ each / weight.sum()), abs=1e-3)


def test_random_values_write_affinely_what_random_neurons_are_on_average():
    x = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    h = torch.relu(x @ torch.randn(8, 60, generator=torch.Generator().manual_seed(1)).double())
    judged = cross_fitted(halves(x, h))
    expected = judged.weighted(judged.n @ judged.variance)
    draws = [
        cross_fitted(halves(x, h @ torch.randn(60, 8, generator=torch.Generator().manual_seed(seed)).double()))
        for seed in range(2, 22)
    ]
    assert sum(draw.share for draw in draws) / 20 == pytest.approx(expected, abs=0.02)


def test_a_linear_layer_is_affine_and_nothing_is_left_of_it(planted, tokens):
    def shift(hf):  # so far that GELU is the identity
        for block in hf.transformer.h:
            block.mlp.c_fc.bias.fill_(100.0)

    model = planted("gpt2", shift)
    (row,) = nonlinearity(model, tokens(model, sequences=24), layers=[1]).rows
    assert row.r2 == pytest.approx(1, abs=1e-4) and row.linear_share == pytest.approx(1, abs=1e-4)
    # the null has the biases too
    assert row.linear_share_null == pytest.approx(1, abs=1e-4)
    assert row.soft_rank_linear == pytest.approx(row.soft_rank, rel=1e-3)


def test_some_of_the_neurons_do_where_memory_is_short(model, tokens):
    text, layers = tokens(model, sequences=24), ffns(model)[:1]
    whole = collect(model, text, probes(layers))
    beside = Beside(layers[0], 10, 0)
    assert not beside.whole and len(beside.chosen.unique()) == 10
    x = torch.randn(6, layers[0].d_model)
    hidden = layers[0].hidden(x)
    row = beside(x, hidden, layers[0].write(hidden))
    d = layers[0].d_model
    assert torch.allclose(row[:, d : d + 10], (hidden * layers[0].gauge)[:, beside.chosen])
    assert torch.allclose(row[:, d + 10 : 2 * d + 10], layers[0].write(hidden))
    assert row[:, beside.of_random.start + d :].shape[1] == 10 == beside.of_random.stop - beside.of_random.start
    # y comes from its own moments then, and is the same y
    few = {name: replace(p, of=beside) if "/hidden/" in name else p for name, p in probes(layers).items()}
    one = layer_row(Beside(layers[0], layers[0].d_mlp, 0), whole, NO_LOSS)
    other = layer_row(beside, collect(model, text, few), NO_LOSS)
    assert (other.r2, other.r2_unmasked) == pytest.approx((one.r2, one.r2_unmasked), abs=FLOATS)
    assert other.neurons == 10 and other.soft_rank is None and abs(other.linear_share - one.linear_share) < 0.2


def test_the_plan_halves_the_neurons_until_they_fit(gpt2):
    layers = ffns(gpt2)
    assert plan_neurons(layers) == 36
    with pytest.raises(InputError, match="do not fit into a budget of 1,000 bytes: give at least"):
        plan_neurons(layers, 1000)
    wide = [FFN(0, torch.empty(10_000, 12), torch.empty(10_000, 12), "relu")]
    assert plan_neurons(wide, affine_bytes(wide, 2048)) == 2048
    assert plan_neurons(wide, affine_bytes(wide, 10_000)) == 10_000


def test_the_plan_is_what_the_moments_take(model, tokens):
    layers = ffns(model)
    kept = collect(model, tokens(model), probes(layers))
    own = sum(
        tensor.nbytes
        for name, statistic in kept.items()
        if name.startswith("nonlinearity/")
        for part, tensor in statistic.tensors().items()
        if part in ("cross", "S")
    )
    # 128 random neurons are planned for, where these layers have 36 or 48 neurons; panels of 12 are no 9/16
    assert 0.3 < own / affine_bytes(layers, layers[0].d_mlp) < 1


def test_the_verdict_follows_its_rule(tmp_path):
    def found(r2, loss=0.5, losses=6):
        numbers = dict.fromkeys(Nonlinearity.row_type.__dataclass_fields__, 0.5)
        numbers |= {"tokens": 9999, "apart": 1, "neurons": 9, "r2": r2, "r2_spread": 0.01}
        none = {"loss": None, "loss_affine": None, "loss_mean": None}
        rows = [
            Nonlinearity.row_type(**numbers | {"layer": layer, "loss_affine": loss, "loss_affine_se": 0.02})
            for layer in range(6)
        ]
        rows = [row if row.layer < losses else replace(row, **none) for row in rows]
        return Nonlinearity(rows, {"model": "m", "seed": 0, "tokens": 9, "documents": 2, "d_model": 8})

    assert found(0.88).verdicts()[0].verdict == "supported"
    assert found(0.88, loss=0.03).verdicts()[0].verdict == "mixed"  # within the error
    assert found(0.88, losses=4).verdicts()[0].verdict == "mixed"  # of four layers no test can say it
    assert found(0.88, losses=0).verdicts()[0].measured.endswith("no loss")
    assert found(0.895).verdicts()[0].verdict == "mixed"  # within the spread
    assert found(0.895, loss=0.03).verdicts()[0].verdict == "not supported"
    assert Nonlinearity(found(0.5).rows[:4], {}).verdicts() == []
    assert Nonlinearity.load(found(0.5).save(tmp_path / "t.parquet")).rows == tuple(found(0.5).rows)
    assert len(found(0.5).plot().axes) == 4


def test_few_tokens_and_one_document_are_said(gpt2, tokens):
    assert "Few tokens" in nonlinearity(gpt2, tokens(gpt2, sequences=2), layers=[0]).findings()[-1]
    with pytest.raises(InputError, match="one document"):
        nonlinearity(gpt2, tokens(gpt2, sequences=1, document=64))
    with pytest.raises(InputError, match="layer 99"):
        nonlinearity(gpt2, tokens(gpt2), layers=[99])


def test_only_odd_documents_are_predicted_and_never_more_than_asked(gpt2, tokens):
    text = tokens(gpt2, sequences=8)
    some = held_out_text(text, 100)
    assert some.ids.shape == (1, 64) and (some.document % 2 == 1).all()
    assert torch.equal(some.ids[0, :16], text.ids[0, 16:32])
    assert held_out_text(text, 16) is None  # one document alone


def test_a_layer_replaced_by_its_map_costs_what_a_change_by_hand_costs(gpt2, tokens):
    text = tokens(gpt2, sequences=24)
    (row,) = nonlinearity(gpt2, text, layers=[1], loss_tokens=512).rows
    beside = Beside(ffns(gpt2)[1], 36, 0)
    found, mean = affine_map(beside, collect(gpt2, text, probes([beside.ffn])))
    some = held_out_text(text, 512)
    for added, to in (
        (row.loss_affine, lambda read: found(read["in"])),
        (row.loss_mean, lambda read: mean.to(read["out"]).expand_as(read["out"])),
    ):
        by_hand = losses(gpt2, some, {"by hand": [Change(1, "out", to)]})
        assert (row.loss, added) == pytest.approx((by_hand.mean(), by_hand.delta("by hand")[0]), abs=1e-6)
    assert abs(row.loss_mean - row.loss_affine) > 1e-5


def test_an_affine_layer_is_replaced_at_no_cost(planted, tokens):
    def shift(hf):
        hf.transformer.h[1].mlp.c_fc.bias.fill_(100.0)

    model = planted("gpt2", shift)
    (row,) = nonlinearity(model, tokens(model, sequences=24), layers=[1]).rows
    assert abs(row.loss_affine) < 1e-5 < abs(row.loss_mean)


def test_the_loss_is_left_out_where_there_is_none(model_of, tokens):
    model = model_of("bert")
    (row,) = nonlinearity(model, tokens(model), layers=[1]).rows
    assert row.loss is None and row.loss_affine is None and row.r2 > 0
    gpt2 = model_of("gpt2")
    found = nonlinearity(gpt2, tokens(gpt2), layers=[0, 2], loss_layers=1)
    assert [row.loss is None for row in found.rows] == [True, False] and found.settings["loss_layers"] == [2]
    assert nonlinearity(gpt2, tokens(gpt2), layers=[0], loss_tokens=0).rows[0].loss is None

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from ffnprobe import capture, ffns, quantization
from ffnprobe.analyzers.codebooks import Halves, decoded, kept_variance, kmeans, nearest
from ffnprobe.analyzers.coded_layer import (
    AFFINE,
    GAUSSIAN_SOFTNESS,
    OF_H,
    OF_X,
    SIGNS,
    STRONGEST,
    TOP,
    affine,
    coded_rows,
    softness_of,
)
from ffnprobe.analyzers.quantization import Quantization
from ffnprobe.errors import InputError
from ffnprobe.ffn import FFN

CODES = (OF_X, OF_H, STRONGEST, SIGNS)


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_ffn(d: int = 6, d_mlp: int = 24, gated: bool = False) -> FFN:
    part = [gaussian(d_mlp, d, seed=seed) for seed in (1, 2, 3)]
    return FFN(0, part[0], part[1], "silu" if gated else "gelu", gates=part[2] if gated else None)


def measured(ffn: FFN, fit: torch.Tensor, test: torch.Tensor, seed: int = 0) -> dict[tuple, dict]:
    rows = coded_rows(ffn, Halves(fit, test), torch.arange(len(test)) // 8, seed)
    return {(row["code"], row["size"]): row for row in rows}


def test_tokens_from_16_centroids_are_told_by_16_codewords_and_not_by_random_ones():
    centroids = gaussian(16, 6)
    fit, test = centroids.repeat(20, 1), centroids.repeat(5, 1)
    rows = measured(random_ffn(d_mlp=16), fit, test)
    for code in (OF_X, OF_H, SIGNS):
        row = rows[code, 16]
        assert row["r2"] == pytest.approx(1, abs=1e-5) and row["r2_se"] < 1e-5
        assert row["perplexity"] == pytest.approx(16) and row["dead"] == row["unseen"] == 0
        assert row["random"] < 0.95  # 16 random tokens miss some centroids
        assert row["permuted"] < 0.1


@pytest.mark.parametrize("dim", [1, 2])
def test_the_distortion_of_a_gaussian_falls_as_the_number_of_codewords_to_the_minus_2_over_dim(dim):
    fit, test = gaussian(20_000, dim), gaussian(20_000, dim, seed=1)
    lost = [float(nearest(test, centres)[1].mean()) for centres in kmeans(fit, (64, 128, 256))]
    assert math.log2(lost[2] / lost[0]) / 2 == pytest.approx(-2 / dim, rel=0.1)


def test_in_a_planted_one_hot_memory_the_strongest_neuron_tells_all():
    d_mlp = 20
    directions = torch.linalg.qr(gaussian(24, d_mlp)).Q.T
    values = gaussian(d_mlp, 24, seed=1) * torch.linspace(0.5, 2, d_mlp)[:, None]
    ffn = FFN(0, directions, values, "relu", key_bias=torch.full((d_mlp,), -0.5))
    which = torch.arange(400) * 7 % d_mlp
    # the key of one memory, and something that no key reads
    rest = gaussian(400, 24, seed=2)
    x = directions[which] + rest - rest @ directions.T @ directions
    rows = measured(ffn, x[:200], x[200:])
    assert rows[STRONGEST, d_mlp]["r2"] == pytest.approx(1, abs=1e-5)
    assert rows[STRONGEST, d_mlp]["perplexity"] == pytest.approx(d_mlp)
    assert rows[STRONGEST, d_mlp]["random"] < 0.5
    assert rows[OF_H, d_mlp]["r2"] == pytest.approx(1, abs=1e-5)
    assert rows[OF_X, d_mlp]["r2"] < 0.9
    assert rows[TOP, 16]["r2"] > 0.99 and rows[TOP, 1]["r2"] > rows[TOP, 1]["random"] + 0.5
    assert rows[TOP, 1]["softness"] == pytest.approx(1)


def test_a_linear_layer_is_an_affine_map_and_all_of_its_neurons_are_the_layer():
    ffn = replace(random_ffn(d_mlp=16), activation="identity", key_bias=gaussian(16), bias=gaussian(6))
    x = gaussian(600, 6) + 3
    rows = measured(ffn, x[:300], x[300:])
    assert rows[AFFINE, None]["r2"] == pytest.approx(1, abs=1e-6)
    assert rows[AFFINE, None]["permuted"] == pytest.approx(-6 / 300, abs=0.03)
    assert rows[TOP, 16]["r2"] == pytest.approx(1, abs=1e-6) == rows[TOP, 16]["random"]
    assert rows[TOP, 4]["r2"] > rows[TOP, 4]["random"]


@pytest.mark.parametrize("size", [20, 200])
def test_a_code_that_knows_nothing_tells_less_than_nothing_by_codewords_over_tokens(size):
    fit, test = (half - half.mean(0) for half in gaussian(2, 2000, 5))  # or their difference would count as well
    told = []
    for seed in range(100):
        order = torch.randperm(2000, generator=torch.Generator().manual_seed(seed))
        codes = Halves(torch.arange(2000) % size, order % size)
        told.append(kept_variance(decoded(codes, fit, size)[0], test, torch.arange(2000)).r2)
    assert sum(told) / 100 == pytest.approx(-size / 2000, rel=0.1)


def test_a_random_codebook_tells_a_lot_and_less_than_a_fitted_one():
    rows = measured(random_ffn(d_mlp=64), gaussian(2000, 6), gaussian(2000, 6, seed=5))
    for size in (16, 32, 64):
        for code in (OF_X, OF_H):
            row = rows[code, size]
            assert 0.2 < row["random"] < row["r2"] - 2 * row["r2_se"]
            assert -3 * size / 2000 - 0.01 < row["permuted"] < 0.01
    assert rows[OF_X, 16]["r2"] < rows[OF_X, 32]["r2"] < rows[OF_X, 64]["r2"]


def test_as_many_codewords_as_tokens_do_not_pass_for_knowledge():
    y = gaussian(200, 5)
    codes = Halves(torch.arange(100), torch.arange(100))
    assert kept_variance(decoded(codes, y[:100], 100)[0], y[100:], torch.arange(100)).r2 < -0.7


def test_what_a_code_tells_is_the_slow_loop():
    codes = Halves(torch.tensor([0, 2, 2, 0, 1]), torch.tensor([2, 0, 3, 2]))
    fit, test, document = gaussian(5, 3), gaussian(4, 3, seed=1), torch.tensor([7, 7, 9, 9])
    predicted, seen = decoded(codes, fit, 4)
    assert seen.tolist() == [True, True, False, True]
    expected = torch.stack([(fit[1] + fit[2]) / 2, (fit[0] + fit[3]) / 2, fit.mean(0), (fit[1] + fit[2]) / 2])
    assert torch.allclose(predicted, expected)
    lost = (test - expected).square().sum(1).tolist()
    whole = (test - test.mean(0)).square().sum(1).tolist()
    r2 = 1 - sum(lost) / sum(whole)
    assert kept_variance(predicted, test, document).r2 == pytest.approx(r2, rel=1e-5)
    off = [sum(lost[i] - (1 - r2) * whole[i] for i in some) for some in ((0, 1), (2, 3))]
    se = math.sqrt(2 * sum(one**2 for one in off)) / sum(whole)
    assert kept_variance(predicted, test, document).se == pytest.approx(se, rel=1e-4)
    assert math.isnan(kept_variance(predicted, test, torch.zeros(4).long()).se)


def test_the_standard_error_is_the_spread_over_draws_of_documents():
    def draw(seed: int):
        y = gaussian(300, 4, seed=seed) + gaussian(30, 4, seed=1000 + seed).repeat_interleave(10, 0)
        noise = gaussian(30, 4, seed=2000 + seed).repeat_interleave(10, 0)
        return kept_variance(y + noise, y, torch.arange(300) // 10)

    drawn = [draw(seed) for seed in range(200)]
    spread = float(torch.tensor([one.r2 for one in drawn]).std())
    assert sum(one.se for one in drawn) / 200 == pytest.approx(spread, rel=0.2)


def test_the_affine_map_is_least_squares():
    x, y = gaussian(50, 4) + 9, gaussian(50, 3, seed=1)
    more = torch.cat([x, torch.ones(50, 1)], dim=1).double()
    weight = torch.linalg.lstsq(more[:30], y[:30].double()).solution
    found = affine(Halves(x[:30], x[30:]), y[:30])
    assert torch.allclose(found.double(), more[30:] @ weight, atol=1e-4)


def test_the_nearest_centre_is_that_of_all_distances():
    rows, centres = gaussian(40, 3), gaussian(9, 3, seed=1)
    distance = torch.cdist(rows, centres).square()
    found, squared = nearest(rows, centres)
    assert torch.equal(found, distance.argmin(1)) and torch.allclose(squared, distance.amin(1), atol=1e-5)


def test_no_more_centres_than_rows():
    with pytest.raises(ValueError, match="cannot place 9 centres among 8 rows"):
        next(kmeans(gaussian(8, 2), (9,)))


def test_softness_of_one_of_equal_and_of_gaussian_contributions():
    assert softness_of(torch.eye(5), gaussian(5, 3)) == pytest.approx(1)
    values = torch.nn.functional.normalize(gaussian(5, 3), dim=1) * torch.arange(1, 6)[:, None]
    assert softness_of(1 / torch.arange(1, 6)[None].float(), values) == pytest.approx(5)
    many = softness_of(gaussian(200, 2000), torch.ones(2000, 1))
    assert many == pytest.approx(GAUSSIAN_SOFTNESS * 2000, rel=0.02)


@pytest.mark.parametrize("change", ["gauge", "permutation"])
def test_a_gated_layer_is_the_same_under_another_gauge_and_order(change):
    ffn, x = random_ffn(gated=True), gaussian(400, 6)
    generator = torch.Generator().manual_seed(4)
    if change == "gauge":  # powers of two: no rounding
        a = 2.0 ** torch.randint(-3, 4, (24,), generator=generator)
        a *= torch.randint(2, (24,), generator=generator) * 2 - 1
        other = replace(ffn, keys=ffn.keys * a[:, None], values=ffn.values / a[:, None])
    else:
        order = torch.randperm(24, generator=generator)
        other = replace(ffn, keys=ffn.keys[order], values=ffn.values[order], gates=ffn.gates[order])
    one, two = (measured(layer, x[:200], x[200:]) for layer in (ffn, other))
    for at, row in one.items():
        if at[0] == SIGNS and change == "permutation":
            continue  # many centres are equally far, and rounding chooses
        for name in ("r2", "r2_se", "perplexity", "softness"):
            if row[name] is not None:
                assert row[name] == pytest.approx(two[at][name], abs=1e-5), (at, name)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_the_codes_of_a_model_are_those_of_its_captured_inputs(architecture, model_of, tokens):
    model = model_of(architecture)
    text = tokens(model)
    found = quantization(model, text, layers=[1], seed=3)
    (batch,) = capture(model, text, ("in", "out"), layers=[1], batch=8)
    act, ffn = batch[1], ffns(model)[1]
    kept = act.kept
    assert torch.allclose(ffn.write(ffn.hidden(act.sites["in"][kept])), act.sites["out"][kept], atol=1e-5)
    document = text.document.flatten()[act.at]
    fit, test = kept & (document % 2 == 0), kept & (document % 2 == 1)
    again = coded_rows(ffn, Halves(act.sites["in"][fit], act.sites["in"][test]), document[test], seed=3)
    rows = {(row["code"], row["size"]): row for row in again}
    for row in found.rows:
        assert (row.fit_tokens, row.tokens, row.documents) == (int(fit.sum()), int(test.sum()), 16)
        if row.code in (STRONGEST, AFFINE, TOP):  # which rows start k-means depends on their order
            assert row.r2 == pytest.approx(rows[row.code, row.size]["r2"], abs=1e-5)
    assert [row.size for row in found.of(OF_X)] == ([16, 32, 36] if architecture == "gpt2" else [16, 32, 48])


def test_half_of_the_documents_never_see_the_other(gpt2, tokens):
    text = tokens(gpt2)
    whole = quantization(gpt2, text, layers=[0], sample=40)
    assert {(row.fit_tokens, row.tokens) for row in whole.rows} == {(40, 40)}
    assert max(row.size or 0 for row in whole.of(OF_X)) == 36
    assert whole.settings["sample"] == 40 and whole.settings["layers"] == [0]


def test_a_code_wider_than_the_sample_is_left_out(gpt2, tokens):
    found = quantization(gpt2, tokens(gpt2), layers=[0], sample=34)
    assert [row.size for row in found.of(OF_X)] == [16, 32]
    assert [row.size for row in found.of(STRONGEST)] == [36]


def test_too_little_text_is_refused(gpt2, tokens):
    with pytest.raises(InputError, match="give more text"):
        quantization(gpt2, tokens(gpt2, sequences=1, document=40), layers=[0])


def test_the_verdict_needs_a_lookup_that_beats_the_affine_map(gpt2, tokens, tmp_path):
    rows = quantization(gpt2, tokens(gpt2), layers=[0]).rows

    def judged(code: float, line: float, null: float, layers: int = 6) -> Quantization:
        told = {AFFINE: {"r2": line}, TOP: {}}
        return Quantization(
            [
                replace(row, layer=layer, r2_se=0.01, **told.get(row.code, {"r2": code, "random": null}))
                for layer in range(layers)
                for row in rows
            ],
            {"model": "m", "seed": 0},
        )

    verdict = partial(lambda *numbers: judged(*numbers).verdicts()[0].verdict)
    assert verdict(0.8, 0.6, 0.5) == "supported"
    assert verdict(0.8, 0.85, 0.5) == verdict(0.4, 0.2, 0.1) == "mixed"
    assert verdict(0.4, 0.2, 0.39) == "not supported"
    assert judged(0.8, 0.6, 0.5, layers=4).verdicts() == []
    loaded = Quantization.load(judged(0.8, 0.6, 0.5).save(tmp_path / "table.parquet"))
    assert loaded.findings() == judged(0.8, 0.6, 0.5).findings()

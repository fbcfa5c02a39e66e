"""A contraction keeps what lies in the row space of its values, and h cut to all of itself loses nothing."""

from dataclasses import replace

import pytest
import torch

from ffnprobe import collect, contraction, ffns
from ffnprobe.analyzers import selectivity
from ffnprobe.analyzers.contraction import Contraction, account, probes
from ffnprobe.analyzers.contraction_cuts import Cuts, truncated
from ffnprobe.analyzers.rank_probes import probes as rank_probes
from ffnprobe.analyzers.selectivity import kept, row_space
from ffnprobe.errors import InputError, ModelRefused
from ffnprobe.intervene import Change, losses, mean_of
from ffnprobe.stream import capture

BRIEF = {"held_out": 128}
D, WIDE = 6, 18  # r = 3


def share(values, hidden):
    covariance = torch.cov(hidden.T, correction=0)
    return kept(row_space(values), values.T @ covariance @ values, covariance.trace())


@pytest.fixture
def values():
    return torch.randn(WIDE, D, generator=torch.Generator().manual_seed(0)).double()


@pytest.fixture
def noise():
    return torch.randn(20_000, WIDE, generator=torch.Generator().manual_seed(1)).double() + 5


def test_of_an_isotropic_h_one_over_r_is_kept(values, noise):
    assert share(values, noise) == pytest.approx(D / WIDE, rel=0.02)


def test_in_the_row_space_all_is_kept_and_beside_it_nothing(values, noise):
    projector = values @ torch.linalg.pinv(values)
    assert share(values, noise @ projector) == pytest.approx(1)
    assert share(values, noise - noise @ projector) == pytest.approx(0, abs=1e-12)


def test_a_layer_no_wider_than_its_output_keeps_everything(values, noise):
    assert share(values.T.contiguous(), noise[:, :D]) == pytest.approx(1)


def test_values_of_a_lower_rank_keep_less(values, noise):
    values[:, 1] = values[:, 0]
    assert share(values, noise) == pytest.approx((D - 1) / WIDE, rel=0.03)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_selectivity_is_that_of_the_projector(model_of, tokens, architecture):
    model, text = model_of(architecture), tokens(model_of(architecture))
    row = contraction(model, text, layers=[1], causal_layers=()).rows[0]
    ffn = ffns(model)[1]
    seen = [batch[1] for batch in capture(model, text, layers=[1])]
    h = torch.cat([of.sites["post"][of.kept] for of in seen]).double()
    norms, V = ffn.values.double().norm(dim=1), ffn.values.double()
    if ffn.gated:
        h, V = h * norms, V / norms[:, None]
    C = torch.cov(h.T, correction=0)
    left, _, _ = torch.linalg.svd(V, full_matrices=False)
    assert row.selectivity == pytest.approx(float((left.T @ C @ left).trace() / C.trace()), rel=1e-4)
    p = torch.linalg.eigvalsh(V.T @ C @ V)
    assert row.participation_ratio_written == pytest.approx(float(p.sum() ** 2 / p.square().sum()), rel=1e-4)
    assert row.blind == ffn.d_model / ffn.d_mlp and row.tokens == len(h)
    # no draw of other neurons knows what h is
    assert abs(row.permuted - row.blind) < 0.15 and row.permuted_sd > 0


def test_values_of_the_neurons_that_vary_keep_everything(planted, tokens):
    def edit(hf):
        mlp = hf.transformer.h[1].mlp
        mlp.c_fc.weight[:, 12:] = 0  # of 36 neurons the first 12 vary
        mlp.c_proj.weight.zero_()
        mlp.c_proj.weight[:12] = torch.eye(12)

    model = planted("gpt2", edit)
    (row,) = contraction(model, tokens(model), layers=[1], causal_layers=()).rows
    assert row.selectivity == pytest.approx(1, abs=1e-6)
    assert row.permuted == pytest.approx(1 / 3, abs=0.2) and row.permuted < 0.9


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_all_directions_and_all_neurons_lose_nothing(model_of, tokens, architecture):
    model, text = model_of(architecture), tokens(model_of(architecture))
    (row,) = contraction(model, text, layers=[1], **BRIEF).rows
    d_mlp = ffns(model)[1].d_mlp
    assert row.directions[-1] == d_mlp and abs(row.directions_delta[-1]) < 1e-6
    assert row.neurons == [d_mlp // 2, d_mlp // 4, round(d_mlp / 8)]
    assert min(map(abs, row.directions_delta[:-1])) > 1e-6  # and fewer something
    none = [Change(1, "post", mean_of(torch.ones(d_mlp), "post", torch.arange(0)))]
    assert losses(model, text, {"none": none}).delta("none") == (0.0, 0.0)


def test_cut_directions_are_as_changed_weights(gpt2, planted, tokens):
    text, k = tokens(gpt2, sequences=2), 5
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(36, k, generator=generator))
    mean = torch.randn(36, generator=generator)
    change = [Change(1, "post", truncated(basis, mean, torch.ones(36)))]

    def edit(hf):
        projection = hf.transformer.h[1].mlp.c_proj
        cut = basis @ (basis.T @ projection.weight)
        projection.bias += mean @ (projection.weight - cut)
        projection.weight.copy_(cut)

    found = losses(gpt2, text, {"cut": change}, sinks=True)
    assert found.mean() + found.delta("cut")[0] == pytest.approx(losses(planted("gpt2", edit), text, {}).mean())
    assert found.delta("cut")[0] != 0


def test_neurons_are_kept_in_the_order_of_what_they_do(planted, tokens):
    loud = torch.tensor([3, 7, 11, 20])

    def edit(hf):
        mlp = hf.transformer.h[1].mlp
        quiet = torch.ones(36, dtype=torch.bool)
        quiet[loud] = False
        mlp.c_fc.weight[:, quiet] = 0  # constant, so that its mean is all there is of it
        mlp.c_fc.bias[quiet] = 0.01

    model = planted("gpt2", edit)
    (row,) = contraction(model, tokens(model), layers=[1], **BRIEF).rows
    assert row.neurons == [18, 9, 4]
    assert max(map(abs, row.contribution_delta + row.variance_delta)) < 1e-6 < max(map(abs, row.random_delta))
    assert abs(row.directions_delta[0]) < 1e-6 < abs(row.ablated)  # four directions are all that h has


def test_the_moments_of_hidden_rank_say_the_same(llama, tokens):
    text, layers = tokens(llama), ffns(llama)[:1]
    shared = collect(llama, text, rank_probes(layers) | probes(layers, budget=None))
    assert {name.split("/")[0] for name in probes(layers, budget=None)} == {"contraction"}
    options = {"layers": [0], **BRIEF}
    assert contraction(llama, text, statistics=shared, **options) == contraction(llama, text, **options)


def test_of_a_sketch_the_selectivity_is_exact_and_nothing_is_cut(llama, tokens, monkeypatch):
    text = tokens(llama)
    exact = contraction(llama, text, causal_layers=())
    monkeypatch.setattr(selectivity, "plan_moments", lambda layers, budget: 24)
    sketched = contraction(llama, text, **BRIEF)
    for one, other in zip(sketched.rows, exact.rows, strict=True):
        assert one.sketch and one.permuted is None and not one.directions and one.ablated is None
        assert one.selectivity == pytest.approx(other.selectivity, rel=1e-3)
        assert one.soft_rank_written == pytest.approx(other.soft_rank_written, rel=1e-3)
    assert "were sketched" in " ".join(sketched.findings()) and len(sketched.plot().axes) == 2


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_the_table_is_whole_and_round_trips(model_of, tokens, architecture, tmp_path):
    result = contraction(model_of(architecture), tokens(model_of(architecture)), causal_layers=[2], **BRIEF)
    again = Contraction.load(result.save(tmp_path / "t.parquet"))
    assert again.findings() == result.findings()
    assert [bool(row.directions) for row in again.rows] == [False, False, True]
    assert again.rows[1].ablated is None and "Layer 0 has " in " ".join(result.findings())
    assert len(result.plot().axes) in (2, 4)


def test_enough_directions_are_those_from_which_on_all_keep_95_percent():
    cuts = Cuts(3.0, (1.0, 0.1), {4: (0.02, 0.0), 8: (0.2, 0.0), 16: (0.05, 0.0), 18: (0.0, 0.0)}, {})
    assert cuts.enough == 16
    assert replace(cuts, ablated=(0.19, 0.1)).enough is None


def test_parameters_are_counted_as_the_layer_has_them(llama):
    ffn = ffns(llama)[0]
    whole, factors, square, narrow, low = account(ffn.d_model, ffn.d_mlp, ffn.gated)
    assert whole.parameters == sum(part.numel() for part in (ffn.keys, ffn.gates, ffn.values))
    assert factors.parameters == whole.parameters and not factors.nonlinear
    assert (narrow.parameters, narrow.rank) == (3 * 16 * 5, 5)  # a gated neuron has three vectors
    assert low.parameters == square.parameters == 16**2 and (low.rank, square.rank) == (8, 16)
    assert all(design.flops == 2 * design.parameters for design in (whole, factors, square, narrow, low))


def test_the_verdict_follows_its_rule(gpt2, tokens):
    (row,) = contraction(gpt2, tokens(gpt2), layers=[1], **BRIEF).rows
    row = replace(row, selectivity=0.9, selectivity_spread=0.01, ablated=1.0, ablated_se=0.1, enough=12)

    def verdict(*rows):
        return [v.verdict for v in Contraction(rows, {}).verdicts()]

    assert verdict(*[row] * 6) == ["supported"]
    assert verdict(*[row] * 5, replace(row, enough=18)) == ["mixed"]
    assert verdict(*[replace(row, selectivity_spread=0.7)] * 6) == ["mixed"]
    assert verdict(*[replace(row, permuted=0.95, enough=18)] * 6) == ["not supported"]
    assert verdict(*[replace(row, ablated_se=0.6)] * 6) == ["mixed"]  # no layer says anything to the loss
    assert verdict(*[replace(row, blind=1.0)] * 6) == [] == verdict(*[row] * 4)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"layers": [9]}, "layer 9 is not there"),
        ({"layers": [0], "causal_layers": [1]}, "layer 1 cannot be cut"),
        ({"held_out": 512}, "cannot hold 512"),
    ],
)
def test_what_is_not_there_is_said(gpt2, tokens, wrong, said):
    with pytest.raises(InputError, match=said):
        contraction(gpt2, tokens(gpt2), **(BRIEF | wrong))


def test_a_model_without_a_loss_is_refused_and_measured_without_cuts(model_of, tokens):
    bert = model_of("bert")
    with pytest.raises(ModelRefused, match="predicts no next token"):
        contraction(bert, tokens(bert))
    assert contraction(bert, tokens(bert), causal_layers=()).rows[2].selectivity > 0

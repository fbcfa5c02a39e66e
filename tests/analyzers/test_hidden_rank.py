import math
from itertools import chain

import pytest
import torch

from ffnprobe import hidden_rank
from ffnprobe import spectrum as sp
from ffnprobe.analyzers.hidden_rank import HiddenRank, Row
from ffnprobe.errors import InputError
from ffnprobe.models import ffns
from ffnprobe.stream import capture


@pytest.fixture(scope="module", params=["gpt2", "llama", "opt"])
def model(request, model_of):
    return model_of(request.param)


def rows_at(model, tokens, layer: int, site: str, everything: bool = False) -> torch.Tensor:
    seen = [batch[layer] for batch in capture(model, tokens, [site], layers=[layer])]
    return torch.cat([a.sites[site] if everything else a.sites[site][a.kept] for a in seen]).double()


def spectrum_of(rows: torch.Tensor) -> torch.Tensor:
    return sp.eigenvalues(torch.cov(rows.T, correction=0))


def test_every_rank_is_that_of_the_captured_activations(model, tokens):
    text = tokens(model)
    result = hidden_rank(model, text, layers=[1])
    gated = ffns(model)[1].gated
    assert [row.site for row in result.rows] == ["in", "pre", *(["up"] if gated else []), "post", "out"]
    for row in result.rows:
        rows = rows_at(model, text, 1, row.site)
        spectrum = spectrum_of(rows)
        assert row.tokens == len(rows)
        assert row.width == rows.shape[1]
        for name, rank in (
            ("soft_rank", sp.soft_rank),
            ("participation_ratio", sp.participation_ratio),
            ("erank_rv", sp.erank_rv),
            ("stable_rank", sp.stable_rank),
        ):
            assert getattr(row, name) == pytest.approx(rank(spectrum), rel=2e-3), (row.site, name)
        about_zero = sp.eigenvalues(rows.T @ rows / len(rows))
        assert row.soft_rank_uncentred == pytest.approx(sp.soft_rank(about_zero), rel=2e-3)
        unmasked = spectrum_of(rows_at(model, text, 1, row.site, everything=True))
        assert row.soft_rank_unmasked == pytest.approx(sp.soft_rank(unmasked), rel=2e-3)


def test_tokens_sinks_and_special_tokens_add_up(model, tokens):
    text = tokens(model)
    for row in hidden_rank(model, text).rows:
        assert row.tokens + row.sinks + row.special == text.n


def test_the_pre_activation_is_bounded_by_d_model_and_the_hidden_layer_is_not(model, tokens):
    result = hidden_rank(model, tokens(model, sequences=16), layers=[0])
    pre, hidden = result.site("pre")[0], result.site("post")[0]
    d_model = ffns(model)[0].d_model
    assert pre.numerical_rank <= d_model < hidden.numerical_rank <= hidden.width


def test_the_null_is_the_ranks_of_the_same_layer_with_random_weights(model, tokens):
    text = tokens(model)
    result = hidden_rank(model, text, layers=[1], seed=3)
    layer = ffns(model)[1]
    null = layer.randomised(3)
    x, h = (rows_at(model, text, 1, site) for site in ("in", "post"))
    expected = {
        "post": null.hidden(x.float()).double(),
        "out": h @ null.values.double(),
        "pre": null.pre(x.float()).double(),
    }
    for site, rows in expected.items():
        assert result.site(site)[0].soft_rank_null == pytest.approx(sp.soft_rank(spectrum_of(rows)), rel=2e-3)


def test_the_null_keeps_the_norm_of_every_row_and_nothing_else(model):
    layer = ffns(model)[0]
    null = layer.randomised(0)
    for trained, random in ((layer.keys, null.keys), (layer.values, null.values), (layer.gates, null.gates)):
        if trained is not None:
            assert torch.allclose(trained.norm(dim=1), random.norm(dim=1), rtol=1e-5)
            assert torch.nn.functional.cosine_similarity(trained, random).abs().mean() < 0.6


def test_permuting_the_neurons_changes_no_rank(planted, model_of, tokens):
    def permute(hf):
        order = torch.randperm(48, generator=torch.Generator().manual_seed(5))
        mlp = hf.model.layers[1].mlp
        mlp.gate_proj.weight.copy_(mlp.gate_proj.weight[order])
        mlp.up_proj.weight.copy_(mlp.up_proj.weight[order])
        mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, order])

    one, other = model_of("llama"), planted("llama", permute)
    text = tokens(one)
    for a, b in zip(
        hidden_rank(one, text, layers=[1]).rows, hidden_rank(other, text, layers=[1]).rows, strict=True
    ):
        assert a.soft_rank == pytest.approx(b.soft_rank, rel=1e-4)
        assert a.participation_ratio_debiased == pytest.approx(b.participation_ratio_debiased, rel=1e-3)


def test_a_collapsed_layer_has_one_direction(planted, tokens):
    def collapse(hf):
        down = hf.model.layers[2].mlp.down_proj.weight
        down.copy_(torch.outer(torch.ones(len(down)), down[0]))

    model = planted("llama", collapse)
    row = hidden_rank(model, tokens(model), layers=[2]).site("out")[0]
    assert row.soft_rank == pytest.approx(1, abs=1e-3)
    assert row.soft_rank_null > 3


def test_the_table_round_trips_with_its_settings(model, tokens, tmp_path):
    result = hidden_rank(model, tokens(model), layers=[0])
    again = HiddenRank.load(result.save(tmp_path / "t.parquet"))
    assert again.settings == result.settings
    for a, b in zip(
        chain(*(vars(row).values() for row in result.rows)),
        chain(*(vars(row).values() for row in again.rows)),
        strict=True,
    ):
        assert a == b or (math.isnan(a) and math.isnan(b))
    assert again.findings() == result.findings()


def test_a_layer_that_is_not_there_is_said(model, tokens):
    with pytest.raises(InputError, match="layer 7 is not there"):
        hidden_rank(model, tokens(model), layers=[7])


def row(layer: int, site: str, soft: float, null: float, spread: float = 1.0) -> Row:
    numbers = {name: 1.0 if "float" in kind else 1 for name, kind in Row.__annotations__.items()}
    return Row(
        **{
            **numbers,
            "layer": layer,
            "site": site,
            "soft_rank": soft,
            "soft_rank_null": null,
            "soft_rank_spread": spread,
        }
    )


@pytest.mark.parametrize(
    ("hidden", "null", "verdict"),
    [
        (20.0, 15.0, "supported"),
        (20.0, 30.0, "mixed"),
        (10.5, 5.0, "not supported"),
        (5.0, 1.0, "not supported"),
    ],
)
def test_the_verdict_on_expansion_follows_its_rule(hidden, null, verdict):
    rows = [
        row(layer, site, soft, null)
        for layer in range(6)
        for site, soft in (("in", 10.0), ("post", hidden), ("out", 9.0))
    ]
    assert HiddenRank(rows, {}).verdicts()[0].verdict == verdict


def test_the_verdict_needs_more_than_a_bare_majority():
    sites = [("in", 10.0, 1.0), ("out", 9.0, 1.0)]
    rows = [
        row(layer, *site) for layer in range(30) for site in (*sites, ("post", 20.0, 15.0 if layer < 16 else 30.0))
    ]
    assert HiddenRank(rows, {}).verdicts()[0].verdict == "mixed"
    assert HiddenRank(rows[:9], {}).verdicts() == []  # of three layers nothing is said

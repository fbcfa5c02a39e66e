import math
from dataclasses import replace
from itertools import chain

import pytest
import torch

from ffnprobe import hidden_rank
from ffnprobe import spectrum as sp
from ffnprobe.analyzers.hidden_rank import HiddenRank, Row
from ffnprobe.errors import InputError
from ffnprobe.models import Model, ffns
from ffnprobe.stream import capture


@pytest.fixture(scope="module", params=["gpt2", "llama", "opt"])
def model(request, model_of):
    return model_of(request.param)


def rows_at(model, tokens, layer: int, site: str, everything: bool = False) -> torch.Tensor:
    seen = [batch[layer] for batch in capture(model, tokens, [site], layers=[layer])]
    return torch.cat([a.sites[site] if everything else a.sites[site][a.kept] for a in seen]).double()


def spectrum_of(rows: torch.Tensor) -> torch.Tensor:
    return sp.eigenvalues(torch.cov(rows.T, correction=0))


def entropy_rank(p: torch.Tensor) -> float:
    p = p[p > 0] / p.sum()
    return float(torch.exp(-(p * p.log()).sum()))


def weighed(model, layer: int, site: str) -> torch.Tensor | float:
    """On a gated layer a neuron counts as it is written."""
    ffn = ffns(model)[layer]
    return ffn.gauge.double() if ffn.gated and site in ("up", "post") else 1.0


@pytest.fixture
def sinking(planted) -> Model:
    """A llama in which one token id makes layer 1's hidden activation (not the residual stream) enormous."""

    def plant(hf):
        # coordinate 0 belongs to token 7
        hf.model.embed_tokens.weight[:, 0] = 0
        hf.model.embed_tokens.weight[7, 0] = 1
        hf.model.layers[0].self_attn.o_proj.weight[0] = 0
        hf.model.layers[0].mlp.down_proj.weight[0] = 0
        hf.model.layers[1].self_attn.o_proj.weight[0] = 0
        hf.model.layers[1].mlp.gate_proj.weight[:4, 0] = 40
        hf.model.layers[1].mlp.up_proj.weight[:4, 0] = 40

    return planted("llama", plant)


def test_every_column_is_that_of_the_captured_activations(model, sinking, tokens):
    for network in (model, sinking):
        text = tokens(network)
        result = hidden_rank(network, text, layers=[1])
        gated = ffns(network)[1].gated
        assert [row.site for row in result.rows] == ["in", "pre", *(["up"] if gated else []), "post", "out"]
        z = None
        for row in result.rows:
            seen = [batch[1] for batch in capture(network, text, [row.site], layers=[1])]
            every = torch.cat([a.sites[row.site] for a in seen]).double() * weighed(network, 1, row.site)
            kind, at = torch.cat([a.kind for a in seen]), torch.cat([a.at for a in seen])
            rows, document = every[kind == 0], text.document.flatten()[at[kind == 0]]
            n = len(rows)
            assert (row.tokens, row.sinks, row.special) == (n, int((kind == 1).sum()), int((kind == 2).sum()))
            assert row.width == rows.shape[1]
            l = torch.linalg.svdvals(rows - rows.mean(0)) ** 2 / n
            p = l / l.sum()
            about_zero = torch.linalg.svdvals(rows) ** 2
            unmasked = torch.linalg.svdvals(every - every.mean(0)) ** 2
            halves = [rows[document % 2 == half] for half in (0, 1)]
            soft_halves = [entropy_rank(torch.linalg.svdvals(x - x.mean(0)) ** 2) for x in halves]
            expected = {
                "participation_ratio": float(1 / (p**2).sum()),
                "soft_rank": entropy_rank(l),
                "erank_rv": entropy_rank(l.sqrt()),
                "stable_rank": float(1 / p.max()),
                "rank_at_90": int((p.cumsum(0) < 0.90).sum()) + 1,
                "rank_at_99": int((p.cumsum(0) < 0.99).sum()) + 1,
                "participation_ratio_uncentred": float(about_zero.sum() ** 2 / (about_zero**2).sum()),
                "soft_rank_uncentred": entropy_rank(about_zero),
                "participation_ratio_unmasked": float(unmasked.sum() ** 2 / (unmasked**2).sum()),
                "soft_rank_unmasked": entropy_rank(unmasked),
                "soft_rank_spread": abs(soft_halves[0] - soft_halves[1]) / 2,
                "soft_rank_extrapolated": min(row.width, entropy_rank(l) ** 2 / math.sqrt(math.prod(soft_halves))),
            }
            full = torch.nn.functional.pad(p, (0, row.width - len(p)))
            flat = torch.arange(1, row.width + 1) / row.width
            expected["early_enrichment"] = float((full.cumsum(0) - flat).sum() / (row.width / 2))
            z = full if row.site == "pre" else z
            for name, value in expected.items():
                assert getattr(row, name) == pytest.approx(value, rel=3e-3, abs=3e-3), (row.site, name)
            if row.site == "post":
                middle = (full + z) / 2
                kl = sum((q * (q / middle).log()).nansum() / 2 for q in (full, z))
                assert row.divergence_from_pre == pytest.approx(float(kl), abs=1e-3)
                assert row.participation_ratio < row.participation_ratio_debiased  # 12 tokens a neuron
                if network is sinking:
                    assert row.sinks > 0 and row.soft_rank_unmasked < 0.8 * row.soft_rank
            assert row.divergence_from_pre is None or row.site in ("pre", "up", "post")


def test_a_sink_is_found_by_its_hidden_norm_alone(sinking, tokens):
    text = tokens(sinking)
    seen = [batch[1] for batch in capture(sinking, text, layers=[1])]
    kind = torch.cat([a.kind for a in seen])
    assert set(text.ids.flatten()[kind == 1].tolist()) == {7}
    assert set(kind[text.ids.flatten() == 7].tolist()) == {1}


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
    layer = ffns(model)[1].canonical()
    null = layer.randomised(3)
    x, h = (rows_at(model, text, 1, site) for site in ("in", "post"))
    h = h * weighed(model, 1, "post")
    random = null.hidden(x.float()).double()
    random = random * h.std(dim=0) / random.std(dim=0).clamp(min=1e-30)  # each neuron at its trained variance
    d, n = x.shape[1], len(x)
    expected = {"post": random, "out": h @ null.values.double(), "pre": null.pre(x.float()).double()}
    for site, rows in expected.items():
        spectrum = spectrum_of(rows)
        assert result.site(site)[0].soft_rank_null == pytest.approx(entropy_rank(spectrum), rel=3e-3)
        hard = float(spectrum.sum() ** 2 / (spectrum**2).sum())
        assert result.site(site)[0].participation_ratio_null == pytest.approx(hard, rel=3e-3)
    assert result.site("in")[0].participation_ratio_null == pytest.approx(1 / (1 / d + 1 / n))


def test_the_null_keeps_the_norm_of_every_row_and_nothing_else(model):
    layer = ffns(model)[0]
    null = layer.randomised(0)
    for trained, random in ((layer.keys, null.keys), (layer.values, null.values), (layer.gates, null.gates)):
        if trained is not None:
            assert torch.allclose(trained.norm(dim=1), random.norm(dim=1), rtol=1e-5)
            assert torch.nn.functional.cosine_similarity(trained, random).abs().mean() < 0.6


def test_two_draws_of_the_null_agree(model_of, tokens):
    model = model_of("llama")
    nulls = [
        hidden_rank(model, tokens(model), layers=[1], seed=seed).site("post")[0].soft_rank_null
        for seed in range(4)
    ]
    assert max(nulls) < 1.5 * min(nulls)


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
            "sketch": 0,
            "soft_rank_low": soft,
            "soft_rank_high": soft,
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


@pytest.mark.parametrize(
    ("out", "null", "verdict"), [(5.0, 6.0, "supported"), (5.0, 4.0, "mixed"), (20.0, 30.0, "not supported")]
)
def test_the_verdict_on_contraction_follows_its_rule(out, null, verdict):
    sites = [("in", 10.0, 1.0), ("post", 20.0, 1.0), ("out", out, null)]
    rows = [row(layer, *site) for layer in range(6) for site in sites]
    assert HiddenRank(rows, {}).verdicts()[1].verdict == verdict


def test_the_findings_speak_of_sinks_only_where_there_are_some():
    rows = [
        row(layer, site, soft, 3.0)
        for layer in range(5)
        for site, soft in (("in", 10.0), ("post", 60.0), ("out", 9.0))
    ]
    assert (
        HiddenRank([replace(r, soft_rank_unmasked=59.0) for r in rows], {}).findings()[0].startswith("Expansion")
    )
    said = HiddenRank([replace(r, sinks=4, special=2) for r in rows], {}).findings()[0]
    assert "60.0 with 4 sinks and 2 special tokens of 7" in said and "1.00 with them left in" in said
    assert "0, 1, 2, 3, 4" in said


def test_the_findings_say_what_is_not_settled():
    rows = [row(layer, site, 10.0, 3.0, spread=0.1) for layer in range(5) for site in ("in", "post", "out")]
    assert not any("Not settled" in finding for finding in HiddenRank(rows, {}).findings())
    rows = [replace(r, soft_rank_spread=2.0) if r.layer == 3 else r for r in rows]
    assert any("at layers 3 the soft rank" in finding for finding in HiddenRank(rows, {}).findings())


def test_one_document_is_refused_before_the_model_runs(model, tokens):
    with pytest.raises(InputError, match="of one document"):
        hidden_rank(model, tokens(model, document=10_000))

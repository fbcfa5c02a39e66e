import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
import zoo

from ffnprobe import load_model, neuron_roles
from ffnprobe.analyzers.detectors import alike, chance, commonest, covering
from ffnprobe.analyzers.neuron_roles import NeuronRoles
from ffnprobe.analyzers.roles import ROLES, Rules
from ffnprobe.analyzers.vocabulary_moments import Vocabulary
from ffnprobe.corpus import Tokens
from ffnprobe.errors import ModelRefused
from ffnprobe.models import Model, ffns
from ffnprobe.stream import capture
from ffnprobe.unembedding import unembedding

D, V, N = 384, 1200, 24  # wide enough that a random value has no role: of random ones the variance is 1 / D
TRIGGER = 77


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def directions() -> torch.Tensor:
    """Orthonormal, and orthogonal to the all-ones direction."""
    rows = torch.cat([torch.ones(D, 1), gaussian(D, 4, seed=1)], dim=1)
    return torch.linalg.qr(rows).Q.T[1:]


def words() -> Tokens:
    """Random ids, and one token often enough to be all triggers of a neuron."""
    ids = torch.randint(1, V, (512,), generator=torch.Generator().manual_seed(0))
    ids[torch.randperm(512, generator=torch.Generator().manual_seed(1))[:40]] = TRIGGER
    special = torch.arange(512) % 64 == 0
    ids[special] = 0
    parts = (ids, torch.arange(512) // 64, special)
    return Tokens(*(part.view(-1, 64) for part in parts), {})


def embeddings() -> torch.Tensor:
    """Tokens in two halves along one direction, and none along another."""
    halves, nothing, *_ = directions()
    rows = gaussian(V, D) / D**0.5
    rows = rows - rows.mean(1, keepdim=True)
    rows += torch.outer(torch.where(torch.arange(V) % 2 == 0, 0.15, -0.15) - rows @ halves, halves)
    return rows - torch.outer(rows @ nothing, nothing)


PLANTED = {role: {i} for i, role in enumerate(ROLES)} | {"dead": {7}}


@pytest.fixture(scope="module")
def plain_roles() -> NeuronRoles:
    """A plain last layer with a neuron of every role, in the order of ROLES, and random ones."""
    hf = zoo.build("gpt2", n_embd=D, n_layer=2, n_inner=N, vocab_size=V, n_positions=64)
    halves, nothing, where, sink = directions()
    rows = embeddings()
    with torch.no_grad():
        hf.transformer.wte.weight.copy_(rows / hf.transformer.ln_f.weight)
        token = hf.transformer.wte.weight[TRIGGER]
        hf.transformer.wpe.weight.copy_(torch.outer(torch.where(torch.arange(64) < 32, 0.1, -0.1), where))
        hf.transformer.wpe.weight[40] += 30 * sink
        for block in hf.transformer.h:
            for part in (block.attn.c_proj.weight, block.attn.c_proj.bias):
                part.zero_()
        hf.transformer.h[0].mlp.c_proj.weight.zero_()
        hf.transformer.h[0].mlp.c_proj.bias.zero_()
        mlp, gain = hf.transformer.h[1].mlp, hf.transformer.h[1].ln_2.weight
        hf.transformer.h[1].ln_2.bias.zero_()
        unembedded = rows - rows.mean(0)
        for i, value in enumerate((unembedded[5], -unembedded[9], halves, 5 * nothing)):
            mlp.c_proj.weight[i] = value + 0.7 / D**0.5  # the mean, which the final norm takes off
        for i, key in ((4, token / token.norm()), (5, 40 * where), (6, 5 * sink)):
            mlp.c_fc.weight[:, i] = key / gain
        mlp.c_fc.bias[4:7] = torch.tensor([-10.0, 0, 0])
        mlp.c_fc.bias[7] = -1e4
    return neuron_roles(load_model(hf, tokenizer=zoo.tokenizer(), device="cpu"), words(), layers=[1])


@pytest.mark.parametrize("role", ROLES)
def test_a_planted_role_is_found_and_no_other_neuron_has_it(plain_roles, role):
    assert {row.neuron for row in plain_roles.rows if getattr(row, role)} == PLANTED[role]


def test_what_is_planted_reads_as_it_was_planted(plain_roles):
    rows = plain_roles.rows
    assert rows[0].skew > 3 and rows[1].skew < -3
    assert rows[2].variance == pytest.approx(0.15**2, rel=0.1) and abs(rows[2].skew) < 0.5
    assert (
        rows[3].null_share == pytest.approx(1) and rows[3].logit_variance < 1e-9 and math.isnan(rows[3].kurtosis)
    )
    null = plain_roles.settings["null_share"]
    assert null == pytest.approx(6 / 383) and max(row.null_share for row in rows if row.neuron != 3) < 4 * null
    assert rows[4].trigger_tokens == 1 and rows[4].trigger == str(zoo.tokenizer().decode([TRIGGER]))
    assert rows[5].information > 0.4 and rows[7].firing_rate == 0 and rows[7].trigger_tokens is None
    assert rows[6].sink_contribution > 10 * rows[6].contribution
    found = plain_roles.layers()[0]
    assert found.detectors == 1 and found.null["detector"] == found.null["prediction"] == found.null["dead"] == 0
    assert found.null["partition"] < 0.001 and found.null["positional"] < 1e-3
    assert plain_roles.plot() and len(plain_roles.findings()) == 4 and plain_roles.verdicts() == []


def gated(change=lambda mlp: None) -> tuple[NeuronRoles, Model]:
    """A gated last layer whose first six neurons have roles; embeddings share a direction that a gate can bar."""
    hf = zoo.build(
        "llama", hidden_size=D, num_hidden_layers=1, intermediate_size=N, vocab_size=V, tie_word_embeddings=False
    )
    halves, nothing, always, _ = directions()
    rows = embeddings()
    with torch.no_grad():
        hf.lm_head.weight.copy_(rows / hf.model.norm.weight)
        hf.model.embed_tokens.weight.copy_(rows + 0.5 * always)
        hf.model.layers[0].self_attn.o_proj.weight.zero_()
        mlp, gain = hf.model.layers[0].mlp, hf.model.layers[0].post_attention_layernorm.weight
        for i, value in enumerate((rows[5], rows[9], halves, 5 * nothing)):
            mlp.down_proj.weight[:, i] = value
        mlp.gate_proj.weight[4] = (rows[TRIGGER] / rows[TRIGGER].norm() - always) / gain
        mlp.up_proj.weight[4] = always / gain / 20  # or its tokens would be sinks
        mlp.gate_proj.weight[5] = -40 * always / gain
        change(mlp)
    model = load_model(hf, tokenizer=zoo.tokenizer(), device="cpu")
    return neuron_roles(model, words()), model


@pytest.fixture(scope="module")
def gated_roles() -> tuple[NeuronRoles, Model]:
    return gated()


def test_a_gated_layer_has_the_roles_that_are_planted(gated_roles):
    found, model = gated_roles
    has = {role: {row.neuron for row in found.rows if getattr(row, role)} for role in ROLES}
    batches = [batch[0] for batch in capture(model, words(), ["post"])]
    h = torch.cat([batch.sites["post"][batch.kept] for batch in batches])
    written = h.gather(0, h.abs().argmax(0, keepdim=True))[0].sign()
    for i in (0, 1):  # a value is read in the direction in which it is written where it is strongest
        assert has["prediction" if written[i] > 0 else "suppression"] >= {i}
    assert has["prediction"] | has["suppression"] == {0, 1}
    assert (has["partition"], has["entropy"], has["detector"], has["dead"]) == ({2}, {3}, {4}, {5})
    assert has["positional"] == has["sink_writer"] == set()
    assert all(math.isnan(row.sink_contribution) and row.sink_chance == 0 for row in found.rows)


def test_sign_scale_and_order_of_gated_neurons_change_no_number(gated_roles):
    order = torch.randperm(N, generator=torch.Generator().manual_seed(2))
    a = gaussian(N, seed=3).exp() * torch.where(torch.arange(N) % 2 == 0, 1.0, -1.0)

    def change(mlp):
        mlp.up_proj.weight.copy_((mlp.up_proj.weight * a[:, None])[order])
        mlp.gate_proj.weight.copy_(mlp.gate_proj.weight[order])
        mlp.down_proj.weight.copy_((mlp.down_proj.weight / a)[:, order])

    one, other = gated_roles[0].rows, gated(change)[0].rows
    for new, old in enumerate(order.tolist()):
        for name, value in vars(replace(one[old], neuron=new)).items():
            again = getattr(other[new], name)
            if isinstance(value, float):
                assert again == pytest.approx(value, rel=1e-5, abs=1e-7, nan_ok=True), name
            else:
                assert again == value, name


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "opt"])
def test_every_number_is_its_slow_count(architecture, model_of, tokens):
    model, layer, k = model_of(architecture), 1, 9
    text = tokens(model)
    found = neuron_roles(model, text, layers=[layer], triggers=k, ranges=8)
    ffn, raw = ffns(model, "folded")[layer], ffns(model)[layer]
    sites = [batch[layer] for batch in capture(model, text, ["post", "pre"], layers=[layer])]
    h, z = (torch.cat([a.sites[site][a.kept] for a in sites]).double() for site in ("post", "pre"))
    at = torch.cat([a.at[a.kept] for a in sites])
    ids, place = text.ids.flatten()[at], at % 64 // 8
    u = unembedding(model).double()
    unit = u / u.norm(dim=1, keepdim=True)
    count = Counter(text.ids[~text.special].tolist())
    assert len(found.rows) == raw.d_mlp
    for row in found.rows[::7]:
        i = row.neuron
        v = ffn.values[i].double()
        size = h[:, i].abs() if ffn.gated else h[:, i]
        top = size.topk(k).indices
        read = -v if ffn.gated and h[top[0], i] < 0 else v
        cosine = unit @ read / v.norm()
        deviation = cosine - cosine.mean()
        assert row.variance == pytest.approx(float(deviation.square().mean()), rel=1e-5)
        m = [float((deviation / cosine.std(correction=0)).pow(p).mean()) for p in (3, 4)]
        assert [row.skew, row.kurtosis] == pytest.approx(m, rel=1e-4, abs=1e-4)
        logits = u @ (v / v.norm())
        typical = float(u.var(0, correction=0).sum()) / (len(v) - (architecture != "llama"))
        assert row.logit_variance == pytest.approx(float(logits.var(correction=0)) / typical, rel=1e-5)
        strength = v.norm() * ffn.keys[i].double().norm() if ffn.gated else v.norm()
        assert row.strength == pytest.approx(float(strength), rel=1e-5)
        mine = Counter(ids[top].tolist()).most_common()
        trigger = mine[0][0]
        writes = torch.sign(h[top, i][ids[top] == trigger].sum()) * v
        assert row.against == bool(u[trigger] @ writes < 0)
        if (size[top] > 0).all():
            need, covered = 0, 0
            while covered < 0.95 * k:
                covered += mine[need][1]
                need += 1
            assert row.trigger_tokens == need
        else:
            assert row.trigger_tokens is None
        near = alike(text, torch.tensor([trigger]))[0].tolist()
        assert trigger not in near and len(set(near)) == 20
        worst = max(abs(count[t] - count[trigger]) for t in near)
        closer = [t for t in count if abs(count[t] - count[trigger]) < worst and t != trigger]
        assert set(closer) <= set(near) or len(closer) > 20
        assert row.against_alike == pytest.approx(float((u[near] @ writes < 0).double().mean()))
        assert row.one_sign == pytest.approx(float((h[top, i].sign() == h[top[0], i].sign()).double().mean()))
        assert row.firing_rate == pytest.approx(float((z[:, i] > 0).double().mean()))
        assert row.tokens == len(z)
        information, p = 0.0, (z[:, i] > 0).double().mean()
        for b in range(8):
            for fires in (True, False):
                joint = float(((place == b) & ((z[:, i] > 0) == fires)).double().mean())
                alone = float((place == b).double().mean() * (p if fires else 1 - p))
                information += joint * math.log(joint / alone) if joint else 0
        if 0.1 < p < 0.9:
            assert row.information == pytest.approx(information - 7 / (2 * len(z)), abs=1e-9)
        assert row.contribution == pytest.approx(float(h[:, i].abs().mean() * v.norm()), rel=1e-4)


def test_moments_are_those_of_the_whole_product_whatever_the_tiles(monkeypatch):
    rows, values = gaussian(300, 12).exp(), gaussian(7, 12, seed=1)
    whole = Vocabulary.of(rows).spread(values)
    monkeypatch.setattr("ffnprobe.analyzers.vocabulary_moments.TILE", 5)
    for one, other in zip(whole, Vocabulary.of(rows).spread(values), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_random_values_have_the_logit_variance_and_the_null_share_of_chance(gpt2, llama):
    for model, centred in ((gpt2, True), (llama, False)):
        vocabulary = Vocabulary.of(unembedding(model))
        values = vocabulary.random(4000, seed=1)
        assert vocabulary.centred == centred
        variance, share = vocabulary.logit_variance(values), vocabulary.null_share(values, 3)
        assert float(variance.mean()) == pytest.approx(1, abs=4 * float(variance.std()) / 4000**0.5)
        chance = 3 / vocabulary.dimensions
        assert float(share.mean()) == pytest.approx(chance, abs=4 * float(share.std()) / 4000**0.5)
        ones = vocabulary.null_share(torch.ones(1, vocabulary.rows.shape[1]), 3)
        assert not centred or float(ones) < 1e-6  # the exact null direction is none of the effective ones


def test_covering_tokens_and_the_commonest_are_a_slow_count():
    ids = torch.randint(4, (60, 8), generator=torch.Generator().manual_seed(0))
    for row, need, most in zip(ids.tolist(), covering(ids, 0.7).tolist(), commonest(ids).tolist(), strict=True):
        counts = [n for _, n in Counter(row).most_common()]
        assert sum(counts[:need]) >= 5.6 > sum(counts[: need - 1])
        assert most == Counter(row).most_common(1)[0][0]  # of equals the first


def test_the_chance_of_a_detector_is_that_of_random_tokens(gpt2, tokens):
    text = tokens(gpt2)
    one_token = replace(text, ids=torch.where(text.special, 0, 7))
    assert chance(one_token, 20, 1, 0.95, seed=0) == 1
    assert chance(text, 20, 5, 0.95, seed=0) == 0


def test_rules_are_recorded_and_obeyed(gpt2, tokens, tmp_path):
    rules = Rules(kurtosis=2.0, variance=0.09, tokens=20, information=-1.0, sink=0.5, late=1.0)
    found = neuron_roles(gpt2, tokens(gpt2), layers=[0, 2], rules=rules)
    assert found.settings["rules"] == vars(rules) and found.settings["weights"] == "folded"
    for row in found.rows:
        assert row.prediction == (row.kurtosis > 2 and row.skew > 0)
        assert row.suppression == (row.kurtosis > 2 and row.skew < 0)
        assert row.partition == (row.variance > 0.09)
        assert row.detector == (row.trigger_tokens is not None and row.trigger_tokens <= 20 and not row.dead)
        assert row.positional == (row.information > -1)
    again = NeuronRoles.load(found.save(tmp_path / "t.parquet"))
    assert again.findings() == found.findings() and len(again.rows) == len(found.rows) == 72
    assert again.layers()[1].share == found.layers()[1].share


def test_a_model_whose_values_cannot_be_read_is_refused(model_of, tokens):
    with pytest.raises(ModelRefused, match="values cannot be read in the vocabulary"):
        neuron_roles(model_of("bert"), tokens(model_of("bert")))


@pytest.mark.parametrize(
    ("layers", "share", "verdict"),
    [(6, 0.05, "mixed"), (6, 0.7, "supported"), (3, 0.7, "not supported"), (0, 0.0, "not supported")],
)
def test_the_verdict_follows_its_rule(plain_roles, layers, share, verdict):
    """In `layers` of six layers this share of the neurons both promotes and detects, elsewhere none."""
    bare = replace(plain_roles.rows[-1], partition=False)
    rows = [
        replace(bare, layer=layer, neuron=i, prediction=hit, detector=hit)
        for layer in range(6)
        for i in range(200)
        for hit in [layer < layers and i < 200 * share]
    ]
    result = NeuronRoles(rows, plain_roles.settings)
    (found,) = result.verdicts()
    assert found.verdict == verdict and f"in {layers} of 6 layers" in found.measured

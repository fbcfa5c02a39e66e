import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score
from transformers import AutoModelForCausalLM, AutoTokenizer

from ffnprobe import load_model, neuron_clusters
from ffnprobe.analyzers.cluster_quality import Judge, adjusted_rand, agreement, coherence, silhouette
from ffnprobe.analyzers.cluster_rows import choose
from ffnprobe.analyzers.neuron_clusters import NeuronClusters
from ffnprobe.analyzers.neuron_views import (
    VIEWS,
    co_activation_bytes,
    co_active,
    drawn,
    half_name,
    of_weights,
    probes,
    views_of,
    vocabulary_metric,
    vocabulary_root,
    within,
)
from ffnprobe.clustering import ALGORITHMS, similarity
from ffnprobe.corpus import Tokens
from ffnprobe.errors import InputError
from ffnprobe.forward import evenly
from ffnprobe.models import ffns, output_gain
from ffnprobe.statistics import triangle
from ffnprobe.stream import capture, collect
from ffnprobe.unembedding import unembedding

GROUPS = 6


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def directions(seed: int, d: int = 16) -> torch.Tensor:
    """48 rows in 6 tight groups of 8."""
    centres = torch.linalg.qr(gaussian(d, GROUPS, seed=seed)).Q.T
    return centres.repeat(8, 1) + 0.02 * gaussian(48, d, seed=seed)


def plant(hf):
    """6 groups of neurons that read alike, write alike and speak together."""
    mlp = hf.model.layers[1].mlp
    mlp.gate_proj.weight.copy_(directions(1))
    mlp.up_proj.weight.copy_(directions(2))
    mlp.down_proj.weight.copy_(directions(3).T)
    # a gated FFN is the same after this
    mlp.up_proj.weight[::3] *= -2
    mlp.down_proj.weight[:, ::3] /= -2


@pytest.fixture(scope="module")
def family(folder_of):
    """The planted layer, measured by every algorithm."""
    folder = folder_of("llama")
    hf = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        plant(hf)
    model = load_model(hf, tokenizer=AutoTokenizer.from_pretrained(folder), device="cpu")
    ids = torch.randint(1, 100, (8, 64), generator=torch.Generator().manual_seed(0))
    document = (torch.arange(512) // 16).view(8, 64)
    text = Tokens(ids, document, torch.zeros(8, 64, dtype=torch.bool), {})
    return neuron_clusters(model, text, layers=[1], candidates=[GROUPS])


def test_planted_groups_are_found_in_every_view_by_every_algorithm(family):
    assert {(row.view, row.algorithm) for row in family.rows} == {(v, a) for v in VIEWS for a in ALGORITHMS}
    for row in family.rows:
        assert row.chosen and row.clusters == GROUPS and row.largest == pytest.approx(1 / GROUPS)
        assert {other["view"] for other in row.agreement} == {*VIEWS} - {row.view}
        assert all(other["ami"] == pytest.approx(1) and other["permuted"] < 0.4 for other in row.agreement)
        seeded = row.algorithm in ("spherical", "balanced")
        assert row.stability == pytest.approx(1) if seeded else row.stability is None
        assert row.silhouette > max(0.5, row.silhouette_null + 0.2)
        assert row.coherence > max(0.9, row.coherence_null + 0.2, row.coherence_permuted + 0.2)
        assert row.signed == (row.view in ("gates", "co-activation"))
        if row.view == "co-activation":
            assert row.replication == pytest.approx(1) and row.replication_permuted < 0.4
        else:
            assert row.replication is None
    assert all(row.stability_null < 0.5 for row in family.view("keys") + family.view("gates"))


def test_the_table_round_trips_and_is_drawn(family, tmp_path):
    again = NeuronClusters.load(family.save(tmp_path / "t.parquet"))
    assert list(again.rows) == list(family.rows) and again.findings() == family.findings()
    assert "AMI 1.00" in again.findings()[0] and again.verdicts() == []
    titles = [axes.get_title() for axes in again.plot().axes]
    assert titles[:2] == ["Stable over seeds", "Do clusters come back, and agree?"]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_gaussian_neurons_have_no_groups_that_last_agree_or_stand_apart(algorithm):
    judge = Judge(range(2), 20, 0)
    views = (of_weights(gaussian(600, 400, seed=seed), True) for seed in (1, 2))
    one, other = (judge.quality(view, 16, algorithm) for view in views)
    assert abs(one.stability) < 0.05 if algorithm in ("spherical", "balanced") else one.stability is None
    assert abs(adjusted_rand_score(one.labels.numpy(), other.labels.numpy())) < 0.05
    assert abs(agreement(one.labels, other.labels, 20, torch.Generator()).ami) < 0.05
    assert abs(one.silhouette) < 0.05


def test_independent_neurons_do_not_come_back():
    view = co_active(torch.eye(200), torch.eye(200), (3000, 3000)).null(torch.Generator().manual_seed(0))
    judge = Judge(range(3), 20, 0)
    found, again = (judge.cluster(rows, True, 8, "spherical") for rows in (view.rows, view.again))
    assert abs(agreement(found[0].labels, again[0].labels, 20, torch.Generator()).ami) < 0.05
    assert abs(silhouette(view.scored, found[0].labels)) < 0.05
    assert abs(coherence(view.scored, found[0].labels)) < 0.01


@settings(max_examples=15, deadline=None)
@given(st.integers(3, 40), st.integers(2, 5), st.integers(2, 5))
def test_agreement_is_sklearns(n, a, b):
    generator = torch.Generator().manual_seed(n)
    one, other = (torch.randint(k, (n,), generator=generator) for k in (a, b))
    found = agreement(one, other, 7, generator)
    assert found.ami == pytest.approx(adjusted_mutual_info_score(one.numpy(), other.numpy()), abs=1e-9)
    assert found.permuted >= -1
    assert adjusted_rand(one, other) == pytest.approx(adjusted_rand_score(one.numpy(), other.numpy()))


def test_a_pairing_at_random_agrees_by_chance_and_the_best_of_many_a_little_more():
    labels = torch.arange(300) % 10
    shuffled = labels[torch.randperm(300, generator=torch.Generator().manual_seed(0))]
    found = agreement(labels, shuffled, 50, torch.Generator().manual_seed(1))
    assert abs(found.ami) < 0.05 and abs(found.ami) < found.permuted < 0.1
    assert agreement(labels, labels, 5, torch.Generator()).ami == pytest.approx(1)


def test_silhouette_and_coherence_are_their_slow_loops():
    cosine, labels = similarity(gaussian(30, 4)), torch.arange(30) % 4
    labels[7] = 4  # alone: its silhouette is 0
    scores, together = [], []
    for i in range(30):
        mean = {k: [] for k in range(5)}
        for j in range(30):
            if i != j:
                mean[int(labels[j])].append(1 - float(cosine[i, j]))
        own = mean.pop(int(labels[i]))
        together += [1 - x for x in own]
        nearest = min(sum(other) / len(other) for other in mean.values() if other)
        inner = sum(own) / len(own) if own else nearest
        scores.append((nearest - inner) / max(nearest, inner) if own else 0.0)
    assert silhouette(cosine, labels) == pytest.approx(sum(scores) / 30, abs=1e-5)
    assert coherence(cosine, labels) == pytest.approx(sum(together) / len(together), abs=1e-5)
    assert math.isnan(silhouette(cosine, torch.zeros(30, dtype=torch.int64)))
    assert math.isnan(coherence(cosine, torch.arange(30)))


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "olmo2"])
def test_values_in_the_vocabulary_have_the_cosines_of_their_logits(architecture, model_of):
    model = model_of(architecture)
    ffn, root = ffns(model)[1], vocabulary_root(model)
    gain = output_gain(model, 1)
    assert (gain is not None) == (architecture == "olmo2")
    logits = (ffn.values if gain is None else ffn.values * gain) @ unembedding(model).T
    view = views_of(ffn, None, vocabulary_metric(model, 1, root), {})["vocabulary"]
    assert torch.allclose(view.scored, similarity(logits, not ffn.gated), atol=1e-3)


@pytest.mark.parametrize("co_activity", ["magnitudes", "counts"])
@pytest.mark.parametrize("chosen", [None, torch.tensor([3, 4, 40])])
def test_co_activation_is_the_correlation_of_each_half_of_the_documents(co_activity, chosen, llama, tokens):
    text = tokens(llama)
    (ffn,) = [ffn for ffn in ffns(llama) if ffn.layer == 2]
    neurons = 48 if chosen is None else 3
    found = collect(llama, text, probes([ffn], co_activity=co_activity, neurons=neurons))
    if chosen is not None:
        chosen = drawn(ffn, neurons, 0)
    view = views_of(ffn, chosen, None, found, co_activity)["co-activation"]
    seen = [batch[2] for batch in capture(llama, text, ["post"], layers=[2])]
    hidden = torch.cat([one.sites["post"][one.kept] for one in seen])
    hidden = (hidden if chosen is None else hidden[:, chosen]).abs().double()
    half = text.document.flatten()[torch.cat([one.at[one.kept] for one in seen])] % 2
    assert view.tokens == (int((half == 0).sum()), int((half == 1).sum()))
    if co_activity == "counts":
        hidden = (hidden > found[half_name(2, 0)].tensors()["threshold"]).double()
    expected = [hidden[half == side].T.corrcoef().nan_to_num().float().fill_diagonal_(1) for side in (0, 1)]
    assert torch.allclose(view.scored, expected[1], atol=1e-4)
    for rows, correlation in zip((view.rows, view.again), expected, strict=True):
        assert torch.allclose(similarity(rows), correlation, atol=3e-3)  # a ridge keeps it regular


def test_layers_beyond_the_budget_go_without_co_activation(llama, tokens):
    layers, one = ffns(llama), co_activation_bytes(48)
    assert one == pytest.approx(2 * 8 * triangle.size(48), rel=0.2)
    assert [f.layer for f in within(layers, 48, 3 * one)] == [0, 1, 2]
    assert [f.layer for f in within(layers, 48, 3 * one - 1)] == [0, 2]
    assert [f.layer for f in within(layers, 48, one)] == [1]
    with pytest.raises(InputError, match=f"give at least {one:,}"):
        within(layers, 48, one - 1)
    few = {"candidates": [3], "algorithms": [], "seeds": 2, "permutations": 2}
    found = neuron_clusters(llama, tokens(llama), budget=one, **few)
    assert [row.layer for row in found.view("co-activation")] == [1] and len(found.view("keys")) == 3
    assert any("at 1 of 3 layers" in sentence for sentence in found.findings())
    found = neuron_clusters(llama, tokens(llama), layers=[0], neurons=20, co_activity="counts", **few)
    assert {row.neurons for row in found.rows} == {20} and found.settings["drawn"]
    assert "20 neurons drawn at random" in found.findings()[-1]


def test_items_are_spread_from_end_to_end():
    assert [evenly(range(9), n) for n in (1, 2, 3)] == [[4], [0, 8], [0, 4, 8]]
    assert evenly(range(2), 5) == [0, 1]


def test_a_shared_pass_gives_the_same_and_bert_has_no_vocabulary(model_of, tokens):
    model = model_of("bert")
    text, few = tokens(model), {"candidates": [4], "algorithms": ["balanced"], "seeds": 2, "permutations": 2}
    found = neuron_clusters(model, text, layers=[1], **few)
    shared = neuron_clusters(
        model, text, layers=[1], statistics=collect(model, text, probes(ffns(model)[1:2])), **few
    )
    assert [*found.rows] == [*shared.rows]
    assert {row.view for row in found.rows} == {"keys", "values", "co-activation"}
    assert all(row.signed for row in found.rows)
    sizes = {row.largest for row in found.rows if row.algorithm == "balanced"}
    assert sizes == {0.25}


def test_the_number_of_clusters_is_the_one_most_stable_beyond_noise(family):
    row = family.view("keys")[0]
    trials = [
        replace(row, layer=layer, clusters=k, stability=stability, stability_null=null)
        for k, stability, null in ((2, 0.9, 0.8), (8, 0.5, 0.1), (32, 0.3, 0.0))
        for layer in (0, 1, 2)
    ]
    assert choose(trials) == {"keys": 8}
    assert choose([replace(t, stability=0.0) if t.clusters == 8 and t.layer else t for t in trials]) == {
        "keys": 32
    }


@pytest.mark.parametrize(
    ("back", "alike", "verdict"),
    [
        (0.6, 0.6, "supported"),
        (0.6, 0.1, "mixed"),
        (0.6, 0.0, "mixed"),
        (0.1, 0.1, "mixed"),
        (0.1, 0.0, "not supported"),
        (0.0, 0.1, "not supported"),
    ],
)
def test_the_verdict_follows_its_rule(family, back, alike, verdict):
    rows = []
    for layer in range(8):
        for row in family.view("gates") + family.view("co-activation"):
            pair = {"view": "values", "ami": alike, "permuted": 0.02}
            halves = {"replication": back, "replication_permuted": 0.02} if row.view == "co-activation" else {}
            rows.append(replace(row, layer=layer, agreement=[pair], **halves))
    (found,) = NeuronClusters(rows, family.settings).verdicts()
    assert (found.claim, found.verdict) == (4, verdict)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"algorithms": ["means"]}, 'algorithm "means" is unknown'),
        ({"candidates": [1]}, "give numbers of clusters and seeds from 2"),
        ({"co_activity": "phase"}, 'co-activity "phase" is unknown'),
        ({"layers": [9]}, "layer 9"),
    ],
)
def test_what_is_not_there_is_said(llama, tokens, wrong, said):
    with pytest.raises(InputError, match=said):
        neuron_clusters(llama, tokens(llama), **wrong)

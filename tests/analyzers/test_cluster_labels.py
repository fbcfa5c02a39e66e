from math import comb

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ffnprobe import cluster_labels
from ffnprobe.analyzers.cluster_labels import ClusterLabels, enrichment
from ffnprobe.analyzers.memories import word
from ffnprobe.corpus import Corpus, Document
from ffnprobe.errors import InputError, ModelRefused
from ffnprobe.models import ffns, tokenizer_of
from ffnprobe.stream import capture
from ffnprobe.unembedding import unembedding

FEW = {"clusters": 6, "seeds": 2, "permutations": 3}


@settings(max_examples=25, deadline=None)
@given(st.integers(4, 30), st.integers(2, 4), st.integers(0, 5))
def test_the_label_is_that_of_the_least_probability_of_a_slow_loop(n, k, things):
    generator = torch.Generator().manual_seed(n)
    having = torch.rand(n, things, generator=generator) < 0.4
    labels = torch.cat([torch.arange(k), torch.randint(k, (n - k,), generator=generator)])
    found = enrichment(having, labels)
    for cluster in range(k):
        size, each = int((labels == cluster).sum()), []
        for thing in range(things):
            overall = int(having[:, thing].sum())
            inside = int(having[labels == cluster, thing].sum())
            more = range(inside, min(size, overall) + 1)
            p = sum(comb(overall, i) * comb(n - overall, size - i) for i in more) / comb(n, size)
            each.append(p if inside >= 2 else 1.0)
        assert float(found.p[cluster]) == pytest.approx(min(each, default=1.0))
    assert found.tests == k * things


def test_what_all_neurons_of_one_cluster_and_no_other_have_names_it_and_chance_does_not():
    labels = torch.arange(60) % 6
    having = torch.zeros(60, 40, dtype=torch.bool)
    having[labels == 2, 7] = True
    having |= torch.rand(60, 40, generator=torch.Generator().manual_seed(0)) < 0.1
    found = enrichment(having, labels)
    assert found.thing[2] == 7 and found.inside[2] == 10
    assert float(found.p[2]) * found.tests < 1e-3 and (found.p[[0, 1, 3, 4, 5]] * found.tests > 0.05).all()


@pytest.fixture
def corpus(tokens, llama) -> Corpus:
    """A label for each document of `tokens`, but for the last one."""
    n = tokens(llama).n_documents
    documents = (Document("", None if i == n - 1 else "ab"[i // 8 % 2], str(i)) for i in range(n))
    return Corpus("planted", tuple(documents))


def test_neurons_planted_in_families_are_named_by_what_they_share(planted, llama, tokens, corpus, tmp_path):
    ids = unembedding(llama).norm(dim=1).topk(6).indices  # no other token has a larger logit along these

    def plant(hf):
        mlp, generator = hf.model.layers[2].mlp, torch.Generator().manual_seed(1)
        for part in (mlp.gate_proj, mlp.up_proj):
            centres = torch.linalg.qr(torch.randn(16, 6, generator=generator)).Q.T
            part.weight.copy_(centres.repeat(8, 1) + 0.01 * torch.randn(48, 16, generator=generator))
        directions = torch.nn.functional.normalize(unembedding(llama)[ids], dim=1)
        mlp.down_proj.weight.copy_(directions.repeat(8, 1).T)

    model = planted("llama", plant)
    text = tokens(model)
    found = cluster_labels(model, text, corpus, layers=[2], triggers=3, readings=1, **FEW)
    assert found.settings["topics"] == ["a", "b"]
    assert {row.kind for row in found.rows} == {"trigger", "value", "document"}
    words = {word(tokenizer_of(model), int(i)) for i in ids}
    named = [row for row in found.of("gates", "value") if row.named]
    # read in the sign in which its neuron is strongest: half of the families may write the opposite
    assert len(named) >= 4 and {row.size for row in named} == {8} and {row.label for row in named} & words
    assert all(2 <= row.inside <= row.overall and row.neurons == 48 for row in named)
    assert sum(row.named for row in found.of("co-activation", "trigger")) == 6
    assert all(row.p_corrected == min(1, row.p * row.tests) for row in found.rows)
    assert all(row.named_random < 0.2 for row in found.rows)
    again = ClusterLabels.load(found.save(tmp_path / "t.parquet"))
    assert list(again.rows) == list(found.rows)
    assert "trigger tokens" in again.findings()[0] and len(again.plot().axes) == 3

    seen = [batch[2] for batch in capture(model, text, ["post"], layers=[2])]
    hidden = torch.cat([one.sites["post"][one.kept] for one in seen])
    at = torch.cat([one.at[one.kept] for one in seen])
    hidden, at = (part[text.document.flatten()[at] % 2 == 1] for part in (hidden, at))
    top = at[hidden.abs().topk(3, dim=0).indices.T]
    triggers = [{word(tokenizer_of(model), i) for i in text.ids.flatten()[row].tolist()} for row in top]
    sign = hidden.gather(0, hidden.abs().argmax(dim=0)[None])[0].sign()
    writes = ((ffns(model)[2].values * sign[:, None]) @ unembedding(model).T).argmax(dim=1).tolist()
    topics = [[corpus.documents[i].label for i in text.document.flatten()[row].tolist()] for row in top]
    for row in found.of("keys", "trigger"):
        assert not row.label or row.overall == sum(row.label in some for some in triggers)
    for row in found.of("keys", "value"):
        assert not row.label or row.overall == sum(row.label == word(tokenizer_of(model), i) for i in writes)
    for row in found.of("keys", "document"):
        assert not row.label or row.overall == sum(2 * some.count(row.label) >= 3 for some in topics)


def test_without_a_corpus_there_are_no_topics_and_another_one_is_refused(llama, tokens, corpus):
    text = tokens(llama)
    found = cluster_labels(llama, text, layers=[0], **FEW)
    assert {row.kind for row in found.rows} == {"trigger", "value"} and len(found.plot().axes) == 2
    text.settings["corpus_sha256"] = "another"
    with pytest.raises(InputError, match="not of corpus planted: give the one"):
        cluster_labels(llama, text, corpus, layers=[0], **FEW)


def test_a_model_without_a_vocabulary_is_refused(model_of, tokens):
    model = model_of("bert")
    with pytest.raises(ModelRefused, match="cannot be read in the vocabulary"):
        cluster_labels(model, tokens(model), layers=[0], **FEW)

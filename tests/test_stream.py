import math

import pytest
import torch
from recipes import LENGTH, tokens_of

from ffnprobe.corpus import Tokens
from ffnprobe.errors import InputError
from ffnprobe.models import ffns, plain
from ffnprobe.sinks import Sinks
from ffnprobe.statistics import Count, Moments, TopActivations
from ffnprobe.stream import KINDS, Probe, capture, choose_layers, collect


@pytest.fixture(params=["gpt2", "llama", "phi3", "gpt_neox", "bloom", "mpt", "opt", "gemma2", "bert"])
def model(request, model_of):
    return model_of(request.param)


def test_every_site_obeys_the_layers_equations(model):
    tokens = tokens_of(model)
    gated = ffns(model)[0].gated
    sites = ("in", "pre", "post", "out", *(["up"] if gated else []))
    layers = {ffn.layer: ffn for ffn in ffns(model)}
    batches = list(capture(model, tokens, sites, batch=2))
    assert [batch.keys() for batch in batches] == [layers.keys()] * 3
    for batch in batches:
        for layer, seen in batch.items():
            x, h, y = (seen.sites[site] for site in ("in", "post", "out"))
            assert torch.allclose(layers[layer].pre(x), seen.sites["pre"], rtol=1e-4, atol=1e-4)
            assert torch.allclose(layers[layer].hidden(x), h, rtol=1e-4, atol=1e-4)
            assert torch.allclose(layers[layer].write(h), y, rtol=1e-4, atol=1e-4)


def test_the_stream_covers_each_token_once_and_in_order(gpt2):
    tokens = tokens_of(gpt2)
    for layer in (0, 1):
        at = torch.cat([batch[layer].at for batch in capture(gpt2, tokens, batch=2)])
        assert at.tolist() == list(range(tokens.ids.numel()))


def test_collect_sees_what_capture_shows(model):
    tokens = tokens_of(model)
    probes = {
        f"{layer}/{site}": Probe(layer, site, Moments.about) for layer in (0, 1) for site in ("in", "post", "out")
    }
    found = collect(model, tokens, probes, batch=2)
    for name, probe in probes.items():
        rows = torch.cat(
            [b[probe.layer].sites[probe.site][b[probe.layer].kept] for b in capture(model, tokens, [probe.site])]
        )
        assert found[name].n == len(rows) > 0
        assert torch.allclose(found[name].compute().mean, rows.double().mean(0), atol=1e-5)
        assert torch.allclose(
            found[name].compute().centred, torch.cov(rows.double().T, correction=0), rtol=1e-3, atol=1e-4
        )


def test_kinds_and_halves_split_the_tokens(gpt2):
    tokens = tokens_of(gpt2)
    probes = {
        f"{kind}/{half}": Probe(1, "in", Count.about, kinds=(kind,), block=(half, 2))
        for kind in KINDS
        for half in (0, 1)
    }
    probes["all"] = Probe(1, "in", Count.about, kinds=KINDS)
    found = {name: count.compute() for name, count in collect(gpt2, tokens, probes).items()}
    assert found.pop("all") == tokens.ids.numel() == sum(found.values())
    assert found["special/0"] + found["special/1"] <= int(tokens.special.sum())
    assert found["kept/0"] > 0 and found["kept/1"] > 0


def test_halves_take_every_other_document(gpt2):
    tokens = tokens_of(gpt2)
    probes = {
        f"{half}": Probe(0, "post", lambda x: TopActivations.about(x, k=80), block=(half, 2)) for half in (0, 1)
    }
    found = collect(gpt2, tokens, probes, sink_factor=math.inf)
    for half in (0, 1):
        at = found[f"{half}"].compute().at
        assert set((tokens.document.flatten()[at] % 2).flatten().tolist()) == {half}


def test_a_planted_sink_is_set_apart_by_norm(gpt2, monkeypatch):
    tokens = tokens_of(gpt2)
    block = plain(gpt2).base_model.h[1]

    def swell(module, args, kwargs):
        hidden = (args[0] if args else kwargs["hidden_states"]).clone()
        hidden[:, 3] *= 1000  # one position of each sequence
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    handle = block.register_forward_pre_hook(swell, with_kwargs=True, prepend=True)
    try:
        seen = [batch[1] for batch in capture(gpt2, tokens, layers=[1])]
        kept = [batch[1] for batch in capture(gpt2, tokens, layers=[1], sink_factor=math.inf)]
    finally:
        handle.remove()
    kind = torch.cat([batch.kind for batch in seen])
    assert (kind == KINDS.index("sink")).nonzero().flatten().tolist() == list(range(3, 5 * LENGTH, LENGTH))
    assert not any((batch.kind == KINDS.index("sink")).any() for batch in kept)


def test_layers_beyond_the_last_one_asked_for_are_not_run(gpt2):
    ran = []
    handle = plain(gpt2).base_model.h[1].register_forward_hook(lambda *_: ran.append(1))
    try:
        list(capture(gpt2, tokens_of(gpt2), layers=[0]))
    finally:
        handle.remove()
    assert not ran


def test_no_hook_is_left_behind_even_after_an_exception(gpt2):
    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in plain(gpt2).modules())

    before = hooks()
    list(capture(gpt2, tokens_of(gpt2)))
    with pytest.raises(ZeroDivisionError):
        collect(gpt2, tokens_of(gpt2), {"x": Probe(0, "in", Count.about, of=lambda x: 1 / 0)})
    assert hooks() == before


def test_what_is_not_there_is_said(gpt2):
    tokens = tokens_of(gpt2)
    with pytest.raises(InputError, match='site "mid" is unknown: choose from in, pre, up, post, out'):
        next(capture(gpt2, tokens, ["mid"]))
    with pytest.raises(InputError, match='"up" is there in gated FFNs only'):
        next(capture(gpt2, tokens, ["up"]))
    with pytest.raises(InputError, match="layer 99 is not there"):
        next(capture(gpt2, tokens, layers=[99]))
    with pytest.raises(InputError, match="no probe"):
        collect(gpt2, tokens, {})


def test_batches_of_any_size_give_the_same_sums(llama):
    tokens = tokens_of(llama)
    one, other = (collect(llama, tokens, {"h": Probe(1, "post", Moments.about)}, batch=b)["h"] for b in (1, 5))
    assert one.n == other.n
    assert torch.allclose(one.compute().centred, other.compute().centred, rtol=1e-5, atol=1e-6)


def test_what_collect_gives_can_be_merged_and_updated(gpt2):
    one, other = (
        collect(gpt2, tokens_of(gpt2, seed=s), {"h": Probe(1, "post", Moments.about)})["h"] for s in (0, 0)
    )
    n = one.n
    one.merge(other)
    assert one.n == 2 * n and other.n == n
    one.update(torch.zeros(3, 36), torch.arange(3))
    assert one.n == 2 * n + 3


def test_a_sequence_longer_than_the_model_reads_is_said(gpt2):
    tokens = tokens_of(gpt2, sequences=17)  # 272 tokens, one sequence of them
    long = Tokens(*(part.view(1, -1) for part in (tokens.ids, tokens.document, tokens.special)), {})
    with pytest.raises(InputError, match="this model reads 256; pack with length=256"):
        collect(gpt2, long, {"h": Probe(1, "post", Moments.about)})


def test_a_sink_that_is_special_counts_as_a_sink(gpt2):
    tokens = tokens_of(gpt2)
    special = Tokens(tokens.ids, tokens.document, torch.ones_like(tokens.special), {})
    kinds = [
        torch.cat([b[1].kind for b in capture(gpt2, t, layers=[1], sink_factor=1.2)]) for t in (tokens, special)
    ]
    assert torch.equal(kinds[0] == 1, kinds[1] == 1) and (kinds[1] == 1).any() and (kinds[1] == 2).any()


def test_sinks_are_above_the_factor_times_the_median(gpt2):
    tokens = tokens_of(gpt2, sequences=4)  # the pilot sees them all
    hidden = torch.cat([b[1].sites["post"] for b in capture(gpt2, tokens, layers=[1])]).norm(dim=1)
    kind = torch.cat([b[1].kind for b in capture(gpt2, tokens, layers=[1], sink_factor=1.1)])
    large = hidden > 1.1 * hidden.median()
    assert 0 < large.sum() < len(large) / 2
    assert set(kind[large].tolist()) == {1}
    assert (kind[~large] == 1).float().mean() < 0.5


def test_hidden_norms_weigh_each_gated_neuron_as_it_is_written(llama):
    (tap,), values = choose_layers(llama, [1]), ffns(llama)[1].values
    post = torch.randn(300, len(values), generator=torch.Generator().manual_seed(0))  # more rows than go at a time
    written = (post * values.norm(dim=1)).norm(dim=1)
    limit = float(written.median())
    found = Sinks(1.0, {1: math.inf}, {1: limit}).find(tap, {"residual": torch.zeros(300, 1), "post": post})
    clear = (written - limit).abs() > 1e-5
    assert torch.equal(found[clear], (written > limit)[clear])

"""A changed activation changes the loss as changed weights would, where it is meant to and nowhere else."""

import math

import pytest
import torch
import zoo
from torch.nn import functional as F

from ffnprobe.corpus import Tokens
from ffnprobe.errors import InputError, ModelRefused
from ffnprobe.intervene import SITES, Change, Losses, losses, mean_of
from ffnprobe.models import attention_output, plain, taps

CAUSAL = [name for name in zoo.SIZES if name != "bert"]


def text(sequences: int = 3, length: int = 16, document: int = 8) -> Tokens:
    n = sequences * length
    ids = torch.randint(1, 100, (n,), generator=torch.Generator().manual_seed(0))
    special = torch.arange(n) % document == 0
    ids[special] = 0
    parts = (ids, torch.arange(n) // document, special)
    return Tokens(*(part.view(sequences, length) for part in parts), {})


def loss_of(model, tokens: Tokens) -> float:
    """One slow obvious loop."""
    with torch.no_grad():
        logp = plain(model)(input_ids=tokens.ids).logits.log_softmax(-1)
    found = [
        -float(logp[s, i, tokens.ids[s, i + 1]])
        for s in range(len(tokens.ids))
        for i in range(tokens.ids.shape[1] - 1)
        if tokens.document[s, i] == tokens.document[s, i + 1] and not tokens.special[s, i + 1]
    ]
    return sum(found) / len(found)


def nothing(read):
    return torch.zeros_like(read["out"])


@pytest.mark.parametrize("architecture", CAUSAL)
def test_a_change_to_the_same_changes_nothing(model_of, architecture):
    model = model_of(architecture)
    arms = {site: [Change(2, site, lambda read, site=site: read[site])] for site in SITES}
    found = losses(model, text(), arms)
    assert found.mean() == pytest.approx(loss_of(model, text()), rel=1e-5)
    for arm in arms:
        assert found.delta(arm) == (0.0, 0.0)


@pytest.mark.parametrize("architecture", CAUSAL)
@pytest.mark.parametrize("layer", [0, 2])
def test_a_silent_sublayer_is_one_without_weights(model_of, planted, architecture, layer):
    model = model_of(architecture)
    arms = {
        "out": [Change(layer, "out", nothing)],
        "attention": [Change(layer, "attention", lambda read: 0 * read["attention"])],
    }
    found = losses(model, text(), arms, sinks=True)
    modules = {"out": taps(model)[layer].down, "attention": attention_output(model, layer)}
    names = {
        name: path for name, module in modules.items() for path, m in plain(model).named_modules() if m is module
    }
    for arm, path in names.items():

        def cut(hf, path=path):
            module = hf.get_submodule(path)
            for part in (module.weight, getattr(module, "bias", None)):
                if part is not None:
                    part.zero_()

        without = loss_of(planted(architecture, cut), text())
        assert found.mean() + found.delta(arm)[0] == pytest.approx(without, abs=2e-5)


def test_changes_of_several_layers_are_made_together(model_of):
    model = model_of("llama")
    found = losses(
        model,
        text(),
        {"both": [Change(0, "out", nothing), Change(1, "out", nothing)], "first": [Change(0, "out", nothing)]},
        sinks=True,
    )

    def silence(module, args, output):
        return 0 * output

    handles = [tap.down.register_forward_hook(silence) for tap in taps(model)[:2]]
    try:
        brute = loss_of(model, text())
    finally:
        for handle in handles:
            handle.remove()
    assert found.mean() + found.delta("both")[0] == pytest.approx(brute, abs=2e-5)
    assert found.delta("both") != found.delta("first")


def test_only_ordinary_tokens_are_changed_and_read_as_the_layer_reads_them(model_of):
    model, seen = model_of("llama"), []

    def look(read):
        seen.append({site: x.clone() for site, x in read.items()})
        return read["post"]

    tokens = text()
    losses(model, tokens, {"look": [Change(1, "post", look)]}, batch=3)
    (read,) = seen
    assert len(read["post"]) == int((~tokens.special).sum())
    tap = taps(model)[1]
    assert torch.allclose(F.silu(read["pre"]) * read["up"], read["post"], atol=1e-6)
    assert torch.equal(tap.up(read["in"]), read["up"])


def test_sinks_keep_what_they_hold(planted):
    big = 7  # a token whose embedding is a hundred times the others'

    def grow(hf):
        hf.get_input_embeddings().weight[big] *= 100

    model, tokens = planted("gpt2", grow), text()
    tokens.ids[:, 5] = big
    rows = []
    change = Change(0, "post", lambda read: rows.append(len(read["post"])) or read["post"])
    losses(model, tokens, {"a": [change]}, batch=3)
    losses(model, tokens, {"a": [change]}, batch=3, sinks=True)
    kept = ~tokens.special & (tokens.ids != big)
    assert rows == [int(kept.sum()), tokens.n]


def test_the_batch_changes_nothing(model_of):
    arms = {"mean": [Change(1, "post", mean_of(torch.ones(36), "post"))]}
    one, three = (losses(model_of("gpt2"), text(), arms, batch=batch) for batch in (1, 3))
    assert torch.allclose(one.unchanged, three.unchanged, atol=1e-6)
    assert torch.allclose(one.changed["mean"], three.changed["mean"], atol=1e-6)


def test_only_predictions_that_count_count(model_of):
    tokens = text()
    counted = tokens.document % 2 == 0
    found, every = (losses(model_of("gpt2"), tokens, {}, counted=of) for of in (counted, None))
    assert torch.equal(found.unchanged, every.unchanged[::2]) and int(every.tokens.sum()) == 6 * 7


def test_the_mean_weighs_tokens_and_its_error_is_over_documents():
    found = Losses(torch.tensor([1, 3]), torch.zeros(2).double(), {"arm": torch.tensor([1.0, 2.0]).double()})
    mean, error = found.delta("arm")
    assert mean == 1.75
    assert error == pytest.approx(math.sqrt(2 * ((0.25 * 0.75) ** 2 + (0.75 * 0.25) ** 2)))


def test_nothing_is_left_behind_also_after_an_error(model_of):
    model = model_of("gpt2")

    def break_it(read):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        losses(model, text(), {"a": [Change(2, "post", break_it)]})
    for module in plain(model).modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert "forward" not in module.__dict__


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (Change(0, "mid", nothing), 'site "mid" cannot be changed: choose from post, out, attention'),
        (Change(9, "out", nothing), "layer 9 is not there"),
    ],
)
def test_what_is_not_there_is_said(gpt2, change, said):
    with pytest.raises(InputError, match=said):
        losses(gpt2, text(), {"a": [change]})


def test_one_document_is_too_few(gpt2):
    with pytest.raises(InputError, match="got 1 documents"):
        losses(gpt2, text(1, 8), {})


def test_a_model_that_predicts_no_next_token_is_refused(model_of):
    with pytest.raises(ModelRefused, match="predicts no next token"):
        losses(model_of("bert"), text(), {})

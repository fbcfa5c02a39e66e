"""On a real pretrained model: the identities hold, and the known facts come out."""

import pytest
import torch

from ffnprobe import ffns, hidden_rank, load_corpus, load_model, memories, pack
from ffnprobe.models import check_model, describe, plain, tokenizer_of
from ffnprobe.stream import capture

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def smollm2():
    return load_model("smollm2-135m")


@pytest.fixture(scope="module")
def tokens(smollm2):
    return pack(load_corpus(), tokenizer_of(smollm2), tokens=4096)


def test_it_is_a_language_model_and_says_that_it_was_rounded(smollm2):
    tokenizer = tokenizer_of(smollm2)
    logits = plain(smollm2)(torch.tensor([tokenizer("The capital of France is").input_ids])).logits
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"
    assert "4-bit" in describe(smollm2)["note"]


def test_every_layer_passes_the_self_check(smollm2):
    checked = check_model(smollm2)
    assert checked.ok and len(checked.layers) == 30 and checked.logits < 1e-5
    assert max(row.write for row in checked.layers) < 1e-5


def test_each_output_is_the_sum_of_its_memories(smollm2, tokens):
    batch = next(capture(smollm2, tokens, ["post", "out"], batch=1))
    for ffn in ffns(smollm2):
        hidden, out = batch[ffn.layer].sites["post"].double(), batch[ffn.layer].sites["out"].double()
        error = (hidden @ ffn.values.double() - out).norm(dim=1) / out.norm(dim=1)
        assert error.max() < 1e-5


def test_masking_the_sinks_gives_the_rank_back(smollm2, tokens):
    for row in hidden_rank(smollm2, tokens, layers=[11, 28]).site("post"):
        assert row.soft_rank > 50 * row.soft_rank_unmasked
        assert 0 < row.sinks < 0.02 * tokens.n


def test_late_values_write_what_follows_their_triggers(smollm2, tokens):
    late = memories(smollm2, tokens, layers=[22]).layers()[0]
    assert late.agreement > 5 * late.shuffled > 0

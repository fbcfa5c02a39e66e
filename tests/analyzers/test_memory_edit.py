import hashlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from ffnprobe import Edit, load_corpus, load_model, memory_edit, pack
from ffnprobe.analyzers.memory_edit import ARMS, MemoryEdit
from ffnprobe.analyzers.writing import associate, document_losses, logits_of
from ffnprobe.corpus import Tokens
from ffnprobe.errors import InputError, ModelRefused
from ffnprobe.models import ffns, plain, taps, tokenizer_of

EDIT = Edit("The cat sat", " the", ("A cat sat",))


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def digest(model) -> str:
    """Of every weight that the caller can see, of the bridge and of the model behind it."""
    states = [*model.state_dict().items(), *plain(model).state_dict().items()]
    return hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for _, t in states)).hexdigest()


@given(st.integers(2, 9), st.integers(1, 9))
def test_the_key_is_answered_with_the_value_and_keys_orthogonal_to_it_as_before(n, d):
    values, key, value = gaussian(n, d, seed=n), gaussian(n, seed=1), gaussian(d, seed=2)
    hidden = gaussian(3 * n, n, seed=3) * torch.logspace(0, 1, n)  # far from isotropic
    C = hidden.T @ hidden / len(hidden)
    edited = associate(values, key, value, C)
    assert torch.allclose(key @ edited, value, rtol=0, atol=1e-10)
    direction = torch.linalg.inv(C) @ key
    others = gaussian(5, n, seed=4)
    others = others - torch.outer(others @ direction, direction) / (direction @ direction)
    assert torch.allclose(others @ edited, others @ values, rtol=0, atol=1e-10)
    assert torch.linalg.matrix_rank(edited - values, atol=1e-8) <= 1


def test_no_other_matrix_that_answers_so_changes_less():
    values, key, value, hidden = gaussian(6, 4), gaussian(6, seed=1), gaussian(4, seed=2), gaussian(50, 6, seed=3)
    C = hidden.T @ hidden / 50
    best = associate(values, key, value, C) - values
    for seed in range(20):
        sideways = gaussian(6, 4, seed=10 + seed)
        sideways = sideways - torch.outer(key, key @ sideways) / (key @ key)  # the key is answered as by `best`
        assert (hidden @ (best + 0.1 * sideways)).square().sum() > (hidden @ best).square().sum()


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "phi3"])
def test_the_edited_model_is_the_model_with_that_matrix(architecture, model_of, planted):
    model = model_of(architecture)
    tap, values = taps(model)[1], gaussian(*ffns(model)[1].values.shape).float()

    def put(hf):
        down = [m for name, m in hf.named_modules() if name.endswith(("mlp.c_proj", "mlp.down_proj"))][1]
        down.weight.copy_(values if architecture == "gpt2" else values.T)

    ids = torch.arange(1, 19).view(2, 9)
    with torch.no_grad():
        wanted, own = plain(planted(architecture, put))(ids).logits, plain(model)(ids).logits
    assert torch.allclose(logits_of(model, tap, values)(ids), wanted, atol=1e-5)
    assert torch.equal(logits_of(model)(ids), own) and not torch.allclose(wanted, own, atol=0.1)


def test_losses_are_a_slow_loop_over_documents(gpt2, tokens):
    text = tokens(gpt2, sequences=3, document=20)  # some go over the end of a sequence
    text.special[:, 30] = True  # in the middle of a document
    counted = text.document != 2
    found = document_losses(logits_of(gpt2), text, counted)
    logits, slow = logits_of(gpt2)(text.ids), {}
    for s, i in torch.cartesian_prod(torch.arange(3), torch.arange(1, 64)).tolist():
        document = int(text.document[s, i])
        if document == text.document[s, i - 1] and not text.special[s, i] and document != 2:
            slow.setdefault(document, []).append(F.cross_entropy(logits[s, i - 1], text.ids[s, i]))
    assert found.tolist() == pytest.approx([float(torch.stack(slow[d]).mean()) for d in sorted(slow)], rel=1e-5)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_the_callers_model_is_untouched_and_the_table_is_whole(architecture, model_of, tokens, tmp_path):
    model = model_of(architecture)
    before, hooks = digest(model), [len(m._forward_hooks) for m in plain(model).modules()]
    found = memory_edit(model, tokens(model), [EDIT], steps=20)
    assert digest(model) == before and [len(m._forward_hooks) for m in plain(model).modules()] == hooks
    assert [(r.layer, r.arm, r.paraphrase) for r in found.rows] == [
        (layer, arm, paraphrase) for layer in range(3) for arm in ARMS for paraphrase in (False, True)
    ]
    assert {r.documents for r in found.rows} == {16}  # half of 8 sequences of 64 tokens, 16 a document
    assert MemoryEdit.load(found.save(tmp_path / "t.parquet")).rows == tuple(found.rows)
    assert len(found.plot().axes) == 3


def test_the_scale_and_sign_of_a_gated_neuron_change_nothing(planted, model_of, tokens):
    def rescale(hf):
        a = gaussian(48).exp().float() * torch.tensor([1.0, -1.0]).repeat(24)
        for layer in hf.model.layers:
            layer.mlp.up_proj.weight.mul_(a[:, None])
            layer.mlp.down_proj.weight.div_(a)

    one, other = model_of("llama"), planted("llama", rescale)
    tables = [memory_edit(model, tokens(one), [EDIT], layers=[1], steps=20).rows for model in (one, other)]
    for row, same in zip(*tables, strict=True):
        for name in ("probability_before", "probability", "change", "loss_change", "loss_change_se"):
            assert getattr(row, name) == pytest.approx(getattr(same, name), rel=1e-5, abs=1e-5)
        assert (row.rank_before, row.rank) == (same.rank_before, same.rank)


@pytest.fixture(scope="module")
def trained():
    model = load_model("tiny-x4", device="cpu")
    corpus = load_corpus(Path(__file__).parents[2] / "data/tiny/heldout.jsonl")
    text = pack(corpus, tokenizer_of(model), tokens=4096)
    edit = Edit("And God said, Let there be", " money", ("And the Lord God said, Let there be",))
    return model, text, memory_edit(model, text, [edit], layers=[1])


def test_in_a_trained_model_the_edit_is_recalled_and_a_random_key_is_not(trained):
    of = {(row.arm, row.paraphrase): row for row in trained[2].rows}
    edit, paraphrase, random = of["edit", False], of["edit", True], of["random key", False]
    assert edit.rank_before > 100 and edit.rank == 1 and edit.probability > 0.8
    assert paraphrase.rank == 1 and paraphrase.probability > 100 * paraphrase.probability_before
    assert random.rank > 100 and random.probability < 0.01
    assert edit.loss_change < of["identity C", False].loss_change  # what C is for
    assert "Layer 1, edit" in trained[2].findings()[0]


def test_what_was_written_is_where_the_key_is(trained):
    model, text, _ = trained
    last, first = (
        memory_edit(model, text, [Edit("Let there be", " money", position=at)], layers=[3], steps=30).rows[0]
        for at in (-1, 0)
    )
    assert last.rank == 1 and first.rank == first.rank_before > 100  # there only the last token predicts


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"edits": []}, "got 0 edits"),
        ({"ridge": 0.0}, "ridge 0.0: give"),
        ({"layers": [9]}, "layer 9 is not there"),
        ({"edits": [Edit("", " the")]}, "prompt '' has 0 tokens: give 1 to 256"),
        ({"edits": [Edit("The cat", " the", ("cat " * 300,))]}, "give 1 to 256"),
        ({"edits": [Edit("The cat", " the railway")]}, "is 5 tokens of this model: give one"),
        ({"edits": [Edit("The cat", " the", position=9)]}, "position 9 is not in prompt 'The cat'"),
    ],
)
def test_bad_input_is_said(gpt2, tokens, wrong, said):
    with pytest.raises(InputError, match=said):
        memory_edit(gpt2, tokens(gpt2), **{"edits": [EDIT], **wrong})


def test_too_little_text_is_said(gpt2, tokens):
    text = tokens(gpt2, sequences=2)
    one = Tokens(text.ids, torch.zeros_like(text.document), text.special, {})
    with pytest.raises(InputError, match="1 documents in 2 sequences: give more text"):
        memory_edit(gpt2, one, [EDIT])


def test_an_encoder_is_refused(model_of, tokens):
    model = model_of("bert")
    with pytest.raises(ModelRefused, match="predicts no next token"):
        memory_edit(model, tokens(model), [EDIT])

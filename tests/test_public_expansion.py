"""The public arms, on saved folders: what they would measure on the hub's."""

import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
import zoo
from checkpoints import Checkpoints
from t5_encoder import documents_of, encoder_expansion, find_sinks, load_encoder
from tokenizers.processors import TemplateProcessing
from transformers import CONFIG_MAPPING, BertConfig, BertModel, T5Config, T5ForConditionalGeneration

from ffnprobe import spectrum as sp
from ffnprobe.analyzers.expansion import Expansion
from ffnprobe.analyzers.expansion_controls import MATCHED, RANDOM, TRAINED
from ffnprobe.corpus import Corpus, load_corpus
from ffnprobe.errors import InputError, ModelRefused

pytestmark = pytest.mark.slow  # a quarter of a minute

SCRIPT = Path(__file__).parents[1] / "analyses" / "public_expansion.py"
WIDTHS = (16, 24, 32, 48, 64, 80)  # six: the rules are applied
DOCUMENTS = 24


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    """Documents of unequal length, so that most rows have padding."""
    whole = load_corpus()
    parts = tuple(replace(d, text=d.text[: 20 + 9 * (i % 12)]) for i, d in enumerate(whole.documents))
    return Corpus("unequal", parts)


def save_t5(folder: Path, d_ff: int, seed: int = 0, **changes) -> Path:
    """A whole T5, decoder included, as the hub has it. Its weights are far from their small defaults."""
    tokenizer = zoo.tokenizer()
    tokenizer.pad_token = end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"$A {end}", special_tokens=[(end, 0)])
    sizes = {"vocab_size": len(tokenizer), "d_model": 32, "d_kv": 8, "num_heads": 4, "num_layers": 2}
    config = T5Config(**{**sizes, "d_ff": d_ff, "pad_token_id": 0, "eos_token_id": 0, **changes})
    model = T5ForConditionalGeneration(config)
    with torch.no_grad():
        random = torch.Generator().manual_seed(seed)
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=random)
            weight.copy_(noise / weight.shape[-1] ** 0.5 if weight.ndim > 1 else 1 + 0.3 * noise)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoders(tmp_path_factory) -> list[Path]:
    root = tmp_path_factory.mktemp("t5")
    return [save_t5(root / f"ff{width}", width) for width in WIDTHS]


@pytest.fixture(scope="module")
def measured(encoders, corpus) -> Expansion:
    return encoder_expansion(encoders, corpus, documents=DOCUMENTS, say=lambda line: None)


@pytest.fixture
def run(monkeypatch, capsys):
    """What the script prints, what it says of an error, and its exit code."""

    def call(*arguments: str) -> tuple[str, str, int]:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
        code = 0
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as stop:
            code = int(stop.code or 0)
        return *capsys.readouterr(), code

    return call


def captured(folder: Path, corpus: Corpus, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x and h of a layer, one document after the other without padding, and which tokens are ordinary."""
    encoder = load_encoder(folder)
    documents = documents_of(corpus, encoder.tokenizer, DOCUMENTS, seed=0)
    dense = encoder.network.encoder.block[layer].layer[-1].DenseReluDense
    x, h = [], []
    dense.wi.register_forward_pre_hook(lambda module, args: x.append(args[0][0]))
    dense.wo.register_forward_pre_hook(lambda module, args: h.append(args[0][0]))
    with torch.no_grad():
        for ids, real in zip(documents.ids, documents.real, strict=True):
            encoder.network(input_ids=ids[real][None])
    ordinary = torch.cat([o[r] for o, r in zip(documents.ordinary, documents.real, strict=True)])
    return torch.cat(x), torch.cat(h).double(), ordinary


def soft_rank(rows: torch.Tensor) -> float:
    return sp.soft_rank(sp.eigenvalues(torch.cov(rows.T, correction=0)))


@pytest.mark.parametrize("layer", [0, 1])
def test_the_ranks_are_those_of_the_captured_activations(measured, encoders, corpus, layer):
    for folder, width in zip(encoders, WIDTHS, strict=True):
        x, everything, ordinary = captured(folder, corpus, layer)
        h = everything[ordinary]
        row, random, matched = (
            next(r for r in measured.rows if (r.state, r.d_mlp, r.layer) == (state, width, layer))
            for state in (TRAINED, RANDOM, MATCHED)
        )
        assert (row.model, row.expansion, row.arm) == (folder.name, width / 32, "T5 encoder, relu")
        assert (row.tokens, row.sinks, row.loss) == (len(h), 0, None)
        assert row.special == (~ordinary).sum() > 0
        assert row.soft_rank == pytest.approx(soft_rank(h), rel=1e-4)
        assert row.soft_rank_unmasked == pytest.approx(soft_rank(everything), rel=1e-4)
        assert row.participation_ratio == pytest.approx(
            sp.participation_ratio(sp.eigenvalues(torch.cov(h.T, correction=0))), rel=1e-4
        )
        features = load_encoder(folder).ffns[layer].randomised(0).hidden(x[ordinary]).double()
        assert random.soft_rank == pytest.approx(soft_rank(features), rel=1e-4)
        assert matched.soft_rank == pytest.approx(
            soft_rank(features / features.std(0, correction=0) * h.std(0, correction=0)), rel=1e-4
        )
        assert len(row.soft_rank_halves) == 14


def test_what_the_layer_computes_is_what_the_encoder_computes(encoders, corpus):
    x, h, _ = captured(encoders[0], corpus, 1)
    torch.testing.assert_close(load_encoder(encoders[0]).ffns[1].hidden(x).double(), h)


def test_a_token_of_a_large_norm_is_set_apart(tmp_path, corpus):
    """One token's embedding is made huge: the token is a sink wherever it stands, and no other is."""
    folder = save_t5(tmp_path / "sink", 48)
    encoder = load_encoder(folder)
    documents = documents_of(corpus, encoder.tokenizer, DOCUMENTS, seed=0)
    token = int(documents.ids[documents.ordinary].mode().values)
    with torch.no_grad():
        encoder.network.get_input_embeddings().weight[token] *= 1e4
    found = find_sinks(encoder, 0, documents, 10.0)
    assert torch.equal(found, (documents.ids == token) & documents.ordinary) and found.any()


def test_documents_are_cut_at_64_tokens_and_each_is_in_one_block(encoders, corpus):
    documents = documents_of(corpus, load_encoder(encoders[0]).tokenizer, DOCUMENTS, seed=0)
    lengths = documents.real.sum(1)
    assert documents.ids.shape == (DOCUMENTS, 64) and lengths.min() < 30 and lengths.max() == 64
    assert torch.cat(documents.blocks).sort().values.tolist() == list(range(DOCUMENTS))


def test_the_t5_arm_saves_ranks_and_fits_without_a_loss(encoders, run, tmp_path, sketched):
    said, _, code = run(
        "t5-efficient", *map(str, encoders), "--documents", str(DOCUMENTS), "--layers", "1", "--out", str(tmp_path)
    )
    assert code == 0 and "5 times the width multiplies the soft rank" in said
    assert "by the hard rank, width is under-used at d_mlp" in said and "supported:" not in said
    ranks = Expansion.load(tmp_path / "expansion-t5-efficient.parquet")
    assert {row.layer for row in ranks.rows} == {1} and "The loss" not in said
    fits = pd.read_parquet(tmp_path / "expansion_fits-t5-efficient.parquet")
    assert set(fits.widths) == {6} and "soft_rank" in set(fits.measure) and "loss" not in set(fits.measure)
    assert len(list(tmp_path.glob("*.png"))) == 2


def test_the_pythia_arm_goes_through_the_steps_and_knows_equal_weights(run, tmp_path, sketched):
    zoo.save("gpt_neox", tmp_path / "step1000")
    zoo.save("gpt_neox", tmp_path / "step0", seed=5)
    shutil.copytree(tmp_path / "step1000", tmp_path / "step64000")
    folders = [str(tmp_path / f"step{n}") for n in (64000, 0, 1000)]
    said, _, code = run("pythia", *folders, "--documents", "64", "--out", str(tmp_path / "out"))
    assert code == 0 and "From step 0 to step 64000 the soft rank" in said
    assert "Steps 1000, 64000 are the same weights." in said
    table = Checkpoints.load(tmp_path / "out" / "checkpoints-pythia.parquet")
    assert list(table.through("soft_rank")) == [0, 1000, 64000]
    assert table.settings["model"] == "step0 to step64000"
    assert table.through("loss")[0] != table.through("loss")[1000]


def test_openelm_is_refused_as_long_as_it_needs_code_from_the_hub(run):
    assert "openelm" not in CONFIG_MAPPING  # the day it is there, the arm can be written
    _, error, code = run("openelm")
    assert code == 3 and error.startswith(
        "OpenELM needs code from the hub, which ffnprobe never runs: transformers"
    )
    assert error.count("\n") == 1


@pytest.mark.parametrize("arm", ["pythia", "t5-efficient"])
def test_without_the_hub_one_line_says_that_it_is_needed(arm, run, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    _, error, code = run(arm)
    assert code == 4 and error.count("\n") == 1
    assert error.startswith(
        f"{arm} needs the Hugging Face hub, or folders saved from it: the hub cannot be reached"
    )


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (("pythia", "a/b@main"), 2, "a/b@main names no step"),
        (("pythia", "a/b@step1", "--layers", "1"), 2, "--layers is for t5-efficient"),
        (("t5-efficient", "no/such/folder"), 2, "no such folder"),
    ],
)
def test_bad_input_is_one_line(arguments, code, reason, run):
    _, error, got = run(*arguments)
    assert got == code and reason in error and error.count("\n") == 1


def test_pickled_weights_are_never_read(encoders, run, tmp_path):
    folder = Path(shutil.copytree(encoders[0], tmp_path / "pickled"))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    _, error, code = run("t5-efficient", str(folder))
    assert code == 2 and "only pytorch_model.bin, which is never unpickled" in error


def test_what_is_no_family_of_plain_encoders_is_refused(encoders, corpus, tmp_path):
    with pytest.raises(ModelRefused, match="own is gated: give a T5 with plain layers"):
        load_encoder(save_t5(tmp_path / "own", 24, feed_forward_proj="gated-gelu"))
    BertModel(
        BertConfig(vocab_size=99, hidden_size=12, num_attention_heads=2, num_hidden_layers=1)
    ).save_pretrained(tmp_path / "bert")
    with pytest.raises(ModelRefused, match="bert is a bert"):
        load_encoder(tmp_path / "bert")
    deeper = save_t5(tmp_path / "deeper", 24, num_layers=3)
    with pytest.raises(InputError, match="ff24 and deeper differ in depth or d_model"):
        encoder_expansion([encoders[1], deeper], corpus, documents=16, layers=[0], say=lambda line: None)
    with pytest.raises(InputError, match="layer 2 is not there: ff24 has 2"):
        encoder_expansion(encoders[1:], corpus, layers=[2])
    with pytest.raises(InputError, match="half-samples need 16"):
        encoder_expansion(encoders, corpus, documents=15)


@pytest.mark.hub
def test_the_hub_has_what_the_t5_arm_asks_for(run, tmp_path):
    models = [f"google/t5-efficient-tiny{width}@refs/pr/1" for width in ("", "-ff3000")]
    said, error, code = run("t5-efficient", *models, "--documents", "64", "--layers", "0", "--out", str(tmp_path))
    if code == 4:
        pytest.skip(error.strip())
    assert code == 0, error
    assert "multiplies the soft rank" in said

import json
import math
import shutil
from itertools import combinations

import pytest
import torch

from ffnprobe import spectrum as sp
from ffnprobe.analyzers.expansion import Expansion, expansion, null_of
from ffnprobe.analyzers.expansion_controls import (
    BLOCKS,
    MATCHED,
    RANDOM,
    STATES,
    STEP_0,
    SUBSET,
    TRAINED,
    _half_samples,
    next_token_loss,
)
from ffnprobe.corpus import Corpus, load_corpus, pack
from ffnprobe.errors import InputError
from ffnprobe.family import MEMBERS, digest
from ffnprobe.models import ffns, load_model, plain, tokenizer_of
from ffnprobe.shipped import shipped
from ffnprobe.statistics import Moments
from ffnprobe.stream import capture

pytestmark = pytest.mark.slow  # a quarter of a minute

NAMES = ("tiny-x0.5", "tiny-x2", "tiny-swiglu-x1")
TOKENS = 2048


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return load_corpus(shipped("tiny/heldout.jsonl", "held-out text", ""))


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """Three members as they were before training, sharpened so that ranks and losses differ."""
    root = tmp_path_factory.mktemp("family")
    for name in NAMES:
        hf = MEMBERS[name].at_step_0(seed=1)
        start = digest(hf.state_dict())
        with torch.no_grad():
            for parameter in hf.parameters():
                parameter.mul_(1.5)
        hf.save_pretrained(root / name)
        shutil.copytree(shipped("tiny/tokenizer", "the tokenizer", ""), root / name, dirs_exist_ok=True)
        training = {"member": name, "seed": 1, "step_0_sha256": start}
        (root / name / "training.json").write_text(json.dumps(training))
    return root


@pytest.fixture(scope="module")
def measured(family, corpus) -> Expansion:
    return expansion([family / name for name in NAMES], corpus, tokens=TOKENS)


def rows_of(measured: Expansion, state: str, model: str, layer: int):
    return [r for r in measured.rows if (r.state, r.model, r.layer) == (state, model, layer)]


def hidden(model, tokens, layer: int) -> torch.Tensor:
    ffn = ffns(model)[layer]
    seen = [batch[layer] for batch in capture(model, tokens, ["post"], layers=[layer])]
    return torch.cat([a.sites["post"][a.kept] for a in seen]).double() * (ffn.gauge.double() if ffn.gated else 1)


@pytest.mark.parametrize("name", ["tiny-x2", "tiny-swiglu-x1"])
def test_the_ranks_are_those_of_the_captured_activations(measured, family, corpus, name):
    model = load_model(family / name)
    tokens = pack(corpus, tokenizer_of(model), tokens=TOKENS)
    for layer in (0, 3):
        h = hidden(model, tokens, layer)
        spectrum = sp.eigenvalues(torch.cov(h.T, correction=0))
        (row,) = rows_of(measured, TRAINED, name, layer)
        assert row.tokens == len(h) and row.d_mlp == h.shape[1] and row.seed == 1
        assert row.soft_rank == pytest.approx(sp.soft_rank(spectrum), rel=1e-4)
        assert row.participation_ratio == pytest.approx(sp.participation_ratio(spectrum), rel=1e-4)
        assert row.erank_rv == pytest.approx(sp.erank_rv(spectrum), rel=1e-3)
        assert row.stable_rank == pytest.approx(sp.stable_rank(spectrum), rel=1e-4)
        assert row.rank_at_99 == sp.rank_at_energy(spectrum, 0.99)


def test_step_0_is_the_untrained_model(measured, family, corpus, tmp_path):
    hf = MEMBERS["tiny-x2"].at_step_0(seed=1)
    model = load_model(hf, tokenizer=tokenizer_of(load_model(family / "tiny-x2")), device="cpu")
    tokens = pack(corpus, tokenizer_of(model), tokens=TOKENS)
    spectrum = sp.eigenvalues(torch.cov(hidden(model, tokens, 2).T, correction=0))
    (row,) = rows_of(measured, STEP_0, "tiny-x2", 2)
    assert row.soft_rank == pytest.approx(sp.soft_rank(spectrum), rel=1e-4)
    longer = pack(corpus, tokenizer_of(model), tokens=4 * TOKENS, per_document=256)
    assert row.loss == pytest.approx(next_token_loss(model, longer))
    assert row.loss != rows_of(measured, TRAINED, "tiny-x2", 2)[0].loss


def test_other_weights_at_step_0_are_left_out_and_said(family, corpus, tmp_path, caplog):
    for name in NAMES[:2]:
        shutil.copytree(family / name, tmp_path / name)
        (tmp_path / name / "training.json").write_text(
            json.dumps({"member": name, "seed": 2, "step_0_sha256": "0"})
        )
    found = expansion([tmp_path / name for name in NAMES[:2]], corpus, tokens=1024)
    assert STEP_0 not in {row.state for row in found.rows} and "step 0" in caplog.text


def test_random_features_see_the_trained_inputs(measured, family, corpus):
    model = load_model(family / "tiny-x2")
    tokens, ffn = pack(corpus, tokenizer_of(model), tokens=TOKENS), ffns(model)[1]
    seen = [batch[1] for batch in capture(model, tokens, ["in"], layers=[1])]
    x = torch.cat([a.sites["in"][a.kept] for a in seen])
    random = ffn.randomised(0).hidden(x).double()
    (row,) = rows_of(measured, RANDOM, "tiny-x2", 1)
    assert row.soft_rank == pytest.approx(
        sp.soft_rank(sp.eigenvalues(torch.cov(random.T, correction=0))), rel=1e-4
    )
    scaled = random / random.std(0, correction=0) * hidden(model, tokens, 1).std(0, correction=0)
    (row,) = rows_of(measured, MATCHED, "tiny-x2", 1)
    assert row.soft_rank == pytest.approx(
        sp.soft_rank(sp.eigenvalues(torch.cov(scaled.T, correction=0))), rel=1e-4
    )


def test_subsets_are_drawn_from_the_widest_of_the_arm(measured, family, corpus):
    subsets = [row for row in measured.rows if row.state == SUBSET]
    assert {(row.model, row.d_mlp, row.expansion) for row in subsets} == {("tiny-x2", 64, 0.5)}
    model = load_model(family / "tiny-x2")
    tokens = pack(corpus, tokenizer_of(model), tokens=TOKENS)
    h, random = hidden(model, tokens, 0), torch.Generator().manual_seed(5)
    covariance = torch.cov(h.T, correction=0)
    soft = []
    for _ in range(30):
        some = torch.randperm(256, generator=random)[:64]
        soft.append(sp.soft_rank(sp.eigenvalues(covariance[some][:, some])))
    assert subsets[0].soft_rank == pytest.approx(sum(soft) / 30, rel=0.03)
    assert subsets[0].participation_ratio == pytest.approx(sp.subset_participation_ratio(covariance, 64), rel=1e-4)


def test_the_loss_is_that_of_the_next_tokens_of_each_document(family, corpus):
    model = load_model(family / "tiny-x2")
    tokens = pack(corpus, tokenizer_of(model), tokens=512)
    logits = plain(model)(input_ids=tokens.ids).logits.log_softmax(-1)
    losses = [
        -logits[s, t - 1, tokens.ids[s, t]].item()
        for s in range(len(tokens.ids))
        for t in range(1, tokens.ids.shape[1])
        if tokens.document[s, t] == tokens.document[s, t - 1] and not tokens.special[s, t]
    ]
    assert next_token_loss(model, tokens) == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_half_samples_have_the_variance_of_the_whole():
    """The fourteen vary as all seventy do, whose variance is s²/n: that of the whole sample's mean."""
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(BLOCKS, 400, 6, generator=random, dtype=torch.float64)
    rows[:, :, 0] *= torch.linspace(2, 3, BLOCKS, dtype=torch.float64)[
        torch.randperm(BLOCKS, generator=random), None
    ]
    blocks = []
    for block in rows:
        blocks.append(Moments.about(rows[0, :4] * 0))
        blocks[-1].update(block, torch.arange(400))
    whole = {"soft_rank": 5.0}
    found = _half_samples(blocks, whole)
    brute = []
    for halves in combinations(range(BLOCKS), BLOCKS // 2):
        covariance = torch.cov(rows[list(halves)].reshape(-1, 6).T, correction=0)
        brute.append(math.log(sp.soft_rank(sp.eigenvalues(covariance))))
    mean = sum(brute) / len(brute)
    variance = sum((b - mean) ** 2 for b in brute) / len(brute)
    halves = torch.tensor(found["soft_rank_halves"], dtype=torch.float64)
    assert len(halves) == 14 and float(halves.mean()) == pytest.approx(0, abs=1e-12)
    assert float(halves.square().mean()) == pytest.approx(variance, rel=0.1)
    assert found["soft_rank_extrapolated"] == pytest.approx(25.0 / math.exp(mean), rel=0.01)


def test_each_arm_has_its_null_and_its_series(measured):
    assert measured.arms == ["gelu", "silu, gated"]
    assert (null_of("gelu"), null_of("silu, gated")) == (RANDOM, MATCHED)
    assert {row.state for row in measured.rows} == set(STATES)
    series = measured.series("gelu", TRAINED, "soft_rank")
    assert list(series) == [64, 256]
    values = sorted(r.soft_rank for r in measured.rows if (r.state, r.d_mlp, r.arm) == (TRAINED, 64, "gelu"))
    assert series[64] == pytest.approx((values[1] + values[2]) / 2)
    assert all(
        (row.closed_form is not None) == (row.state == RANDOM and row.arm == "gelu") for row in measured.rows
    )


def test_the_table_comes_back_from_disk_and_draws_itself(measured, tmp_path):
    again = Expansion.load(measured.save(tmp_path / "t.parquet"))
    assert again.findings() == measured.findings() and len(again.plot().axes) == 4
    assert "4 times the width multiplies the soft rank" in again.findings()[0]


def test_bad_input_is_said(family, corpus):
    with pytest.raises(InputError, match="at least two"):
        expansion([family / NAMES[0]], corpus)
    with pytest.raises(InputError, match="half-samples need 16"):
        expansion([family / name for name in NAMES], corpus, tokens=512)

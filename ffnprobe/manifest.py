"""Which files of a run are finished, and what must be in them?

A line a file, added when the file is safely there. What is no whole line (a crash tears the last one) says
nothing, and its file is made again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from .disk import append_line


@dataclass(frozen=True)
class Entry:
    name: str
    bytes: int
    sha256: str
    batch: int  # sequences a forward pass; smaller than the plan's where memory ran out
    threads: int
    torch: str
    seconds: float


def read(folder: Path) -> dict[str, list[Entry]]:
    """Every finished file by name. A file has several entries where it was made again."""
    found: dict[str, list[Entry]] = {}
    for path in sorted(folder.glob("MANIFEST*.jsonl")):  # one for each writer: appends of several hosts tear
        for entry in _entries(path):
            found.setdefault(entry.name, []).append(entry)
    return found


def add(folder: Path, entry: Entry, writer: str = "") -> None:
    """Note a finished file. `writer` tells several processes apart."""
    append_line(folder / f"MANIFEST{writer}.jsonl", json.dumps(asdict(entry)))


def _entries(path: Path) -> Iterator[Entry]:
    for line in path.read_bytes().split(b"\n"):
        try:
            entry = Entry(**json.loads(line))
            types = (type(value).__name__ for value in asdict(entry).values())
            if tuple(types) == ("str", "int", "str", "int", "int", "str", "float"):
                yield entry
        except (ValueError, TypeError):
            continue

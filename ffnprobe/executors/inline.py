"""Shards in this process, one after the other."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

import torch

from ..manifest import Entry
from .base import Make, Start


@dataclass(frozen=True)
class Inline:
    threads: int = field(default_factory=torch.get_num_threads)
    workers: int = 1
    writer: str = ""

    def __call__(self, shards: Sequence[int], make: Make, start: Start) -> Generator[Entry, None, None]:
        yield from map(make, shards)

"""What does a run ask of an executor?"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Protocol, runtime_checkable

from ..manifest import Entry

Make = Callable[[int], Entry]  # computes a shard in this process and writes its file
Start = Callable[[], Make]  # picklable: gets a fresh process ready for that


@runtime_checkable
class Executor(Protocol):
    """Shard number -> shard file. Which shard is computed where and when must not matter, and does not."""

    @property
    def workers(self) -> int:
        """Shards that are computed at once."""

    @property
    def threads(self) -> int:
        """A worker's: the last bits of a sum depend on it."""

    @property
    def writer(self) -> str:
        """Empty where this process alone works in the run folder; else what tells it from the others."""

    def __call__(self, shards: Sequence[int], make: Make, start: Start) -> Generator[Entry, None, None]:
        """An entry for each finished shard, as they finish; `make` is ready here, `start` is for elsewhere.

        Closed early, it ends its workers.
        """

"""How does a long measurement survive whatever happens on the way, and give the same bytes?

RUN/ holds run.json (what is measured, and with what), pilot.safetensors, a file a shard, MANIFEST.jsonl (a line
a finished file) and merged.safetensors. Whatever is missing or damaged is computed again.
"""

from __future__ import annotations

import json
import logging
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from . import manifest
from .disk import atomic_write, make_folder, need_room, sweep
from .errors import InputError, MachineError
from .executors import Executor, Inline
from .lock import Lock, locked
from .models import plain
from .placement import devices
from .shards import PILOT, Maker, Work, check_pilot, entry, merge, shard_path, size_of, write_pilot
from .statistics import Statistic
from .stream import Progress
from .tensors import Damaged

log = logging.getLogger(__name__)

LIBRARIES = ("ffnprobe", "torch", "transformers", "transformer-lens", "scikit-learn", "numpy")
TRIES = 3  # of a shard that is not on disk what was written
NOT_EQUAL = "sums agree to 1e-6 (in half precision: to its rounding), not bit for bit"

Say = Callable[[str], None]
Prepare = Callable[[Say], Work]


@dataclass(frozen=True)
class Outcome:
    statistics: dict[str, Statistic]
    bit_equal: bool  # every shard was computed with the batch, threads and torch that run.json names
    seconds: float  # of all shards, whenever they were computed


@contextmanager
def run(
    folder: str | Path,
    prepare: Prepare,
    *,
    executor: Executor | None = None,
    facts: Mapping[str, Any] | None = None,
    say: Say = lambda line: None,
    progress: Progress | None = None,
) -> Iterator[tuple[Work, Outcome | None]]:
    """Compute what of a run is missing in its folder, add it up into merged.safetensors, hold the folder.

    Args:
        prepare: makes the work, given whom to tell of downloads; picklable where the executor starts processes.
        executor: where shards are computed; in this process by default.
        facts: more for run.json that must be the same when the run goes on.

    Yields:
        The work, and what came of it; None where other ranks are still at it: the last of them adds up.

    Raises:
        InputError: the folder holds another run, or another process is at work in it.
        ModelRefused: an activation is NaN or Inf.
        MachineError: disk or memory are too small; what is done is kept.
    """
    folder, facts = make_folder(folder), dict(facts or {})
    executor = executor or Inline()
    several = bool(executor.writer)  # a rank that starts late waits for the one that adds up
    with locked(folder / "lock", shared=several, wait=say if several else None) as lock:
        if not several:
            sweep(folder)
        _refuse_another(folder, facts)  # before a model is loaded for nothing
        work = prepare(say)
        with threads_set(executor.threads):
            with locked(folder / "setup.lock", wait=log.info):
                plan = work.plan()
                _agree(folder, facts | plan, _circumstances(work, executor), say)
                pilot_sha256, size = _set_up(folder, work, plan, executor, say)
            outcome = _complete(folder, prepare, work, pilot_sha256, size, executor, lock, say, progress)
        yield work, outcome


def note(folder: str | Path, **more: Any) -> None:
    """Add to run.json."""
    path = Path(folder) / "run.json"
    _write_json(path, read_run(folder) | more)


def read_run(folder: str | Path) -> dict[str, Any]:
    """What run.json says.

    Raises:
        InputError: it is not one of ours.
    """
    path = Path(folder) / "run.json"
    try:
        found = json.loads(path.read_bytes())
        if not isinstance(found["settings"], dict):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not a run of ffnprobe: choose another folder with --out") from error
    return found


def _set_up(folder: Path, work: Work, plan: Mapping[str, Any], executor: Executor, say: Say) -> tuple[str, int]:
    """Make sure of the pilot; its sha256, and the bytes of its statistics."""
    for known in reversed(manifest.read(folder).get(PILOT, [])):
        try:
            return known.sha256, check_pilot(folder, known.sha256, plan)
        except Damaged as damage:
            say(f"{damage}: it is made again")
    started = time.perf_counter()
    pilot = work.pilot()
    written = write_pilot(folder, pilot, plan)
    made = entry(folder / PILOT, written, work.batch, time.perf_counter() - started)
    manifest.add(folder, made, executor.writer)
    return made.sha256, size_of(pilot.starts)


def _complete(
    folder: Path,
    prepare: Prepare,
    work: Work,
    pilot_sha256: str,
    size: int,
    executor: Executor,
    lock: Lock,
    say: Say,
    progress: Progress | None,
) -> Outcome | None:
    """Compute the missing shards and add them up, until no file is damaged."""
    counter = _Counter(work, progress)
    make = Maker(work, folder, pilot_sha256, counter.within)
    begin = partial(_begin, prepare, folder, pilot_sha256)
    paths = [shard_path(folder, shard) for shard in range(len(work.shards()))]
    writer, damages = executor.writer, list[str]()
    while True:
        missing = _missing(folder, paths, say)
        counter.start(missing)
        if 0 < len(missing) < len(paths):
            say(f"{len(paths) - len(missing)} of {len(paths)} shards are there: going on")
        need_room(folder, (len(missing) + 1) * size, f"{len(missing)} shards and their sum")
        with closing(executor(missing, make, begin)) as finished:  # or a signal would leave its workers to chance
            for made in finished:
                manifest.add(folder, made, writer)
                counter.finish(paths.index(folder / "shards" / made.name))
                if made.batch < work.batch:
                    say(f"{made.name}: out of memory, so it was made with {made.batch} sequences a batch")
        if executor.writer:
            alone, missing = lock.alone(), _missing(folder, paths)
            if missing or not alone:
                if alone:
                    lock.share()  # or a rank that is yet to come would wait for this one
                say(f"rank done; {len(missing)} of {len(paths)} shards are still out: the last rank adds up")
                return None
            sweep(folder)
            executor = Inline(executor.threads)  # the others have left
        try:
            return _add_up(folder, work, pilot_sha256, paths, say)
        except Damaged as damage:
            if (seen := damages.count(str(damage))) == TRIES:
                raise MachineError(f"{damage}, for the {seen + 1}th time: does the disk fail?") from damage
            damages.append(str(damage))
            say(f"{damage}: it is made again")


def _add_up(folder: Path, work: Work, pilot_sha256: str, paths: list[Path], say: Say) -> Outcome:
    known = manifest.read(folder)
    merged, made = merge(folder, pilot_sha256, [known[path.name] for path in paths])
    recorded = read_run(folder)
    planned = work.batch, recorded["machine"]["threads"], recorded["versions"]["torch"]
    like_planned = [(one.batch, one.threads, one.torch) == planned for one in made]
    if not all(like_planned):
        say(f"{like_planned.count(False)} shards were made with another batch, threads or torch: {NOT_EQUAL}")
    return Outcome(dict(merged.starts), all(like_planned), sum(one.seconds for one in made))


class _Counter:
    """Tokens done, of finished shards and within the one at work."""

    def __init__(self, work: Work, progress: Progress | None) -> None:
        self.sizes = [len(rows) * work.tokens.ids.shape[1] for rows in work.shards()]
        self.progress, self.done = progress or (lambda done, total: None), 0

    def start(self, missing: list[int]) -> None:
        self.done = sum(self.sizes) - sum(self.sizes[shard] for shard in missing)

    def within(self, done: int, total: int) -> None:
        self.progress(self.done + done, sum(self.sizes))

    def finish(self, shard: int) -> None:
        self.done += self.sizes[shard]
        self.progress(self.done, sum(self.sizes))


def _begin(prepare: Prepare, folder: Path, pilot_sha256: str) -> Maker:
    return Maker(prepare(log.info), folder, pilot_sha256)


def _missing(folder: Path, paths: list[Path], say: Say = lambda line: None) -> list[int]:
    """Shards that are not finished: no file, no line in the manifest, or another size than it says."""
    known, missing = manifest.read(folder), []
    for shard, path in enumerate(paths):
        there = path.exists()
        if not there or path.stat().st_size not in {one.bytes for one in known.get(path.name, [])}:
            missing.append(shard)
            if there:
                say(f"{path.name} is not as the manifest says: it is made again")
    return missing


def _circumstances(work: Work, executor: Executor) -> dict[str, Any]:
    """What may differ when a run goes on, at the price of the last bits."""
    return {
        "machine": {
            "threads": executor.threads,
            "device": devices(plain(work.model)),
            "processor": platform.machine(),
        },
        "versions": {name: version(name) for name in LIBRARIES} | {"python": platform.python_version()},
    }


def _agree(folder: Path, facts: Mapping[str, Any], circumstances: Mapping[str, Any], say: Say) -> None:
    path = folder / "run.json"
    if not path.exists():
        _write_json(path, {"settings": {}, **facts, **circumstances})
        return
    _refuse_another(folder, facts)
    before = read_run(folder)
    if changed := _differences({name: before.get(name) for name in circumstances}, circumstances):
        say(f"{'; '.join(changed)}: {NOT_EQUAL}")


def _refuse_another(folder: Path, facts: Mapping[str, Any]) -> None:
    if (folder / "run.json").exists():
        before = read_run(folder)
        if other := [line for name in facts for line in _differences(before.get(name), facts[name])]:
            raise InputError(f"{folder} holds another run ({'; '.join(other)}): choose another folder with --out")


def _differences(before: Any, now: Any, name: str = "it") -> list[str]:
    """Every leaf that differs, as `seed 0, now 1`."""
    if isinstance(before, dict) and isinstance(now, Mapping):
        names = [*now, *(name for name in before if name not in now)]
        return [line for name in names for line in _differences(before.get(name), now.get(name), name)]
    now = json.loads(json.dumps(now))
    return [] if before == now else [f"{name} {before!r}, now {now!r}"]


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    atomic_write(path, lambda file: file.write_text(json.dumps(data, indent=2) + "\n"))


@contextmanager
def threads_set(count: int) -> Iterator[None]:
    """So many threads within, as many as before after."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)

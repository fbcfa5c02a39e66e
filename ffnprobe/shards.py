"""What is one shard of a run, and what do all of them add up to?

A shard is a fixed list of sequences in batches of a fixed shape. It starts from the pilot's bytes on disk and
ends as one file, so who computes it, when, and after how many crashes changes no bit of it.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from .backoff import backing_off
from .corpus import Tokens
from .disk import sweep
from .fingerprint import fingerprints
from .manifest import Entry
from .memory import apart
from .models import Model, plain, taps
from .sinks import Sinks
from .statistics import Statistic
from .stream import BATCH, SINK_FACTOR, Pilot, Probe, Progress, collect_rows, counting, pilot
from .tensors import Damaged, stored, write_tensors

log = logging.getLogger(__name__)

SHARD = 8192  # tokens
MOST = 16  # shards, where nobody asked for a size: each is as large on disk as all statistics together
PILOT = "pilot.safetensors"
MERGED = "merged.safetensors"


@dataclass(frozen=True)
class Work:
    """All that a worker must hold to compute any shard of a run."""

    model: Model
    tokens: Tokens
    probes: Mapping[str, Probe]
    batch: int = BATCH
    shard: int | None = None  # tokens; the nearest whole number of batches is taken
    sink_factor: float = SINK_FACTOR
    nonfinite: str = "stop"

    def shards(self) -> tuple[Int[Tensor, " sequences"], ...]:
        """The sequences of each shard: consecutive, whole batches, all but the last one alike."""
        sequences, length = self.tokens.ids.shape
        if self.shard:
            batches = max(1, round(self.shard / length / self.batch))
        else:
            least = -(-sequences // (MOST * self.batch))  # rounded up, or there would be more than MOST
            batches = max(round(SHARD / length / self.batch), least, 1)
        return torch.arange(sequences).split(batches * self.batch)

    def wanted(self) -> dict[str, Probe]:
        """The probes, and a count of what is skipped."""
        return counting(self.probes, self.nonfinite)

    def plan(self) -> dict[str, Any]:
        """What must be the same when a run goes on."""
        sequences, length = self.tokens.ids.shape
        shards, names = self.shards(), sorted(self.wanted())
        return {
            "fingerprints": fingerprints(self.model, self.tokens)
            | {"statistics": sha256("\n".join(names).encode()).hexdigest()},
            "plan": {
                "sequences": sequences,
                "length": length,
                "batch": self.batch,
                "shards": len(shards),
                "sequences_a_shard": len(shards[0]),
                "sink_factor": self.sink_factor,
                "nonfinite": self.nonfinite,
                "dtype": str(plain(self.model).dtype).removeprefix("torch."),
                "statistics": len(names),
            },
        }

    def devices(self) -> dict[str, torch.device]:
        """Where the statistics of each probe are kept up: beside the weights of its layer."""
        at: dict[int, Any] = {tap.layer: tap.down.weight for tap in taps(self.model)}
        return {name: at[probe.layer].device for name, probe in self.wanted().items()}

    def pilot(self) -> Pilot:
        """What every shard starts from."""
        return pilot(
            self.model, self.tokens, self.wanted(), sink_factor=self.sink_factor, nonfinite=self.nonfinite
        )


class Placed(Mapping[str, Statistic]):
    """Sums as they were read from disk, each handed out beside the weights of its layer."""

    def __init__(self, sums: Mapping[str, Statistic], devices: Mapping[str, torch.device]) -> None:
        self.sums, self.devices = sums, devices

    def __getitem__(self, name: str) -> Statistic:
        return self.sums[name].to(self.devices[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.sums)

    def __len__(self) -> int:
        return len(self.sums)


class Maker:
    """Computes shards in this process, each from the pilot on disk, and writes their files."""

    def __init__(self, work: Work, folder: Path, pilot_sha256: str, progress: Progress | None = None) -> None:
        self.work, self.folder, self.progress = work, folder, progress
        self.pilot_sha256, self.batch = pilot_sha256, work.batch

    def __call__(self, shard: int) -> Entry:
        started, work = time.perf_counter(), self.work
        rows, wanted = work.shards()[shard], work.wanted()

        def feed(batch: int) -> dict[str, Statistic]:
            with apart():
                start = read_pilot(self.folder, self.pilot_sha256, work.devices())
            return collect_rows(
                work.model,
                work.tokens,
                wanted,
                start,
                rows,
                batch=batch,
                nonfinite=work.nonfinite,
                progress=self.progress,
            )

        # what did not fit once will not fit the next time: the smaller batch stays
        statistics, self.batch = backing_off(self.batch, feed, log.warning)
        path = shard_path(self.folder, shard)
        sweep(path.parent, f"{path.name}.*")
        written = write_tensors(path, named(statistics), {"pilot": self.pilot_sha256})
        return entry(path, written, self.batch, time.perf_counter() - started)


def entry(path: Path, written: tuple[int, str], batch: int, seconds: float) -> Entry:
    """The manifest's line of a file that this process has written."""
    return Entry(path.name, *written, batch, torch.get_num_threads(), str(torch.__version__), seconds)


def shard_path(folder: Path, shard: int) -> Path:
    """Where a shard's statistics lie."""
    return folder / "shards" / f"s-{shard:05d}.safetensors"


def write_pilot(folder: Path, start: Pilot, plan: Mapping[str, Any]) -> tuple[int, str]:
    """Save a pilot and the plan of its run, so that its sha256 stands for both; its size and sha256."""
    sinks = start.sinks
    layers = sorted(sinks.residual)
    numbers = {
        "layer": torch.tensor(layers),
        "residual": torch.tensor([sinks.residual[layer] for layer in layers], dtype=torch.float64),
        "hidden": torch.tensor([sinks.hidden[layer] for layer in layers], dtype=torch.float64),
        "factor": torch.tensor(sinks.factor, dtype=torch.float64),
    }
    tensors = named(start.starts)
    about: dict[str, Any] = {
        "plan": plan,
        "bytes": size_of(start.starts),
        "kinds": _kinds(start.starts),
        "moved": [name for name, tensor in tensors.items() if tensor.device.type != "cpu"],
        # most sums start at zero: one number in place of gigabytes, which each shard reads again
        "shapes": {name: list(tensor.shape) for name, tensor in tensors.items() if _constant(tensor)},
    }
    tensors = {name: t.flatten()[:1] if name in about["shapes"] else t for name, t in tensors.items()}
    tensors |= {f"sinks:{name}": number for name, number in numbers.items()}
    return write_tensors(folder / PILOT, tensors, about)


def check_pilot(folder: Path, digest: str, plan: Mapping[str, Any]) -> int:
    """The bytes of the statistics of a pilot that was saved.

    Raises:
        Damaged: it is not what was written, or of another plan.
    """
    with stored(folder / PILOT, digest) as (_, about, _):
        if about["plan"] != json.loads(json.dumps(plan)):
            raise Damaged(f"{PILOT} is of another plan")
        return about["bytes"]


def read_pilot(folder: Path, digest: str, devices: Mapping[str, torch.device] | None = None) -> Pilot:
    """The pilot that was saved, its statistics where they were: on the accelerator that is given, or not.

    Raises:
        Damaged: it is not what was written.
    """
    with stored(folder / PILOT, digest) as (tensors, about, _):
        layers, residual, hidden = (tensors[f"sinks:{name}"].tolist() for name in ("layer", "residual", "hidden"))
        factor = float(tensors["sinks:factor"])
        sinks = Sinks(factor, dict(zip(layers, residual, strict=True)), dict(zip(layers, hidden, strict=True)))
        moved = set(about["moved"]) if devices else set()

        def tensor(name: str, part: str) -> Tensor:
            found, shape = tensors[full := f"{name}:{part}"], about["shapes"].get(full)
            if shape is not None:
                found = torch.full(shape, found.item(), dtype=found.dtype)
            return found.to((devices or {})[name]) if full in moved else found

        names = [name for name in tensors if not name.startswith("sinks:")]
        return Pilot(sinks, dict(statistics_of(names, tensor, about["kinds"])))


def merge(folder: Path, pilot_sha256: str, entries: Iterable[list[Entry]]) -> tuple[Pilot, list[Entry]]:
    """Add the shards up in the order given, one statistic in memory at a time, and write merged.safetensors.

    Returns:
        The pilot, its statistics now the sums; and the entry that each file matches.

    Raises:
        Damaged: a shard's file is not what was written; it is gone then, to be made again.
    """
    start = read_pilot(folder, pilot_sha256)
    kinds, matched = _kinds(start.starts), []
    for candidates in entries:
        path = folder / "shards" / candidates[0].name
        by_digest = {candidate.sha256: candidate for candidate in candidates}
        try:
            with stored(path, *by_digest) as (tensors, about, digest):
                if about["pilot"] != pilot_sha256:
                    raise Damaged(f"{path.name} started from another pilot")
                for name, part in statistics_of(tensors, lambda *at, of=tensors: of[":".join(at)], kinds):
                    start.starts[name].merge(part)
        except Damaged:
            path.unlink(missing_ok=True)
            raise
        matched.append(by_digest[digest])
    write_tensors(folder / MERGED, named(start.starts), {"kinds": kinds})
    return start, matched


def size_of(statistics: Mapping[str, Statistic]) -> int:
    """Bytes of all their tensors."""
    return sum(tensor.nbytes for tensor in named(statistics).values())


def named(statistics: Mapping[str, Statistic]) -> dict[str, Tensor]:
    """Every tensor of every statistic, as NAME:TENSOR."""
    return {
        f"{name}:{part}": tensor
        for name, statistic in statistics.items()
        for part, tensor in statistic.tensors().items()
    }


def statistics_of(
    names: Iterable[str], tensor: Callable[[str, str], Tensor], kinds: Mapping[str, str]
) -> Iterator[tuple[str, Statistic]]:
    """The statistics that have these tensors, read one statistic at a time; `kinds` says what each of them is."""
    known = {kind.__name__: kind for kind in _subclasses(Statistic)}
    parts: dict[str, list[str]] = {name: [] for name in kinds}
    for name in names:
        statistic, _, part = name.rpartition(":")
        parts[statistic].append(part)
    for name, kind in kinds.items():
        yield name, known[kind]({part: tensor(name, part) for part in parts[name]})


def _kinds(statistics: Mapping[str, Statistic]) -> dict[str, str]:
    return {name: type(statistic).__name__ for name, statistic in statistics.items()}


def _constant(tensor: Tensor) -> bool:
    return tensor.numel() > 1 and bool((tensor == tensor.flatten()[0]).all())


def _subclasses(kind: type) -> Iterator[type[Statistic]]:
    subclass: type[Statistic]
    for subclass in kind.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)

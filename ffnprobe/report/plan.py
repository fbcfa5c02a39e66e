"""What will a report take, in memory, disk and time? Measured on one batch, and on one and two of the layers."""

from __future__ import annotations

import logging
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from ..analyzers.rank_probes import moment_bytes, plan_moments
from ..backoff import backing_off
from ..disk import make_folder, need_room
from ..errors import MachineError
from ..executors import Executor
from ..forward import evenly
from ..memory import available, peak
from ..models import describe, ffns, plain
from ..result import Result
from ..run import threads_set
from ..shards import Work, entry, merge, named, read_pilot, shard_path, size_of, write_pilot
from ..statistics import Statistic
from ..stream import Pilot, choose_layers, collect_rows
from ..tensors import write_tensors
from .analyses import ANALYSES, FEW, inner, measure
from .build import about_of, draw, work_of
from .settings import Settings

log = logging.getLogger(__name__)

Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """Bytes and seconds that a report will take, and the bytes that are there for it."""

    model: Mapping[str, Any]  # as `describe` gives it
    weights: int  # bytes
    layers: int
    tokens: int
    shards: int
    workers: int
    budget: int  # bytes of all moments
    sketch: int  # test vectors; 0 where every covariance is exact
    exact: int  # bytes of all moments, if every covariance is exact
    statistics: int  # bytes of a shard: of all statistics together
    memory: int  # at the most, of all workers
    memory_there: int
    disk: int  # the whole run folder
    disk_there: int  # free, and in the folder already
    seconds: Mapping[str, float]  # by stage

    def lines(self) -> list[str]:
        """What the command line prints."""
        width = f"{self.layers} of {self.model['n_layers']} layers, {self.tokens:,} tokens"
        workers = f", of {self.workers} workers together" if self.workers > 1 else ""
        stages = ", ".join(f"{stage} {_duration(seconds)}" for stage, seconds in self.seconds.items())
        return [
            f"model       {self.model['name']}, {self.model['dtype']}, {_size(self.weights)}: {width}",
            f"statistics  {_size(self.statistics)}: {self._moments()}",
            f"memory      {_size(self.memory)} at the most{workers}; {_size(self.memory_there)} there",
            f"disk        {_size(self.disk)}: {self.shards} shards and their sum, {_size(self.statistics)} each, "
            f"tables, figures; {_size(self.disk_there)} there",
            f"time        {_duration(sum(self.seconds.values()))}: {stages}",
        ]

    def _moments(self) -> str:
        budget = f"within the budget of {_size(self.budget)}"
        if self.sketch:
            return f"h sketched by {self.sketch} test vectors, {budget}; exact with --budget {self.exact}"
        return f"every covariance exact, {budget}"

    def check(self) -> None:
        """Refuse what the machine cannot hold.

        Raises:
            MachineError: memory or disk are too small.
        """
        _fits(self.memory, self.memory_there)
        if self.disk > self.disk_there:
            raise MachineError(
                f"the disk is too small: {self.disk:,} bytes needed, {self.disk_there:,} bytes there; "
                "make room, choose another folder with --out, or measure fewer layers with --layers"
            )


def plan_report(
    settings: Settings,
    out: str | Path,
    executor: Executor,
    say: Say = lambda line: None,
    started: float | None = None,
) -> Plan:
    """Load the model; time disk, a batch, the analyses of one layer and of two, drawing; leave nothing behind.

    Args:
        started: when the command did, by `time.perf_counter`; now by default.

    Raises:
        InputError, ModelRefused, MachineError: as build_report does.
    """
    clock, seconds, workers = _Clock(started), dict[str, float](), executor.workers
    there, out = available() + peak(), Path(out)
    folder = make_folder(next(parent for parent in (out, *out.absolute().parents) if parent.is_dir()))
    work = work_of(settings, say)
    work.plan()  # a report takes fingerprints
    seconds["load"], loaded = clock.lap(), peak()
    layers, rows = [tap.layer for tap in choose_layers(work.model, settings.layers)], _rows(work)
    with (
        tempfile.TemporaryDirectory(prefix=".ffnprobe-plan-", dir=folder) as name,
        threads_set(executor.threads),
    ):
        scratch = Path(name)
        say("timing the disk")
        of_first = {name: probe for name, probe in work.probes.items() if probe.layer == layers[0]}
        size, begin, write, add = _one_layer(replace(work, probes=of_first), rows[:1], scratch, clock)
        _fits(loaded + workers * len(layers) * size, there)  # before all of them are made
        begin, write, add = (each * len(layers) for each in (begin, write, add))

        say("timing one batch")
        clock.lap()
        start = work.pilot()
        seconds["load"] += clock.lap()
        size = size_of(start.starts)
        _feed(work, start, rows[:2])  # a first pass is slower
        clock.lap()
        _feed(work, start, rows[: work.batch])
        a_sequence = clock.lap() / len(rows[: work.batch])
    sizes = [len(rows) for rows in work.shards()]
    rounds = ceil(len(sizes) / workers)
    seconds["pass"] = min(rounds * sizes[0], sum(sizes)) * a_sequence
    seconds["files"] = rounds * (begin + write) + begin + len(sizes) * add + write

    chosen = inner(layers)
    say(f"timing the analysis of layers {' and '.join(map(str, chosen))}")
    share = len(layers) / len(chosen)
    with tempfile.TemporaryDirectory(prefix=".ffnprobe-plan-", dir=folder) as name:
        scratch = Path(name)
        clock.lap()
        results, seconds["analyses"] = _analyses(settings, work, start, layers, clock)
        for result in results:
            result.save(result.path(scratch / "tables"))
        seconds["analyses"] += clock.lap()
        tables = share * _bytes(scratch)
        draw(scratch, about_of(settings, work, out, 0.0, {}), results)
        seconds["drawing"] = clock.lap()
        drawn = _bytes(scratch / "figures") + share * _bytes(scratch / "report.html")
    network: Any = plain(work.model)
    measured = [ffn for ffn in ffns(work.model) if ffn.layer in layers]
    return Plan(
        model=describe(work.model),
        weights=sum(weight.nbytes for weight in network.parameters()),
        layers=len(layers),
        tokens=work.tokens.n,
        shards=len(sizes),
        workers=workers,
        budget=settings.budget,
        sketch=plan_moments(measured, settings.budget),
        exact=moment_bytes(measured, sys.maxsize),
        statistics=size,
        memory=peak() if workers == 1 else loaded + workers * peak(),
        memory_there=there,
        disk=(len(sizes) + 1) * size + int(tables + drawn),
        disk_there=shutil.disk_usage(folder).free + _bytes(out),
        seconds=seconds,
    )


def _analyses(
    settings: Settings, work: Work, start: Pilot, layers: list[int], clock: _Clock
) -> tuple[list[Result], float]:
    """The results of two of the layers, and the seconds that all layers will take."""
    chosen = inner(layers)
    results, taken = _timed(settings, work, start, chosen, clock)
    more = {name: ANALYSES[name].layers_more(len(layers), len(chosen)) for name in taken}
    growing = tuple(name for name in taken if more[name])
    less = dict.fromkeys(growing, 0.0)
    if growing and len(chosen) > 1:
        one = evenly(evenly(layers, FEW), 1)
        less = _timed(replace(settings, analyzers=growing), work, start, one, clock)[1]
    grown = sum(max(0.0, taken[name] - less[name]) * more[name] for name in growing)
    return results, sum(taken.values()) + grown


def _timed(
    settings: Settings, work: Work, start: Pilot, layers: list[int], clock: _Clock
) -> tuple[list[Result], dict[str, float]]:
    """The results of these layers, and the seconds that each of them took."""
    results, taken = [], {}
    for name, result in measure(settings, work, dict(start.starts), layers, lambda line: None):
        results.append(result)
        taken[name] = clock.lap()
    return results, taken


class _Clock:
    def __init__(self, started: float | None) -> None:
        self.last = time.perf_counter() if started is None else started

    def lap(self) -> float:
        """Seconds since it was asked last."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        before, self.last = self.last, time.perf_counter()
        return self.last - before


def _rows(work: Work) -> Int[Tensor, " sequences"]:
    """All sequences, first those with most and least of the odd documents: the analyses want both halves."""
    document = torch.unique_consecutive(work.tokens.document, return_inverse=True)[1]
    odd = (document % 2).sum(dim=1)
    first = dict.fromkeys([int(odd.argmax()), int(odd.argmin())])
    return torch.tensor([*first, *(row for row in range(len(odd)) if row not in first)])


def _feed(work: Work, start: Pilot, rows: Int[Tensor, " sequences"]) -> Mapping[str, Statistic]:
    def feed(batch: int) -> Mapping[str, Statistic]:
        return collect_rows(
            work.model, work.tokens, work.wanted(), start, rows, batch=batch, nonfinite=work.nonfinite
        )

    return backing_off(work.batch, feed, log.warning)[0]


def _one_layer(
    work: Work, rows: Int[Tensor, " sequences"], folder: Path, clock: _Clock
) -> tuple[int, float, float, float]:
    """The bytes of one layer's statistics, and the seconds to begin a shard, to write it and to add it up."""
    start = work.pilot()
    size, (_, digest) = size_of(start.starts), write_pilot(folder, start, {})
    need_room(folder, 2 * size, "a sample of the statistics")
    statistics, path = _feed(work, start, rows), shard_path(folder, 0)
    clock.lap()
    read_pilot(folder, digest)
    begin = clock.lap()
    written = write_tensors(path, named(statistics), {"pilot": digest})
    write = clock.lap()
    merge(folder, digest, [[entry(path, written, work.batch, 0.0)]])
    return size, begin, write, max(0.0, clock.lap() - begin - write)


def _fits(memory: int, there: int) -> None:
    if memory > there:
        raise MachineError(
            f"memory is too small: {memory:,} bytes needed, {there:,} bytes there; "
            "measure fewer layers with --layers, or use fewer --workers"
        )


def _bytes(folder: Path) -> int:
    paths = [folder, *folder.rglob("*")]
    return sum(path.stat().st_size for path in paths if path.is_file())


def _size(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"

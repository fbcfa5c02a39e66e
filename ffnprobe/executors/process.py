"""Shards in several processes of this machine, each with its own model and its share of the cores."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, cast

import torch

from ..errors import FFNProbeError, MachineError
from ..manifest import Entry
from .base import Make, Start

DEATHS = 3  # of workers over one shard, before it is given up
METHOD = "spawn"  # a fork would share locks of torch's threads


@dataclass(frozen=True)
class Processes:
    workers: int
    threads: int
    writer: str = ""

    @classmethod
    def sharing(cls, workers: int) -> Processes:
        """So many workers that share the cores of this process."""
        return cls(workers, share(workers))

    def __call__(self, shards: Sequence[int], make: Make, start: Start) -> Generator[Entry, None, None]:
        queue, deaths, workers = list(shards), Counter[int](), list[BaseProcess]()
        busy: dict[Connection, tuple[BaseProcess, int]] = {}
        try:
            while queue or busy:
                while queue and len(busy) < self.workers:
                    with _undisturbed():
                        connection, worker = self._spawn(start)
                        workers.append(worker)
                        busy[connection] = worker, _give(connection, queue)
                for connection in cast(list[Connection], wait(list(busy))):
                    worker, shard = busy.pop(connection)
                    try:
                        answer = connection.recv()
                    except (EOFError, OSError):
                        worker.join()
                        deaths[shard] += 1
                        if deaths[shard] == DEATHS:
                            raise MachineError(
                                f"{DEATHS} workers died over shard {shard} (exit {worker.exitcode}): "
                                "use fewer --workers, and the same command goes on"
                            ) from None
                        queue.insert(0, shard)
                        continue
                    if isinstance(answer, BaseException):
                        raise answer
                    if queue:
                        busy[connection] = worker, _give(connection, queue)
                    yield answer
        finally:
            for worker in workers:
                worker.kill()  # a file is there whole or not at all, so there is nothing to tidy up
            for worker in workers:
                worker.join()

    def _spawn(self, start: Start) -> tuple[Connection, BaseProcess]:
        context: Any = multiprocessing.get_context(METHOD)
        here, there = context.Pipe()
        worker = context.Process(target=_work, args=(there, start, self.threads), daemon=True)
        worker.start()
        there.close()  # or the death of the worker would not be seen here
        return here, worker


def share(workers: int) -> int:
    """Threads a worker, so that they do not fight over the cores of this process."""
    return max(1, torch.get_num_threads() // workers)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Signals that arrive within wait until after it: half a start would leave a worker that nobody ends.

    SIGINT is blocked as well, which workers inherit: Ctrl-C reaches the whole group, and this process ends them.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    came: list[int] = []
    handlers: dict[int, Any] = {
        n: signal.signal(n, lambda number, _: came.append(number)) for n in (signal.SIGINT, signal.SIGTERM)
    }
    resource_tracker.ensure_running()  # its start, else part of the first worker's, unblocks SIGINT at its end
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)


def _give(connection: Connection, queue: list[int]) -> int:
    shard = queue.pop(0)
    with suppress(OSError):  # it has died: its end of the pipe says so to who waits for the answer
        connection.send(shard)
    return shard


def _work(connection: Connection, start: Start, threads: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    try:
        make = start()
        while True:
            try:
                shard = connection.recv()
            except EOFError:
                return
            connection.send(make(shard))
    except FFNProbeError as error:
        connection.send(error)
    except Exception as error:
        connection.send(RuntimeError(f"{error}\n{traceback.format_exc()}"))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # killed without a word: nobody waits for this shard

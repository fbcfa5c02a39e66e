"""Shards on Ray: actors that hold the model, one a GPU or a share of the cores.

On this machine alone, or on the cluster that RAY_ADDRESS names, which must share the run folder.
"""

from __future__ import annotations

import logging
import os
import secrets
import sys
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ..errors import FFNProbeError, InputError, MachineError
from ..manifest import Entry
from .base import Make, Start
from .process import DEATHS, share

# read when ray is first imported: it reports to nobody, and only who holds the token may send it work
PRIVATE = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token"}
# on one machine: listen on loopback alone (ray replaces a node address of 127.0.0.1 by an outer one)
LOCAL = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


@dataclass(frozen=True)
class Ray:
    workers: int
    threads: int
    writer: str = ""

    @classmethod
    def sharing(cls, workers: int) -> Ray:
        """So many actors that share the cores of this process, or take a GPU each."""
        return cls(workers, share(workers))

    def __call__(self, shards: Sequence[int], make: Make, start: Start) -> Generator[Entry, None, None]:
        if not shards:
            return
        ray = _ray(self.workers * self.threads)
        options = {"num_cpus": self.threads, "num_gpus": int(torch.cuda.is_available())}
        again = {"max_restarts": DEATHS, "max_task_retries": DEATHS}  # a worker that dies, and its shard
        actor = ray.remote(**options, **again)(_Worker)
        queue = list(shards)
        try:
            idle = [actor.remote(start, self.threads) for _ in shards[: self.workers]]
            busy: dict[Any, Any] = {}
            while queue or busy:
                while queue and idle:
                    worker = idle.pop()
                    busy[worker.make.remote(queue.pop(0))] = worker
                (ready, *_), _ = ray.wait(list(busy), num_returns=1)
                idle.append(busy.pop(ready))
                try:
                    entry = ray.get(ready)
                except ray.exceptions.RayTaskError as error:
                    raise (error.cause if isinstance(error.cause, FFNProbeError) else error) from None
                except ray.exceptions.RayActorError as error:
                    raise MachineError(
                        "a Ray worker died too often: use fewer, and the same command goes on"
                    ) from error
                yield entry
        finally:
            ray.shutdown()


class _Worker:
    """What an actor runs."""

    def __init__(self, start: Start, threads: int) -> None:
        torch.set_num_threads(threads)
        self.start = start

    @cached_property
    def ready(self) -> Make:
        return self.start()  # at the first shard: an error in the actor's making would lose its own name

    def make(self, shard: int) -> Entry:
        return self.ready(shard)


def _ray(cores: int) -> Any:
    address = os.environ.get("RAY_ADDRESS")
    if not address and "ray" in sys.modules and "RAY_AUTH_TOKEN" not in os.environ:
        raise InputError("ray is imported already, without a token: set RAY_AUTH_TOKEN before, or import it later")
    alone = {} if address else LOCAL | {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
    for name, value in (PRIVATE | alone).items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise MachineError(
            "ray is not installed: pip install 'ffnprobe[ray]', or use --executor process"
        ) from error
    local: dict[str, Any] = {} if address else {"num_cpus": cores, "include_dashboard": False}
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **local)
    return ray

"""Shards i % world == rank, as torchrun or SLURM numbers its processes: they share a folder and nothing else."""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ..errors import InputError
from ..manifest import Entry
from .base import Make, Start

LAUNCHERS = (  # rank, world, and the number on this host
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
)


@dataclass(frozen=True)
class Rank:
    rank: int
    world: int
    threads: int = field(default_factory=torch.get_num_threads)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Rank:
        """The rank that a launcher gave this process; on a host with GPUs it takes the one of its number.

        Raises:
            InputError: no launcher did, or its numbers make no sense.
        """
        for rank, world, local in LAUNCHERS:
            if rank not in environment or world not in environment:
                continue
            numbers = environment[rank], environment[world], environment.get(local, "0")
            if not all(number.isdecimal() for number in numbers) or int(numbers[0]) >= int(numbers[1]):
                raise InputError(f"{rank}={numbers[0]!r} of {world}={numbers[1]!r}: start with torchrun or srun")
            if torch.cuda.is_available():
                torch.cuda.set_device(int(numbers[2]) % torch.cuda.device_count())
            return cls(int(numbers[0]), int(numbers[1]))
        known = " or ".join(f"{rank} and {world}" for rank, world, _ in LAUNCHERS)
        raise InputError(f"the rank executor needs {known}: start with torchrun or srun")

    @property
    def workers(self) -> int:
        return self.world

    @property
    def writer(self) -> str:
        return f"-{self.rank}"

    def __call__(self, shards: Sequence[int], make: Make, start: Start) -> Generator[Entry, None, None]:
        return (make(shard) for shard in shards if shard % self.world == self.rank)

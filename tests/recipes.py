"""Which run do the tests of the engine make? Seven sequences in four shards, on a tiny model.

`Recipe` is what a worker of another process unpickles to make the same work.
"""

import hashlib
import os
import signal
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformer_lens.model_bridge import TransformerBridge

from ffnprobe.corpus import Tokens
from ffnprobe.errors import InputError
from ffnprobe.models import load_model, plain
from ffnprobe.run import run
from ffnprobe.shards import MERGED, Maker, Work
from ffnprobe.statistics import Count, FiringRate, Moments, TopActivations
from ffnprobe.stream import Probe

LENGTH = 16
SHARDS = 4


def tokens_of(model: TransformerBridge, sequences: int = 5, seed: int = 0) -> Tokens:
    """Random ids; documents of 10 tokens that begin with the special id 0."""
    n = sequences * LENGTH
    vocabulary = plain(model).get_input_embeddings().weight.shape[0]
    ids = torch.randint(1, vocabulary, (n,), generator=torch.Generator().manual_seed(seed))
    special = torch.arange(n) % 10 == 0
    ids[special] = 0
    document = torch.arange(n) // 10
    return Tokens(ids.view(-1, LENGTH), document.view(-1, LENGTH), special.view(-1, LENGTH), {})


def work_of(model: TransformerBridge, sequences: int = 7, seed: int = 0, **changes) -> Work:
    top = partial(TopActivations.about, k=3, by_magnitude=True)
    probes = {
        "0/post": Probe(0, "post", Moments.about),
        "1/in": Probe(1, "in", Moments.about, block=(1, 2)),
        "1/top": Probe(1, "post", top),
        "1/rate": Probe(1, "pre", FiringRate.about),
        "1/dropped": Probe(1, "in", Count.about, kinds=("sink", "special")),
    }
    plan = {"batch": 2, "shard": 2 * LENGTH} | changes
    return Work(model, tokens_of(model, sequences, seed), probes, **plan)


@dataclass(frozen=True)
class Recipe:
    folder: Path

    def __call__(self, say) -> Work:
        return work_of(load_model(self.folder, device="cpu"))


@dataclass(frozen=True)
class Deadly(Recipe):
    """A worker made from this is killed at its second shard, `lives` times in all."""

    marks: Path
    lives: int

    def __call__(self, say):
        made = Maker.__call__

        def make(maker: Maker, shard: int):
            if shard > 1 and len(list(self.marks.iterdir())) < self.lives:
                (self.marks / str(os.getpid())).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return made(maker, shard)

        if self.marks.exists():  # in a worker; the parent makes the folder when its own work is ready
            Maker.__call__ = make
        return super().__call__(say)


@dataclass(frozen=True)
class Refusing(Recipe):
    parent: int

    def __call__(self, say):
        if os.getpid() != self.parent:
            raise InputError("not here: go elsewhere")
        return super().__call__(say)


def sha256(folder: Path, name: str = MERGED) -> str:
    return hashlib.sha256((folder / name).read_bytes()).hexdigest()


def go(folder: Path, work, **options):
    """The outcome of a run, and what it said."""
    said: list[str] = []
    with run(folder, lambda say: work, say=said.append, **options) as (_, outcome):
        return outcome, said

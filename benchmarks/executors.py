"""Do workers that share the cores cost throughput? The same run under every executor.

python benchmarks/executors.py [--tokens N] [--rounds N] [--executors inline process ray]
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench import load, machine, seconds, table, tokens_for

from ffnprobe import manifest
from ffnprobe.executors import executor_of
from ffnprobe.forward import choose_layers
from ffnprobe.run import run
from ffnprobe.shards import PILOT, Work
from ffnprobe.statistics import Moments
from ffnprobe.stream import Probe

KINDS = ("inline", "process", "ray")


@dataclass(frozen=True)
class Recipe:
    """Every rank of h in all layers of SmolLM2-135M; what a worker makes its work from."""

    tokens: int

    def __call__(self, say: Callable[[str], None]) -> Work:
        model = load("smollm2-135m")
        probes = {f"{tap.layer}": Probe(tap.layer, "post", Moments.about) for tap in choose_layers(model)}
        return Work(model, tokens_for(model, self.tokens), probes, shard=2048)


def measure(kind: str, tokens: int) -> tuple[float, float]:
    """Tokens a second while shards are computed, and seconds of the whole run."""
    workers = 1 if kind == "inline" else len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:

        def whole(_: int) -> None:
            with run(folder, Recipe(tokens), executor=executor_of(kind, workers)):
                pass

        taken = seconds(whole, 0)
        shards = [entry for name, (entry, *_) in manifest.read(Path(folder)).items() if name != PILOT]
    return tokens * workers / sum(entry.seconds for entry in shards), taken


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--tokens", type=int, default=16_384)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--executors", nargs="+", choices=KINDS, default=KINDS)
    given = arguments.parse_args()
    print(machine())
    print(f"\nsmollm2-135m, covariance of h in all layers, {given.tokens:,} tokens, {given.rounds} rounds\n")
    rounds = [{kind: measure(kind, given.tokens) for kind in given.executors} for _ in range(given.rounds)]
    rows = []
    for kind in given.executors:
        rate = median(each[kind][0] for each in rounds)
        ratio = median(each[kind][0] / each[given.executors[0]][0] for each in rounds)
        rows.append([kind, f"{rate:.0f}", f"{ratio:.2f}", f"{median(each[kind][1] for each in rounds):.0f}"])
    head = ("executor", "tokens a second", f"ratio to {given.executors[0]}", "seconds of the whole run")
    print(table(head, rows))


if __name__ == "__main__":
    main()

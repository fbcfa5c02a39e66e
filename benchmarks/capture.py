"""What does it cost to measure while the model runs? Ratios to the bare forward pass, all layers at once.

python benchmarks/capture.py [--model smollm2-135m|gpt2-random] [--rounds N] [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from bench import BATCH, LENGTH, MODELS, Run, load, machine, ratios, table, tokens_for
from torch import Tensor

from ffnprobe.forward import choose_layers, forward
from ffnprobe.models import Model, plain
from ffnprobe.statistics import CoActivation, FiringRate, Marginals, Moments, Statistic, TopActivations
from ffnprobe.stream import Probe, collect_rows, pilot

Make = Callable[[Tensor], Statistic]

# each row of the table adds to the row before; the limits are those of smollm2-135m and of GPT-2 small
RUNGS: dict[str, tuple[dict[str, Make], tuple[float, float]]] = {
    "mean, variance, third and fourth moments, firing rate": (
        {"marginals": Marginals.about, "rate": FiringRate.about},
        (1.08, 1.08),
    ),
    "+ top 20 tokens of every neuron": ({"top": TopActivations.about}, (1.15, 1.15)),
    "+ second moment of h": ({"moments": Moments.about}, (1.45, 1.85)),
    "+ co-activation counts": ({"co-activation": CoActivation.about}, (1.60, 2.20)),
}
NOTHING = "hooks that do nothing"


def bare(model: Model, ids: Sequence[Tensor]) -> Run:
    """The forward pass of the Hugging Face base model and nothing else."""
    network: Any = plain(model).base_model

    def run(round_: int) -> None:
        with torch.inference_mode():
            network(input_ids=ids[round_], use_cache=False)

    return run


def runs_of(model: Model, ids: Sequence[Tensor]) -> dict[str, Run]:
    """ffnprobe at every rung, all layers at once."""
    chosen = choose_layers(model)

    def hooks(round_: int) -> None:
        forward(model, ids[round_], chosen, lambda tap, read: None)

    runs: dict[str, Run] = {NOTHING: hooks}
    makes: dict[str, Make] = {}
    for rung, (more, _) in RUNGS.items():
        makes = makes | more
        runs[rung] = collecting(
            model,
            len(ids),
            {
                f"{name}/{tap.layer}": Probe(tap.layer, "post", make)
                for tap in chosen
                for name, make in makes.items()
            },
        )
    return runs


def collecting(model: Model, batches: int, probes: dict[str, Probe]) -> Run:
    """One batch of a pass that has begun."""
    tokens = tokens_for(model, batches * BATCH * LENGTH)
    start, rows = pilot(model, tokens, probes), torch.arange(len(tokens.ids)).split(BATCH)
    return lambda round_: collect_rows(model, tokens, probes, start, rows[round_], batch=BATCH)


def today(model: Model, ids: Sequence[Tensor]) -> dict[str, Run]:
    """The ways that transformer_lens offers."""

    def hooked(round_: int) -> None:
        with torch.inference_mode():
            model.run_with_hooks(
                ids[round_], fwd_hooks=[(lambda name: name.endswith("hook_post"), lambda value, hook: None)]
            )

    def cached(round_: int) -> None:
        with torch.inference_mode():
            model.run_with_cache(ids[round_])

    return {"run_with_hooks, doing nothing": hooked, "run_with_cache of everything": cached}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--model", choices=MODELS, action="append")
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--dtype", default="float32")
    given = arguments.parse_args()
    limits: dict[str, Sequence[object]] = {NOTHING: (1.05, 1.05)}
    limits |= {rung: limit for rung, (_, limit) in RUNGS.items()}
    print(machine())
    for name in given.model or MODELS:
        model = load(name, given.dtype)
        packed = tokens_for(model, (given.rounds + 1) * BATCH * LENGTH)
        ids = packed.ids.to(plain(model).device).split(BATCH)

        print(f"\n{name} in {given.dtype}, {given.rounds} rounds of {BATCH} x {LENGTH} tokens")
        print("ratio to the bare forward pass\n")
        rows = [
            [what, f"{middle:.2f}", f"{low:.2f} to {high:.2f}", limits.get(what, ["", ""])[MODELS.index(name)]]
            for runs in (runs_of(model, ids), today(model, ids))
            for what, (low, middle, high) in ratios(given.rounds, bare(model, ids), runs).items()
        ]
        print(table(("what is computed", "median", "quartiles", "at most"), rows), flush=True)


if __name__ == "__main__":
    main()

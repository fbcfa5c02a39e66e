"""What does it cost to measure while the model runs? Ratios to the bare forward pass, all layers at once.

python benchmarks/capture.py [--model smollm2-135m|gpt2-random] [--rounds N]
"""

from __future__ import annotations

import argparse

import torch
from common import BATCH, LENGTH, MODELS, load, machine, ratios, table, tokens_for

from ffnprobe.forward import choose_layers, forward
from ffnprobe.models import Model, plain
from ffnprobe.statistics import CoActivation, FiringRate, Marginals, Moments, TopActivations
from ffnprobe.stream import Probe, collect_rows, pilot

# each row of the table adds to the row before; the limits are those of smollm2-135m and of GPT-2 small
RUNGS = {
    "mean, variance, third and fourth moments, firing rate": ((Marginals, FiringRate), (1.08, 1.08)),
    "+ top 20 tokens of every neuron": ((TopActivations,), (1.15, 1.15)),
    "+ second moment of h": ((Moments,), (1.45, 1.85)),
    "+ co-activation counts": ((CoActivation,), (1.60, 2.20)),
}
NOTHING = "hooks that do nothing"


def measure(model: Model, rounds: int) -> dict[str, tuple[float, float, float]]:
    """Ratios of every rung, one batch of 8 x 256 tokens a round."""
    tokens = tokens_for(model, (rounds + 1) * BATCH * LENGTH)
    batches = torch.arange(len(tokens.ids)).split(BATCH)
    chosen, network = choose_layers(model), plain(model).base_model

    def bare(round_: int) -> None:
        with torch.inference_mode():
            network(input_ids=tokens.ids[batches[round_]], use_cache=False)

    runs = {NOTHING: lambda round_: forward(model, tokens.ids[batches[round_]], chosen, lambda tap, read: None)}
    kinds: tuple[type, ...] = ()
    for name, (more, _) in RUNGS.items():
        kinds += more
        probes = {
            f"{kind.__name__}/{tap.layer}": Probe(tap.layer, "post", kind.about)
            for tap in chosen
            for kind in kinds
        }
        start = pilot(model, tokens, probes)
        runs[name] = lambda round_, probes=probes, start=start: collect_rows(
            model, tokens, probes, start, batches[round_], batch=BATCH
        )
    return ratios(rounds, bare, runs)


def measure_today(model: Model, rounds: int) -> dict[str, tuple[float, float, float]]:
    """Ratios of the ways that transformer_lens offers, on the same batches."""
    tokens = tokens_for(model, (rounds + 1) * BATCH * LENGTH)
    batches = tokens.ids.split(BATCH)

    def bare(round_: int) -> None:
        with torch.inference_mode():
            plain(model).base_model(input_ids=batches[round_], use_cache=False)

    def hooked(round_: int) -> None:
        with torch.inference_mode():
            model.run_with_hooks(batches[round_], fwd_hooks=[(is_post, lambda value, hook: None)])

    def cached(round_: int) -> None:
        with torch.inference_mode():
            model.run_with_cache(batches[round_])

    def is_post(name: str) -> bool:
        return name.endswith("hook_post")

    return ratios(rounds, bare, {"run_with_hooks, doing nothing": hooked, "run_with_cache of everything": cached})


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--model", choices=MODELS, action="append")
    arguments.add_argument("--rounds", type=int, default=7)
    given = arguments.parse_args()
    limits = {NOTHING: (1.05, 1.05)} | {name: limit for name, (_, limit) in RUNGS.items()}
    print(machine())
    for name in given.model or MODELS:
        model = load(name)
        found = measure(model, given.rounds)
        rows = [
            [what, f"{middle:.2f}", f"{low:.2f} to {high:.2f}", limits[what][MODELS.index(name)]]
            for what, (low, middle, high) in found.items()
        ]
        print(f"\n{name}, {given.rounds} rounds of {BATCH} x {LENGTH} tokens\n")
        print(table(("what is computed", "median ratio", "quartiles", "at most"), rows), flush=True)
        today = measure_today(model, min(given.rounds, 3))
        rows = [[what, f"{middle:.2f}", f"{low:.2f} to {high:.2f}"] for what, (low, middle, high) in today.items()]
        print()
        print(table(("what users do today", "median ratio", "quartiles"), rows), flush=True)


if __name__ == "__main__":
    main()

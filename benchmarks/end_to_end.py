"""How long from a model to every rank of h, and in how much memory, beside the way it is done today?

Today's way: run_with_cache, keep every layer's hidden activation, concatenate, numpy's covariance, SVD.

python benchmarks/end_to_end.py [--tokens N] [--rounds N]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

import numpy as np
import torch
from bench import BATCH, forget_peak, load, machine, resident, table, tokens_for

from ffnprobe.forward import choose_layers
from ffnprobe.models import plain
from ffnprobe.spectrum import eigenvalues, participation_ratio, soft_rank
from ffnprobe.statistics import CoActivation, FiringRate, Marginals, Moments, TopActivations
from ffnprobe.stream import Probe, collect

WAYS = ("bare", "streamed", "full", "cached")


def bare(model, tokens) -> list[float]:
    """The forward pass and nothing else."""
    with torch.inference_mode():
        for ids in tokens.ids.split(BATCH):
            plain(model).base_model(input_ids=ids, use_cache=False)
    return []


def streamed(model, tokens) -> list[float]:
    """ffnprobe: sinks set apart, the covariance summed while the forward pass runs."""
    probes = {f"{tap.layer}": Probe(tap.layer, "post", Moments.about) for tap in choose_layers(model)}
    spectra = (eigenvalues(moments.compute().centred) for moments in collect(model, tokens, probes).values())
    return [rank(spectrum) for spectrum in spectra for rank in (participation_ratio, soft_rank)]


def full(model, tokens) -> list[float]:
    """ffnprobe with everything that it can sum of h; the bytes of the sums are said beside the peak."""
    kinds = (Marginals, FiringRate, TopActivations, Moments, CoActivation)
    probes = {
        f"{kind.__name__}/{tap.layer}": Probe(tap.layer, "post", kind.about)
        for tap in choose_layers(model)
        for kind in kinds
    }
    collected = collect(model, tokens, probes).values()
    return [sum(tensor.nbytes for statistic in collected for tensor in statistic.tensors().values()) / 2**20]


def cached(model, tokens) -> list[float]:
    """What a user of transformer_lens writes today: every layer kept, then numpy."""
    kept: dict[int, list[np.ndarray]] = {layer: [] for layer in range(len(model.blocks))}
    for ids in tokens.ids.split(BATCH):
        with torch.inference_mode():
            _, cache = model.run_with_cache(ids, names_filter=lambda name: name.endswith("hook_post"))
        for layer in kept:
            kept[layer].append(cache["post", layer].flatten(0, 1).numpy().copy())
    found = []
    for layer in list(kept):
        covariance = np.cov(np.concatenate(kept.pop(layer)), rowvar=False)
        spectrum = torch.from_numpy(np.linalg.svd(covariance, compute_uv=False))
        found += [participation_ratio(spectrum), soft_rank(spectrum)]
    return found


def child(way: str, tokens: int, name: str) -> None:
    """One measurement in a process of its own, whose peak memory is its own."""
    model = load(name)
    packed = tokens_for(model, tokens)
    with torch.inference_mode():
        plain(model).base_model(input_ids=packed.ids[:1], use_cache=False)
    before, started = resident(), time.perf_counter()
    forget_peak()
    answer = globals()[way](model, packed)
    found = {"seconds": time.perf_counter() - started, "peak": resident("VmHWM") - before}
    print(json.dumps(found | {"sums": answer[0] if way == "full" else None}))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--tokens", type=int, action="append")
    arguments.add_argument("--rounds", type=int, default=1)
    arguments.add_argument("--model", default="smollm2-135m")
    arguments.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    arguments.add_argument("--child", help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.child:
        child(given.child, given.tokens[0], given.model)
        return
    print(machine())
    print(f"\n{given.model}, participation ratio and soft rank of h in all layers\n")
    rows = []
    for tokens in given.tokens or (16_384,):
        for _ in range(given.rounds):
            for way in given.ways:
                command = [
                    sys.executable,
                    __file__,
                    "--child",
                    way,
                    "--tokens",
                    str(tokens),
                    "--model",
                    given.model,
                ]
                found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
                sums = "" if found["sums"] is None else f"{found['sums']:,.0f}"
                rows.append([way, f"{tokens:,}", f"{found['seconds']:.1f}", f"{found['peak'] / 2**20:,.0f}", sums])
    print(table(("way", "tokens", "seconds", "MiB beyond the model", "MiB of them sums"), rows))


if __name__ == "__main__":
    main()

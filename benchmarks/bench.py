"""What do the benchmarks share? Models, tokens, a fair clock and a table."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import ffnprobe as fp
from ffnprobe.corpus import Tokens
from ffnprobe.models import Model, plain

Run = Callable[[int], object]  # of one round

MODELS = ("smollm2-135m", "gpt2-random")
BATCH, LENGTH = 8, 256


def load(name: str, dtype: str = "float32") -> Model:
    """SmolLM2-135M, or GPT-2 small with random weights and the same tokenizer; on the GPU if there is one."""
    smollm2 = fp.load_model("smollm2-135m", dtype=dtype)
    if name == "smollm2-135m":
        return smollm2
    torch.manual_seed(0)
    random: Any = GPT2LMHeadModel(GPT2Config())
    random.to(plain(smollm2).device, plain(smollm2).dtype)
    return fp.load_model(random, tokenizer=fp.tokenizer_of(smollm2))


def tokens_for(model: Model, tokens: int) -> Tokens:
    """The built-in corpus in sequences of 256 tokens."""
    return fp.pack(fp.load_corpus(), fp.tokenizer_of(model), tokens=tokens, length=LENGTH)


def ratios(rounds: int, against: Run, runs: Mapping[str, Run]) -> dict[str, tuple[float, float, float]]:
    """Lower quartile, median and upper quartile of each run's time over that of `against`.

    In each round each run is timed between two of `against`, so that drift of the machine meets both. A round
    before the first is not counted.
    """
    found: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(-1, rounds):
        before = seconds(against, round_)
        for name, run in runs.items():
            taken = seconds(run, round_)
            after = seconds(against, round_)
            found[name] += [2 * taken / (before + after)] if round_ >= 0 else []
            before = after
    quartiles = {name: quantiles(each, n=4, method="inclusive") for name, each in found.items()}
    return {name: (low, middle, high) for name, (low, middle, high) in quartiles.items()}


def seconds(run: Run, round_: int) -> float:
    """How long it takes; on a GPU by its own clock, and what was asked of it before is not counted."""
    if not torch.cuda.is_available():
        started = time.perf_counter()
        run(round_)
        return time.perf_counter() - started
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    first.record()
    run(round_)
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1000


def resident(which: str = "VmRSS") -> int:
    """Resident memory of this process in bytes, now or (VmHWM) at its peak. Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(which))


def forget_peak() -> None:
    """Let the peak start from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def machine() -> str:
    """What the numbers were measured on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    return f"{gpu}{cpu}, {torch.get_num_threads()} threads, {versions}"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)

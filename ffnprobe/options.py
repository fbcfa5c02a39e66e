"""What may be written on the command line, and what does it mean?"""

import re
from collections.abc import Callable
from functools import wraps
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import InputError

if TYPE_CHECKING:  # heavy
    from .executors import Executor
    from .report.settings import Settings

Model = Annotated[
    str,
    typer.Argument(
        help="A hub id (gpt2, or ID@REVISION), a folder, a .gguf file, smollm2-135m, or a tiny model that comes "
        "with ffnprobe (tiny-x4).",
        show_default=False,
    ),
]
Tokens = Annotated[int, typer.Option(help="Tokens to run.", min=16)]
Layers = Annotated[str | None, typer.Option(help="Layers, as in 0,3-5. All by default.")]
Corpus = Annotated[
    str | None, typer.Option(help="A .txt, .jsonl or .parquet file. The built-in corpus by default.")
]
Dataset = Annotated[str | None, typer.Option(help="A data set of the hub instead.")]
Seed = Annotated[int, typer.Option(help="Of the document sample and of every null.", min=0, max=2**31)]
SinkFactor = Annotated[float, typer.Option(help="A sink's norm is above this many times the median.", min=1.0)]
Out = Annotated[Path | None, typer.Option(help="The run folder; runs/NAME by default.")]
Nonfinite = Annotated[str, typer.Option(help="At a NaN or Inf: stop, or skip its token.")]
Batch = Annotated[int, typer.Option(help="Sequences a forward pass.", min=1)]
Shard = Annotated[
    int | None, typer.Option(help="Tokens a shard: what a crash may cost. 8,192 or more by default.", min=1)
]
ExecutorName = Annotated[str, typer.Option("--executor", help="inline, process, rank (torchrun, SLURM) or ray.")]
Budget = Annotated[
    str, typer.Option(help="Memory for covariances, as in 4GiB or 500MB; above it wide layers are sketched.")
]
Dtype = Annotated[str, typer.Option(help="Of the weights: float32, bfloat16 or float16.")]
DeviceMap = Annotated[
    str | None, typer.Option(help="How to spread a model larger than one GPU: auto. On one device by default.")
]
Only = Annotated[str | None, typer.Option(help="Analyzers to run, as in memories,knockout. All by default.")]
Skip = Annotated[str | None, typer.Option(help="Analyzers to leave out.")]
Workers = Annotated[int, typer.Option(help="Processes that share the cores.", min=1)]


def run_of(
    model: Model,
    tokens: Tokens = 16_384,
    layers: Layers = None,
    corpus: Corpus = None,
    dataset: Dataset = None,
    out: Out = None,
    seed: Seed = 0,
    sink_factor: SinkFactor = 10.0,
    nonfinite: Nonfinite = "stop",
    batch: Batch = 8,
    shard: Shard = None,
    budget: Budget = "4GiB",
    dtype: Dtype = "float32",
    device_map: DeviceMap = None,
    only: Only = None,
    skip: Skip = None,
    executor: ExecutorName = "inline",
    workers: Workers = 2,
) -> "tuple[Settings, Path, Executor]":
    """What a report is made with, where it is kept, and what runs it."""
    from .executors import executor_of
    from .report.analyses import choose_analyzers
    from .report.settings import Settings

    settings = Settings(
        model,
        tokens,
        parse_layers(layers),
        corpus,
        dataset,
        seed,
        sink_factor,
        nonfinite,
        batch,
        shard,
        parse_size(budget),
        dtype,
        device_map,
        choose_analyzers(only, skip),
    )
    return settings, out or folder_of(model), executor_of(executor, workers)


def takes_run_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of `run_of`; it is called with all of them by name."""

    @wraps(command)
    def run(**options: Any) -> None:
        command(**options)

    options = signature(run_of).replace(return_annotation=None)
    run.__signature__ = options  # type: ignore[attr-defined]
    run.__annotations__ = {name: option.annotation for name, option in options.parameters.items()}
    return run


def parse_layers(text: str | None) -> tuple[int, ...] | None:
    """The layers that `0,3-5` names, in order; None for all.

    Raises:
        InputError: it is not written so.
    """
    if text is None:
        return None
    chosen: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise InputError(f"layers {text!r} are not understood: write them as in 0,3-5")
        if dash and int(last) < int(first):
            raise InputError(f"layers {text!r} count down: write {last}-{first}")
        chosen |= set(range(int(first), int(last or first) + 1))
    return tuple(sorted(chosen))


def folder_of(model: str) -> Path:
    """Where the run of a model is kept, if nothing else is said."""
    path = Path(model)
    if path.exists():
        return Path("runs") / path.resolve().name
    name, at, revision = model.partition("@")
    return Path("runs") / (Path(name).name + at + revision.replace("/", "-"))


def parse_size(text: str) -> int:
    """The bytes that `4GiB` or `500MB` names.

    Raises:
        InputError: it is not written so.
    """
    units = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if not found:
        raise InputError(f"size {text!r} is not understood: write it as in 4GiB or 500MB")
    number, unit, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** units[unit.upper()])


def parse_neuron(text: str) -> tuple[int, int]:
    """The layer and the neuron that `5.123` names.

    Raises:
        InputError: it is not written so.
    """
    layer, dot, index = text.partition(".")
    if not (dot and layer.isdecimal() and index.isdecimal()):
        raise InputError(f"neuron {text!r} is not understood: write layer.neuron, as in 5.123")
    return int(layer), int(index)

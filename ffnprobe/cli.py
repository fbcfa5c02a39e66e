"""The command line: each command reads its input, calls one function and prints."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import FFNProbeError, InputError, ModelRefused

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Measure what the feed-forward layers of a pretrained transformer do.",
)

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


@app.callback()
def options(
    debug: Annotated[bool, typer.Option(help="Show the traceback of an error.")] = False,
    threads: Annotated[int, typer.Option(help="Threads; all cores by default.", min=0)] = 0,
) -> None:
    # debug is read in main, which catches what a command raises
    if threads:
        for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            os.environ[variable] = str(threads)  # read when torch and numpy are first imported


@app.command()
def report(
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
) -> None:
    """Measure a model's feed-forward layers and write tables, figures and report.html.

    The same command again goes on where it stopped. A run folder in the place of MODEL is drawn again from
    what it holds, without the model.
    """
    from .report.build import build_report, render_run

    with _progress() as show:
        if (Path(model) / "run.json").exists():
            folder = Path(model)
            findings = render_run(folder)
        else:
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
            folder = out or _folder(model)
            where = executor_of(executor, workers)
            findings = build_report(settings, folder, where, say=show.say, progress=show.step)
    if not findings:
        return  # another rank tells
    typer.echo()
    for finding in findings:
        typer.echo(f"* {finding}")
    typer.echo(f"\nopen {folder / 'report.html'}")


@app.command()
def plan(
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
) -> None:
    """Say what memory, disk and time a report with these options will take, from one timed batch.

    Ends with 4 where the machine has less memory or disk.
    """
    started = time.perf_counter()
    from .executors import executor_of
    from .report.analyses import choose_analyzers
    from .report.plan import plan_report
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
    planned = plan_report(settings, out or _folder(model), executor_of(executor, workers), _say, started)
    for line in planned.lines():
        typer.echo(line)
    planned.check()


@app.command()
def check(model: Model, dtype: Dtype = "float32", device_map: DeviceMap = None) -> None:
    """Check that every layer obeys its equations, and say which analyzers apply."""
    from rich.console import Console
    from rich.table import Table

    from .models import check_model, describe, load_model
    from .report.analyses import ANALYSES

    loaded = load_model(model, dtype=dtype, device_map=device_map, say=_say, refuse=False)
    checked = check_model(loaded)
    frame = checked.to_frame()
    table = Table(box=None)
    for name in frame.columns:
        table.add_column(name)
    for line in frame.itertuples(index=False):
        table.add_row(*(f"{cell:.1e}" if isinstance(cell, float) else str(cell) for cell in line))
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    console.print(f"logits against Hugging Face's: {checked.logits:.1e}")
    if note := describe(loaded)["note"]:
        console.print(str(note))
    if not checked.ok:
        raise ModelRefused(f"{model} failed the self-check: {checked.problems[0]}: choose another model")
    refused = {name: reason for name, analysis in ANALYSES.items() if (reason := analysis.why_not(loaded))}
    console.print(f"these analyzers apply: {', '.join(name for name in ANALYSES if name not in refused)}")
    for name, reason in refused.items():
        console.print(f"not {name}: {reason}", markup=False)


@app.command()
def fetch(name: Annotated[str, typer.Argument(help="A built-in model.")] = "smollm2-135m") -> None:
    """Get a built-in model, once, and say where it is. The tiny models (tiny-x4) come with ffnprobe."""
    from .models import fetch as fetch_model

    typer.echo(fetch_model(name, say=_say))


@app.command()
def neuron(
    model: Model,
    name: Annotated[str, typer.Argument(metavar="L.I", help="Layer and neuron, as in 5.123.", show_default=False)],
    tokens: Tokens = 16_384,
    corpus: Corpus = None,
    seed: Seed = 0,
    dtype: Dtype = "float32",
    device_map: DeviceMap = None,
) -> None:
    """Show one neuron: what triggers its key, and what its value writes."""
    layer, index = _neuron(name)
    from rich.console import Console

    from .analyzers import memories
    from .corpus import LENGTH, load_corpus, pack
    from .models import context_length, ffns, load_model, tokenizer_of
    from .report.build import card
    from .report.card import card_text

    loaded = load_model(model, dtype=dtype, device_map=device_map, say=_say)
    widths = {ffn.layer: ffn.d_mlp for ffn in ffns(loaded)}
    if index >= widths.get(layer, index + 1):
        raise InputError(f"neuron {index} is not there: layer {layer} has neurons 0 to {widths[layer] - 1}")
    length = min(LENGTH, context_length(loaded))
    packed = pack(load_corpus(corpus), tokenizer_of(loaded), tokens=tokens, length=length, seed=seed)
    with _progress() as show:
        result = memories(loaded, packed, layers=[layer], triggers=10, seed=seed, progress=show.step)
    Console().print(card_text(card(result.rows[index])))


def main() -> None:
    """Run the command line; an error is one line and an exit code."""
    debug = "--debug" in sys.argv
    try:
        with _stoppable():
            code = app(standalone_mode=False)
        if code == 130:  # typer makes an exit of an interrupt
            raise _Stopped(code)
        sys.exit(code or 0)
    except FFNProbeError as error:
        _fail(str(error), error.exit_code, debug)
    except typer.Abort:
        sys.exit(130)
    except _Stopped as stopped:
        _fail(
            "interrupted: a report keeps its finished shards, the same command goes on", stopped.code, debug=False
        )
    except MemoryError:
        _fail("out of memory: run fewer layers with --layers", 4, debug)
    except Exception as error:
        if hasattr(error, "exit_code"):  # click's own: a usage error, or an exit
            if hasattr(error, "show"):
                error.show()
            sys.exit(error.exit_code)
        if debug:
            raise
        _fail(f"{type(error).__name__}: {error} (a bug: please report it, with --debug)", 1, debug)


class _Stopped(BaseException):
    """Ctrl-C or SIGTERM; not a KeyboardInterrupt, which typer turns into a plain return."""

    def __init__(self, code: int) -> None:
        self.code = code


@contextmanager
def _stoppable() -> Iterator[None]:
    def stop(number: int, frame: object) -> None:
        raise _Stopped(128 + number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _fail(message: str, code: int, debug: bool) -> None:
    if debug:
        raise
    typer.echo(f"ffnprobe: {' '.join(message.split())}", err=True)
    sys.exit(code)


def _say(line: str) -> None:
    typer.echo(line, err=True)


class _Plain:
    """Progress for a log: a line a tenth."""

    def __init__(self) -> None:
        self.tenth = 0

    say = staticmethod(_say)

    def step(self, done: int, total: int) -> None:
        if done * 10 // total > self.tenth:
            self.tenth = done * 10 // total
            _say(f"  {done:,} of {total:,} tokens")


class _Bar:
    """Progress for a terminal."""

    def __init__(self, progress: Any) -> None:
        self.progress, self.task = progress, None

    def say(self, line: str) -> None:
        self.progress.console.print(line, markup=False, highlight=False)

    def step(self, done: int, total: int) -> None:
        if self.task is None:
            self.task = self.progress.add_task("tokens", total=total)
        self.progress.update(self.task, completed=done)


@contextmanager
def _progress() -> Iterator[_Plain | _Bar]:
    if not sys.stderr.isatty():
        yield _Plain()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield _Bar(progress)


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


def _folder(model: str) -> Path:
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


def _neuron(text: str) -> tuple[int, int]:
    layer, dot, index = text.partition(".")
    if not (dot and layer.isdecimal() and index.isdecimal()):
        raise InputError(f"neuron {text!r} is not understood: write layer.neuron, as in 5.123")
    return int(layer), int(index)

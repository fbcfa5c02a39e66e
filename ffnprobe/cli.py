"""The command line: each command reads its input, calls one function and prints."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import FFNProbeError, InputError, ModelRefused
from .options import Corpus, DeviceMap, Dtype, Model, Seed, Tokens, parse_neuron, run_of, takes_run_options
from .progress import progress, say

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Measure what the feed-forward layers of a pretrained transformer do.",
)


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
@takes_run_options
def report(**options: Any) -> None:
    """Measure a model's feed-forward layers and write tables, figures and report.html.

    The same command again goes on where it stopped. A run folder in the place of MODEL is drawn again from
    what it holds, without the model.
    """
    from .report.build import build_report, render_run

    with progress() as show:
        if (Path(options["model"]) / "run.json").exists():
            folder = Path(options["model"])
            findings = render_run(folder)
        else:
            settings, folder, executor = run_of(**options)
            findings = build_report(settings, folder, executor, say=show.say, progress=show.step)
    if not findings:
        return  # another rank tells
    typer.echo()
    for finding in findings:
        typer.echo(f"* {finding}")
    typer.echo(f"\nopen {folder / 'report.html'}")


@app.command()
@takes_run_options
def plan(**options: Any) -> None:
    """Say what memory, disk and time a report with these options will take, from one timed batch.

    Ends with 4 where the machine has less memory or disk.
    """
    started = time.perf_counter()
    from .report.plan import plan_report

    planned = plan_report(*run_of(**options), say, started)
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

    loaded = load_model(model, dtype=dtype, device_map=device_map, say=say, refuse=False)
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

    typer.echo(fetch_model(name, say=say))


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
    layer, index = parse_neuron(name)
    from rich.console import Console

    from .analyzers import memories
    from .corpus import LENGTH, load_corpus, pack
    from .models import context_length, ffns, load_model, tokenizer_of
    from .report.build import card
    from .report.card import card_text

    loaded = load_model(model, dtype=dtype, device_map=device_map, say=say)
    widths = {ffn.layer: ffn.d_mlp for ffn in ffns(loaded)}
    if index >= widths.get(layer, index + 1):
        raise InputError(f"neuron {index} is not there: layer {layer} has neurons 0 to {widths[layer] - 1}")
    length = min(LENGTH, context_length(loaded))
    packed = pack(load_corpus(corpus), tokenizer_of(loaded), tokens=tokens, length=length, seed=seed)
    with progress() as show:
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

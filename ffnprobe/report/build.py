"""From a model's name to a run folder: load, collect once, analyse, write."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from shlex import quote
from typing import Any

import torch

from ..analyzers import Memories, hidden_rank, memories, neuron_clusters, weight_rank
from ..analyzers.hidden_rank import check_documents
from ..analyzers.hidden_rank import probes as rank_probes
from ..analyzers.memories import Row as Memory
from ..analyzers.memories import probes as memory_probes
from ..corpus import LENGTH, Tokens, load_corpus, load_dataset_corpus, pack
from ..disk import atomic_write, make_folder
from ..errors import InputError
from ..ffn import FFN
from ..figure import save_figure
from ..models import Model, context_length, describe, ffns, load_model, tokenizer_of, why_illegible
from ..result import Result
from ..stream import SINK_FACTOR, choose_layers, collect
from .card import NeuronCard
from .page import About, top_findings, write_page

LIBRARIES = ("ffnprobe", "torch", "transformers", "transformer-lens", "scikit-learn", "numpy")
CARDS = 32  # neurons of each layer in the page's browser; the table has them all


@dataclass(frozen=True)
class Settings:
    """Everything that decides what a report says; written to run.json."""

    model: str
    tokens: int = 16_384
    layers: tuple[int, ...] | None = None
    corpus: str | None = None
    dataset: str | None = None
    seed: int = 0
    sink_factor: float = SINK_FACTOR

    def command(self, out: str) -> str:
        """The command line that makes this report again."""
        options = [f"--tokens {self.tokens}"] if self.tokens != Settings.tokens else []
        options += [f"--layers {','.join(map(str, self.layers))}"] if self.layers is not None else []
        options += [f"--{name} {quote(value)}" for name in ("corpus", "dataset") if (value := getattr(self, name))]
        options += [f"--seed {self.seed}"] if self.seed else []
        options += [f"--sink-factor {self.sink_factor:g}"] if self.sink_factor != SINK_FACTOR else []
        return " ".join(["ffnprobe report", quote(self.model), *options, f"--out {quote(out)}"])


def build_report(
    settings: Settings,
    out: str | Path,
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Measure everything and write `out`: run.json, tables/, figures/, report.html.

    Returns:
        The three most telling findings.

    Raises:
        InputError, ModelRefused, MachineError: as load_model, load_corpus and the disk do; and InputError
            where `out` holds the report of another model or of other settings.
    """
    started = time.perf_counter()
    out = make_folder(out)
    _refuse_other_run(out, settings)
    say(f"loading {settings.model}")
    model = load_model(settings.model, say=say)
    chosen = {tap.layer for tap in choose_layers(model, settings.layers)}
    measured = [ffn for ffn in ffns(model) if ffn.layer in chosen]
    corpus = load_dataset_corpus(settings.dataset) if settings.dataset else load_corpus(settings.corpus)
    length = min(LENGTH, context_length(model))
    tokens = pack(corpus, tokenizer_of(model), tokens=settings.tokens, length=length, seed=settings.seed)
    check_documents(tokens)
    say(f"running {len(measured)} layers over {tokens.n:,} tokens of {tokens.n_documents:,} documents")
    results = _measure(model, tokens, measured, settings, say, progress)

    say("writing tables, figures and the page")
    for result in results:
        result.save(out / "tables" / f"{result.name}.parquet")
        save_figure(result.plot(), out / "figures" / result.name)
    versions = {library: version(library) for library in LIBRARIES} | {"python": platform.python_version()}
    run: dict[str, Any] = {
        "settings": asdict(settings),
        "model": describe(model),
        "corpus": {"name": corpus.name, "sha256": corpus.sha256},
    }
    run |= {"packing": tokens.settings, "versions": versions, "threads": torch.get_num_threads()}
    atomic_write(out / "run.json", lambda file: file.write_text(json.dumps(run, indent=2) + "\n"))
    about = About(
        model=describe(model),
        corpus=corpus.name,
        tokens=tokens.n,
        documents=tokens.n_documents,
        seed=settings.seed,
        command=settings.command(str(out)),
        seconds=time.perf_counter() - started,
        versions=versions,
    )
    neurons = [card for result in results if isinstance(result, Memories) for card in cards(result.rows)]
    write_page(out / "report.html", about, results, neurons)
    return top_findings(results)


def _measure(
    model: Model,
    tokens: Tokens,
    measured: Sequence[FFN],
    settings: Settings,
    say: Callable[[str], None],
    progress: Callable[[int, int], None] | None,
) -> list[Result]:
    """One pass over the tokens, then every analyzer that applies."""
    if illegible := why_illegible(model):
        say(f"memories is left out: {illegible}")
    collecting: dict[str, Any] = {"sink_factor": settings.sink_factor}
    ranks_need = rank_probes(measured, settings.seed)
    memories_need = {} if illegible else memory_probes(measured)
    statistics = collect(model, tokens, ranks_need | memories_need, progress=progress, **collecting)

    shared: dict[str, Any] = {"layers": [ffn.layer for ffn in measured], "seed": settings.seed}
    streamed = shared | collecting | {"statistics": statistics}
    say("measuring hidden_rank")
    results: list[Result] = [hidden_rank(model, tokens, **streamed)]
    for name in ranks_need:
        del statistics[name]  # the covariances, by far the most of the memory
    if not illegible:
        say("measuring memories")
        results.append(memories(model, tokens, **streamed))
    say("measuring weight_rank")
    results.append(weight_rank(model, **shared))
    say("measuring neuron_clusters")
    results.append(neuron_clusters(model, **shared))
    return results


def cards(rows: Sequence[Memory], each: int = CARDS) -> list[NeuronCard]:
    """Cards of the neurons that contribute most at their strongest trigger, `each` of every layer."""
    chosen: list[NeuronCard] = []
    for _, layer in groupby(rows, key=lambda row: row.layer):
        strongest = sorted(layer, key=lambda row: abs(row.contribution), reverse=True)
        chosen += [card(row) for row in strongest[:each]]
    return chosen


def card(row: Memory) -> NeuronCard:
    """One row of `memories` as a card."""
    return NeuronCard(
        layer=row.layer,
        neuron=row.neuron,
        contexts=tuple((t["before"], t["token"], t["after"], t["contribution"]) for t in row.triggers),
        promotes=tuple(row.promotes),
        suppresses=tuple(row.suppresses),
        numbers={
            "firing rate": row.firing_rate,
            "contribution": row.contribution,
            "cosine of key and value": row.key_value_cosine,
            "purity of the triggers": row.purity,
            "agreement": row.agrees,
            "agreement null": row.agrees_shuffled,
        },
    )


def _refuse_other_run(out: Path, settings: Settings) -> None:
    path = out / "run.json"
    if not path.exists():
        return
    try:
        before = dict(json.loads(path.read_text())["settings"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not a run of ffnprobe: choose another folder with --out") from error
    now = json.loads(json.dumps(asdict(settings)))
    if other := [
        f"{name} {before.get(name)!r}, now {now[name]!r}" for name in now if before.get(name) != now[name]
    ]:
        raise InputError(f"{out} holds another run ({'; '.join(other)}): choose another folder with --out")

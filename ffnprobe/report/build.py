"""From a model's name to a run folder, and from a run folder to the page: load, run, analyse, draw."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import groupby
from pathlib import Path

from ..analyzers.claims import claims
from ..analyzers.claims_family import ClaimsFamily
from ..analyzers.contraction_family import ContractionFamily
from ..analyzers.expansion import Expansion
from ..analyzers.expansion_fits import ExpansionFits
from ..analyzers.hidden_rank import check_documents
from ..analyzers.memories import Memories
from ..analyzers.memories import Row as Memory
from ..analyzers.quantization_family import QuantizationFamily
from ..analyzers.recall import Recall
from ..corpus import LENGTH, pack
from ..errors import InputError
from ..executors import Executor
from ..family import MEMBERS
from ..models import context_length, describe, load_model, tokenizer_of
from ..result import Result
from ..run import note, read_run, run
from ..shards import Work
from ..shipped import shipped
from ..statistics import Count, Statistic
from ..stream import Probe, choose_ffns
from .analyses import ANALYSES, analyses_of, measure
from .card import NeuronCard
from .embed import Drawing
from .page import About, top_findings, write_page
from .settings import Settings

# measured beforehand, by the scripts of analyses/: they take more than one model
FAMILY: dict[str, type[Result]] = {
    "expansion-tiny": Expansion,
    "expansion_fits-tiny": ExpansionFits,
    "claims_family-tiny": ClaimsFamily,
    "contraction_family-tiny": ContractionFamily,
    "quantization_family-tiny": QuantizationFamily,
    "recall-planted": Recall,
}
RESULTS: tuple[type[Result], ...] = (*(analysis.kind for analysis in ANALYSES.values()), *FAMILY.values())
CARDS = 32  # neurons of each layer in the page's browser; the table has them all


def work_of(settings: Settings, say: Callable[[str], None]) -> Work:
    """Load the model and the tokens, and list what all analyzers want of one pass."""
    say(f"loading {settings.model}")
    model = load_model(settings.model, dtype=settings.dtype, device_map=settings.device_map, say=say)
    measured = choose_ffns(model, settings.layers)
    length = min(LENGTH, context_length(model))
    tokens = pack(settings.text(), tokenizer_of(model), tokens=settings.tokens, length=length, seed=settings.seed)
    check_documents(tokens)
    wanted: dict[str, Probe] = {}
    for analysis in analyses_of(settings, model, tokens, say).values():
        wanted |= analysis.probes(measured, settings, tokens)
    if not wanted:  # nobody asked for activations: they are counted, and the run is one all the same
        wanted["count"] = Probe(measured[0].layer, "post", Count.about)
    say(f"running {len(measured)} layers over {tokens.n:,} tokens of {tokens.n_documents:,} documents")
    return Work(model, tokens, wanted, settings.batch, settings.shard, settings.sink_factor, settings.nonfinite)


def build_report(
    settings: Settings,
    out: str | Path,
    executor: Executor | None = None,
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Measure what is missing of everything, and write `out`: the run, tables/, figures/ and report.html.

    Returns:
        The three most telling findings; none where other ranks are still at work.

    Raises:
        InputError, ModelRefused, MachineError: as load_model, load_corpus and run do.
    """
    prepare, facts = partial(work_of, settings), {"settings": asdict(settings)}
    with run(out, prepare, executor=executor, facts=facts, say=say, progress=progress) as (work, outcome):
        if outcome is None:
            return []
        started = time.perf_counter()
        _say_skipped(outcome.statistics, say)
        measured = []
        for name, result in measure(settings, work, outcome.statistics, settings.layers, say):
            result.save(result.path(Path(out) / "tables"))
            measured.append(name)
        tables = [*measured, *add_family(settings.model, Path(out) / "tables")]
        seconds = outcome.seconds + time.perf_counter() - started
        about = about_of(settings, work, out, seconds, read_run(out)["versions"])
        packing = work.tokens.settings
        corpus = {"name": packing["corpus"], "sha256": packing["corpus_sha256"]}
        made = {"model": about["model"], "corpus": corpus, "packing": packing, "tables": sorted(tables)}
        note(out, **made, bit_equal=outcome.bit_equal, about=about)
        say("drawing the figures and the page")
        return render_run(out)


def add_family(model: str, tables: Path) -> list[str]:
    """Put what was measured of the whole family beside the tables of one of its members; their names."""
    if model not in MEMBERS:
        return []
    for stem, kind in FAMILY.items():
        measured = shipped(f"expansion/{stem}.parquet", f"the table {stem}", "run the scripts of analyses/")
        kind.load(measured).save(kind.path(tables))
    return [kind.name for kind in FAMILY.values()]


def about_of(
    settings: Settings, work: Work, out: str | Path, seconds: float, versions: Mapping[str, str]
) -> About:
    """What the page says of the run."""
    return About(
        model=describe(work.model),
        corpus=work.tokens.settings["corpus"],
        tokens=work.tokens.n,
        documents=work.tokens.n_documents,
        seed=settings.seed,
        command=settings.command(str(out)),
        seconds=seconds,
        versions=dict(versions),
    )


def render_run(folder: str | Path) -> list[str]:
    """Draw the figures and the page of a finished run from its folder alone: no model, no corpus.

    Returns:
        The three most telling findings.

    Raises:
        InputError: the folder is no finished run.
    """
    folder = Path(folder)
    recorded = read_run(folder)
    if (about := recorded.get("about")) is None:
        raise InputError(f"{folder} is not finished: give the command that began it again")
    kinds = [kind for kind in RESULTS if kind.name in recorded["tables"]]
    results = [kind.load(kind.path(folder / "tables")) for kind in kinds]
    draw(folder, about, results)
    return top_findings(results)


def draw(folder: Path, about: About, results: Sequence[Result]) -> None:
    """Write the answers to the six claims, the figures and the page."""
    answered = claims(results)
    answered.save(answered.path(folder / "tables"))
    drawings = {result.name: Drawing.of(result.plot()) for result in (*results, answered)}
    for name, drawing in drawings.items():
        drawing.save(folder / "figures" / name)
    neurons = [neuron for result in results if isinstance(result, Memories) for neuron in cards(result.rows)]
    write_page(folder / "report.html", about, results, neurons, drawings)


def _say_skipped(statistics: Mapping[str, Statistic], say: Callable[[str], None]) -> None:
    for name, statistic in statistics.items():
        if name.startswith("nonfinite/") and statistic.n:
            say(f"layer {name.partition('/')[2]}: {statistic.n:,} tokens left out, they hold NaN or Inf")


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

"""From a model's name to a run folder, and from a run folder to the page: load, run, analyse, draw."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from shlex import quote
from typing import Any

from ..analyzers import hidden_rank, memories, neuron_clusters, weight_rank
from ..analyzers.expansion import Expansion
from ..analyzers.expansion_fits import ExpansionFits
from ..analyzers.hidden_rank import HiddenRank, check_documents
from ..analyzers.memories import Memories
from ..analyzers.memories import Row as Memory
from ..analyzers.memories import probes as memory_probes
from ..analyzers.neuron_clusters import NeuronClusters
from ..analyzers.neuron_clusters import probes as cluster_probes
from ..analyzers.rank_probes import BUDGET
from ..analyzers.rank_probes import probes as rank_probes
from ..analyzers.recall import Recall
from ..analyzers.weight_rank import WeightRank
from ..corpus import LENGTH, load_corpus, load_dataset_corpus, pack
from ..errors import InputError
from ..executors import Executor
from ..family import MEMBERS
from ..figure import save_figure
from ..models import context_length, describe, ffns, load_model, tokenizer_of, why_illegible
from ..result import Result
from ..run import note, read_run, run
from ..shards import Work
from ..shipped import shipped
from ..statistics import Statistic
from ..stream import BATCH, SINK_FACTOR, choose_layers
from .card import NeuronCard
from .page import About, top_findings, write_page

# measured beforehand, by the scripts of analyses/: they take more than one model
FAMILY = {"expansion-tiny": Expansion, "expansion_fits-tiny": ExpansionFits, "recall-planted": Recall}
RESULTS = (HiddenRank, Memories, WeightRank, NeuronClusters, *FAMILY.values())
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
    nonfinite: str = "stop"
    batch: int = BATCH
    shard: int | None = None
    budget: int = BUDGET  # bytes of all moments
    dtype: str = "float32"
    device_map: str | None = None

    def __post_init__(self) -> None:
        if self.corpus and self.dataset:
            raise InputError("got both --corpus and --dataset: give one of them")

    def command(self, out: str) -> str:
        """The command line that makes this report again."""
        options = [f"--tokens {self.tokens}"] if self.tokens != Settings.tokens else []
        options += [f"--layers {','.join(map(str, self.layers))}"] if self.layers is not None else []
        options += [f"--{name} {quote(value)}" for name in ("corpus", "dataset") if (value := getattr(self, name))]
        options += [f"--seed {self.seed}"] if self.seed else []
        options += [f"--sink-factor {self.sink_factor:g}"] if self.sink_factor != SINK_FACTOR else []
        options += [f"--nonfinite {self.nonfinite}"] if self.nonfinite != "stop" else []
        options += [f"--batch {self.batch}"] if self.batch != BATCH else []
        options += [f"--shard {self.shard}"] if self.shard else []
        options += [f"--budget {self.budget}"] if self.budget != BUDGET else []
        options += [f"--dtype {quote(self.dtype)}"] if self.dtype != Settings.dtype else []
        options += [f"--device-map {quote(self.device_map)}"] if self.device_map else []
        return " ".join(["ffnprobe report", quote(self.model), *options, f"--out {quote(out)}"])


def work_of(settings: Settings, say: Callable[[str], None]) -> Work:
    """Load the model and the tokens, and list what all analyzers want of one pass."""
    say(f"loading {settings.model}")
    model = load_model(settings.model, dtype=settings.dtype, device_map=settings.device_map, say=say)
    chosen = {tap.layer for tap in choose_layers(model, settings.layers)}
    measured = [ffn for ffn in ffns(model) if ffn.layer in chosen]
    corpus = load_dataset_corpus(settings.dataset) if settings.dataset else load_corpus(settings.corpus)
    length = min(LENGTH, context_length(model))
    tokens = pack(corpus, tokenizer_of(model), tokens=settings.tokens, length=length, seed=settings.seed)
    check_documents(tokens)
    say(f"running {len(measured)} layers over {tokens.n:,} tokens of {tokens.n_documents:,} documents")
    wanted = rank_probes(measured, settings.seed, settings.budget) | cluster_probes(measured, seed=settings.seed)
    if illegible := why_illegible(model):
        say(f"memories is left out: {illegible}")
    else:
        wanted |= memory_probes(measured)
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
        analyses = analyses_of(settings, work, outcome.statistics, settings.layers)
        for name, analyse in analyses.items():
            say(f"measuring {name}")
            analyse().save(Path(out) / "tables" / f"{name}.parquet")
            for done in [of for of in outcome.statistics if of.startswith(f"{name}/")]:
                del outcome.statistics[done]  # the covariances are by far the most of the memory
        tables = [*analyses, *add_family(settings.model, Path(out) / "tables")]
        seconds = outcome.seconds + time.perf_counter() - started
        about = about_of(settings, work, out, seconds, read_run(out)["versions"])
        packing = work.tokens.settings
        corpus = {"name": packing["corpus"], "sha256": packing["corpus_sha256"]}
        made = {"model": about["model"], "corpus": corpus, "packing": packing, "tables": sorted(tables)}
        note(out, **made, bit_equal=outcome.bit_equal, about=about)
        say("drawing the figures and the page")
        return render_run(out)


def analyses_of(
    settings: Settings, work: Work, statistics: Mapping[str, Statistic], layers: Sequence[int] | None
) -> dict[str, Callable[[], Result]]:
    """The analyses that a report is made of, in order; `statistics` is what one pass has collected."""
    shared: dict[str, Any] = {"layers": layers, "seed": settings.seed}
    collecting: dict[str, Any] = {name: getattr(settings, name) for name in ("batch", "sink_factor", "nonfinite")}
    streamed = shared | collecting | {"statistics": statistics}
    analyses: dict[str, Callable[[], Result]] = {
        "hidden_rank": lambda: hidden_rank(work.model, work.tokens, budget=settings.budget, **streamed),
        "memories": lambda: memories(work.model, work.tokens, **streamed),
        "weight_rank": lambda: weight_rank(work.model, **shared),
        "neuron_clusters": lambda: neuron_clusters(work.model, work.tokens, **streamed),
    }
    measured = {name.partition("/")[0] for name in work.probes} | {"weight_rank"}
    return {name: analyse for name, analyse in analyses.items() if name in measured}


def add_family(model: str, tables: Path) -> list[str]:
    """Put what was measured of the whole family beside the tables of one of its members; their names."""
    if model not in MEMBERS:
        return []
    for stem, kind in FAMILY.items():
        measured = shipped(f"expansion/{stem}.parquet", f"the table {stem}", "run the scripts of analyses/")
        kind.load(measured).save(tables / f"{kind.name}.parquet")
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
    results = [kind.load(folder / "tables" / f"{kind.name}.parquet") for kind in kinds]
    draw(folder, about, results)
    return top_findings(results)


def draw(folder: Path, about: About, results: Sequence[Result]) -> None:
    """Write the figures and the page."""
    for result in results:
        save_figure(result.plot(), folder / "figures" / result.name)
    neurons = [neuron for result in results if isinstance(result, Memories) for neuron in cards(result.rows)]
    write_page(folder / "report.html", about, results, neurons)


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

"""Results and neurons of the shape that real runs have, and hostile ones."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
from matplotlib.figure import Figure

from ffnprobe.report import About, NeuronCard
from ffnprobe.result import Result, Verdict, column

Arguments = tuple[About, list[Result], list[NeuronCard]]


@dataclass(frozen=True)
class RankRow:
    layer: int = column("", "the layer, counted from 0")
    site: str = column("", "x enters the FFN, h is hidden, y leaves it")
    participation_ratio: float = column("dimensions", "hard rank")
    participation_ratio_null: float | None = column("dimensions", "the same for random features")
    soft_rank: float = column("dimensions", "exp of the entropy of the eigenvalues")
    tokens_masked: int = column("tokens", "attention sinks left out")


@dataclass(frozen=True)
class HiddenRank(Result):
    name: ClassVar[str] = "hidden_rank"
    question: ClassVar[str] = "How many dimensions are in use before, inside and after the FFN?"
    row_type: ClassVar[type] = RankRow

    def findings(self) -> list[str]:
        return [
            "Hidden activations fill 212 of 1,536 dimensions (random features: 301).",
            "Layer 11 writes a sink.",
        ]

    def verdicts(self) -> list[Verdict]:
        rule = "The median rank of h exceeds that of x, and the random features' too."
        return [
            Verdict(2, rule, "h 212 | x 96 | random features 301", "mixed", "Random features expand as well."),
            Verdict(3, "y has fewer dimensions than h.", "y 88 | h 212", "supported", "Any contraction does."),
        ]

    def plot(self) -> Figure:
        figure = Figure(figsize=(8, 3.6), layout="constrained")
        axes = figure.subplots()
        for site in ("x", "h", "y"):
            line = [(row.layer, row.participation_ratio) for row in self.rows if row.site == site]
            axes.plot(*zip(*line, strict=True), label=site)
        axes.set(xlabel="layer", ylabel="participation ratio [dimensions]", title=str(self.settings["model"]))
        axes.legend()
        return figure


@dataclass(frozen=True)
class MemoryRow:
    layer: int = column("", "the layer, counted from 0")
    neuron: int = column("", "the neuron, counted from 0")
    agrees: bool = column("", "its value's top token follows its top trigger")


@dataclass(frozen=True)
class Memories(Result):
    name: ClassVar[str] = "memories"
    question: ClassVar[str] = "Does a value promote the token that follows its key's trigger?"
    row_type: ClassVar[type] = MemoryRow

    def findings(self) -> list[str]:
        return ["3.1% of values promote the next token of their trigger (shuffled: 0.2%)."]

    def verdicts(self) -> list[Verdict]:
        return [
            Verdict(4, "Agreement exceeds shuffled.", "3.1% | 0.2%", "not supported", "Sinks retrieve no text.")
        ]

    def plot(self) -> Figure:
        figure = Figure(figsize=(8, 3), layout="constrained")
        figure.subplots().set(xlabel="layer", ylabel="agreement rate")
        return figure


@pytest.fixture
def about() -> About:
    return About(
        model=dict(
            name="smollm2-135m", architecture="LlamaForCausalLM", n_layers=30, d_model=576, d_vocab=49152,
            dtype="float32", note="its weights carry 4-bit rounding",
        ),
        corpus="the default corpus (literature and Wikipedia introductions)", tokens=16384, documents=256,
        seed=0, command="ffnprobe report smollm2-135m --tokens 16384", seconds=301.2,
        versions={"ffnprobe": "0.1.0", "torch": "2.13.0"},
    )  # fmt: skip


@pytest.fixture
def results() -> list[Result]:
    ranks = tuple(
        RankRow(layer, site, scale * (40 + layer), 1.2 * scale * 40 if site == "h" else None, scale * 99.0, 64)
        for layer in range(30)
        for site, scale in (("x", 2.0), ("h", 4.5), ("y", 1.8))
    )
    memories = tuple(MemoryRow(layer, neuron, neuron % 3 == 0) for layer in range(30) for neuron in range(10))
    return [
        HiddenRank(ranks, {"model": "smollm2-135m", "sink_factor": 10.0}),
        Memories(memories, {"seed": 0}),
    ]


@pytest.fixture
def neurons() -> list[NeuronCard]:
    numbers = {
        "firing rate": 0.0123,
        "cos(key, value)": -0.31,
        "cos(key, value) null": 0.042,
        "kurtosis": 11.0,
    }
    contexts = (
        ("The ship sailed into the\n", " harbour", " at dawn, and the", 4.2134),
        ("a boat left the small", " harbor", " of the island", 3.9),
    )
    return [
        NeuronCard(layer, neuron, contexts, (" sea", " port", "shore"), (" the", "\n"), numbers)
        for layer in (0, 5, 29)
        for neuron in (0, 7, 1535)
    ]


ATTACKS = {
    "script end": "</script><img src=x onerror=\"document.title='owned'\">",
    "attribute end": '"><svg onload="document.title=\'owned\'">',
    "comment": "<!--<script>document.title='owned'//",
    "line separators": "'\u2028document.title='owned'//\u2029",
    "override": "\u202eright to left \u2066",
    "terminal": "\x1b[2J\x00\x9b31m\r\n\t\x7f",
    "half a character": "\ud800",
    "right to left": "\u0645\u0631\u062d\u0628\u0627",
    "template": "{{ 7 * 7 }}{% raw %}&lt;",
    "rich markup": "[bold red]markup[/]:smile:",
    "formula": "$\\nonsense{$",
    "long": "=" * 3000,
}


@pytest.fixture(params=list(ATTACKS.values()), ids=list(ATTACKS))
def attack(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def attacks() -> str:
    return " ".join(ATTACKS.values())


@pytest.fixture
def dressed(about: About, results: list[Result]) -> Callable[[str], Arguments]:
    """The arguments of one page in which each text that comes from outside is the given one."""

    def dress(text: str) -> Arguments:
        model = about["model"] | {"name": text, "architecture": text, "note": text}
        outside = {"corpus": text, "command": text, "versions": {text: text}}
        settings = {"model": text, f"{text}.": [text, {text: text}]}
        card = NeuronCard(3, 1, ((text, text, text, 1.0),), (text,), (text,), {text: 1.0, f"{text} null": 2.0})
        return (
            About(**about | outside | {"model": model}),
            [HiddenRank(results[0].rows[:6], settings)],
            [card],
        )

    return dress

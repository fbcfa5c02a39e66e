"""What do all numbers together say of the six claims?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from matplotlib.figure import Figure

from ..figure import BLACK, BLUE, GREY, ORANGE, caption, new_figure, styled
from ..result import Result, column

CLAIMS = (
    "The FFN fits a high-dimensional map.",
    "Expansion buys expressive power and diverse features.",
    "Contraction controls complexity and keeps dimensions equal.",
    "The FFN is a key-value memory and a soft vector quantiser: more width is more memory and finer "
    "quantisation, and contraction selects and compresses.",
    "High dimension lets features interact.",
    "Gradients flow better, and the FFN complements attention.",
)
RULE = (
    "supported or not supported where every analyzer that measures the claim says so, mixed where they differ or "
    "one of them does"
)
COLOUR = {"supported": BLUE, "mixed": ORANGE, "not supported": BLACK, "not measured": GREY}


@dataclass(frozen=True)
class Row:
    claim: int = column("", "number of the claim, from 1")
    text: str = column("", "the claim")
    analyzer: str = column("", "that measured it")
    verdict: str = column("", "supported, mixed or not supported, by the rule")
    rule: str = column("", "as it stands in the code; it says so if it was set after numbers were seen")
    measured: str = column("", "the numbers that decide, each beside its null")
    against: str = column("", "the strongest published evidence against the claim")


@dataclass(frozen=True)
class Claims(Result):
    name: ClassVar[str] = "claims"
    question: ClassVar[str] = "What do all numbers together say of the six claims?"
    row_type: ClassVar[type] = Row

    def claim(self, number: int) -> list[Row]:
        """The rows of one claim."""
        return [row for row in self.rows if row.claim == number]

    def overall(self, number: int) -> str:
        """The verdict on one claim by all analyzers together, by `RULE`; `not measured` without any."""
        found = {row.verdict for row in self.claim(number)}
        return "not measured" if not found else found.pop() if len(found) == 1 else "mixed"

    def findings(self) -> list[str]:
        sentences = []
        for number, text in enumerate(CLAIMS, start=1):
            by = ", ".join(f"{row.analyzer} {row.verdict}" for row in self.claim(number))
            sentences.append(f"{number}. {text} {self.overall(number).capitalize()}{f' ({by})' if by else ''}.")
        return sentences

    @styled
    def plot(self) -> Figure:
        analyzers = list(dict.fromkeys(row.analyzer for row in self.rows))
        figure, (axes,) = new_figure(1, caption(self.settings))
        figure.set_size_inches(3.5 + 0.6 * len(analyzers), 3.9)
        columns = [*analyzers, "all together"]
        marked = {(row.analyzer, row.claim): row.verdict for row in self.rows}
        marked |= {("all together", number): self.overall(number) for number in range(1, len(CLAIMS) + 1)}
        for verdict, marker in zip(COLOUR, "os^x", strict=True):
            at = [(columns.index(name), claim) for (name, claim), found in marked.items() if found == verdict]
            x, y = zip(*at, strict=True) if at else ((), ())
            axes.scatter(x, y, s=90, marker=marker, color=COLOUR[verdict], label=verdict)
        axes.axvline(len(analyzers) - 0.5, color=GREY, linewidth=0.8)
        axes.set_xticks(range(len(columns)), columns, rotation=40, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(1, len(CLAIMS) + 1))
        axes.set(title="Six claims", ylabel="claim", xlim=(-0.7, len(columns) - 0.3))
        axes.set_ylim(len(CLAIMS) + 0.6, 0.4)
        axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
        return figure


def claims(results: Iterable[Result]) -> Claims:
    """Every verdict of these results, in the order of the claims."""
    results = list(results)
    rows = [
        Row(
            claim=verdict.claim,
            text=CLAIMS[verdict.claim - 1],
            analyzer=result.name,
            verdict=verdict.verdict,
            rule=verdict.rule,
            measured=verdict.measured,
            against=verdict.against,
        )
        for result in results
        for verdict in result.verdicts()
    ]
    settings = dict(results[0].settings) if results else {"model": "", "seed": 0}
    return Claims(sorted(rows, key=lambda row: row.claim), settings | {"rule": RULE})

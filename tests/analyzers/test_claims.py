"""The six claims are answered by all verdicts together, and by no other."""

from dataclasses import dataclass, field
from typing import ClassVar

import pytest

from ffnprobe.analyzers.claims import CLAIMS, Claims, claims
from ffnprobe.result import Result, Verdict


@dataclass(frozen=True)
class Says(Result):
    """A result with these verdicts."""

    name: ClassVar[str] = "says"
    rows: tuple = ()
    settings: dict = field(default_factory=lambda: {"model": "m", "seed": 3})
    said: tuple = ()

    def verdicts(self) -> list[Verdict]:
        return [Verdict(claim, "rule", "measured", verdict, "against") for claim, verdict in self.said]


@pytest.mark.parametrize(
    ("said", "overall"),
    [
        ((), "not measured"),
        (("supported",), "supported"),
        (("supported", "supported"), "supported"),
        (("not supported", "not supported"), "not supported"),
        (("supported", "not supported"), "mixed"),
        (("mixed", "supported"), "mixed"),
    ],
)
def test_a_claim_is_what_all_say_or_mixed(said, overall):
    found = claims([Says(said=((4, verdict), (2, "mixed"))) for verdict in said])
    assert found.overall(4) == overall
    assert found.overall(1) == "not measured"
    assert [row.claim for row in found.rows] == [2] * len(said) + [4] * len(said)


def test_every_claim_gets_a_sentence_and_the_figure_marks_it(tmp_path):
    found = claims([Says(said=((1, "supported"), (6, "not supported")))])
    sentences = found.findings()
    assert len(sentences) == len(CLAIMS) and sentences[0].endswith("Supported (says supported).")
    assert sentences[2].endswith("Not measured.")
    (axes,) = found.plot().axes
    marks = {c.get_label(): c.get_offsets().tolist() for c in axes.collections}
    assert marks["supported"] == [[0, 1], [1, 1]] and marks["not supported"] == [[0, 6], [1, 6]]
    assert len(marks["not measured"]) == 4
    again = Claims.load(found.save(tmp_path / "claims.parquet"))
    assert again.findings() == sentences and again.settings["seed"] == 3


def test_nothing_measured_is_an_answer_too():
    assert {claims([]).overall(number) for number in range(1, 7)} == {"not measured"}

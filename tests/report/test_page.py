"""The page: it answers every claim, trusts no text, and is the same each time."""

import re
from base64 import b64decode, b64encode
from dataclasses import dataclass, replace
from hashlib import sha256
from html.parser import HTMLParser
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from jinja2 import UndefinedError

from ffnprobe.report import render, top_findings, write_page
from ffnprobe.report.page import CLAIMS
from ffnprobe.report.show import show
from ffnprobe.result import column


class Page(HTMLParser):
    """What a parser makes of a page: its elements with their attributes, and its text."""

    def __init__(self, page: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.raw: list[str] | None = None
        self.inside: dict[str, list[str]] = {"script": [], "style": []}
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.raw = self.inside.get(tag)

    def handle_endtag(self, tag):
        self.raw = None

    def handle_data(self, data):
        if self.raw is None:
            self.text += data
        else:
            self.raw.append(data)

    def skeleton(self) -> list[tuple[str, list[str]]]:
        return [(tag, sorted(attributes)) for tag, attributes in self.elements]

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def test_no_text_from_outside_becomes_an_element_or_an_attribute(dressed, attack):
    page, harmless = Page(render(*dressed(attack))), Page(render(*dressed("harmless")))
    assert page.skeleton() == harmless.skeleton()
    assert page.inside["script"][1:] == harmless.inside["script"][1:]  # all but the neurons' data


def test_text_from_outside_is_shown_whole(dressed, attack):
    page = Page(render(*dressed(attack)))
    assert page.text.count(show(attack)) >= 12
    assert page.of("img")[0]["alt"].startswith(f"Figure: {show(attack)}: participation ratio")


def test_no_character_that_acts_reaches_the_page(dressed, attacks):
    page = render(*dressed(attacks))
    page.encode()  # a lone surrogate would raise
    assert not re.findall("[^\n\\S ]|[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]", page)


def test_policy_names_exactly_the_script_and_the_style_of_the_page(about, results, neurons):
    page = Page(render(about, results, neurons))
    policy = next(meta["content"] for meta in page.of("meta") if meta.get("http-equiv"))
    hashes = {
        tag: f"'sha256-{b64encode(sha256(page.inside[tag][-1].encode()).digest()).decode()}'"
        for tag in ("script", "style")
    }
    assert policy.split("; ") == [
        "default-src 'none'", f"script-src {hashes['script']}", f"style-src {hashes['style']}",
        "img-src data:", "base-uri 'none'", "form-action 'none'",
    ]  # fmt: skip
    assert [script.get("type") for script in page.of("script")] == ["application/json", None]


def test_nothing_is_loaded_and_nothing_is_inline(about, results, neurons):
    page = Page(render(about, results, neurons))
    for tag, attributes in page.elements:
        assert not any(name == "style" or name.startswith("on") for name in attributes)
        if tag != "a":
            assert all(attributes.get(name, "data:").startswith("data:") for name in ("src", "href", "srcset"))
    assert "url(" not in "".join(page.inside["style"]) and "@import" not in "".join(page.inside["style"])


def test_each_claim_is_answered_once_and_in_order(about, results):
    page = Page(render(about, results)).text
    places = [page.index(claim) for claim in CLAIMS]
    answers = [page[a:b] for a, b in zip(places, [*places[1:], len(page)], strict=True)]
    said = [re.search("not measured|not supported|supported|mixed", answer)[0] for answer in answers]
    assert said == ["not measured", "mixed", "supported", "not supported", "not measured", "not measured"]
    assert "h 212 | x 96 | random features 301" in answers[1] and "Random features expand as well." in answers[1]


def test_a_run_without_results_says_so(about):
    page = Page(render(about, [])).text
    assert page.count("not measured") == 6
    assert "Nothing was measured in this run." in page and "This run kept no neurons." in page


def test_findings_take_turns(results):
    first, second = results
    assert top_findings(results) == [first.findings()[0], second.findings()[0], first.findings()[1]]
    assert top_findings([]) == []


def test_a_missing_fact_is_an_error(about, results):
    del about["model"]["dtype"]
    with pytest.raises(UndefinedError, match="dtype"):
        render(about, results)


def test_short_tables_are_on_the_page_and_long_ones_are_named(about, results):
    page = Page(render(about, results))
    assert len(page.of("table")) == 1  # 90 rows; the other has 300
    assert page.of("th")[2]["title"] == "hard rank"
    assert "tables/memories.parquet" in page.text


@dataclass(frozen=True)
class Listed:
    layer: int = column("", "")
    kept: list[int] = column("directions", "")
    added: list[float] = column("nats", "a number a direction")
    agreement: list[dict] = column("", "")


def test_whole_numbers_in_a_list_stand_in_a_wide_cell_and_series_are_for_data_frames(about, results, monkeypatch):
    monkeypatch.setattr(type(results[1]), "row_type", Listed)
    rows = (Listed(0, [4, 8], [0.1, 0.2], [{"ami": 0.5}]), Listed(1, [], [], []))
    page = Page(render(about, [replace(results[1], rows=rows)]))
    assert [cell["class"] for cell in page.of("th") if cell["scope"] == "col"] == ["number", "list"]
    assert "4, 8" in page.text and "ami" not in page.text


def test_headings_step_down_one_at_a_time(about, results, neurons):
    levels = [
        int(tag[1]) for tag, _ in Page(render(about, results, neurons)).elements if re.fullmatch("h[1-6]", tag)
    ]
    assert levels.count(1) == 1 and levels[0] == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))


def test_figures_parse_and_hold_no_date(dressed, attacks):
    url = Page(render(*dressed(attacks.replace("=", "")))).of("img")[0]["src"]
    kind, _, data = url.partition(",")
    assert kind == "data:image/svg+xml;base64"
    assert b"<dc:date>" not in b64decode(data)
    assert ElementTree.fromstring(b64decode(data)).tag.endswith("svg")


def test_the_same_run_gives_the_same_page(about, results, neurons, tmp_path):
    page = write_page(tmp_path / "report.html", about, results, neurons)
    again = write_page(tmp_path / "again.html", about, results, neurons[::-1])
    assert page.read_bytes() == again.read_bytes()

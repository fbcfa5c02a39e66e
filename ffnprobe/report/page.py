"""What does a run say? One page that opens from disk, trusts no text and answers six claims in order."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from hashlib import sha256
from importlib.resources import files
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, TypedDict

from jinja2 import Environment, StrictUndefined

from ..analyzers.claims import CLAIMS, RULE, claims
from ..disk import atomic_write
from ..result import Result
from .card import NeuronCard
from .embed import Drawing
from .show import show, show_column

LONGEST_TABLE = 200  # rows; a longer one is for a data frame
KINDS = {str: "text", list: "list"}  # of columns; all others are numbers


class About(TypedDict):
    """What was probed and how. Nothing in it is a date."""

    model: dict[str, Any]  # name, architecture, n_layers, d_model, d_vocab, dtype, note ("" for none)
    corpus: str
    tokens: int
    documents: int
    seed: int
    command: str
    seconds: float
    versions: dict[str, str]


def render(
    about: About,
    results: Sequence[Result],
    neurons: Sequence[NeuronCard] = (),
    drawings: Mapping[str, Drawing] = {},
) -> str:
    """The whole page. Results and their findings stand in the order given; the first ones lead the page.

    Args:
        drawings: by the names of the results; what is not there is drawn.
    """
    style, script = _file("page.css"), _file("page.js")
    answered = claims(results)
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, finalize=_finalize, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"in_words": in_words, "heading": lambda name: _capital(in_words(name))}
    template = environment.from_string(_file("page.html"))
    return template.render(
        about=about,
        telling=top_findings(results),
        claims=[(text, answered.overall(n), answered.claim(n)) for n, text in enumerate(CLAIMS, start=1)],
        overall_rule=RULE,
        sections=[_section(result, drawings.get(result.name) or Drawing.of(result.plot())) for result in results],
        neurons=len(neurons),
        neuron_data=_script_json(_lines(neurons)),
        style=style,
        script=script,
        policy=f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'",
    )


def write_page(
    path: str | Path,
    about: About,
    results: Sequence[Result],
    neurons: Sequence[NeuronCard] = (),
    drawings: Mapping[str, Drawing] = {},
) -> Path:
    """Render the page to a file."""
    page = render(about, results, neurons, drawings).encode()
    return atomic_write(path, lambda file: file.write_bytes(page))


def top_findings(results: Iterable[Result], n: int = 3) -> list[str]:
    """The n most telling findings: each result's first, in the order given, then each one's second."""
    in_turn = chain.from_iterable(zip_longest(*(result.findings() for result in results)))
    return [finding for finding in in_turn if finding is not None][:n]


def in_words(name: str) -> str:
    """An analyzer's name as it stands in a sentence.

    >>> in_words("svd_directions")
    'SVD directions'
    """
    return name.replace("_", " ").replace("svd", "SVD")


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]


def _section(result: Result, drawing: Drawing) -> dict[str, Any]:
    findings = result.findings()
    short = len(result.rows) <= LONGEST_TABLE
    columns = []
    for f in fields(result.row_type):
        if str(f.type) in ("list[float]", "list[dict]"):  # for a data frame too
            continue
        values = [getattr(row, f.name) for row in result.rows] if short else []
        kind = next((kind for type_, kind in KINDS.items() if any(isinstance(v, type_) for v in values)), "number")
        columns.append({**f.metadata, "name": f.name, "kind": kind, "cells": show_column(values)})
    return {
        "result": result,
        "findings": findings,
        "image": drawing.url(),
        "alt": " ".join([f"Figure: {drawing.alt}.", *findings[:1]]),
        "columns": columns,
        "short": short,
    }


def _lines(neurons: Iterable[NeuronCard]) -> list[list[Any]]:
    """The cards as page.js reads them: numbers already written, so that page and terminal say the same."""
    return [
        [
            card.layer,
            card.neuron,
            [[show(before), show(token), show(after), show(a)] for before, token, after, a in card.contexts],
            [show(token) for token in card.promotes],
            [show(token) for token in card.suppresses],
            card.beside_null(),
        ]
        for card in sorted(neurons, key=lambda card: (card.layer, card.neuron))
    ]


def _script_json(data: object) -> str:
    """JSON that cannot end its script element: `</script>` becomes `\\u003c/script\\u003e`."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.translate({ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"})


def _finalize(value: object) -> object:
    # jinja2 escapes what comes out of here; only our own script, style and data are marked safe before.
    return value if hasattr(value, "__html__") else show(value)


def _file(name: str) -> str:
    return files("ffnprobe.report").joinpath(name).read_text("utf-8")


def _hash(text: str) -> str:
    return f"sha256-{b64encode(sha256(text.encode()).digest()).decode()}"

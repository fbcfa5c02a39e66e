"""How does a figure get into its files and the page, and what is said to those who cannot see it?"""

from __future__ import annotations

from base64 import b64encode
from dataclasses import dataclass
from pathlib import Path

from matplotlib.cbook import is_math_text
from matplotlib.figure import Figure
from matplotlib.mathtext import MathTextParser
from matplotlib.text import Text

from ..disk import atomic_write
from ..figure import draw
from .show import visible

LARGEST_SVG = 400_000  # bytes; a cloud of points is smaller, and faster to draw, as pixels


@dataclass(frozen=True)
class Drawing:
    """A figure drawn once, for its two files and for the page."""

    svg: bytes
    png: bytes
    alt: str  # what each panel shows

    @classmethod
    def of(cls, figure: Figure) -> Drawing:
        _write_out(figure)
        svg = draw(figure, "svg")
        figure.set_layout_engine("none")  # it is laid out now
        return cls(svg, draw(figure, "png"), describe(figure))

    def save(self, stem: str | Path) -> None:
        """Write `stem`.svg and `stem`.png."""
        atomic_write(f"{stem}.svg", lambda file: file.write_bytes(self.svg))
        atomic_write(f"{stem}.png", lambda file: file.write_bytes(self.png))

    def url(self) -> str:
        """As a `data:` image: SVG, or PNG where the SVG would be large."""
        kind, data = ("svg+xml", self.svg) if len(self.svg) <= LARGEST_SVG else ("png", self.png)
        return f"data:image/{kind};base64,{b64encode(data).decode()}"


def describe(figure: Figure) -> str:
    """What each panel shows, from its own title and labels."""
    panels = []
    for axes in figure.axes:
        title, x, y = axes.get_title(), axes.get_xlabel(), axes.get_ylabel()
        against = f"{y} against {x}" if x and y else x or y
        panels.append(": ".join(filter(None, (title, against))))
    return "; ".join(filter(None, dict.fromkeys(panels)))


def _write_out(figure: Figure) -> None:
    """Make the texts drawable: a control character breaks an SVG, a stray dollar raises in matplotlib."""
    parser = MathTextParser("path")
    for text in (artist for artist in figure.findobj() if isinstance(artist, Text)):
        lines = [visible(line) for line in text.get_text().split("\n")]
        text.set_text("\n".join(lines))
        try:
            for line in filter(is_math_text, lines):
                parser.parse(line)
        except ValueError:
            text.set_parse_math(False)

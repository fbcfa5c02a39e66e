"""How does a figure get into the page, and what is said to those who cannot see it?"""

from base64 import b64encode

from matplotlib.cbook import is_math_text
from matplotlib.figure import Figure
from matplotlib.mathtext import MathTextParser
from matplotlib.text import Text

from ..figure import draw
from .show import visible

LARGEST_SVG = 400_000  # bytes; a cloud of points is smaller, and faster to draw, as pixels


def data_url(figure: Figure) -> str:
    """The figure as a `data:` image: SVG, or PNG where the SVG would be large."""
    _write_out(figure)
    svg = draw(figure, "svg")
    if len(svg) <= LARGEST_SVG:
        return f"data:image/svg+xml;base64,{b64encode(svg).decode()}"
    return f"data:image/png;base64,{b64encode(draw(figure, 'png')).decode()}"


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

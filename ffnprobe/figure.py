"""How our figures look: one palette that survives colour-blindness and grey print, one caption line."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .disk import atomic_write

# Okabe & Ito; told apart by lightness as well
BLUE, ORANGE, GREEN, PURPLE, SKY, BLACK = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#000000"
GREY = "#8A8A8A"  # nulls

STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 3.5,
    "svg.hashsalt": "ffnprobe",  # the same table draws the same bytes
}


styled = rc_context(STYLE)  # decorates a `plot`


def new_figure(panels: int, caption: str, rows: int = 1) -> tuple[Figure, Any]:
    """Panels in one row or several, with a caption below, without pyplot's global state."""
    columns = -(-panels // rows)
    figure = Figure(figsize=(3.9 * columns, 3.9 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()[:panels]
    # a model's name may hold anything: a dollar would be mathematics, a control character no SVG
    shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in caption)
    figure.supxlabel(shown, fontsize=7.5, color="#555555", parse_math=False)
    return figure, axes


def legend_below(axes: Axes) -> None:
    """Below the panel, where it hides no data."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2, columnspacing=1.2, handlelength=1.8)


def caption(settings: Mapping[str, Any], *more: str) -> str:
    """Model, tokens, documents and seed, in one line."""
    parts = [str(settings["model"])]
    if "tokens" in settings:
        parts.append(f"{settings['tokens']:,} tokens of {settings['documents']:,} documents")
    parts += [*more, f"seed {settings['seed']}"]
    return " | ".join(parts)


def save_figure(figure: Figure, stem: str | Path) -> list[Path]:
    """Write `stem`.svg and `stem`.png."""

    def write(kind: str) -> Path:
        return atomic_write(f"{stem}.{kind}", lambda file: file.write_bytes(draw(figure, kind)))

    return [write("svg"), write("png")]


@styled
def draw(figure: Figure, kind: str) -> bytes:
    """The figure as svg or png; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()

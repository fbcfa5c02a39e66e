"""What does the table of clusters look like, by layer, by view and by number of clusters?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..figure import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, caption, legend_below, new_figure

MARK = {
    "keys": ("o-", BLUE),
    "gates": ("^-", ORANGE),
    "values": ("s-", GREEN),
    "vocabulary": ("D-", PURPLE),
    "co-activation": ("v-", BLACK),
}


def draw(views: Mapping[str, Sequence[Any]], rows: Sequence[Any], settings: Mapping[str, Any]) -> Figure:
    """Stability and agreement by layer, agreement of the views, and stability by number of clusters.

    Args:
        views: the rows of each view at the number of clusters chosen. rows: all of them.
    """
    views = {view: of for view, of in views.items() if of}
    figure, (stable, agree, matrix, counts) = new_figure(4, caption(settings, "raw weights, folded vocabulary"))
    for view, of in views.items():
        mark, colour = MARK[view]
        layers = [row.layer for row in of]
        label = f"{view}, {of[0].clusters} clusters"
        stable.plot(layers, [row.stability for row in of], mark, color=colour, label=label)
        stable.plot(layers, [row.stability_null for row in of], "--", color=colour, alpha=0.45, linewidth=1)
    stable.plot([], [], "--", color=GREY, label="Gaussian rows")
    stable.set(title="Stable over seeds", xlabel="layer", ylabel="adjusted Rand index", ylim=(-0.02, 1.02))
    _agreements(agree, views)
    _matrix(matrix, views)
    _by_count(counts, views, [row for row in rows if row.algorithm == "spherical"])
    for axes in (stable, agree, counts):
        legend_below(axes)
    return figure


def _agreements(axes: Axes, views: Mapping[str, Sequence[Any]]) -> None:
    if active := views.get("co-activation"):
        mark, colour = MARK["co-activation"]
        layers = [row.layer for row in active]
        axes.plot(layers, [row.replication for row in active], mark, color=colour, label="document halves")
        axes.plot(layers, [row.replication_permuted for row in active], ":", color=colour, linewidth=1)
    for view in ("keys", "gates", "co-activation"):
        if of := views.get(view):
            mark, colour = MARK[view]
            layers, pairs = [row.layer for row in of], [row.with_view("values") for row in of]
            line = "--" if view == "co-activation" else "-"
            style: dict[str, Any] = {"color": colour, "linestyle": line, "label": f"{view} and values"}
            axes.plot(layers, [pair["ami"] for pair in pairs], mark[0], **style)
            axes.plot(layers, [pair["permuted"] for pair in pairs], ":", color=colour, linewidth=1)
    axes.plot([], [], ":", color=GREY, label="best random pairing")
    axes.set(title="Do clusters come back, and agree?", xlabel="layer", ylabel="adjusted mutual information")


def _matrix(axes: Axes, views: Mapping[str, Sequence[Any]]) -> None:
    """Median agreement of each two views over the layers, and in brackets that of the best random pairing."""
    names = list(views)
    pairs = {
        (i, j): [pair for row in views[one] if (pair := row.with_view(other))]
        for i, one in enumerate(names)
        for j, other in enumerate(names)
        if i != j
    }
    shown = np.full((len(names), len(names)), np.nan)
    for place, found in pairs.items():
        shown[place] = median(pair["ami"] for pair in found) if found else np.nan
    for (i, j), found in pairs.items():
        if found:
            colour = "white" if shown[i, j] > 0.5 * np.nanmax(shown) else BLACK
            text = f"{shown[i, j]:.2f}\n({median(pair['permuted'] for pair in found):.2f})"
            axes.text(j, i, text, ha="center", va="center", fontsize=7, color=colour)
    axes.imshow(shown, cmap="Blues", vmin=0)
    axes.set_xticks(range(len(names)), names, rotation=35, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.grid(visible=False)
    axes.set_title("Agreement of views (AMI; random)")


def _by_count(axes: Axes, views: Mapping[str, Sequence[Any]], rows: Sequence[Any]) -> None:
    """At the layers where several numbers of clusters were tried."""
    for view in views:
        mark, colour = MARK[view]
        several = {row.layer for row in rows if row.view == view and not row.chosen}
        by_count: dict[int, list[float]] = {}
        for row in rows:
            if row.view == view and row.layer in several:
                by_count.setdefault(row.clusters, []).append(row.stability - row.stability_null)
        counts = sorted(by_count)
        axes.plot(counts, [median(by_count[k]) for k in counts], mark, color=colour, label=view)
    axes.axhline(0, color=GREY, linestyle="--", label="Gaussian rows")
    axes.set(title="How many clusters?", xlabel="clusters", ylabel="stability beyond Gaussian rows (ARI)")
    axes.set_xscale("log", base=2)

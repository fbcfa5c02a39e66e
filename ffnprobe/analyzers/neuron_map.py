"""Which neurons of a layer are active together, and where do they lie?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from ..clustering import restarts
from ..corpus import Tokens
from ..errors import InputError
from ..figure import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, caption, legend_below, new_figure, styled
from ..models import Model, ffns
from ..result import Result, column
from ..stream import choose_layers, collect, settings_of
from .cluster_quality import best, coherence, permuted
from .hidden_rank import check_documents
from .neuron_views import BUDGET, NEURONS, View, drawn, half_name, views_of
from .neuron_views import probes as probes

COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, BLACK)  # of the largest clusters


@dataclass(frozen=True)
class Row:
    layer: int = column("", "layer")
    neuron: int = column("", "neuron")
    cluster: int = column("", "its cluster of co-activation in one half of the documents; 0 is the largest")
    x: float = column("", "first principal coordinate of the correlations in the other half")
    y: float = column("", "second principal coordinate")
    profile: list[float] = column(
        "-1..1", "mean correlation of |h| with each cluster's neurons, in the other half"
    )


@dataclass(frozen=True)
class NeuronMap(Result):
    name: ClassVar[str] = "neuron_map"
    question: ClassVar[str] = "Which neurons of a layer are active together, and where do they lie?"
    row_type: ClassVar[type] = Row

    def findings(self) -> list[str]:
        return [
            f"Layer {layer}: in the other half of the documents two neurons of a cluster correlate by "
            f"{about['coherence']:.3f} (random clusters of these sizes: up to {about['coherence_permuted']:.3f}); "
            f"two coordinates hold {about['share']:.1%} of the correlations, of independent neurons "
            f"{about['share_null']:.1%}."
            for layer, about in self.settings["of_layer"].items()
        ]

    @styled
    def plot(self) -> Figure:
        """The matrix and the map of the middle one of the layers."""
        layers = [list(rows) for _, rows in groupby(self.rows, key=lambda row: row.layer)]
        rows = sorted(layers[len(layers) // 2], key=lambda row: row.cluster)
        layer = rows[0].layer
        about = caption(
            self.settings, f"layer {layer}", "clusters of one half of the documents, shown in the other"
        )
        figure, (matrix, plane) = new_figure(2, about)
        _draw_matrix(matrix, rows)
        _draw_map(plane, rows, self.settings["of_layer"][str(layer)])
        return figure


def _draw_matrix(axes: Axes, rows: Sequence[Row]) -> None:
    """One line a neuron, in the order of the clusters; one column a cluster, as wide as it has neurons."""
    edges = np.concatenate([[0], np.bincount([row.cluster for row in rows]).cumsum()])
    profiles = np.array([row.profile for row in rows])
    most = max(np.quantile(np.abs(profiles), 0.99), 1e-9)
    shown = axes.pcolormesh(
        edges, np.arange(len(rows) + 1), profiles, cmap="RdBu_r", vmin=-most, vmax=most, rasterized=True
    )
    axes.set(title="Co-activation, by cluster", xlabel="cluster (as wide as its neurons)")
    axes.set_ylabel("neuron, in the order of clusters")
    axes.invert_yaxis()
    axes.grid(visible=False)
    figure: Any = axes.figure
    figure.colorbar(shown, ax=axes, label="mean correlation of |h|", shrink=0.8)


def _draw_map(axes: Axes, rows: Sequence[Row], about: Mapping[str, float]) -> None:
    """The largest clusters in colour, the others grey."""
    for cluster in (None, *range(len(COLOURS))):
        some = [r for r in rows if (r.cluster >= len(COLOURS) if cluster is None else r.cluster == cluster)]
        colour = GREY if cluster is None else COLOURS[cluster]
        label = f"the other clusters ({len(some)})" if cluster is None else f"cluster {cluster} ({len(some)})"
        style: dict[str, Any] = {"s": 3 if cluster is None else 9, "linewidths": 0, "rasterized": True}
        axes.scatter([r.x for r in some], [r.y for r in some], color=colour, label=label, **style)
    axes.set(title="Neurons, by principal coordinates", ylabel="second")
    axes.set_xlabel(f"first (both: {about['share']:.1%}; independent {about['share_null']:.1%})")
    legend_below(axes)


def neuron_map(
    model: Model,
    tokens: Tokens,
    *,
    layers: Sequence[int] | None = None,
    clusters: int = 32,
    seeds: int = 5,
    permutations: int = 20,
    co_activity: str = "magnitudes",
    neurons: int = NEURONS,
    budget: int = BUDGET,
    seed: int = 0,
    statistics: Mapping[str, Any] | None = None,
    **collecting: Any,
) -> NeuronMap:
    """Clusters of co-activation made of one half of the documents, seen in the other.

    The map has the two leading principal coordinates of the correlations of |h| (classical scaling): distances on
    it are those of the two directions of largest variance and no more, and the axes say how much that is.

    Args:
        layers: the layers to map; the middle one by default.
        clusters: at most a quarter of the layer's neurons.
        statistics: what one `collect` over `probes(...)` gave, when several analyzers share a pass.

    Raises:
        InputError: a layer that is not there, a budget too small for the layers, or a single document.
    """
    check_documents(tokens)
    taps = choose_layers(model, layers)
    wanted = {tap.layer for tap in (taps if layers is not None else [taps[len(taps) // 2]])}
    measured = [ffn for ffn in ffns(model) if ffn.layer in wanted]
    keep: dict[str, Any] = {"co_activity": co_activity, "neurons": neurons, "budget": budget, "seed": seed}
    if statistics is None:
        statistics = collect(model, tokens, probes(measured, **keep), **collecting)
    rows: list[Row] = []
    of_layer: dict[str, dict[str, float]] = {}
    for ffn in measured:
        if half_name(ffn.layer, 0) not in statistics:
            raise InputError(
                f"layer {ffn.layer} does not fit into a budget of {budget:,} bytes: give more, or fewer layers"
            )
        chosen = drawn(ffn, neurons, seed)
        view = views_of(ffn, chosen, None, statistics, co_activity)["co-activation"]
        k = min(clusters, max(2, len(view.rows) // 4))
        labels = by_size(best(restarts(view.rows, k, range(seed, seed + seeds))).labels)
        generator = torch.Generator().manual_seed(1_000_003 * seed + ffn.layer)
        random = permuted(labels, permutations, generator)
        places, share = coordinates(view.scored)
        of_layer[str(ffn.layer)] = {
            "coherence": coherence(view.scored, labels),
            "coherence_permuted": max(coherence(view.scored, some) for some in random),
            "share": share,
            "share_null": coordinates(view.null(generator).scored)[1],
        }
        rows += _layer_rows(
            ffn.layer, range(ffn.d_mlp) if chosen is None else chosen.tolist(), view, labels, places
        )
    settings = settings_of(model, tokens, seed, **collecting) | keep | {"clusters": clusters, "seeds": seeds}
    return NeuronMap(rows, settings | {"permutations": permutations, "of_layer": of_layer})


def by_size(labels: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """The same clusters, numbered from the largest on.

    >>> by_size(torch.tensor([5, 2, 2, 0, 2, 0]))
    tensor([2, 0, 0, 1, 0, 1])
    """
    _, labels = labels.unique(return_inverse=True)
    return labels.bincount().argsort(descending=True, stable=True).argsort()[labels]


def coordinates(similarity: Float[Tensor, "n n"]) -> tuple[Float[Tensor, "n 2"], float]:
    """The two leading principal coordinates (Torgerson 1952), and their share of all that is positive."""
    squares, directions = torch.linalg.eigh(_centred(similarity.double()))
    squares, directions = squares.flip(0).clamp(min=0), directions.flip(1)[:, :2]
    # a direction has no sign: the entry of largest size is positive
    sign = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True)).sign()
    places = directions * sign * squares[:2].sqrt()
    return places.float(), float(squares[:2].sum() / squares.sum())


def _centred(matrix: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    matrix = matrix - matrix.mean(dim=0)
    return matrix - matrix.mean(dim=1, keepdim=True)


def _layer_rows(
    layer: int, neurons: Sequence[int], view: View, labels: Int[Tensor, " n"], places: Float[Tensor, "n 2"]
) -> list[Row]:
    member = torch.nn.functional.one_hot(labels).to(view.scored)
    # a neuron's correlation with itself says nothing; a cluster of one has none with others
    others = (member.sum(dim=0) - member).clamp(min=1)
    profiles = ((view.scored @ member - view.scored.diagonal()[:, None] * member) / others).tolist()
    return [
        Row(layer, neuron, cluster, x, y, profile)
        for neuron, cluster, (x, y), profile in zip(
            neurons, labels.tolist(), places.tolist(), profiles, strict=True
        )
    ]

"""Which tokens do the singular directions of keys, gates and values stand for?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from torch import Tensor

from ..errors import InputError
from ..ffn import FFN
from ..figure import GREY, caption, legend_below, new_figure, styled
from ..models import Model, describe, tokenizer_of
from ..result import Result, column
from ..stream import choose_ffns
from ..unembedding import unembedding
from .memories import word
from .weight_rank import MARK

GAP = 1.02  # of neighbouring singular values, at least
HELD = 2**26  # bytes of each of the four arrays in which the vocabulary is read
ALONE = 256  # random directions of the null


@dataclass(frozen=True)
class Row:
    layer: int = column("", "layer")
    matrix: str = column("", "keys: up-projection rows, gates: gate rows, values: down-projection rows")
    direction: int = column("", "right singular direction, 0 the strongest")
    singular_value: float = column("", "singular value")
    share: float = column("0..1", "share of the matrix's squared norm")
    gap: float = column("ratio", "to the nearer of the two neighbouring singular values, above 1")
    kurtosis: float | None = column(
        "", "of the direction's logits over the vocabulary; none below the gap, not read"
    )
    kurtosis_null: float = column("", "median of random directions of the same space")
    kurtosis_high: float = column("", "95% of random directions are below")
    longer: list[str] = column("", "vocabulary tokens at the end with the longer tail, furthest first")
    shorter: list[str] = column("", "tokens at the other end: a singular direction has no sign")
    overlap: float = column(
        "0..1", "mean squared cosine of the leading directions with those of the values (of values: of the keys)"
    )
    overlap_null: float = column("0..1", "the same of random directions: k / d_model")
    overlap_null_sd: float = column("0..1", "its standard deviation")

    @property
    def legible(self) -> bool:
        """More so than 95% of random directions."""
        return self.kurtosis is not None and self.kurtosis > self.kurtosis_high


@dataclass(frozen=True)
class SVDDirections(Result):
    name: ClassVar[str] = "svd_directions"
    question: ClassVar[str] = "Which tokens do the singular directions of keys, gates and values stand for?"
    row_type: ClassVar[type] = Row

    def matrix(self, matrix: str) -> list[Row]:
        """The rows of one matrix."""
        return [row for row in self.rows if row.matrix == matrix]

    def findings(self) -> list[str]:
        sentences = []
        for matrix in MARK:
            if rows := self.matrix(matrix):
                read = [row for row in rows if row.kurtosis is not None]
                partner = "keys" if matrix == "values" else "values"
                typical = median([row.kurtosis for row in read if row.kurtosis is not None] or [float("nan")])
                sentences.append(
                    f"{matrix.capitalize()}: {_legible(read):.0%} of {len(read):,} singular directions read in "
                    f"the vocabulary are more legible than 95% of random ones (kurtosis {typical:.2f}, random "
                    f"{rows[0].kurtosis_null:.2f}); {len(rows) - len(read):,} more were left out, within {GAP} of "
                    f"a neighbour's strength. Overlap of the leading {self.settings['directions']} with those of "
                    f"the {partner}: {median(row.overlap for row in rows):.3f} (median layer), random "
                    f"{rows[0].overlap_null:.3f} ± {rows[0].overlap_null_sd:.3f}."
                )
        return sentences

    @styled
    def plot(self) -> Figure:
        about = caption(self.settings, "raw weights", f"vocabulary {self.settings['vocabulary']}")
        figure, (legible, depth, overlap) = new_figure(3, about)
        null = self.rows[0]
        for matrix, (mark, colour) in MARK.items():
            if not (rows := self.matrix(matrix)):
                continue
            style = {"color": colour, "label": matrix}
            layers = sorted({row.layer for row in rows})
            by_layer = [[row for row in rows if row.layer == layer] for layer in layers]
            legible.plot(layers, [_legible(some) for some in by_layer], mark, **style)
            read = sorted({row.direction for row in rows if row.kurtosis is not None})
            several = ([row.kurtosis for row in rows if row.direction == at] for at in read)
            typical = [median(k for k in some if k is not None) for some in several]
            depth.plot([1 + at for at in read], typical, mark, **style)
            if matrix != "values":
                overlap.plot(layers, [some[0].overlap for some in by_layer], mark, **style)
        legible.axhline(0.05, color=GREY, linestyle="--", label="random directions")
        depth.axhline(null.kurtosis_null, color=GREY, linestyle="--", label="random directions")
        depth.axhline(null.kurtosis_high, color=GREY, linestyle=":", label="95% of them are below")
        overlap.axhline(null.overlap_null, color=GREY, linestyle="--", label="random directions")
        legible.set(title="Legible directions", ylabel="share above 95% of random ones", ylim=(0, 1.02))
        depth.set(title="Legibility by strength", ylabel="kurtosis of logits (median layer)")
        depth.set_xlabel("singular direction, strongest first")
        overlap.set(title="Shared with the values", ylabel="mean squared cosine", ylim=(0, None))
        for axes in (legible, overlap):
            axes.set_xlabel("layer")
        for axes in (legible, depth, overlap):
            legend_below(axes)
        return figure


def svd_directions(
    model: Model,
    *,
    layers: Sequence[int] | None = None,
    directions: int = 32,
    readings: int = 8,
    view: str = "raw",
    seed: int = 0,
) -> SVDDirections:
    """The leading right singular directions of every matrix in the vocabulary (Millidge & Black 2022).

    A direction is read only where its singular value is over 1.02 times away from both its neighbours, or else the
    two are one plane in which any direction would do; and at both ends, because it has no sign. Legibility is the
    kurtosis of its logits over the vocabulary, which a few tokens far out make large. Random directions have 3 if
    tokens are Gaussian, 3d / (d + 2) if they are spread evenly over a sphere; the null is what they have in this
    vocabulary. In a gated layer a neuron's key and value share an arbitrary scale, which would change both: values
    are taken at unit norm and keys carry their norms (`FFN.canonical`). Gates have no such freedom.

    Args:
        layers: the layers to measure; all by default.
        directions: leading directions a matrix; of as many the overlap is taken.
        readings: vocabulary tokens an end.
        view: the unembedding, `raw` as published or `folded` (see `unembedding`). Weights are raw.

    Raises:
        InputError: a layer or a view that is not there, or a count below 1.
        ModelRefused: with `folded`, more than a norm lies between the last block and the unembedding.
    """
    if min(directions, readings) < 1:
        raise InputError(f"got directions={directions}, readings={readings}: give at least 1 of each")
    vocabulary, tokenizer = unembedding(model, view), tokenizer_of(model)
    words = [word(tokenizer, i) for i in range(len(vocabulary))]
    random = torch.randn(ALONE, vocabulary.shape[1], generator=torch.Generator().manual_seed(seed))
    # a kurtosis has no scale, so that random directions need not be of unit length
    null = torch.tensor([reading.kurtosis for reading in read_directions(random, vocabulary, 1)])
    rows = [
        row
        for ffn in (layer.canonical() for layer in choose_ffns(model, layers))
        for row in _layer_rows(ffn, vocabulary, words, directions, readings, null)
    ]
    settings = {"model": describe(model)["name"], "weights": "raw", "vocabulary": view, "gap": GAP}
    return SVDDirections(rows, settings | {"directions": directions, "readings": readings, "seed": seed})


class Singular(NamedTuple):
    values: Float[Tensor, " k"]
    directions: Float[Tensor, "k d_model"]


def singular(rows: Float[Tensor, "n d_model"]) -> Singular:
    """Singular values, largest first, and the right singular directions, k = min(n, d_model).

    >>> singular(torch.tensor([[3.0, 0.0], [0.0, 5.0]])).values
    tensor([5., 3.], dtype=torch.float64)
    """
    rows = rows.detach().cpu().double()
    squares, vectors = torch.linalg.eigh(rows.T @ rows)  # many times faster than the SVD of a tall matrix
    k = min(rows.shape)
    return Singular(squares.flip(0)[:k].clamp(min=0).sqrt(), vectors.flip(1)[:, :k].T)


def gaps(values: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
    """The ratio of each singular value to the nearer of its two neighbours, at least 1; 1 for those of rounding.

    >>> gaps(torch.tensor([8.0, 4.0, 3.0]))
    tensor([2.0000, 1.3333, 1.3333])
    """
    ends = values.new_tensor([float("inf")]), values.new_zeros(1)
    above = torch.cat([ends[0], values[:-1]]) / values
    below = values / torch.cat([values[1:], ends[1]])
    rounding = len(values) * torch.finfo(torch.float32).eps * values[0]
    return torch.where(values > rounding, torch.minimum(above, below), 1.0)


def overlap(one: Float[Tensor, "k d"], other: Float[Tensor, "k d"]) -> float:
    """Mean squared cosine of the principal angles of two k-dimensional spaces, from orthonormal rows, in [0, 1].

    >>> overlap(torch.eye(4)[:2], torch.eye(4)[1:3])
    0.5
    """
    return float((one @ other.T).square().sum() / len(one))


def random_overlap(k: int, d: int) -> tuple[float, float]:
    """Mean and standard deviation of `overlap` for random k-dimensional spaces of R^d.

    2 k² (d - k)² / (d² (d - 1) (d + 2)).
    """
    return k / d, (d - k) / d * (2 / ((d - 1) * (d + 2))) ** 0.5


class Reading(NamedTuple):
    kurtosis: float
    longer: Int[Tensor, " n"]
    shorter: Int[Tensor, " n"]


def read_directions(
    directions: Float[Tensor, "n d_model"], vocabulary: Float[Tensor, "d_vocab d_model"], k: int, held: int = HELD
) -> Iterator[Reading]:
    """Kurtosis of each direction's logits, and the k tokens at either end; the longer tail comes first.

    `held` bounds the bytes of each of four arrays: a slice of the vocabulary, scores, and two made of them.
    """
    slices = vocabulary.split(max(1, held // (4 * vocabulary.shape[1])))
    for some in directions.float().to(vocabulary.device).split(max(1, held // (4 * len(vocabulary)))):
        scores = torch.cat([some @ piece.float().T for piece in slices], dim=1)
        scores -= scores.mean(dim=1, keepdim=True)
        scores /= scores.square().mean(dim=1, keepdim=True).sqrt()
        kurtosis = scores.square().square_().mean(dim=1)
        scores *= scores.pow(3).mean(dim=1, keepdim=True).sign()
        k = min(k, len(vocabulary))
        longer, shorter = (scores.topk(k, dim=1, largest=largest).indices.cpu() for largest in (True, False))
        yield from map(Reading, kurtosis.tolist(), longer, shorter)


def _layer_rows(
    ffn: FFN,
    vocabulary: Float[Tensor, "d_vocab d_model"],
    words: list[str],
    directions: int,
    readings: int,
    null: Float[Tensor, " n"],
) -> Iterator[Row]:
    parts = {"keys": ffn.keys, "gates": ffn.gates, "values": ffn.values}
    found = {matrix: singular(rows) for matrix, rows in parts.items() if rows is not None}
    k = min(directions, *found["keys"].directions.shape)
    leading = {matrix: part.directions[:k] for matrix, part in found.items()}
    expected, sd = random_overlap(k, ffn.d_model)
    for matrix, (values, _) in found.items():
        gap = gaps(values)[:k]
        apart = gap > GAP
        read = read_directions(leading[matrix][apart], vocabulary, readings)
        for i, reading in enumerate(next(read) if there else None for there in apart):
            yield Row(
                layer=ffn.layer,
                matrix=matrix,
                direction=i,
                singular_value=float(values[i]),
                share=float(values[i].square() / values.square().sum()),
                gap=float(gap[i]),
                kurtosis=reading and reading.kurtosis,
                kurtosis_null=float(null.median()),
                kurtosis_high=float(null.quantile(0.95)),
                longer=[words[token] for token in reading.longer.tolist()] if reading else [],
                shorter=[words[token] for token in reading.shorter.tolist()] if reading else [],
                overlap=overlap(leading[matrix], leading["keys" if matrix == "values" else "values"]),
                overlap_null=expected,
                overlap_null_sd=sd,
            )


def _legible(rows: Sequence[Row]) -> float:
    """The share of those read that are."""
    read = [row.legible for row in rows if row.kurtosis is not None]
    return fmean(read) if read else float("nan")

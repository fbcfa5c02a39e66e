"""How many directions do the keys read and the values write?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from .. import spectrum as sp
from ..ffn import FFN
from ..figure import BLUE, GREEN, GREY, ORANGE, caption, legend_below, new_figure, styled
from ..models import Model, describe
from ..result import Result, column
from ..stream import choose_ffns

MARK = {"keys": ("o-", BLUE), "gates": ("^-", ORANGE), "values": ("s-", GREEN)}


@dataclass(frozen=True)
class Row:
    layer: int = column("", "layer")
    matrix: str = column("", "keys: up-projection rows, gates: gate rows, values: down-projection rows")
    neurons: int = column("rows", "neurons, d_mlp")
    dimensions: int = column("columns", "d_model")
    soft_rank: float = column("directions", "exp of the entropy of the normalised eigenvalues of the Gram matrix")
    soft_rank_null: float = column("directions", "soft rank of Gaussian rows with the same norms, mean over draws")
    soft_rank_null_sd: float = column("directions", "standard deviation of the null over draws")
    participation_ratio: float = column("directions", "(sum l)^2 / sum l^2 of those eigenvalues")
    participation_ratio_null: float = column("directions", "participation ratio of the null, mean over draws")
    erank_rv: float = column("directions", "exp of the entropy of the normalised singular values (Roy & Vetterli)")
    erank_rv_null: float = column("directions", "effective rank of the null, mean over draws")
    stable_rank: float = column("directions", "sum l / max l")
    stable_rank_null: float = column("directions", "stable rank of the null, mean over draws")
    spikes: int = column(
        "directions", "eigenvalues above the noise edge: the largest of shuffled rows and 99.9% of its play"
    )


@dataclass(frozen=True)
class WeightRank(Result):
    name: ClassVar[str] = "weight_rank"
    question: ClassVar[str] = "How many directions do the keys read and the values write?"
    row_type: ClassVar[type] = Row

    def matrix(self, matrix: str) -> list[Row]:
        """The rows of one matrix, in the order of the layers."""
        return [row for row in self.rows if row.matrix == matrix]

    def findings(self) -> list[str]:
        sentences = []
        for matrix in MARK:
            rows = self.matrix(matrix)
            if rows:
                share, null, spikes = (
                    float(torch.tensor(values).median())
                    for values in (
                        [row.erank_rv / row.dimensions for row in rows],
                        [row.erank_rv_null / row.dimensions for row in rows],
                        [float(row.spikes) for row in rows],
                    )
                )
                sentences.append(
                    f"{matrix.capitalize()}: effective rank {share:.2f} d_model, Gaussian rows {null:.2f} "
                    f"(median layer); {spikes:.0f} directions stand out from shuffled rows."
                )
        return sentences

    @styled
    def plot(self) -> Figure:
        figure, (rank, spikes) = new_figure(2, caption(self.settings, f"{self.settings['weights']} weights"))
        for matrix, (mark, colour) in MARK.items():
            rows = self.matrix(matrix)
            if not rows:
                continue
            layers = [row.layer for row in rows]
            rank.plot(layers, [row.soft_rank / row.dimensions for row in rows], mark, color=colour, label=matrix)
            spikes.plot(layers, [row.spikes / row.dimensions for row in rows], mark, color=colour, label=matrix)
        rows = self.matrix("keys")
        null = [row.soft_rank_null / row.dimensions for row in rows]
        rank.plot([row.layer for row in rows], null, "--", color=GREY, label="Gaussian rows, same norms")
        rank.set(title="Directions of the weights", xlabel="layer", ylabel="soft rank / d_model", ylim=(0, 1.02))
        spikes.set(
            title="Directions above shuffled rows",
            xlabel="layer",
            ylabel="directions / d_model",
            ylim=(0, None),
        )
        legend_below(rank)
        legend_below(spikes)
        return figure


def weight_rank(model: Model, *, layers: Sequence[int] | None = None, draws: int = 3, seed: int = 0) -> WeightRank:
    """Ranks of every layer's keys, gates and values (raw weights) beside Gaussian rows of the same norms.

    On a gated FFN the values are taken at unit norm and the keys carry their norms (`FFN.canonical`).

    Args:
        layers: the layers to measure; all by default.
        draws: Gaussian matrices of the null.

    Raises:
        InputError: a layer that is not there.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = [
        _row(ffn, matrix, rows.detach().cpu().double(), draws, generator)
        for ffn in (layer.canonical() for layer in choose_ffns(model, layers))
        for matrix, rows in (("keys", ffn.keys), ("gates", ffn.gates), ("values", ffn.values))
        if rows is not None
    ]
    return WeightRank(rows, {"model": describe(model)["name"], "weights": "raw", "draws": draws, "seed": seed})


def _row(ffn: FFN, matrix: str, rows: Float[Tensor, "n d"], draws: int, generator: torch.Generator) -> Row:
    spectrum = sp.gram_eigenvalues(rows)
    norms = rows.norm(dim=1)
    nulls = []
    for _ in range(draws):
        gaussian = torch.randn(rows.shape, generator=generator, dtype=rows.dtype)
        nulls.append(sp.gram_eigenvalues(gaussian * (norms / gaussian.norm(dim=1))[:, None]))
    shuffled = rows.gather(1, torch.rand(rows.shape, generator=generator).argsort(dim=1))
    # signs as well, or an offset that all entries share would be taken for noise
    shuffled *= torch.randint(2, rows.shape, generator=generator) * 2 - 1
    edge = float(sp.gram_eigenvalues(shuffled)[0]) + _edge_width(rows)
    soft = torch.tensor([sp.soft_rank(null) for null in nulls])
    return Row(
        layer=ffn.layer,
        matrix=matrix,
        neurons=rows.shape[0],
        dimensions=rows.shape[1],
        soft_rank=sp.soft_rank(spectrum),
        soft_rank_null=float(soft.mean()),
        soft_rank_null_sd=float(soft.std(correction=0)),
        participation_ratio=sp.participation_ratio(spectrum),
        participation_ratio_null=_mean([sp.participation_ratio(null) for null in nulls]),
        erank_rv=sp.erank_rv(spectrum),
        erank_rv_null=_mean([sp.erank_rv(null) for null in nulls]),
        stable_rank=sp.stable_rank(spectrum),
        stable_rank_null=_mean([sp.stable_rank(null) for null in nulls]),
        spikes=int((spectrum > edge).sum()),
    )


def _edge_width(rows: Float[Tensor, "n d"]) -> float:
    """How far above its mean the largest eigenvalue of noise comes once in a thousand (Johnstone 2001)."""
    n, d = rows.shape
    scale = (n**0.5 + d**0.5) * (n**-0.5 + d**-0.5) ** (1 / 3) * float(rows.square().mean())
    return 4.5 * scale  # Tracy-Widom: mean -1.2, 99.9% quantile 3.3


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)

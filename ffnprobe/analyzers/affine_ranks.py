"""Over how many directions does that part of h spread which is affine in x, and over how many what is left?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .. import spectrum as sp
from ..regression import AffineMap, Paired
from ..statistics import Moments
from .affine_probes import HALVES, Beside

RANKS = {"soft_rank": sp.soft_rank, "participation_ratio": sp.participation_ratio}
PARTS = ("", "_linear", "_nonlinear")


def affine_ranks(
    beside: Beside, parts: Sequence[Paired], maps: Sequence[AffineMap], statistics: Mapping[str, Any]
) -> dict[str, float | None]:
    """Of what the map of the other half says of h, of what it leaves, and of both: covariances of both halves.

    None where the covariance of h did not fit into memory: it is not there, or a sketch of `hidden_rank`'s.
    """
    if not (beside.whole and isinstance(statistics.get(f"hidden_rank/{beside.ffn.layer}/post/0"), Moments)):
        return dict.fromkeys(measure + part for measure in RANKS for part in PARTS)
    whole, linear, rest = (torch.zeros(beside.ffn.d_mlp, beside.ffn.d_mlp, dtype=torch.float64) for _ in range(3))
    total = sum(part.n for part in parts)
    for half, part, found in zip(HALVES, parts, reversed(maps), strict=True):
        B, share = found.weights[:, : beside.ffn.d_mlp].cpu(), part.n / total
        C = statistics[f"hidden_rank/{beside.ffn.layer}/post/{half}"].compute().centred.cpu()
        said = B.T @ (part.inputs.cpu() @ B)
        both = B.T @ part.cross[:, beside.of_hidden].cpu()
        whole += share * C
        linear += share * said
        rest += share * (C - both - both.T + said)
    spectra = dict(zip(PARTS, map(sp.eigenvalues, (whole, linear, rest)), strict=True))
    return {
        measure + part: rank(spectrum) for measure, rank in RANKS.items() for part, spectrum in spectra.items()
    }

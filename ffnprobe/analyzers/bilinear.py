"""Over how many directions does the product of gate and key spread, in a gated layer?"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from .. import spectrum as sp
from ..ffn import FFN


class Bilinear(NamedTuple):
    """Participation ratios of the tensor B[o, a, b] = sum_i v_io (g_ia k_ib + k_ia g_ib) / 2."""

    output: float  # of its unfolding along what is written
    input: float  # of its unfolding along what is read
    top: float  # of the interaction matrix B[w] of the leading output direction w: squared eigenvalues


def bilinear(ffn: FFN) -> Bilinear | None:
    """The tensor with which a gated layer multiplies two inputs; None for a plain layer.

    Exact in a bilinear layer (`identity` gate, no biases): y = B(x, x). Elsewhere the layer with its gate
    linearised, its second-order part at x = 0 up to the factor act'(0). The scale or sign of a neuron changes
    nothing. Both unfoldings come from Gram matrices of neurons; the tensor of d_model³ numbers is never made.
    """
    if ffn.gates is None:
        return None
    ffn = ffn.canonical()
    V, K, G = ffn.values, ffn.keys, ffn.gates
    assert G is not None
    KK, GG, GK, VV = K @ K.T, G @ G.T, G @ K.T, V @ V.T
    output = V.T @ (((GG * KK + GK * GK.T) / 2) @ V)
    crossed = G.T @ (VV * GK.T) @ K
    entering = G.T @ (VV * KK) @ G + K.T @ (VV * GG) @ K + crossed + crossed.T
    w = torch.linalg.eigh(output.double()).eigenvectors[:, -1].to(V)
    top = torch.linalg.eigvalsh(interaction_matrix(ffn, w).double()).square().cpu()
    return Bilinear(
        sp.participation_ratio(sp.eigenvalues(output)),
        sp.participation_ratio(sp.eigenvalues(entering)),
        sp.participation_ratio(top),
    )


def interaction_matrix(ffn: FFN, w: Float[Tensor, " d_model"]) -> Float[Tensor, "d_model d_model"]:
    """B[w]: x' B[w] x is what the bilinear layer writes along w."""
    assert ffn.gates is not None
    matrix = ffn.gates.T @ ((ffn.values @ w)[:, None] * ffn.keys)
    return (matrix + matrix.T) / 2

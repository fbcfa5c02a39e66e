"""What do the codes of one layer's tokens tell of its output, and what do their nulls?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..ffn import FFN
from .codebooks import Halves, decoded, kept_variance, kmeans, nearest, perplexity

OF_X, OF_H, STRONGEST, SIGNS = "k-means of x", "k-means of h", "strongest neuron", "k-means of signs"
AFFINE, TOP = "affine map", "top neurons"
FEWEST_CODES = 16
KEPT = (1, 4, 16, 64)
RIDGE = 1e-8  # of the affine map, in mean eigenvalues
GAUSSIAN_SOFTNESS = math.exp(math.log(2) + 0.5772156649015329 - 2)  # E g² ln g² is 2 - ln 2 - Euler's constant


def coded_rows(ffn: FFN, x: Halves, document: Int[Tensor, " m"], seed: int = 0) -> Iterator[dict[str, Any]]:
    """What stands in the table of one layer, a line a code and size.

    Args:
        x: the layer's inputs at the tokens that codes are fitted and tested on.
        document: of each test token.
    """
    ffn = ffn.canonical()  # the size of a gated neuron's h is what it writes, whatever its scale was
    h = Halves(*map(ffn.hidden, x))
    generator = torch.Generator().manual_seed(1_000_003 * seed + ffn.layer)
    y = Halves(*map(ffn.write, h))
    yield from _Layer(ffn, x, h, y, document.to(x.test.device), seed, generator).rows()


@dataclass(frozen=True)
class _Layer:
    ffn: FFN
    x: Halves
    h: Halves
    y: Halves
    document: Int[Tensor, " m"]
    seed: int
    generator: torch.Generator

    def rows(self) -> Iterator[dict[str, Any]]:
        shared = {
            "layer": self.ffn.layer,
            "expansion": self.ffn.expansion,
            "d_mlp": self.ffn.d_mlp,
            "softness": softness_of(self.h.test, self.ffn.values),
            "softness_null": GAUSSIAN_SOFTNESS * self.ffn.d_mlp,
            "fit_tokens": len(self.x.fit),
            "tokens": len(self.x.test),
            "documents": len(self.document.unique()),
        }
        for part in (self._clustered, self._strongest, self._affine, self._top):
            yield from ({**shared, **row} for row in part())

    def _clustered(self) -> Iterator[dict[str, Any]]:
        sizes = [k for k in code_sizes(self.ffn.d_mlp) if k <= len(self.x.fit)]
        signs = Halves(*((self.ffn.pre(part) > 0).to(part) for part in self.x))
        for code, of in ((OF_X, self.x), (OF_H, self.h), (SIGNS, signs)):
            for size, centres in zip(sizes, kmeans(of.fit, sizes, seed=self.seed), strict=True):
                codes = Halves(*(nearest(part, centres)[0] for part in of))
                yield self._coded(code, codes, size, self._random_codebook(of, size), size)

    def _strongest(self) -> Iterator[dict[str, Any]]:
        codes = Halves(*(part.argmax(dim=1) for part in self._contributions()))
        used = len(codes.fit.unique())
        yield self._coded(STRONGEST, codes, self.ffn.d_mlp, self._random_codebook(self.x, used), used)

    def _affine(self) -> Iterator[dict[str, Any]]:
        y, order = self.y, Halves(*(self._order(len(part)) for part in self.y))
        kept = kept_variance(affine(self.x, y.fit), y.test, self.document)
        permuted = kept_variance(affine(self.x, y.fit[order.fit]), y.test[order.test], self.document)
        yield _no_code(AFFINE) | {"r2": kept.r2, "r2_se": kept.se, "permuted": permuted.r2}

    def _top(self) -> Iterator[dict[str, Any]]:
        h, mean, size = self.h.test, self.h.fit.mean(dim=0), self._contributions().test
        for k in (k for k in KEPT if k <= self.ffn.d_mlp):
            arms = (size, torch.rand(size.shape, generator=self.generator).to(size))
            written = (self.ffn.write(only_top(h, by, k, mean)) for by in arms)
            kept, null = (kept_variance(predicted, self.y.test, self.document) for predicted in written)
            yield _no_code(TOP) | {"size": k, "r2": kept.r2, "r2_se": kept.se, "random": null.r2}

    def _coded(self, code: str, codes: Halves, size: int, null: Halves, null_size: int) -> dict[str, Any]:
        predicted, seen = decoded(codes, self.y.fit, size)
        kept = kept_variance(predicted, self.y.test, self.document)
        return {
            "code": code,
            "size": size,
            "r2": kept.r2,
            "r2_se": kept.se,
            "random": self._told(null, null_size),
            "permuted": self._told(Halves(*(part[self._order(len(part))] for part in codes)), size),
            "perplexity": perplexity(codes.test),
            "dead": 1 - len(codes.test.unique()) / size,
            "unseen": float((~seen).double().mean()),
        }

    def _told(self, codes: Halves, size: int) -> float:
        return kept_variance(decoded(codes, self.y.fit, size)[0], self.y.test, self.document).r2

    def _random_codebook(self, of: Halves, size: int) -> Halves:
        centres = of.fit[self._order(len(of.fit))[:size]]
        return Halves(*(nearest(part, centres)[0] for part in of))

    def _contributions(self) -> Halves:
        norms = self.ffn.values.norm(dim=1)
        return Halves(*(part.abs() * norms for part in self.h))

    def _order(self, n: int) -> Int[Tensor, " n"]:
        return torch.randperm(n, generator=self.generator).to(self.x.fit.device)


def _no_code(code: str) -> dict[str, Any]:
    names = ("size", "random", "permuted", "perplexity", "dead", "unseen")
    return {"code": code} | dict.fromkeys(names)


def code_sizes(d_mlp: int) -> list[int]:
    """Powers of two from 16 to d_mlp, and d_mlp itself.

    >>> code_sizes(100), code_sizes(8)
    ([16, 32, 64, 100], [8])
    """
    powers = [2**b for b in range(int(math.log2(FEWEST_CODES)), 40) if 2**b < d_mlp]
    return [*powers, d_mlp]


def softness_of(h: Float[Tensor, "n d_mlp"], values: Float[Tensor, "d_mlp d"]) -> float:
    """exp of the entropy over neurons of h_i² |v_i|² / sum, of the median token, in [1, d_mlp].

    >>> softness_of(torch.tensor([[3.0, 3.0, 0.0]]), torch.eye(3))
    2.0
    """
    share = (h * values.norm(dim=1)).double().square()
    share = share / share.sum(dim=1, keepdim=True)
    return float(torch.special.entr(share).sum(dim=1).exp().median())


def affine(x: Halves, y: Float[Tensor, "n d"]) -> Float[Tensor, "m d"]:
    """What the affine map that fits y best on the fit tokens gives on the test tokens, with a ridge."""
    mean = x.fit.mean(dim=0)
    centred = (x.fit - mean).double()
    gram = centred.mT @ centred
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram)).to(gram)
    weight = torch.linalg.solve(gram + ridge, centred.mT @ (y - y.mean(dim=0)).double())
    return ((x.test - mean).double() @ weight).to(y) + y.mean(dim=0)


def only_top(
    h: Float[Tensor, "n d_mlp"], by: Float[Tensor, "n d_mlp"], k: int, mean: Float[Tensor, " d_mlp"]
) -> Float[Tensor, "n d_mlp"]:
    """h of the k neurons that are largest `by` this for each token, and the mean of all others."""
    at = by.topk(k, dim=1).indices
    return mean.expand_as(h).scatter(1, at, h.gather(1, at))

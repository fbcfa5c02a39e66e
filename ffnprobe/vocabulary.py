"""Which tokens does a direction raise most, and which does it lower most?"""

from __future__ import annotations

import time
import warnings
from functools import cache

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

HELD = 112 * 2**20  # bytes held at once, beside the copy of the vocabulary in bfloat16
SPARE = 44  # candidates more than are wanted: bfloat16 moves a token by so many places at most, nearly always
STRIDES = 16  # a token is looked for among the strides with the largest maxima


def read_values(
    values: Float[Tensor, "n d_model"], vocabulary: Float[Tensor, "d_vocab d_model"], k: int, held: int = HELD
) -> tuple[Int[Tensor, "n k"], Int[Tensor, "n k"]]:
    """Ids of the k vocabulary tokens that each value raises most and lowers most, strongest first.

    Exact: where a bfloat16 product is the faster one it proposes candidates, which are ranked in the vocabulary's
    own precision, and whoever its rounding could have left out is ruled out by a bound (Cauchy-Schwarz on what
    rounding took off) or looked for in the whole product. `held` bytes exist at a time, whatever the number of
    values, and `d_vocab d_model` bfloat16.

    Raises:
        ValueError: k is not in [1, d_vocab].
    """
    n, width = vocabulary.shape
    if not 1 <= k <= n:
        raise ValueError(f"cannot read {k} tokens of a vocabulary of {n}: choose 1 to {n}")
    values = values.to(vocabulary)
    if n < 2 * STRIDES * (k + SPARE) or not _narrow_is_faster(vocabulary.device, vocabulary.dtype, width):
        ends = [_extremes(chunk @ vocabulary.mT, k) for chunk in values.split(max(1, held // (4 * n)))]
    else:
        narrow = _Narrow(vocabulary)
        ends = [narrow.read(chunk, k) for chunk in values.split(max(1, held // (2 * n + 24 * (k + SPARE))))]
    raised, lowered = zip(*ends, strict=True)
    return torch.cat(raised).cpu(), torch.cat(lowered).cpu()


def _extremes(scores: Float[Tensor, "n d_vocab"], k: int) -> tuple[Int[Tensor, "n k"], Int[Tensor, "n k"]]:
    return scores.topk(k, dim=1).indices, scores.topk(k, dim=1, largest=False).indices


class _Narrow:
    """A vocabulary and its bfloat16 copy."""

    def __init__(self, vocabulary: Float[Tensor, "d_vocab d_model"]) -> None:
        self.wide, self.narrow = vocabulary, vocabulary.bfloat16()
        self.longest = vocabulary.norm(dim=1).max()
        # by parts: a difference of the two would be a second copy
        self.lost = torch.stack(
            [
                (a - b.to(a)).norm(dim=1).max()
                for a, b in zip(vocabulary.split(1024), self.narrow.split(1024), strict=True)
            ]
        ).max()

    def read(self, values: Float[Tensor, "n d_model"], k: int) -> tuple[Int[Tensor, "n k"], Int[Tensor, "n k"]]:
        short = values.bfloat16()
        scores = short @ self.narrow.mT
        bound = (values - short.to(values)).norm(dim=1) * self.longest + values.norm(dim=1) * self.lost
        raised, sure = self._best(scores, values, bound, k)
        # in place, or there would be two of them
        lowered, sure_too = self._best(scores.neg_(), -values, bound, k)
        if len(open_ := (~(sure & sure_too)).nonzero().squeeze(1)):
            for rows in open_.split(max(1, len(values) // 4)):
                raised[rows], lowered[rows] = _extremes(values[rows] @ self.wide.mT, k)
        return raised, lowered

    def _best(
        self, scores: Tensor, values: Float[Tensor, "n d_model"], bound: Float[Tensor, " n"], k: int
    ) -> tuple[Int[Tensor, "n k"], Bool[Tensor, " n"]]:
        """The k best of the candidates, and whether they are surely the k best of all."""
        about, token = _top(scores, k + SPARE)
        token = token.sort(dim=1).values  # so that equal scores come in the order of the ids
        n, most = token.shape
        ends = torch.arange(0, n * most + 1, most, device=token.device)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            nothing = torch.zeros(n * most).to(values)
            place = torch.sparse_csr_tensor(
                ends, token.flatten(), nothing, (n, len(self.wide)), check_invariants=False
            )
        exact = torch.sparse.sampled_addmm(place, values, self.wide.mT, beta=0.0).values().view(n, most)
        best = exact.topk(k, dim=1)
        # every other token is at most the last candidate, plus the rounding of its sum, plus the bound
        last = about[:, -1].to(values)
        sure = last + last.abs() * 2**-7 + bound * (1 + 2**-7) < best.values[:, -1]
        return token.gather(1, best.indices), sure


def _top(scores: Tensor, k: int) -> tuple[Tensor, Int[Tensor, "n k"]]:
    """As topk, by way of the k strides with the largest maxima: no other one holds any of the k largest."""
    n, width = scores.shape
    stride = width // STRIDES
    part = scores[:, : stride * STRIDES].view(n, STRIDES, stride)
    at = part.amax(1).topk(k, dim=1).indices
    found = part.gather(2, at[:, None].expand(-1, STRIDES, -1)).flatten(1)
    ids = (at[:, None] + stride * torch.arange(STRIDES, device=at.device)[:, None]).flatten(1)
    rest = torch.arange(stride * STRIDES, width, device=at.device).expand(n, -1)
    found, ids = torch.cat([found, scores[:, stride * STRIDES :]], dim=1), torch.cat([ids, rest], dim=1)
    best = found.topk(k, dim=1)
    return best.values, ids.gather(1, best.indices)


@cache
def _narrow_is_faster(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Tried out: processors without bfloat16 arithmetic are slower with it."""
    if dtype != torch.float32 or (device.type == "cpu" and not torch.backends.mkl.is_available()):
        return False

    def seconds(dtype: torch.dtype) -> float:
        a, b = (torch.ones(rows, width, device=device, dtype=dtype) for rows in (128, 2048))
        tries = []
        for _ in range(4):
            started = time.perf_counter()
            float((a @ b.mT)[0, 0])  # waits for an accelerator
            tries.append(time.perf_counter() - started)
        return min(tries[1:])

    return seconds(torch.bfloat16) < 0.7 * seconds(torch.float32)

"""In which views can the neurons of a layer be alike, and what does that need of one pass over the tokens?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..clustering import similarity
from ..errors import InputError
from ..ffn import FFN
from ..forward import evenly
from ..models import Model, output_gain
from ..statistics import CoActivation
from ..stream import Probe
from ..unembedding import unembedding, why_illegible

VIEWS = ("keys", "gates", "values", "vocabulary", "co-activation")
BUDGET = 2**28  # bytes of co-activation, all layers together
NEURONS = 2048  # of a layer, at most
CO_ACTIVITY = ("magnitudes", "counts")
NULL_TOKENS = 2**14  # of a half, at most: more would only bring the null nearer to 0
RIDGE = 1e-3  # of a correlation matrix: of few tokens it is singular


@dataclass(frozen=True, eq=False)
class View:
    """Rows to be clustered, one a neuron, and the similarities by which clusters are judged.

    Of co-activation, the rows are those of one half of the documents and the similarities those of the other.
    """

    rows: Float[Tensor, "n d"]
    signed: bool  # by cosine; else by |cosine|, where a sign is a gauge
    scored: Float[Tensor, "n n"]
    again: Float[Tensor, "n d"] | None = None  # the rows of the other half
    tokens: tuple[int, ...] = ()  # of each half
    metric: Float[Tensor, "d d"] | None = None  # what values are multiplied by before they are compared

    def null(self, generator: torch.Generator) -> View:
        """Gaussian rows of that shape, in the same metric; of co-activation, independent Gaussian neurons."""
        if self.tokens:
            shapes = [(len(self.rows), min(tokens, NULL_TOKENS)) for tokens in self.tokens]
            one, other = (torch.randn(shape, generator=generator).abs().corrcoef() for shape in shapes)
            return co_active(one, other)
        rows = torch.randn(self.rows.shape, generator=generator)
        return of_weights(rows if self.metric is None else rows @ self.metric, self.signed, self.metric)

    @property
    def kind(self) -> tuple:
        """Views of one kind have one null."""
        return (*self.rows.shape, self.signed, len(self.tokens), self.metric is not None)


def of_weights(rows: Float[Tensor, "n d"], signed: bool, metric: Float[Tensor, "d d"] | None = None) -> View:
    """A view of weights."""
    return View(rows, signed, similarity(rows, signed), metric=metric)


def co_active(one: Float[Tensor, "n n"], other: Float[Tensor, "n n"], tokens: tuple[int, ...] = ()) -> View:
    """The view of two halves' correlations: rows whose cosines are the correlations, by Cholesky."""
    halves = [torch.nan_to_num(half).fill_diagonal_(1.0) for half in (one, other)]
    ridge = RIDGE * torch.eye(len(one), dtype=torch.float64)
    rows = [torch.linalg.cholesky(half.double() + ridge).float() for half in halves]
    return View(rows[0], True, halves[1].float(), rows[1], tokens)


def views_of(
    ffn: FFN,
    chosen: Int[Tensor, " n"] | None,
    metric: Float[Tensor, "d d"] | None,
    statistics: Mapping[str, Any],
    co_activity: str = "magnitudes",
) -> dict[str, View]:
    """Every view that this layer has, of the chosen neurons or all.

    Gates, and all weights of a plain layer, are compared by cosine; keys and values of a gated one by |cosine|,
    because (key, value) -> (-key, -value) leaves it as it is.
    """
    pick = slice(None) if chosen is None else chosen
    parts = {"keys": ffn.keys, "gates": ffn.gates, "values": ffn.values}
    rows = {name: part.detach()[pick].float().cpu() for name, part in parts.items() if part is not None}
    found = {name: of_weights(part, name == "gates" or not ffn.gated) for name, part in rows.items()}
    if metric is not None:
        found["vocabulary"] = of_weights(rows["values"] @ metric, not ffn.gated, metric)
    if (name := half_name(ffn.layer, 0)) in statistics:
        halves = [statistics[name], statistics[half_name(ffn.layer, 1)]]
        active = [half.compute() for half in halves]
        matrices = [co.correlation() if co_activity == "counts" else co.magnitude_correlation() for co in active]
        one, other = (matrix.cpu() for matrix in matrices)
        found["co-activation"] = co_active(one, other, tuple(half.n for half in halves))
    return found


def vocabulary_metric(model: Model, layer: int, root: Float[Tensor, "d d"] | None) -> Float[Tensor, "d d"] | None:
    """The root of the vocabulary's second moment behind the norm that a layer's output passes, if any."""
    gain = output_gain(model, layer)
    return root if root is None or gain is None else gain.float().cpu()[:, None] * root


def vocabulary_root(model: Model) -> Float[Tensor, "d d"] | None:
    """R with R R' = U' U, U the folded unembedding: `values @ R` have the cosines of `values @ U'`.

    So values are compared by what they do to all tokens, and no d_mlp x d_vocab matrix is made. None where
    values cannot be read in the vocabulary.
    """
    if why_illegible(model):
        return None
    vocabulary = unembedding(model)
    moment = sum((part.float().mT @ part.float()).double().cpu() for part in vocabulary.split(2**13))
    squares, directions = torch.linalg.eigh(torch.as_tensor(moment))
    return (directions * squares.clamp(min=0).sqrt()).float()


def half_name(layer: int, half: int) -> str:
    return f"neuron_clusters/{layer}/half/{half}"


def drawn(ffn: FFN, neurons: int, seed: int) -> Int[Tensor, " n"] | None:
    """A random subset of a layer with more neurons than are to be clustered; None: all of them."""
    if ffn.d_mlp <= neurons:
        return None
    generator = torch.Generator().manual_seed(1_000_003 * seed + ffn.layer)
    return torch.randperm(ffn.d_mlp, generator=generator)[:neurons].sort().values


def probes(
    layers: Sequence[FFN],
    *,
    co_activity: str = "magnitudes",
    neurons: int = NEURONS,
    budget: int = BUDGET,
    seed: int = 0,
) -> dict[str, Probe]:
    """Co-activation of each half of the documents, at as many of the layers as the budget has room for.

    Raises:
        InputError: it has no room for a single one, or there is no such co-activity.
    """
    if co_activity not in CO_ACTIVITY:
        raise InputError(f'co-activity "{co_activity}" is unknown: choose from {", ".join(CO_ACTIVITY)}')
    make = partial(CoActivation.about, keep=co_activity)
    wanted: dict[str, Probe] = {}
    for ffn in within(layers, neurons, budget):
        probe, chosen = Probe(ffn.layer, "post", make), drawn(ffn, neurons, seed)
        probe = probe if chosen is None else replace(probe, of=_choosing(chosen))
        wanted |= {half_name(ffn.layer, half): replace(probe, block=(half, 2)) for half in (0, 1)}
    return wanted


def within(layers: Sequence[FFN], neurons: int, budget: int) -> list[FFN]:
    """All layers, or as many as fit into so many bytes, spread evenly."""
    for n in range(len(layers), 0, -1):
        some = evenly(layers, n)
        if sum(co_activation_bytes(min(ffn.d_mlp, neurons)) for ffn in some) <= budget:
            return some
    least = min(co_activation_bytes(min(ffn.d_mlp, neurons)) for ffn in layers)
    raise InputError(
        f"the co-activation of a single layer does not fit into a budget of {budget:,} bytes: give at least "
        f"{least:,}, or fewer neurons"
    )


@cache
def co_activation_bytes(neurons: int) -> int:
    """Bytes of both halves of the documents, about 9 for each pair of neurons."""
    one = CoActivation.about(torch.empty(0, neurons, device="meta"), keep="magnitudes")
    return 2 * sum(tensor.nbytes for tensor in one.tensors().values())


def _choosing(chosen: Int[Tensor, " n"]) -> Callable[[Tensor], Tensor]:
    return lambda hidden: hidden[:, chosen.to(hidden.device)]

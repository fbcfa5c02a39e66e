"""What do regressions of a layer on what it reads need of one pass over the tokens, and how many bytes is that?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import InputError
from ..ffn import FFN
from ..regression import Paired
from ..statistics import CrossMoments, Moments
from ..stream import Probe
from .rank_probes import BUDGET, plan_moments
from .rank_probes import probes as rank_probes

RANDOM = 128  # random neurons of the null
HALVES = (0, 1)  # even and odd documents
SITES = ("in", "post", "out")


@dataclass(frozen=True)
class Beside:
    """x, h, y -> [x | h of some neurons, each weighed by its gauge | y unless h is whole | h of random ones]."""

    ffn: FFN
    neurons: int
    seed: int

    def __call__(
        self,
        x: Float[Tensor, "n d_model"],
        hidden: Float[Tensor, "n d_mlp"],
        y: Float[Tensor, "n d_model"],
    ) -> Float[Tensor, "n width"]:
        parts = [x, (hidden if self.whole else hidden[:, self.chosen.to(x.device)]) * self._gauge.to(x.device)]
        parts += [] if self.whole else [y]
        return torch.cat([*parts, self.random.hidden(x)], dim=1)

    @property
    def whole(self) -> bool:
        """All neurons are there: then y is a linear map of the targets."""
        return self.neurons == self.ffn.d_mlp

    @cached_property
    def chosen(self) -> Int[Tensor, " neurons"]:
        """The neurons, in the order in which they stand in the row."""
        if self.whole:
            return torch.arange(self.ffn.d_mlp)
        return self._drawn[: self.neurons].sort().values

    @cached_property
    def random_like(self) -> Int[Tensor, " n"]:
        """Among the chosen, those whose norms and biases the random neurons have."""
        drawn = self._drawn[: min(RANDOM, self.neurons)]
        return torch.searchsorted(self.chosen, drawn.sort().values)

    @cached_property
    def random(self) -> FFN:
        """The null: Gaussian keys and gates with the norms of some neurons, on the same x."""
        rows, ffn = self.chosen[self.random_like], self.ffn.canonical()
        parts = {"keys": ffn.keys, "values": ffn.values, "gates": ffn.gates}
        parts |= {"key_bias": ffn.key_bias, "gate_bias": ffn.gate_bias}
        some: dict[str, Any] = {
            name: part[rows.to(part.device)] for name, part in parts.items() if part is not None
        }
        return replace(ffn, **some).randomised(self.seed).to(self.ffn.keys.dtype)

    @cached_property
    def _drawn(self) -> Int[Tensor, " d_mlp"]:
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.ffn.layer)
        return torch.randperm(self.ffn.d_mlp, generator=generator)

    @cached_property
    def _gauge(self) -> Float[Tensor, " neurons"]:
        return self.ffn.gauge[self.chosen.to(self.ffn.keys.device)]

    @property
    def of_hidden(self) -> slice:
        """The targets that are h."""
        return slice(0, self.neurons)

    @property
    def of_random(self) -> slice:
        """The targets that are h of random neurons."""
        start = self.neurons + (0 if self.whole else self.ffn.d_model)
        return slice(start, start + len(self.random_like))


def _side_by_side(x: Float[Tensor, "n d_model"], y: Float[Tensor, "n d_model"]) -> Float[Tensor, "n width"]:
    return torch.cat([x, y], dim=1)


def besides(layers: Sequence[FFN], seed: int, budget: int) -> list[Beside]:
    """One a layer, of as many neurons as the budget allows.

    Raises:
        InputError: the moments of RANDOM neurons do not fit.
    """
    neurons = plan_neurons(layers, budget)
    return [Beside(ffn, min(neurons, ffn.d_mlp), seed) for ffn in layers]


def plan_neurons(layers: Sequence[FFN], budget: int = BUDGET) -> int:
    """Neurons of each layer whose h is regressed: all if their moments take at most `budget` bytes.

    Else as many as fit of 8192, 4096, ... 128.

    Raises:
        InputError: 128 do not fit.
    """
    most = max(ffn.d_mlp for ffn in layers)
    if affine_bytes(layers, most) <= budget:
        return most
    neurons = 8192
    while affine_bytes(layers, neurons) > budget:
        if neurons == RANDOM:
            raise InputError(
                f"the moments of {len(layers)} layers do not fit into a budget of {budget:,} bytes: give at "
                f"least {affine_bytes(layers, RANDOM):,}, or fewer layers"
            )
        neurons //= 2
    return neurons


def affine_bytes(layers: Sequence[FFN], neurons: int) -> int:
    """Bytes of the moments of `probes`, without those that `hidden_rank` has too."""
    total = 0
    for ffn in layers:
        k, d = min(neurons, ffn.d_mlp), ffn.d_model
        targets = k + RANDOM + (0 if k == ffn.d_mlp else d)
        total += 2 * 8 * d * (targets + d + d * 9 // 16)  # of the tokens set apart, y and x with x
    return total


def probes(layers: Sequence[FFN], seed: int = 0, budget: int = BUDGET) -> dict[str, Probe]:
    """Moments of x, h and y by halves of the documents; those of one site are `hidden_rank`'s, by their names.

    Raises:
        InputError: they do not fit into `budget` bytes.
    """
    exact = plan_moments(layers, budget) == 0
    shared = ("in", "out", "post") if exact else ("in", "out")
    names = {f"hidden_rank/{ffn.layer}/{site}/{half}" for ffn in layers for site in shared for half in HALVES}
    wanted = {name: probe for name, probe in rank_probes(layers, seed, budget).items() if name in names}
    for beside in besides(layers, seed, budget):
        ffn = beside.ffn
        own, cross = f"nonlinearity/{ffn.layer}", partial(CrossMoments.about, d=ffn.d_model)
        apart = Probe(ffn.layer, ("in", "out"), cross, of=_side_by_side, kinds=("sink", "special"))
        for half in HALVES:
            block = (half, 2)
            wanted[f"{own}/hidden/{half}"] = Probe(ffn.layer, SITES, cross, of=beside, block=block)
            wanted[f"{own}/apart/{half}"] = replace(apart, block=block)
            of_x = Probe(ffn.layer, "in", Moments.about, kinds=("sink", "special"), block=block)
            wanted[f"{own}/apart_in/{half}"] = of_x
    return wanted


def ordinary(beside: Beside, statistics: Mapping[str, Any], half: int) -> Paired:
    """x and h of half of the documents, sinks and special tokens set apart."""
    layer = beside.ffn.layer
    x = statistics[f"hidden_rank/{layer}/in/{half}"].compute()
    cross = statistics[f"nonlinearity/{layer}/hidden/{half}"].compute()
    assert x.n == cross.n
    return Paired(x.n, x.mean, x.centred, cross.mean, cross.covariance, cross.variance)


def written(beside: Beside, part: Paired, statistics: Mapping[str, Any], half: int) -> Paired:
    """x and y of the same tokens."""
    variance = statistics[f"hidden_rank/{beside.ffn.layer}/out/{half}"].compute().variance
    if not beside.whole:
        return part.targets(slice(beside.neurons, beside.of_random.start))
    values, offset = writing(beside.ffn)
    hidden = part.targets(beside.of_hidden)
    return replace(hidden, mean=hidden.mean @ values + offset, cross=hidden.cross @ values, variance=variance)


def writing(ffn: FFN) -> tuple[Float[Tensor, "d_mlp d_model"], Float[Tensor, " d_model"]]:
    """(V, b) such that y = weighed h @ V + b, float64."""
    values = ffn.canonical().values.double()
    return values, values.new_zeros(ffn.d_model) if ffn.bias is None else ffn.bias.double()


def everything(beside: Beside, kept: Paired, statistics: Mapping[str, Any], half: int) -> Paired:
    """x and y of the same documents with sinks and special tokens left in."""
    layer = beside.ffn.layer
    apart = statistics[f"nonlinearity/{layer}/apart/{half}"]
    if not apart.n:
        return kept
    both = Moments(statistics[f"hidden_rank/{layer}/in/{half}"].state())
    both.merge(statistics[f"nonlinearity/{layer}/apart_in/{half}"])
    x, one = both.compute(), apart.compute()
    a, b = kept.n / x.n, one.n / x.n
    off, gap = kept.input_mean - one.input_mean, kept.mean - one.mean
    return Paired(
        x.n,
        x.mean,
        x.centred,
        a * kept.mean + b * one.mean,
        (a * kept.cross + b * one.covariance).addr(off, gap, alpha=a * b),
        a * kept.variance + b * one.variance + a * b * gap**2,
    )

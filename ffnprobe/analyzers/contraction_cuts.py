"""What does the model lose when h keeps only some of its directions, or only some of its neurons?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..corpus import Tokens
from ..ffn import FFN
from ..intervene import Change, Losses, Read, losses, mean_of
from ..models import Model
from ..statistics.moments import Covariance
from .nested import CRITERIA

CUT = 4  # layers of which h is cut
SHARES = (1 / 2, 1 / 4, 1 / 8)  # of the neurons
DRAWS = 2  # random sets of neurons
LEAST = 4  # directions
ENOUGH = 0.95  # of what the loss gains by h


@dataclass(frozen=True)
class Cuts:
    """Nats a token that one layer's cuts add to the loss, and their standard errors over documents."""

    loss: float  # unchanged
    ablated: tuple[float, float]
    directions: Mapping[int, tuple[float, float]]  # by their number
    neurons: Mapping[tuple[str, int], tuple[float, float]]  # by criterion and number; random: mean and sd of draws

    @property
    def speaks(self) -> bool:
        """Whether the loss needs what h says beside its mean, beyond two standard errors."""
        return self.ablated[0] > 2 * self.ablated[1]

    @property
    def enough(self) -> int | None:
        """Fewest directions from which on 95% of what h gains is kept; None where it gains nothing."""
        if not self.speaks:
            return None
        worst, found = (1 - ENOUGH) * self.ablated[0], None
        for k in sorted(self.directions, reverse=True):
            if self.directions[k][0] > worst:
                break
            found = k
        return found


def counts(ffn: FFN) -> list[int]:
    """Numbers of directions kept: powers of two, the width of the output, and all, where nothing is cut."""
    powers = {2**i for i in range(ffn.d_mlp.bit_length())}
    return sorted({k for k in powers if LEAST <= k < ffn.d_mlp} | {min(ffn.d_model, ffn.d_mlp), ffn.d_mlp})


def kept_neurons(ffn: FFN) -> list[int]:
    """Numbers of neurons kept, most first."""
    return [max(1, round(share * ffn.d_mlp)) for share in SHARES]


def cut(
    model: Model,
    text: Tokens,
    layers: Sequence[FFN],
    covariances: Mapping[int, Covariance],
    sizes: Mapping[int, Float[Tensor, " d_mlp"]],
    seed: int,
    **looking: Any,
) -> dict[int, Cuts]:
    """The loss on the text with h of one layer cut, by layer.

    Args:
        covariances: of h weighed by `FFN.gauge`, by layer.
        sizes: mean contribution of each neuron, by layer.
        looking: passed to `losses` (sink_factor, nonfinite).
    """
    arms: dict[str, list[Change]] = {}
    for ffn in layers:
        for name, to in _arms(ffn, covariances[ffn.layer], sizes[ffn.layer], seed).items():
            arms[f"{ffn.layer}/{name}"] = [Change(ffn.layer, "post", to)]
    found = losses(model, text, arms, **looking)
    return {ffn.layer: _cuts(ffn, found) for ffn in layers}


def columns(cuts: Cuts | None) -> dict[str, Any]:
    """The cuts as fields of a row; nothing where h was not cut."""
    neurons = list(dict.fromkeys(kept for _, kept in cuts.neurons)) if cuts else []
    found: dict[str, Any] = {
        "loss": cuts and cuts.loss,
        "ablated": cuts and cuts.ablated[0],
        "ablated_se": cuts and cuts.ablated[1],
        "enough": cuts and cuts.enough,
        "directions": list(cuts.directions) if cuts else [],
        "neurons": neurons,
    }
    series = {"directions": list(cuts.directions.values()) if cuts else []}
    series |= {of: [cuts.neurons[of, kept] for kept in neurons] if cuts else [] for of in CRITERIA}
    for name, pairs in series.items():
        found[f"{name}_delta"] = [delta for delta, _ in pairs]
        found[f"{name}_{'sd' if name == 'random' else 'se'}"] = [error for _, error in pairs]
    return found


def truncated(
    basis: Float[Tensor, "d_mlp k"], mean: Float[Tensor, " d_mlp"], gauge: Float[Tensor, " d_mlp"]
) -> Callable[[Read], Float[Tensor, "n d_mlp"]]:
    """A change of h, weighed by the gauge, to its mean and what lies along an orthonormal basis about it.

    >>> to = truncated(torch.eye(2)[:, :1], torch.tensor([1.0, 4.0]), torch.tensor([1.0, 2.0]))
    >>> to({"post": torch.tensor([[3.0, 7.0]])})
    tensor([[3., 2.]])
    """

    def to(read: Read) -> Tensor:
        x = read["post"]
        axes, middle, scale = (part.to(x.device, torch.float32) for part in (basis, mean, gauge))
        return (((x.float() * scale - middle) @ axes) @ axes.T + middle) / scale

    return to


def _arms(
    ffn: FFN, covariance: Covariance, size: Float[Tensor, " d_mlp"], seed: int
) -> dict[str, Callable[[Read], Tensor]]:
    gauge = ffn.gauge.cpu()
    weighed = covariance.mean.cpu()
    mean = weighed / gauge
    vectors = torch.linalg.eigh(covariance.centred.cpu()).eigenvectors.flip(1).float()
    arms: dict[str, Callable[[Read], Tensor]] = {"mean": mean_of(mean, "post")}
    for k in counts(ffn):
        arms[f"directions/{k}"] = truncated(vectors[:, :k], weighed, gauge)
    for criterion, several in _orders(covariance.variance.cpu(), size.cpu(), ffn.layer, seed).items():
        for draw, order in enumerate(several):
            for kept in kept_neurons(ffn):
                arms[f"{criterion}/{kept}/{draw}"] = mean_of(mean, "post", order[kept:])
    return arms


def _orders(
    variance: Float[Tensor, " d_mlp"], size: Float[Tensor, " d_mlp"], layer: int, seed: int
) -> dict[str, list[Int[Tensor, " d_mlp"]]]:
    """Neurons in the order in which they are kept."""
    random = torch.Generator().manual_seed(1_000_003 * seed + layer)
    return {
        "random": [torch.randperm(len(size), generator=random) for _ in range(DRAWS)],
        "contribution": [size.argsort(descending=True)],
        "variance": [variance.argsort(descending=True)],
    }


def _cuts(ffn: FFN, found: Losses) -> Cuts:
    neurons = {}
    for criterion in CRITERIA:
        for kept in kept_neurons(ffn):
            draws = range(DRAWS if criterion == "random" else 1)
            each = [found.delta(f"{ffn.layer}/{criterion}/{kept}/{draw}") for draw in draws]
            deltas = [delta for delta, _ in each]
            neurons[criterion, kept] = (fmean(deltas), stdev(deltas)) if len(each) > 1 else each[0]
    return Cuts(
        loss=found.mean(),
        ablated=found.delta(f"{ffn.layer}/mean"),
        directions={k: found.delta(f"{ffn.layer}/directions/{k}") for k in counts(ffn)},
        neurons=neurons,
    )

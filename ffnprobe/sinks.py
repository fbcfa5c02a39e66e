"""Which tokens are set apart: attention sinks, by norm, and those with a NaN or Inf?"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .corpus import Tokens
from .errors import ModelRefused
from .forward import forward
from .models import Model, Tap
from .statistics import IN_CACHE

PILOT = 4  # sequences that fix the sink thresholds and the shifts
_OVERFLOW = "run it in float32, choose other layers, or leave such tokens out with --nonfinite skip"


@dataclass(frozen=True)
class Sinks:
    """Norms above which a token is an attention sink: `factor` times the layer's median over a pilot."""

    factor: float
    residual: dict[int, float]
    hidden: dict[int, float]

    def find(self, tap: Tap, read: Mapping[str, Tensor]) -> Bool[Tensor, " n"]:
        """Which of a layer's tokens are sinks."""
        residual, hidden = _norms(tap, read)
        return (residual > self.residual[tap.layer]) | (hidden > self.hidden[tap.layer])


def _norms(tap: Tap, read: Mapping[str, Tensor]) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Norms of the residual stream and of the hidden activation."""

    def norm(rows: Tensor) -> Tensor:
        return torch.linalg.vector_norm(rows, dim=1, dtype=torch.promote_types(rows.dtype, torch.float32))

    if tap.gated:
        # each neuron weighed as it is written: its own scale is a gauge, that of a plain one is not
        weighed = (norm(rows * tap.value_norms) for rows in read["post"].split(IN_CACHE))
        return norm(read["residual"]), torch.cat(list(weighed))
    return norm(read["residual"]), norm(read["post"])


def find_sinks(
    model: Model,
    tokens: Tokens,
    chosen: Sequence[Tap],
    factor: float,
    nonfinite: str = "stop",
    then: Callable[[Tap, dict[str, Tensor], Tensor], None] | None = None,
) -> Sinks:
    """Fix each layer's sink thresholds from the medians of a pilot: a few sequences spread over the corpus.

    `then` is shown each layer's pilot activations and which of the tokens are no sinks.
    """
    sinks = Sinks(factor, {}, {})
    rows = pilot_rows(tokens)

    def measure(tap: Tap, read: dict[str, Tensor]) -> None:
        residual, hidden = _norms(tap, read)
        finite = ~not_finite(tap, read, read.keys(), rows, tokens, nonfinite)
        if not finite.any():
            raise ModelRefused(f"layer {tap.layer} gives only NaN or Inf: {_OVERFLOW}")
        sinks.residual[tap.layer] = factor * float(residual[finite].median())
        sinks.hidden[tap.layer] = factor * float(hidden[finite].median())
        if then:
            then(tap, read, finite & ~sinks.find(tap, read))

    forward(model, tokens.ids[rows], chosen, measure)
    return sinks


def pilot_rows(tokens: Tokens) -> Int[Tensor, " n"]:
    """The sequences of the pilot, spread evenly."""
    return torch.linspace(0, len(tokens.ids) - 1, min(PILOT, len(tokens.ids))).long()


def flat_index(rows: Int[Tensor, " s"], tokens: Tokens) -> Int[Tensor, " n"]:
    """Each token's index in the corpus."""
    length = tokens.ids.shape[1]
    return (rearrange(rows * length, "s -> s 1") + torch.arange(length)).flatten()


def not_finite(
    tap: Tap,
    read: Mapping[str, Tensor],
    sites: Collection[str],
    rows: Int[Tensor, " s"],
    tokens: Tokens,
    policy: str,
) -> Bool[Tensor, " n"]:
    """The tokens with a NaN or Inf at one of the sites.

    Raises:
        ModelRefused: there is one, and the policy is to stop.
    """
    bad = torch.zeros(len(read["post"]), dtype=torch.bool, device=read["post"].device)
    names = sorted(sites)
    sums = torch.stack([read[site].sum().float() for site in names])  # looked at once: a GPU is waited for
    for site, fine in zip(names, torch.isfinite(sums).tolist(), strict=True):
        if not fine:  # a sum may also overflow, so look again
            found = ~torch.isfinite(read[site]).all(dim=1)
            bad |= found
            if policy == "stop" and found.any():
                at = int(flat_index(rows, tokens)[found.cpu()][0])
                document = tokens.document.flatten()
                number = int(document[at])
                position = at - int((document == number).nonzero()[0])
                raise ModelRefused(
                    f"an activation is NaN or Inf: layer {tap.layer}, site {site}, document {number}, "
                    f"position {position} of it (token {at} of the corpus): {_OVERFLOW}"
                )
    return bad

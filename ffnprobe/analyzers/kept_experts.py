"""What is kept of a layer's output, and of the model's loss, by a few experts of each token?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..corpus import Tokens
from ..ffn import FFN
from ..intervene import Change, Losses, Read, mean_of
from .codebooks import kept_variance
from .partition import Partition

SHARES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
CLUSTERS, RANDOM, NEURONS = "clusters", "random", "neurons"
ORACLE, ROUTER = "oracle", "router"
ARMS = ((CLUSTERS, ORACLE), (CLUSTERS, ROUTER), (RANDOM, ORACLE), (RANDOM, ROUTER), (NEURONS, ORACLE))

Cut = Mapping[tuple[str, int], Partition]  # by name and draw


def count_of(share: float, experts: int) -> int:
    """How many experts that is, at least one.

    >>> count_of(0.05, 40), count_of(0.05, 3), count_of(0.3, 40)
    (2, 1, 12)
    """
    return math.ceil(share * experts - 1e-9)


def arms_of(cut: Cut) -> Iterator[tuple[str, int, str, float]]:
    """Partition, draw, choice and share of every arm."""
    return (
        (name, draw, choice, share)
        for name, draw in cut
        for choice in (c for n, c in ARMS if n == name)
        for share in SHARES
    )


@torch.no_grad()
def output_rows(
    ffn: FFN, cut: Cut, x: Float[Tensor, "n d_model"], document: Int[Tensor, " n"]
) -> Iterator[dict[str, Any]]:
    """How much of the variance of one layer's output is kept in each arm."""
    h, pre = ffn.hidden(x), ffn.pre(x)
    y, document = ffn.write(h), document.to(x.device)
    for name, draw, choice, share in arms_of(cut):
        partition = cut[name, draw]
        kept = partition.chosen(h, pre, choice, count_of(share, partition.experts))
        told = kept_variance(ffn.write(torch.where(kept, h, partition.mean.to(h))), y, document)
        yield {
            **dict.fromkeys(("delta_loss", "delta_loss_se", "gap_kept")),
            "layer": ffn.layer,
            "expansion": ffn.expansion,
            "partition": name,
            "choice": choice,
            "draw": draw,
            "experts": partition.experts,
            "share": share,
            "kept": float(kept.double().mean()),
            "r2": told.r2,
            "r2_se": told.se,
            "documents": len(document.unique()),
        }


def changes(cut: Mapping[int, Cut]) -> dict[str, list[Change]]:
    """All layers changed at once, by the name of the arm; `ablated`: all of h at its mean."""

    def keep(layer: int, name: str, draw: int, choice: str, share: float) -> Change:
        partition = cut[layer][name, draw]
        count = count_of(share, partition.experts)

        def to(read: Read) -> Tensor:
            h = read["post"]
            kept = partition.chosen(h, read["pre"], choice, count)
            return torch.where(kept, h, partition.mean.to(h))

        return Change(layer, "post", to)

    first = next(iter(cut.values()))
    means = {layer: next(iter(of.values())).mean for layer, of in cut.items()}
    ablated = [Change(layer, "post", mean_of(mean, "post")) for layer, mean in means.items()]
    arms = [arm for arm in arms_of(first) if arm[1] == 0]  # every arm is a pass of the model: of draws, the first
    return {str(arm): [keep(layer, *arm) for layer in cut] for arm in arms} | {"ablated": ablated}


def loss_rows(rows: Sequence[Mapping[str, Any]], found: Losses) -> Iterator[dict[str, Any]]:
    """What the loss says of each arm, beside the share of the neurons that the layers' `rows` keep in it."""
    ablated = found.delta("ablated")[0]
    names = ("partition", "draw", "choice", "share")
    kept: dict[tuple, list[float]] = {}
    for row in rows:
        kept.setdefault(tuple(row[name] for name in names), []).append(row["kept"])
    for arm, parts in kept.items():
        if str(arm) not in found.changed:
            continue
        delta, error = found.delta(str(arm))
        yield {
            **dict.fromkeys(("layer", "expansion", "experts", "r2", "r2_se")),
            **dict(zip(names, arm, strict=True)),
            "kept": fmean(parts),
            "delta_loss": delta,
            "delta_loss_se": error,
            "gap_kept": 1 - delta / ablated,
            "documents": len(found.tokens),
        }


def every_other(tokens: Tokens, n: int) -> Tokens:
    """About n tokens of every other document, from the second on, laid end to end."""
    document = tokens.document.flatten()
    number = (torch.cat([torch.zeros(1), document.diff()]) != 0).cumsum(0)
    at = (number % 2 == 1).nonzero().squeeze(1)
    length = max(1, min(tokens.ids.shape[1], len(at)))
    at = at[: max(1, min(n, len(at)) // length) * length].view(-1, length)
    ids, document, special = (part.flatten()[at] for part in (tokens.ids, tokens.document, tokens.special))
    return Tokens(ids, document, special, {})

"""Which norm does a layer read through, and what does it do to what it reads?"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from .taps import Tap, recording


class Norm(NamedTuple):
    """norm(x) = gain * x̂ + bias, where x̂ is x at unit mean square, first centred if the norm `centres`."""

    gain: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"]
    centres: bool  # a LayerNorm does, an RMSNorm does not


@torch.inference_mode()
def measure(norm: nn.Module, like: Float[Tensor, "_ d_model"]) -> Norm:
    """What a norm does, by probing it, whatever its weights are called (Gemma's gain is 1 + weight).

    >>> measure(nn.LayerNorm(4), torch.ones(1, 4)).centres
    True
    """
    d_model = like.shape[1]
    half = d_model // 2
    x = torch.full((d_model,), float(-half)).to(like)  # mean 0 and no entry 0, in any dimension
    x[:half] = d_model - half
    x *= 1e3 / x.norm() * d_model**0.5  # far above the norm's epsilon

    def through(x: Tensor) -> Tensor:
        return norm(x).to(x)  # back from the norm's own device

    gain, bias = (through(x) - through(-x)) / 2 / (x * 1e-3), (through(x) + through(-x)) / 2
    same = torch.allclose(through(x + 1e3), through(x), atol=1e-3 * float(gain.abs().max()))
    return Norm(gain, bias, same)


@torch.inference_mode()
def norms_before(
    model: PreTrainedModel, taps: Sequence[Tap], ids: Int[Tensor, "s l"]
) -> dict[int, nn.Module | None]:
    """By layer, the norm whose output is what the layer reads; None where there is no such norm.

    Found by what passes, not by name: behind parallel attention it is the one that attention reads through.
    """
    inside: dict[Hashable, nn.Module] = {
        (tap.layer, name): module
        for tap in taps
        for name, module in tap.block.named_modules()
        if getattr(getattr(module, "weight", None), "ndim", None) == 1
    }
    ups: dict[Hashable, nn.Module] = {(tap.layer, None): tap.up for tap in taps}
    with recording(inside | ups) as calls:
        model(ids)
    found: dict[int, nn.Module | None] = {}
    for tap in taps:
        read = calls[tap.layer, None][0][0]
        wrote = [
            module
            for name, module in tap.block.named_modules()
            if any(torch.equal(output, read) for _, output in calls.get((tap.layer, name), ()))
        ]
        found[tap.layer] = wrote[0] if wrote else None
    return found

"""Where is one feed-forward layer read, and which nonlinearity is in it?"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from ffnprobe.ffn import ACTIVATIONS

TOLERANCE = 1e-4  # absolute, on z in [-12, 12]: erf- and tanh-GELU differ by 4.7e-4


@dataclass(frozen=True)
class Tap:
    """Where one layer is read: modules of the plain Hugging Face model."""

    layer: int
    block: nn.Module  # its first argument is the residual stream
    up: nn.Module  # x -> the keys' pre-activation; [gate | key] when fused
    gate: nn.Module | None
    down: nn.Module  # h -> y
    fused: bool

    @property
    def gated(self) -> bool:
        return self.gate is not None or self.fused

    @cached_property
    def value_norms(self) -> Float[Tensor, " d_mlp"]:
        """Norms of the values of a gated layer."""
        down: Any = self.down
        return down.weight.detach().float().square().sum(0).sqrt()


def flat(value: Any) -> Tensor:
    value = value[0] if isinstance(value, tuple) else value
    return value.flatten(0, -2)  # some families drop the batch dimension inside the block


@contextmanager
def recording(modules: Mapping[Hashable, nn.Module]) -> Iterator[dict[Hashable, list[tuple[Tensor, Tensor]]]]:
    """What enters and what leaves each module, a pair for every time it is called."""
    calls: dict[Hashable, list[tuple[Tensor, Tensor]]] = {name: [] for name in modules}

    def keeping(name: Hashable) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            entering = args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values())))
            calls[name].append((flat(entering), flat(output)))

        return keep

    handles = [m.register_forward_hook(keeping(name), with_kwargs=True) for name, m in modules.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def activations(model: PreTrainedModel, taps: list[Tap], ids: Int[Tensor, "sequences length"]) -> list[str]:
    """The name of each layer's nonlinearity, found by feeding it known pre-activations in [-12, 12].

    The model's own pre-activations will not do: where they are small, all GELUs look alike. Nor will
    the configuration: transformer_lens reports relu for BLOOM and MPT. In float32, whatever the model's
    dtype: bfloat16 would hide what tells one GELU from the other.
    """

    def instead(share: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
        return lambda module, args, output: share(output)

    def wide(like: Tensor) -> Tensor:
        return like.to(torch.promote_types(like.dtype, torch.float32))

    def grid(like: Tensor) -> Tensor:
        return torch.linspace(-12, 12, like.numel()).reshape(like.shape).to(wide(like))

    def gain(like: Tensor) -> Tensor:  # either sign, never near 0
        wave = torch.cos(torch.arange(like.numel(), dtype=torch.float32))
        return (wave.sign() * (0.5 + wave.abs())).reshape(like.shape).to(wide(like))

    def both(like: Tensor) -> Tensor:
        gate, key = like.chunk(2, dim=-1)
        return torch.cat([grid(gate), gain(key)], dim=-1)

    entered: dict[int, Tensor] = {}

    def entering(layer: int) -> Callable[..., Any]:
        def keep(module: Any, args: tuple) -> tuple:
            entered[layer] = flat(args[0])
            return (args[0].to(module.weight.dtype), *args[1:])

        return keep

    handles = []
    for tap in taps:
        handles.append(tap.down.register_forward_pre_hook(entering(tap.layer)))
        if tap.gate is not None:
            handles.append(tap.gate.register_forward_hook(instead(grid)))
        up = both if tap.fused else gain if tap.gate is not None else grid
        handles.append(tap.up.register_forward_hook(instead(up)))
    try:
        model(ids)
    finally:
        for handle in handles:
            handle.remove()
    names = []
    for tap in taps:
        hidden = entered[tap.layer]
        rounding = torch.finfo(hidden.dtype).eps  # some families cast what enters the down-projection
        z, h = grid(hidden), hidden / gain(hidden) if tap.gated else wide(hidden)
        errors = {name: float((act(z) - h).abs().max()) for name, act in ACTIVATIONS.items()}
        best = min(errors, key=errors.__getitem__)
        tolerance = max(TOLERANCE, 100 * rounding)
        names.append(best if errors[best] < tolerance else f"unknown (nearest: {best}, off by {errors[best]:.1e})")
    return names

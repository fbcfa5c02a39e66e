"""What does each feed-forward layer read, hold and write during one forward pass?

The bridge names the modules; plain hooks on them read the activations. Nothing is copied, except from another
device: all that is shown of a layer lies beside its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor, nn

from .errors import InputError
from .ffn import FFN
from .memory import keep_freed
from .models import Model, Tap, context_length, ffns, plain, taps
from .placement import input_device

_Item = TypeVar("_Item")

OnLayer = Callable[[Tap, dict[str, Tensor]], None]


def choose_layers(model: Model, layers: Sequence[int] | None = None) -> list[Tap]:
    """The taps of the layers asked for, in the order of the forward pass.

    Raises:
        InputError: a layer that has no FFN or is not there.
    """
    available = {tap.layer: tap for tap in taps(model)}
    if layers is not None and not layers:
        raise InputError("no layer chosen: name at least one")
    for layer in layers or ():
        if layer not in available:
            there = f"{min(available)} to {max(available)}"
            raise InputError(f"layer {layer} is not there: the FFNs are in layers {there}; choose among them")
    return [tap for layer, tap in available.items() if layers is None or layer in layers]


def choose_ffns(model: Model, layers: Sequence[int] | None = None) -> list[FFN]:
    """The FFNs of the layers asked for, in the order of the forward pass, with the weights as they are.

    Raises:
        InputError: a layer that has no FFN or is not there.
    """
    chosen = {tap.layer for tap in choose_layers(model, layers)}
    return [ffn for ffn in ffns(model) if ffn.layer in chosen]


def evenly(items: Sequence[_Item], n: int) -> list[_Item]:
    """At most n of them, the first and the last among them; the middle one where n is 1.

    >>> evenly(range(30), 4)
    [0, 10, 19, 29]
    """
    if n >= len(items):
        return list(items)
    places = torch.linspace(0, len(items) - 1, n) if n > 1 else torch.tensor([len(items) // 2])
    return [items[i] for i in places.round().long().tolist()]


def forward(model: Model, ids: Int[Tensor, "s l"], chosen: Sequence[Tap], on_layer: OnLayer) -> None:
    """Run the model up to the last layer chosen and show `on_layer` each of them as it is done."""
    keep_freed()
    if (longest := context_length(model)) < ids.shape[1]:
        raise InputError(
            f"sequences of {ids.shape[1]} tokens: this model reads {longest}; pack with length={longest}"
        )
    network: Any = plain(model).base_model  # no logits: nobody asked

    def show(tap: Tap, read: dict[str, Tensor]) -> None:
        on_layer(tap, read)
        if tap is chosen[-1]:
            raise _Enough

    with showing(chosen, show), torch.no_grad(), suppress(_Enough):
        network(input_ids=ids.to(input_device(network)), use_cache=False)


class _Enough(Exception):
    """Raised inside the forward pass once the last layer asked for has been read."""


@contextmanager
def reading(tap: Tap) -> Iterator[dict[str, Tensor]]:
    """While the model runs, what the layer reads and holds: residual, in, pre, up and, before it writes, post."""
    read: dict[str, Tensor] = {}

    def rows(x: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[-1])

    def at_block(module: nn.Module, args: tuple, kwargs: dict) -> None:
        read["residual"] = rows(args[0] if args else kwargs["hidden_states"])

    def at_up(module: nn.Module, args: tuple, output: Tensor) -> None:
        read["in"] = rows(args[0])
        if tap.fused:
            read["pre"], read["up"] = rows(output).chunk(2, dim=1)
        else:
            read["pre" if tap.gate is None else "up"] = rows(output)

    def at_gate(module: nn.Module, args: tuple, output: Tensor) -> None:
        read["pre"] = rows(output)

    def at_down(module: nn.Module, args: tuple) -> None:
        read["post"] = rows(args[0])

    handles = [
        tap.block.register_forward_pre_hook(at_block, with_kwargs=True),
        tap.up.register_forward_hook(at_up),
        tap.down.register_forward_pre_hook(at_down),
    ]
    if tap.gate is not None and not tap.fused:
        handles.append(tap.gate.register_forward_hook(at_gate))
    try:
        yield read
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def showing(chosen: Sequence[Tap], on_layer: OnLayer) -> Iterator[None]:
    """While the model runs, show `on_layer` each layer as it is done, beside its weights."""
    with ExitStack() as stack:
        for tap in chosen:
            read = stack.enter_context(reading(tap))

            def at_down(module: nn.Module, args: tuple, output: Tensor, tap=tap, read=read) -> None:
                # before accelerate's own hooks, the residual stream is still where the layer before wrote it
                sites = {**read, "out": output.reshape(-1, output.shape[-1])}
                read.clear()  # or the layer's activations would live until the next batch
                on_layer(tap, {site: x.to(output.device) for site, x in sites.items()})

            stack.callback(tap.down.register_forward_hook(at_down).remove)
        yield

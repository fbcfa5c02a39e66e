"""How much of the gradient of the loss passes a block with its feed-forward layer on, off, and random?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..corpus import Tokens
from ..errors import ModelRefused
from ..ffn import FFN
from ..forward import choose_layers, showing
from ..intervene import check_causal, next_token_losses, predictable
from ..models import Model, Tap, blocks, plain
from ..placement import input_device
from ..sinks import find_sinks
from ..stream import SINK_FACTOR


@dataclass
class _Seen:
    """One block of one pass: what it was called with, what it gave, and which tokens are ordinary."""

    args: tuple = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    given: Tensor | None = None
    kept: Bool[Tensor, " n"] | None = None

    @property
    def stream(self) -> Tensor:
        return self.args[0] if self.args else self.kwargs["hidden_states"]

    def ends(self) -> tuple[Tensor, Tensor]:
        """The residual stream before and behind the block."""
        assert self.given is not None
        return self.stream, self.given

    def called_with(self, stream: Tensor) -> tuple[tuple, dict[str, Any]]:
        """The same call on another residual stream."""
        if self.args:
            return (stream, *self.args[1:]), self.kwargs
        return (), self.kwargs | {"hidden_states": stream}


@dataclass(frozen=True)
class Passed:
    """Norms of the loss's gradient at one block, by sequences, over ordinary tokens; mean loss of a token."""

    behind: Float[Tensor, " sequences"]  # at the block's output
    on: Float[Tensor, " sequences"]  # at its input
    off: Float[Tensor, " sequences"]  # at its input, the FFN's output multiplied by 0
    random: Float[Tensor, " sequences"]  # at its input, the FFN with random weights of the same norms


def gradient_norms(
    model: Model,
    tokens: Tokens,
    random: Mapping[int, FFN],
    *,
    sink_factor: float = SINK_FACTOR,
    **_: Any,
) -> dict[int, Passed]:
    """By layer, what passes backwards through its block, a sequence at a time.

    One block at a time is changed and given the gradient that the unchanged model has behind it; so off and random
    tell what that block would pass on, not what another model would have learnt.

    Args:
        tokens: all of them are used.
        random: by layer, a layer to put in its place.

    Raises:
        ModelRefused: the model does not predict the next token.
    """
    check_causal(model)
    chosen = choose_layers(model, sorted(random))
    sinks = find_sinks(model, tokens, chosen, sink_factor, "skip")
    norms: dict[int, list[list[float]]] = {tap.layer: [] for tap in chosen}
    for row in torch.arange(len(tokens.ids)).split(1):
        if not predictable(tokens)[row].any():
            continue
        seen: dict[int, _Seen] = {tap.layer: _Seen() for tap in chosen}

        def mark(tap: Tap, read: Mapping[str, Tensor], row=row, seen=seen) -> None:
            apart = tokens.special[row].flatten().to(read["post"].device) | sinks.find(tap, read)
            seen[tap.layer].kept = ~apart

        with torch.enable_grad():
            with _recording(model, chosen, seen), showing(chosen, mark):
                loss = _loss(model, tokens, row)
            both = [end for tap in chosen for end in seen[tap.layer].ends()]
            gradients = torch.autograd.grad(loss, both)
            for tap, on, behind in zip(chosen, gradients[::2], gradients[1::2], strict=True):
                block = seen[tap.layer]
                changed = [_through(tap, block, behind, instead) for instead in (_off, _other(random[tap.layer]))]
                norms[tap.layer].append([_norm(g, block.kept) for g in (behind, on, *changed)])
    return {layer: Passed(*torch.tensor(lines, dtype=torch.float64).T) for layer, lines in norms.items() if lines}


Instead = Callable[[Tensor, Tensor], Tensor]  # what enters the layer, what leaves it -> what is to leave it


def _off(x: Tensor, y: Tensor) -> Tensor:
    return y * 0


def _other(ffn: FFN) -> Instead:
    return lambda x, y: ffn.write(ffn.hidden(x)).to(y)


def _through(tap: Tap, block: _Seen, behind: Tensor, instead: Instead) -> Tensor:
    """The gradient at the block's input if it is `behind` at its output and the FFN writes something else."""
    entered: list[Tensor] = []
    handles = [
        tap.up.register_forward_pre_hook(lambda _, args: entered.append(args[0])),
        tap.down.register_forward_hook(lambda _, args, y: instead(entered.pop(), y)),
    ]
    stream = block.stream.detach().requires_grad_()
    args, kwargs = block.called_with(stream)
    try:
        given = _first(tap.block(*args, **kwargs))
    finally:
        for handle in handles:
            handle.remove()
    (found,) = torch.autograd.grad(given, stream, behind)
    return found


@contextmanager
def _recording(model: Model, chosen: Sequence[Tap], seen: Mapping[int, _Seen]) -> Iterator[None]:
    """Keep each block's call and what it gave; gradients end at the first block, so weights may be frozen."""

    def begin(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        first = _Seen(args, kwargs)
        return first.called_with(first.stream.detach().requires_grad_())

    def entering(block: _Seen) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple, kwargs: dict) -> None:
            block.args, block.kwargs = args, kwargs

        return keep

    def leaving(block: _Seen) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple, output: Any) -> None:
            block.given = _first(output)

        return keep

    handles = [blocks(model)[0].register_forward_pre_hook(begin, with_kwargs=True)]
    for tap in chosen:
        block = seen[tap.layer]
        handles.append(tap.block.register_forward_pre_hook(entering(block), with_kwargs=True))
        handles.append(tap.block.register_forward_hook(leaving(block)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _loss(model: Model, tokens: Tokens, row: Int[Tensor, " one"]) -> Tensor:
    twin, ids = plain(model), tokens.ids[row]
    logits = twin(input_ids=ids.to(input_device(twin)), use_cache=False).logits
    each = next_token_losses(logits, ids)
    loss = each[predictable(tokens)[row].to(each.device)].mean()
    if not torch.isfinite(loss):
        raise ModelRefused("the loss is NaN or Inf, so that it has no gradient: run the model in float32")
    return loss


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _norm(gradient: Tensor, kept: Tensor | None) -> float:
    assert kept is not None
    rows = gradient.reshape(-1, gradient.shape[-1])[kept.to(gradient.device)]
    return float(rows.double().norm())

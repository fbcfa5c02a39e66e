"""What would the loss do if it were linear in every hidden activation?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from .corpus import Tokens
from .forward import choose_layers, showing
from .intervene import BATCH, check_causal, predictable, token_losses
from .models import Model, Tap, plain
from .sinks import find_sinks, not_finite
from .stream import SINK_FACTOR


def first_order(
    model: Model,
    tokens: Tokens,
    means: Mapping[int, Float[Tensor, " d_mlp"]],
    *,
    counted: Bool[Tensor, "s l"] | None = None,
    batch: int = BATCH,
    sink_factor: float = SINK_FACTOR,
    nonfinite: str = "stop",
) -> dict[int, Float[Tensor, " d_mlp"]]:
    """What each neuron would add to the mean loss of a token if the loss were linear and it were set to its mean.

    The sum over ordinary tokens of (mean - h) dL/dh, L the mean loss of `losses`: attribution patching (Nanda
    2023). For a change so small that the loss is linear in it, it is what `losses` measures.

    Args:
        means: of h, by layer; only these layers are read.
    """
    check_causal(model)
    chosen = choose_layers(model, sorted(means))
    apart = find_sinks(model, tokens, chosen, sink_factor, nonfinite)
    use = predictable(tokens) if counted is None else predictable(tokens) & counted[:, 1:]
    found = {layer: torch.zeros_like(mean, dtype=torch.float64, device="cpu") for layer, mean in means.items()}
    for rows in torch.arange(len(tokens.ids)).split(batch):
        kept: dict[int, Tensor] = {}

        def mark(tap: Tap, read: dict[str, Tensor], rows=rows, kept=kept) -> None:
            bad = not_finite(tap, read, read.keys(), rows, tokens, nonfinite) | apart.find(tap, read)
            kept[tap.layer] = ~(bad.cpu() | tokens.special[rows].flatten())

        with torch.enable_grad(), showing(chosen, mark), _differentiable(model, chosen) as hidden:
            loss = token_losses(model, tokens.ids[rows])[use[rows]].sum()
        gradients = torch.autograd.grad(loss, list(hidden.values()))
        for (layer, h), gradient in zip(hidden.items(), gradients, strict=True):
            h, gradient = (x.detach().flatten(0, -2)[kept[layer].to(x.device)] for x in (h, gradient))
            found[layer] += ((means[layer].to(h) - h) * gradient).sum(0, dtype=torch.float64).cpu()
    return {layer: total / use.sum() for layer, total in found.items()}


@contextmanager
def _differentiable(model: Model, chosen: Sequence[Tap]) -> Iterator[dict[int, Tensor]]:
    """While the model runs, gradients reach every hidden activation, and here they are."""
    hidden: dict[int, Tensor] = {}
    embedding: Any = plain(model).get_input_embeddings()
    with ExitStack() as stack:
        start = embedding.register_forward_hook(lambda _, args, output: output.detach().requires_grad_())
        stack.callback(start.remove)
        for tap in chosen:

            def keep(module: nn.Module, args: tuple, layer=tap.layer) -> None:
                hidden[layer] = args[0]

            stack.callback(tap.down.register_forward_pre_hook(keep).remove)
        yield hidden

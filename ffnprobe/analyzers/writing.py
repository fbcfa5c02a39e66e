"""How is one pair of key and value written into a layer, and what does the model say then?"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from ..corpus import Tokens
from ..forward import forward
from ..intervene import BATCH, document_means, next_token_losses, predictable
from ..models import Model, Tap, plain
from ..placement import input_device

STEP = 0.1  # of a gradient step, in norms of what the layer leaves in the residual stream

Logits = Callable[[Int[Tensor, "s l"]], Float[Tensor, "s l d_vocab"]]


def associate(
    values: Float[Tensor, "d_mlp d_model"],
    key: Float[Tensor, " d_mlp"],
    value: Float[Tensor, " d_model"],
    second_moment: Float[Tensor, "d_mlp d_mlp"],
) -> Float[Tensor, "d_mlp d_model"]:
    """The values that answer `key` with `value` and change least what other keys are answered with.

    V + C^-1 k (v - V'k)' / (k' C^-1 k), the least E |h' dV|² under k' (V + dV) = v (Meng et al. 2022).

    >>> associate(torch.eye(2), torch.tensor([1.0, 0.0]), torch.tensor([0.0, 3.0]), torch.eye(2))
    tensor([[0., 3.],
            [0., 1.]])
    """
    direction = torch.linalg.solve(second_moment, key)
    return values + torch.outer(direction / (direction @ key), value - key @ values)


def wanted(
    model: Model, tap: Tap, ids: Int[Tensor, "1 l"], position: int, target: int, goal: float, steps: int
) -> tuple[Float[Tensor, " d_mlp"], Float[Tensor, " d_model"]]:
    """The hidden activation at the position, and what to add to the layer's output there.

    Steps down the gradient of -log p(target), a tenth of the residual stream behind the layer each, end at `goal`.
    """
    twin, found = plain(model), dict[str, Tensor]()
    forward(model, ids, [tap], lambda _, read: found.update(read))
    out = found["out"][position].float()
    step = STEP * (found["residual"][position] + out).norm()
    change = torch.zeros_like(out)
    here = (torch.arange(ids.numel()) == position)[:, None].to(change)

    def add(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output + (here * change).to(output).view_as(output)

    handle = tap.down.register_forward_hook(add)
    try:
        for _ in range(steps):
            change.requires_grad_()
            loss = -next_token(twin(input_ids=ids.to(input_device(twin)), use_cache=False).logits)[target]
            if loss <= -math.log(goal):
                break
            (gradient,) = torch.autograd.grad(loss, change)
            # where the gradient is 0, as beside the last position of the last layer, nothing can be done
            change = change.detach() - step * gradient / gradient.norm().clamp(min=1e-30)
    finally:
        handle.remove()
    return found["post"][position].cpu().double(), change.detach().cpu().double()


def logits_of(
    model: Model, tap: Tap | None = None, values: Float[Tensor, "d_mlp d_model"] | None = None
) -> Logits:
    """What the model says, with these values in place of a layer's own; the model itself is not touched."""
    twin, weights = plain(model), {}
    if tap is not None and values is not None:
        own: Any = tap.down.weight
        name = next(name for name, weight in twin.named_parameters() if weight is own)
        weights[name] = (values if isinstance(tap.down, Conv1D) else values.T).to(own)

    def read(ids: Int[Tensor, "s l"]) -> Float[Tensor, "s l d_vocab"]:
        with torch.no_grad():
            arguments = {"input_ids": ids.to(input_device(twin)), "use_cache": False}
            return functional_call(twin, weights, (), arguments).logits.cpu()

    return read


def next_token(logits: Float[Tensor, "1 l d_vocab"]) -> Float[Tensor, " d_vocab"]:
    """Log-probabilities of what follows the last token."""
    return logits[0, -1].float().log_softmax(0)


@torch.no_grad()
def document_losses(
    logits: Logits, tokens: Tokens, counted: Bool[Tensor, "s l"], batch: int = BATCH
) -> Float[Tensor, " documents"]:
    """The mean loss of each document in nats a token, over tokens that are counted and not special."""
    loss = torch.cat([next_token_losses(logits(ids), ids) for ids in tokens.ids.split(batch)])
    return document_means(loss, predictable(tokens) & counted[:, 1:], tokens)[1]

"""What does the model lose where a layer is replaced by its best affine map, or by its mean?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..corpus import Tokens
from ..intervene import Change, Read, losses, mean_of, predictable
from ..models import Model
from ..regression import AffineMap

Loss = dict[str, float | None]
NO_LOSS: Loss = dict.fromkeys(("loss", "loss_affine", "loss_affine_se", "loss_mean", "loss_mean_se"))


def affine_losses(
    model: Model,
    tokens: Tokens,
    written: Mapping[int, tuple[AffineMap, Tensor]],
    n: int,
    **collecting: Any,
) -> dict[int, Loss]:
    """By layer: the loss on n tokens of odd documents, and what is added to it if the layer writes something else.

    Sinks and special tokens keep what the layer writes to them. Empty where the model predicts no next token.

    Args:
        written: by layer, an affine map x -> y of even documents, and the mean of y there.
    """
    text = held_out_text(tokens, n)
    if model.cfg.attention_dir != "causal" or text is None or not written:
        return {}
    arms: dict[str, Sequence[Change]] = {}
    for layer, (found, mean) in written.items():
        arms[f"affine/{layer}"] = [Change(layer, "out", _through(found))]
        arms[f"mean/{layer}"] = [Change(layer, "out", mean_of(mean, "out"))]
    passed = {name: value for name, value in collecting.items() if name in ("sink_factor", "nonfinite")}
    measured = losses(model, text, arms, **passed)
    loss = measured.mean()

    def of(layer: int) -> Loss:
        numbers = loss, *measured.delta(f"affine/{layer}"), *measured.delta(f"mean/{layer}")
        return dict(zip(NO_LOSS, numbers, strict=True))

    return {layer: of(layer) for layer in written}


def held_out_text(tokens: Tokens, n: int) -> Tokens | None:
    """The first n tokens of odd documents in sequences of the same length; None if fewer than two predict any."""
    length = tokens.ids.shape[1]
    turns = tokens.document.flatten().diff(prepend=tokens.document.flatten()[:1]) != 0
    odd = turns.cumsum(0) % 2 == 1  # as Probe counts documents
    n = min(n, int(odd.sum()))
    length = min(length, n)
    if not length:
        return None

    def some(part: Tensor) -> Tensor:
        return part.flatten()[odd][: n // length * length].view(-1, length)

    text = Tokens(some(tokens.ids), some(tokens.document), some(tokens.special), tokens.settings)
    predicted = text.document[:, 1:][predictable(text)]
    return text if len(predicted.unique()) > 1 else None


def _through(found: AffineMap) -> Callable[[Read], Tensor]:
    return lambda read: found(read["in"])

"""In which direction does each token of the vocabulary lie?"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .errors import InputError, ModelRefused
from .models import VIEWS, Model, describe, few_tokens, plain
from .norms import measure
from .taps import recording


def why_illegible(model: Model) -> str | None:
    """Why values cannot be read in the vocabulary; None where they can."""
    try:
        unembedding(model)
    except ModelRefused as error:
        return str(error)
    return None


def unembedding(model: Model, view: str = "folded") -> Float[Tensor, "d_vocab d_model"]:
    """The direction of each token in the vocabulary: `values @ unembedding.T` reads values as tokens.

    raw: the unembedding matrix as stored (a view; where embeddings are tied it is W_E too).
    folded: each column times the final norm's gain, found by probing the norm (Gemma's is 1 + weight);
    then, if that norm is a LayerNorm, each row centred over d_model, because a LayerNorm's output has
    mean 0; then each column centred over the vocabulary, because a constant on all logits changes no
    probability (left out where logits are capped: there it would). The biases of the norm and of the
    unembedding, and multipliers of all logits, are left out of both. The folded one is in float32 at least.

    Refused where the last block's output does not reach the unembedding through one norm: BERT has a
    dense layer and a GELU in between, OPT-350m a projection.
    """
    if view not in VIEWS:
        raise InputError(f'view "{view}" is unknown: choose from {", ".join(VIEWS)}')
    twin = plain(model)
    head: Any = twin.get_output_embeddings()
    if head is None:
        raise ModelRefused(f"{describe(model)['name']} has no unembedding: choose a language model")
    rows = head.weight.detach()
    if view == "raw":
        return rows
    norm = twin.get_submodule(model.ln_final.name) if hasattr(model, "ln_final") else None
    block = twin.get_submodule(model.blocks[-1].name)
    path = [module for module in (block, norm, head) if module is not None]
    with recording(dict(enumerate(path))) as calls, torch.inference_mode():
        twin(few_tokens(model))
    if norm is None or not all(torch.equal(calls[i][0][1], calls[i + 1][0][0]) for i in (0, 1)):
        raise ModelRefused(
            f"{describe(model)['name']} has other than one norm between its last block and its unembedding, so "
            "values cannot be read in the vocabulary"
        )
    gain, _, centres = measure(norm, rows)
    wide = torch.promote_types(rows.dtype, torch.float32)  # the order of tokens is that of close numbers
    folded = rows.to(wide) * gain.to(wide)
    if centres:
        folded = folded - folded.mean(dim=1, keepdim=True)
    if not model.cfg.output_logits_soft_cap > 0:
        folded = folded - folded.mean(dim=0, keepdim=True)
    return folded

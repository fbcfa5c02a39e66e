"""Which models differ in the expansion ratio alone, and what do they start from?"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

D_MODEL, LAYERS, HEADS, CONTEXT, VOCABULARY = 128, 4, 2, 256, 4096
END = 0  # the token between documents


@dataclass(frozen=True)
class Member:
    """A GPT-2 (GELU), or a Llama (SwiGLU) if it is gated, of width `d_mlp`."""

    name: str
    d_mlp: int
    gated: bool = False

    @property
    def expansion(self) -> float:
        return self.d_mlp / D_MODEL

    @property
    def config(self) -> PretrainedConfig:
        from transformers import GPT2Config, LlamaConfig

        shared: dict[str, Any] = {
            "vocab_size": VOCABULARY,
            "bos_token_id": END,
            "eos_token_id": END,
            "tie_word_embeddings": True,
        }
        if self.gated:
            return LlamaConfig(
                hidden_size=D_MODEL,
                num_hidden_layers=LAYERS,
                num_attention_heads=HEADS,
                intermediate_size=self.d_mlp,
                max_position_embeddings=CONTEXT,
                **shared,
            )
        return GPT2Config(
            n_embd=D_MODEL,
            n_layer=LAYERS,
            n_head=HEADS,
            n_inner=self.d_mlp,
            n_positions=CONTEXT,
            activation_function="gelu",
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
            **shared,
        )

    def at_step_0(self, seed: int) -> PreTrainedModel:
        """The untrained model, float32: the same weights for the same seed."""
        from transformers import AutoModelForCausalLM

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return AutoModelForCausalLM.from_config(self.config, dtype=torch.float32)


MEMBERS = {
    member.name: member
    for member in [
        *(Member(f"tiny-x{r:g}", int(r * D_MODEL)) for r in (0.5, 1, 2, 4, 8, 16)),
        *(Member(f"tiny-swiglu-x{r:.3g}", round(r * D_MODEL), gated=True) for r in (1, 8 / 3, 8)),
    ]
}


def digest(state: Mapping[str, Tensor]) -> str:
    """sha256 of the names, types, shapes and numbers of a state dict, in the order of names."""
    found = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.numpy().tobytes())
    return found.hexdigest()

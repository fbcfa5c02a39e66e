"""Tiny models with planted weights, and tokens for them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ffnprobe.corpus import Tokens
from ffnprobe.models import Model, load_model, plain

LENGTH = 64


@pytest.fixture
def planted(folder_of: Callable[[str], Path]) -> Callable[..., Model]:
    """`planted("llama", edit)`: the tiny model after `edit(hf_model)` has changed its weights in place."""

    def make(architecture: str, edit: Callable[[PreTrainedModel], None]) -> Model:
        folder = folder_of(architecture)
        hf = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            edit(hf)
        return load_model(hf, tokenizer=AutoTokenizer.from_pretrained(folder), device="cpu")

    return make


@pytest.fixture
def tokens() -> Callable[..., Tokens]:
    """`tokens(model)`: random text of many short documents, each behind the special id 0."""

    def make(model: Model, sequences: int = 8, document: int = 16) -> Tokens:
        n = sequences * LENGTH
        vocabulary = plain(model).get_input_embeddings().weight.shape[0]
        ids = torch.randint(1, vocabulary, (n,), generator=torch.Generator().manual_seed(0))
        special = torch.arange(n) % document == 0
        ids[special] = 0
        parts = (ids, torch.arange(n) // document, special)
        return Tokens(*(part.view(-1, LENGTH) for part in parts), {})

    return make

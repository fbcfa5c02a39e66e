"""Tokens for tiny models."""

from collections.abc import Callable

import pytest
import torch

from ffnprobe.corpus import Tokens
from ffnprobe.models import Model, plain

LENGTH = 64


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

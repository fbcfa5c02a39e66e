"""What do all tests share? Tiny models, made once a session and only if a test asks for them."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import zoo
from transformer_lens.model_bridge import TransformerBridge

from ffnprobe.models import load_model

torch.set_num_threads(1)  # on matrices this small a second thread only waits


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`folder_of("llama")`: the saved folder of a tiny random model. Do not write into it."""

    @cache
    def make(architecture: str) -> Path:
        return zoo.save(architecture, tmp_path_factory.mktemp("zoo") / architecture)

    return make


@pytest.fixture(scope="session")
def model_of(folder_of: Callable[[str], Path]) -> Callable[[str], TransformerBridge]:
    """`model_of("llama")`: the loaded bridge, shared by the session. Do not modify it."""

    @cache
    def make(architecture: str) -> TransformerBridge:
        return load_model(folder_of(architecture), device="cpu")

    return make


@pytest.fixture(scope="session")
def gpt2(model_of: Callable[[str], TransformerBridge]) -> TransformerBridge:
    return model_of("gpt2")


@pytest.fixture(scope="session")
def llama(model_of: Callable[[str], TransformerBridge]) -> TransformerBridge:
    return model_of("llama")

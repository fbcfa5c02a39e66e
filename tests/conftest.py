"""What do all tests share? Tiny models, made once a session and only if a test asks for them."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import zoo
from matplotlib.figure import Figure
from matplotlib.text import Text
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

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


@pytest.fixture
def planted(folder_of: Callable[[str], Path]) -> Callable[..., TransformerBridge]:
    """`planted("llama", edit)`: the tiny model after `edit(hf_model)` has changed its weights in place."""

    def make(architecture: str, edit: Callable[[PreTrainedModel], None]) -> TransformerBridge:
        folder = folder_of(architecture)
        hf = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            edit(hf)
        return load_model(hf, tokenizer=AutoTokenizer.from_pretrained(folder), device="cpu")

    return make


@pytest.fixture(scope="session")
def sketching() -> Callable[[], AbstractContextManager[None]]:
    """Within it, figures are saved as their texts and numbers: drawing takes most of the time of a tiny report."""

    def save(figure: Figure, file, **_) -> None:
        texts = [text.get_text() for text in figure.findobj(Text)]
        lines = [np.asarray(line.get_xydata()).tolist() for axes in figure.axes for line in axes.lines]
        file.write(repr([texts, lines]).encode())

    @contextmanager
    def sketch() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Figure, "savefig", save)
            yield

    return sketch


@pytest.fixture
def sketched(sketching: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """The whole test draws so."""
    with sketching():
        yield


@pytest.fixture(scope="session")
def gpt2(model_of: Callable[[str], TransformerBridge]) -> TransformerBridge:
    return model_of("gpt2")


@pytest.fixture(scope="session")
def llama(model_of: Callable[[str], TransformerBridge]) -> TransformerBridge:
    return model_of("llama")

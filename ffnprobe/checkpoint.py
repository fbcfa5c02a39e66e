"""Can a model be read from a folder, whole, with the tokenizer that belongs to it?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .errors import InputError, ModelRefused
from .hub import quiet
from .placement import DeviceMap

AGAIN = "save or download it again"
DENSE = "choose a model with dense feed-forward layers"


def read(
    folder: Path,
    gguf: str | None,
    name: str,
    dtype: torch.dtype,
    device_map: DeviceMap | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and its tokenizer; nothing of the model's own code is run and no weights are unpickled.

    Raises:
        InputError: what is there cannot be read.
        ModelRefused: it is not one stack of dense layers, or lacks weights.
    """
    source: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    source |= {"gguf_file": gguf} if gguf else {}
    with quiet():
        try:
            config = AutoConfig.from_pretrained(folder, **source)
        except Exception as error:  # whatever a torn file makes the libraries raise
            raise InputError(f"{name} has no readable configuration ({first_line(error)}): {AGAIN}") from error
        if experts := _experts(config):  # before the weights are read, because a mixture is large
            raise ModelRefused(f"{name} is a mixture of experts ({experts}): {DENSE}")
        if config.is_encoder_decoder:
            raise ModelRefused(f"{name} is an encoder-decoder ({config.model_type}), not one stack: {DENSE}")
        masked = any(a.endswith("ForMaskedLM") for a in config.architectures or [])
        auto: Any = AutoModelForMaskedLM if masked else AutoModelForCausalLM
        try:
            hf, report = auto.from_pretrained(
                folder,
                dtype=dtype,
                device_map=device_map,
                use_safetensors=True,
                output_loading_info=True,
                **source,
            )
        except Exception as error:
            remedy = AGAIN if device_map is None else f"correct device_map ({device_map!r}), or {AGAIN}"
            raise InputError(f"{name} could not be read ({first_line(error)}): {remedy}") from error
        if missing := sorted(report["missing_keys"]):
            # transformers would go on with random numbers in their place
            raise ModelRefused(f"{name} lacks {len(missing)} weights, the first is {missing[0]}: {AGAIN}")
        try:
            tokenizer = tokenizer or AutoTokenizer.from_pretrained(folder, **source)
        except Exception as error:
            raise InputError(f"{name} has no readable tokenizer ({first_line(error)}): pass tokenizer=") from error
    return hf, tokenizer


def _experts(config: PretrainedConfig) -> str | None:
    sizes = {k: v for k, v in config.to_dict().items() if k.endswith("experts") and isinstance(v, int)}
    return next((f"{k} = {v}" for k, v in sizes.items() if v > 1), None)


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def refuse_weights(hf: PreTrainedModel, name: str) -> None:
    for tensor, weight in hf.named_parameters():
        if not (finite := torch.isfinite(weight)).all():
            bad = f"{int((~finite).sum())} of {weight.numel()}"
            raise ModelRefused(f"{name}: {tensor} is NaN or infinite in {bad} entries: {AGAIN}")


def refuse_tokenizer(hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    if not tokenizer.encode("a cat", add_special_tokens=False):
        # transformers makes an empty one where the files are missing
        raise InputError(f"{name} has an empty tokenizer: give the tokenizer that belongs to this model")
    rows = rows_of(hf)
    token, largest = max(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    if largest >= rows:
        raise InputError(
            f"{name}: the tokenizer's ids reach {largest} ({token!r}), the vocabulary has {rows} rows: "
            "give the tokenizer that belongs to this model"
        )


def rows_of(hf: PreTrainedModel) -> int:
    embedding: Any = hf.get_input_embeddings()
    return embedding.weight.shape[0]

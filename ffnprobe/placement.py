"""In which precision is a model, and on which devices do its parts lie?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ffnprobe.errors import InputError, ModelRefused
from ffnprobe.taps import Tap

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DeviceMap = str | Mapping[str, int | str | torch.device]  # as transformers' from_pretrained takes it


def dtype_of(dtype: str | torch.dtype) -> torch.dtype:
    """The dtype that a text names.

    Raises:
        InputError: it names none.

    >>> dtype_of("bfloat16")
    torch.bfloat16
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise InputError(f'dtype "{dtype}" is unknown: choose from {", ".join(DTYPES)}')
    return DTYPES[dtype]


def dtype_name(hf: PreTrainedModel) -> str:
    """As `dtype_of` reads it."""
    return str(hf.dtype).removeprefix("torch.")


def dispatched(hf: PreTrainedModel) -> bool:
    """Whether accelerate has placed the parts and moves what enters them: then they must stay where they are."""
    return any(hasattr(module, "_hf_hook") for module in hf.modules())


def input_device(hf: PreTrainedModel) -> torch.device:
    """Where token ids are read."""
    embedding: Any = hf.get_input_embeddings()
    return embedding.weight.device


def devices(hf: PreTrainedModel) -> str:
    """`cpu`, `cuda`, or every one of several: `cuda:0, cuda:1`."""
    found = {weight.device for weight in hf.parameters()}
    return next(iter(found)).type if len(found) == 1 else ", ".join(sorted(map(str, found)))


def refuse_offloaded(hf: PreTrainedModel, name: str) -> None:
    """Refuse weights that are fetched from main memory or the disk when they are needed, and not there before.

    Raises:
        ModelRefused: there is one.
    """
    if away := [weight for weight, tensor in hf.named_parameters() if tensor.device.type == "meta"]:
        raise ModelRefused(
            f"{name} does not fit on the devices: {len(away)} weights were left in main memory or on the disk, "
            f"the first is {away[0]}: give it more GPUs, or a narrower dtype (bfloat16)"
        )


def refuse_split_layers(taps: Sequence[Tap], name: str) -> None:
    """Refuse a feed-forward layer whose matrices lie on several devices: statistics are kept beside their layer.

    Raises:
        InputError: there is one.
    """
    for tap in taps:
        parts: list[Any] = [part for part in (tap.up, tap.gate, tap.down) if part is not None]
        if len(found := {str(part.weight.device) for part in parts}) > 1:
            raise InputError(
                f"{name}: the feed-forward of layer {tap.layer} is split over {', '.join(sorted(found))}: "
                "give a device_map that keeps each layer on one device, or auto"
            )

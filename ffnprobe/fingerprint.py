"""Are these the same weights, the same tokenizer, the same tokens as before?"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

from .corpus import Tokens
from .models import Model, plain, tokenizer_of
from .tensors import raw_bytes

_PLACES = ("_name_or_path", "transformers_version")  # of a configuration: where it lay, not what it is


def fingerprints(model: Model, tokens: Tokens) -> dict[str, str]:
    """sha256 of all that decides what a forward pass gives, each part apart."""
    return {
        "weights": weights(model),
        "tokenizer": tokenizer(model),
        "tokens": _sha256(raw_bytes(part) for part in (tokens.ids, tokens.document, tokens.special)),
    }


def weights(model: Model) -> str:
    """Of every parameter and buffer, and of the configuration: equal weights under another activation differ."""
    network = plain(model)
    config = {key: value for key, value in network.config.to_dict().items() if key not in _PLACES}

    def parts() -> Iterable[bytes | memoryview]:
        yield json.dumps(config, sort_keys=True, default=str).encode()
        for name, tensor in sorted([*network.named_parameters(), *network.named_buffers()]):
            yield f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
            yield raw_bytes(tensor)

    return _sha256(parts())


def tokenizer(model: Model) -> str:
    """Of the vocabulary and its rules; truncation and padding are left out, every call may set them."""
    found = tokenizer_of(model)
    if (backend := getattr(found, "backend_tokenizer", None)) is not None:
        rules = {
            key: value
            for key, value in json.loads(backend.to_str()).items()
            if key not in ("truncation", "padding")
        }
    else:
        rules = {"class": type(found).__name__, "vocabulary": found.get_vocab()}
    return _sha256([json.dumps([rules, sorted(found.all_special_ids)], sort_keys=True).encode()])


def _sha256(parts: Iterable[bytes | memoryview]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(b"%d:" % len(part))
        digest.update(part)
    return digest.hexdigest()

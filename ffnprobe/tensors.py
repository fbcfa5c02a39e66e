"""How do named tensors get to disk and back, so that not one bit can change unseen?

The format is safetensors, which any reader of it opens. The library's own writer copies every tensor and
shuffles metadata; this one streams them, hashes what it writes, and gives the same bytes for the same tensors.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .disk import atomic_write

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in NAMES.items()}


class Damaged(Exception):
    """A file that is not what was written."""


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> tuple[int, str]:
    """Write a safetensors file; its size in bytes and its sha256.

    Raises:
        MachineError: the disk is full or fails.
    """
    # wide types first: then each tensor lies at a multiple of its item size
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header: dict = {"__metadata__": {"about": json.dumps(dict(about), sort_keys=True)}}
    end = 0
    for name in order:
        start, end = end, end + tensors[name].nbytes
        header[name] = {
            "dtype": NAMES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    head = struct.pack("<Q", len(head)) + head
    digest = hashlib.sha256()

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            parts: Iterator[Any] = chain([head], (raw_bytes(tensors[name]) for name in order))
            for part in parts:
                digest.update(part)
                file.write(part)

    size = len(head) + end
    atomic_write(path, write, size)
    return size, digest.hexdigest()


def read_tensors(path: str | Path, *digests: str) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """The tensors of a file, what `about` said, and its sha256; read once, checked, then viewed in place.

    Raises:
        Damaged: it is missing, or its sha256 is none of `digests`.
    """
    try:
        with open(path, "rb") as file:
            data = bytearray(Path(path).stat().st_size)
            file.readinto(data)
    except OSError as error:
        raise Damaged(f"{Path(path).name} cannot be read ({error.strerror or error})") from error
    if (digest := hashlib.sha256(data).hexdigest()) not in digests:
        raise Damaged(f"{Path(path).name} has other bytes than were written")
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    about = json.loads(header.pop("__metadata__")["about"])
    tensors = {}
    for name, entry in header.items():
        (start, end), dtype = entry["data_offsets"], DTYPES[entry["dtype"]]
        if start == end:
            tensors[name] = torch.empty(entry["shape"], dtype=dtype)
            continue
        flat = torch.frombuffer(
            data, dtype=dtype, count=(end - start) // dtype.itemsize, offset=8 + length + start
        )
        tensors[name] = flat.view(entry["shape"])
    return tensors, about, digest


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor of any type, uncopied where it lies in order in main memory."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data

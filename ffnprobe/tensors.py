"""How do named tensors get to disk and back, so that not one bit can change unseen?

The format is safetensors, which any reader of it opens. The library's own writer copies every tensor and
shuffles metadata; this one streams them, hashes what it writes, and gives the same bytes for the same tensors.
"""

from __future__ import annotations

import errno
import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

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


class Stored(Mapping[str, Tensor]):
    """The tensors of a file, each read when it is asked for: a file need not fit into memory as a whole."""

    def __init__(self, file: BinaryIO, entries: Mapping[str, Any], base: int) -> None:
        self.file, self.entries, self.base = file, entries, base

    def __getitem__(self, name: str) -> Tensor:
        entry = self.entries[name]
        tensor = torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]])
        with _readable(self.file.name):
            self.file.seek(self.base + entry["data_offsets"][0])
            if self.file.readinto(raw_bytes(tensor)) != tensor.nbytes:  # type: ignore[attr-defined]
                raise OSError(errno.EIO, "it has become shorter")
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


@contextmanager
def stored(path: str | Path, *digests: str) -> Iterator[tuple[Stored, dict[str, Any], str]]:
    """The tensors of a file, what `about` said, and its sha256, which is checked before anything is read.

    Raises:
        Damaged: it is missing, or its sha256 is none of `digests`.
    """
    with ExitStack() as stack:
        with _readable(path):
            file = stack.enter_context(open(path, "rb"))
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest not in digests:
                raise Damaged(f"{Path(path).name} has other bytes than were written")
            file.seek(0)
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        about = json.loads(header.pop("__metadata__")["about"])
        yield Stored(file, header, 8 + length), about, digest


@contextmanager
def _readable(path: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Damaged(f"{Path(path).name} cannot be read ({error.strerror or error})") from error


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor of any type, uncopied where it lies in order in main memory."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data

"""The one way to disk: a file is there whole, or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from .errors import InputError, MachineError

FULL = (errno.ENOSPC, errno.EDQUOT)
AGAIN = "make room, and the same command goes on"


def atomic_write(path: str | Path, write: Callable[[Path], object], size: int | None = None) -> Path:
    """Have `write` fill a temporary file beside `path`, flush it to disk, then rename it to `path`.

    Args:
        size: the bytes it will have, where that is known beforehand.

    Raises:
        InputError: the folder cannot be made or written.
        MachineError: the disk is full or fails.
    """
    path = Path(path)
    make_folder(path.parent)
    temporary = None
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)  # mkstemp makes it private; a table or a page is meant to be shared
        temporary.replace(path)
        _flush_folder(path.parent)
    except OSError as error:
        got = temporary.stat().st_size if temporary and temporary.exists() else 0
        if temporary:
            temporary.unlink(missing_ok=True)  # before the free bytes are counted
        raise _failed(path, error, size or got + 1) from error
    finally:
        if temporary:
            temporary.unlink(missing_ok=True)
    return path


def append_line(path: str | Path, line: str) -> None:
    """Add a line at the end of a file and flush it to disk. What a crash tore before stays a line of its own.

    Raises:
        MachineError: the disk is full or fails.
    """
    path, data = Path(path), f"{line}\n".encode()
    try:
        with open(path, "ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                data = data if file.read(1) == b"\n" else b"\n" + data
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise _failed(path, error, len(data)) from error


def sweep(folder: Path, name: str = "*") -> None:
    """Remove what killed writes have left below `folder`. Only for who alone writes there."""
    for stale in folder.rglob(f".{name}.partial"):
        stale.unlink(missing_ok=True)


def need_room(folder: Path, size: int, what: str) -> None:
    """Check that `size` more bytes fit.

    Raises:
        MachineError: they do not.
    """
    if (free := shutil.disk_usage(folder).free) < size:
        raise MachineError(
            f"{folder} is too small for {what}: {size:,} bytes needed, {free:,} bytes free; {AGAIN}"
        )


def make_folder(path: str | Path) -> Path:
    """Make `path` and its parents, and check that it takes files.

    Raises:
        InputError: it is a file, or may not be written.
        MachineError: the disk is full.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        if error.errno in FULL:
            raise _failed(path, error, 1) from error
        raise InputError(
            f"cannot write into {path}: {error.strerror or error}; choose another folder with --out"
        ) from error
    return path


def _failed(path: Path, error: OSError, size: int) -> MachineError:
    free = shutil.disk_usage(path.parent).free
    return MachineError(
        f"cannot write {path}: {error.strerror or error}; {size:,} bytes needed, {free:,} bytes free; {AGAIN}"
    )


def _flush_folder(folder: Path) -> None:
    """Make the rename itself last: without this a power cut may undo it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

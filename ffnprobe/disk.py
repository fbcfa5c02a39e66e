"""The one way to disk: a file is there whole, or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from .errors import InputError, MachineError


def atomic_write(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Have `write` fill a temporary file beside `path`, flush it to disk, then rename it to `path`.

    Raises:
        InputError: the folder cannot be made or written.
        MachineError: the disk is full or fails.
    """
    path = Path(path)
    make_folder(path.parent)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)  # mkstemp makes it private; a table or a page is meant to be shared
        temporary.replace(path)
    except OSError as error:
        raise MachineError(
            f"cannot write {path}: {error.strerror or error}; free some space and run it again"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def make_folder(path: str | Path) -> Path:
    """Make `path` and its parents, and check that it takes files.

    Raises:
        InputError: it is a file, or may not be written.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise InputError(
            f"cannot write into {path}: {error.strerror or error}; choose another folder with --out"
        ) from error
    return path

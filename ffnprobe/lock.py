"""Is another process at work in this folder?"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from .disk import make_folder
from .errors import InputError

ABSENT = (
    errno.ENOLCK,
    errno.ENOSYS,
    errno.EOPNOTSUPP,
)  # a file system without locks: the user must see to it


@dataclass(frozen=True)
class Lock:
    file: IO[str]

    def alone(self) -> bool:
        """Turn a shared lock into the only one; False while anybody else holds it.

        Where several leave at once the last of them gets it: each lets go before it asks.
        """
        return _take(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def share(self) -> None:
        """Let others in again."""
        _take(self.file, fcntl.LOCK_SH)


@contextmanager
def locked(
    path: str | Path, *, shared: bool = False, wait: Callable[[str], object] | None = None
) -> Iterator[Lock]:
    """Hold a lock file; the kernel lets go of it however the process ends.

    Args:
        wait: told who holds it, where it is to be waited for.

    Raises:
        InputError: another process holds it; the message says which.
    """
    path = Path(path)
    make_folder(path.parent)
    try:
        opened = open(path, "a+")  # noqa: SIM115
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; choose another folder with --out") from error
    with opened as file:
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        if not _take(file, kind | fcntl.LOCK_NB):
            file.seek(0)
            who = _holder(file.read())
            if not wait:
                raise InputError(
                    f"{path.parent} is in use by {who}: wait for it, or choose another folder with --out"
                )
            wait(f"waiting: {path.parent} is in use by {who}")
            _take(file, kind)
        with suppress(OSError):  # who holds it is a courtesy; a full disk is met by who needs the room
            file.truncate(0)
            file.write(json.dumps({"pid": os.getpid(), "host": platform.node()}))
            file.flush()
        yield Lock(file)


def _take(file: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(file, kind)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in ABSENT:
            raise
    return True


def _holder(text: str) -> str:
    try:
        who = json.loads(text)
        return f"process {int(who['pid'])} on {str(who['host'])[:80]!r}"
    except (ValueError, KeyError, TypeError):
        return "another process"

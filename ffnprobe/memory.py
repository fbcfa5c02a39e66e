"""How much memory is there, and how much was used at the most?"""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
MIB = 2**20


def peak() -> int:
    """The most bytes of main memory that this process has held so far."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def available(meminfo: Path = Path("/proc/meminfo"), cgroups: Path = CGROUPS) -> int:
    """Bytes that may still be taken: what the machine has, or what a container or a batch job may use if less."""
    try:
        lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
        machine = 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([machine, *_limits(cgroups)])


@cache
def keep_freed() -> None:
    """Let this process keep up to 256 MiB of what it frees for what it takes next.

    By default glibc hands the activations of a layer back to the system as they are freed, and each of the next
    layer's pages is cleared anew, which can cost a tenth of a forward pass. What is above 32 MiB, the most that
    glibc takes for this, is still handed back at once. Nothing happens where there is no glibc.
    """
    _set(M_MMAP_THRESHOLD, 32 * MIB)
    _set(M_TRIM_THRESHOLD, 256 * MIB)


@contextmanager
def apart() -> Iterator[None]:
    """What is taken in here from 1 MiB on has pages of its own, so that no holes are left between what stays."""
    keep_freed()
    _set(M_MMAP_THRESHOLD, MIB)
    try:
        yield
    finally:
        _set(M_MMAP_THRESHOLD, 32 * MIB)


def _set(option: int, size: int) -> None:
    with suppress(OSError, AttributeError, TypeError):  # no glibc
        ctypes.CDLL(None).mallopt(option, size)


def _limits(cgroups: Path) -> Iterator[int]:
    """What is left of the limit of this process's control group and of each group that it lies in."""
    own = ""
    with suppress(OSError):
        own = Path("/proc/self/cgroup").read_text().partition("0::/")[2].split("\n")[0]
    for group in (cgroups / own, *(cgroups / own).parents):
        with suppress(OSError, ValueError):  # no such file, or the limit is `max`
            limit, used = (int((group / f"memory.{what}").read_text()) for what in ("max", "current"))
            caches = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            yield limit - used + int(caches.get("inactive_file", 0))

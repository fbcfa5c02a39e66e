"""How much memory is there, and how much was used at the most?"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


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

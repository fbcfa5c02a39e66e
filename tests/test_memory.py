"""The memory that is there is the machine's, or a container's limit where that is less."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from ffnprobe.memory import available, peak

GIB = 2**30


def test_the_peak_is_never_below_what_is_held():
    before = peak()
    held = torch.ones(64 * 2**20, dtype=torch.uint8)
    assert peak() >= held.nbytes and peak() >= before


@pytest.fixture
def meminfo(tmp_path):
    path = tmp_path / "meminfo"
    path.write_text(f"MemTotal: {16 * 2**20} kB\nMemAvailable: {8 * 2**20} kB\n")
    return path


def group(folder, limit, used, cached) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("max", limit), ("current", used), ("stat", f"anon 1\ninactive_file {cached}\n")):
        (folder / f"memory.{name}").write_text(f"{text}\n" if name != "stat" else text)


def test_the_machine_counts_where_no_group_has_a_limit(meminfo, tmp_path):
    assert available(meminfo, tmp_path / "none") == 8 * GIB
    group(tmp_path / "groups", "max", GIB, 0)
    assert available(meminfo, tmp_path / "groups") == 8 * GIB


def test_the_least_limit_of_the_groups_counts_without_its_caches(meminfo, tmp_path):
    group(tmp_path, 4 * GIB, 3 * GIB, 2 * GIB)
    assert available(meminfo, tmp_path) == 3 * GIB


def test_a_machine_without_meminfo_counts_its_pages(tmp_path):
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert available(tmp_path / "none", tmp_path) == total


# five blocks of 20 MiB at a time: by itself glibc keeps twice the largest that was freed
CHURN = """
import resource
from ffnprobe.memory import keep_freed
keep_freed()
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [bytes([1]) * (20 << 20) for _ in range(5)]
    del blocks
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

# every other block of 2 MiB is freed: pages held in the end
HOLES = """
from pathlib import Path
from ffnprobe.memory import apart
with apart():
    blocks = [bytes([1]) * (2 << 20) for _ in range(40)]
before = int(Path("/proc/self/statm").read_text().split()[1])
del blocks[::2]
print(int(Path("/proc/self/statm").read_text().split()[1]) - before)
"""


def printed_by(code: str) -> int:
    return int(subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_what_is_freed_is_taken_again_without_new_pages():
    assert printed_by(CHURN) < 100


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_what_is_taken_apart_leaves_no_holes():
    assert printed_by(HOLES) < -9000

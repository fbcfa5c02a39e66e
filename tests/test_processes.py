"""The command line as real processes: killed at any moment, started by launchers, stopped by signals."""

import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ffnprobe.shards import MERGED

pytestmark = pytest.mark.slow

FFNPROBE = Path(sys.executable).with_name("ffnprobe")
SHARDS = 64
OPTIONS = ("--tokens", "16384", "--shard", "256", "--batch", "1")


@pytest.fixture(scope="module")
def model(folder_of) -> Path:
    return folder_of("llama")


def command(model: Path, out: Path, *more: str) -> list[str]:
    return [str(word) for word in (FFNPROBE, "--threads", "1", "report", model, *OPTIONS, "--out", out, *more)]


def start(words: list[str], **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        words, env=os.environ | environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(words: list[str], **environment: str) -> str:
    process = start(words, **environment)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return said


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / MERGED).read_bytes()).hexdigest()


def made(folder: Path) -> int:
    return len(list((folder / "shards").glob("s-*.safetensors")))


def wait_for(shards: int, folder: Path) -> None:
    until = time.monotonic() + 120
    while made(folder) < shards:
        assert time.monotonic() < until
        time.sleep(0.005)


@pytest.fixture(scope="module")
def undisturbed(model, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(command(model, folder))
    assert made(folder) == SHARDS
    return digest(folder)


@pytest.mark.parametrize("seed", range(5))
def test_five_kills_at_random_moments_change_no_byte(seed, model, undisturbed, tmp_path):
    chance, words, there = random.Random(seed), command(model, tmp_path / "run"), 0
    for _ in range(5):
        process = start(words)
        wait_for(min(there + 1, SHARDS), tmp_path / "run")
        time.sleep(chance.uniform(0, 0.3))
        process.kill()
        said, _ = process.communicate()
        if 0 < there < SHARDS:  # at most one is made again
            assert int(re.search(rf"(\d+) of {SHARDS} shards are there", said)[1]) >= there - 1
        there = made(tmp_path / "run")
    assert there >= 5
    finish(words)
    assert digest(tmp_path / "run") == undisturbed
    assert not list((tmp_path / "run").rglob("*.partial"))


def test_torchrun_gives_the_same_bytes(model, undisturbed, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python"]
    finish([*torchrun, *command(model, tmp_path / "run", "--executor", "rank")])
    assert digest(tmp_path / "run") == undisturbed
    assert {path.name for path in (tmp_path / "run").glob("MANIFEST*")} == {"MANIFEST-0.jsonl", "MANIFEST-1.jsonl"}
    assert (tmp_path / "run" / "report.html").exists()


def test_slurms_variables_number_the_ranks(model, undisturbed, tmp_path):
    words = command(model, tmp_path / "run", "--executor", "rank")
    tasks = [start(words, SLURM_PROCID=str(rank), SLURM_NTASKS="2", SLURM_LOCALID=str(rank)) for rank in range(2)]
    said = [task.communicate(timeout=300)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], said
    assert digest(tmp_path / "run") == undisturbed


def test_two_workers_of_one_thread_give_the_bytes_of_one(model, undisturbed, tmp_path):
    words = command(model, tmp_path / "run", "--executor", "process", "--workers", "2")
    words[words.index("--threads") + 1] = "2"  # a thread each
    finish(words)
    assert digest(tmp_path / "run") == undisturbed


@pytest.mark.parametrize("executor", ["inline", "process"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_no_worker_and_the_run_goes_on(number, executor, model, undisturbed, tmp_path):
    words = command(model, tmp_path / "run", "--executor", executor)
    process = start(words)
    wait_for(2, tmp_path / "run")
    children = descendants(process.pid)
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, said
    assert "the same command goes on" in said and "Traceback" not in said
    assert bool(children) == (executor == "process")
    until = time.monotonic() + 10  # multiprocessing's own tracker ends a moment later
    while left := [child for child in children if Path(f"/proc/{child}").exists()]:
        assert time.monotonic() < until, left
        time.sleep(0.05)
    if executor == "inline":
        finish(words)
        assert digest(tmp_path / "run") == undisturbed


def descendants(process: int) -> list[int]:
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [found for child in map(int, children) for found in (child, *descendants(child))]


@pytest.mark.skipif(shutil.which("ss") is None, reason="ss is not installed")
def test_ray_listens_on_loopback_alone(model, undisturbed, tmp_path):
    pytest.importorskip("ray")
    before = listening()
    process = start(command(model, tmp_path / "run", "--executor", "ray"))
    wait_for(1, tmp_path / "run")
    opened = listening() - before
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert opened and all(re.match(r"127\.|\[::1\]|\[::ffff:127\.", address) for address in opened), opened
    assert not any(address.endswith(":8265") for address in opened)  # the dashboard
    if len(os.sched_getaffinity(0)) <= 3:  # two workers have a thread each then
        assert digest(tmp_path / "run") == undisturbed


def listening() -> set[str]:
    lines = subprocess.run(["ss", "-ltnH"], text=True, capture_output=True, check=True).stdout.splitlines()
    return {line.split()[3] for line in lines}

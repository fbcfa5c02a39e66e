"""The real command, in processes of its own: killed, interrupted, started by launchers."""

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from recipes import sha256

from ffnprobe import manifest
from ffnprobe.shards import MERGED

pytestmark = pytest.mark.slow

SHARDS = 16
COMMAND = [sys.executable, "-c", "from ffnprobe.cli import main; main()", "--threads", "1", "report"]
OPTIONS = ["--tokens", "4096", "--shard", "256", "--batch", "1", "--only", "hidden_rank,memories"]


def start(folder: Path, out: Path, *more: str, launcher: tuple[str, ...] = (), **environment: str):
    """The command in a session of its own, so that a signal reaches all its processes as a terminal's does."""
    command = [*launcher, *COMMAND, str(folder), *OPTIONS, "--out", str(out), *more]
    return subprocess.Popen(
        command,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen) -> str:
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0, said
    return said


def wait_for(found, process: subprocess.Popen) -> None:
    while not found():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)


def merge_of(process: subprocess.Popen, out: Path) -> str:
    """The sum's sha256; the analyses and the page are not waited for."""
    wait_for((out / MERGED).exists, process)  # it is there whole, or not at all
    kill(process)
    return sha256(out)


def kill(process: subprocess.Popen) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def left_behind(process: subprocess.Popen) -> list[str]:
    """Processes of the command's session that are still there."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(session) == process.pid and state != "Z":
            found.append(path.parent.name)
    return found


def deaf_to_ctrl_c(process: subprocess.Popen) -> list[bool]:
    """Of every worker of the command: whether it blocks SIGINT."""
    found = []
    for folder in (Path("/proc") / pid for pid in left_behind(process)):
        if b"spawn_main" in (folder / "cmdline").read_bytes():
            blocked = re.search(r"SigBlk:\s+(\w+)", (folder / "status").read_text())
            found.append(bool(int(blocked[1], 16) >> signal.SIGINT - 1 & 1))
    return found


@pytest.fixture(scope="module")
def model(folder_of):
    return folder_of("llama")


@pytest.fixture(scope="module")
def undisturbed(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    started = time.monotonic()
    process = start(model, out)
    wait_for((out / "run.json").exists, process)
    begun = time.monotonic()
    digest = merge_of(process, out)
    assert time.monotonic() - started < 300
    return digest, time.monotonic() - begun


@pytest.mark.parametrize("seed", range(25))
def test_a_command_killed_at_any_moment_goes_on_to_the_same_bytes(seed, model, undisturbed, tmp_path):
    digest, lasts = undisturbed
    process = start(model, tmp_path)
    wait_for((tmp_path / "run.json").exists, process)
    time.sleep(random.Random(seed).uniform(0, 1.1 * lasts))
    kill(process)
    finished = sum(len(lines) for lines in manifest.read(tmp_path).values())
    files = len(list((tmp_path / "shards").glob("s-*"))) + (tmp_path / "pilot.safetensors").exists()
    assert 0 <= files - finished <= 1  # what is not in the manifest is made again
    assert merge_of(start(model, tmp_path), tmp_path) == digest
    noted = manifest.read(tmp_path)
    assert len(noted) == SHARDS + 1 and all(len(lines) == 1 for lines in noted.values())


def test_two_processes_give_the_same_bytes_as_one(model, undisturbed, tmp_path):
    process = start(model, tmp_path, "--executor", "process", OMP_NUM_THREADS="2")
    assert merge_of(process, tmp_path) == undisturbed[0]


def port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def test_torchrun_gives_the_same_bytes(model, undisturbed, tmp_path):
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port()]
    finish(start(model, tmp_path, "--executor", "rank", launcher=(*run, "--no-python")))
    assert sha256(tmp_path) == undisturbed[0]
    assert (tmp_path / "report.html").exists()
    assert {path.name for path in tmp_path.glob("MANIFEST*")} == {"MANIFEST-0.jsonl", "MANIFEST-1.jsonl"}


def test_two_tasks_of_slurm_give_the_same_bytes(model, undisturbed, tmp_path):
    ranks = [
        start(model, tmp_path, "--executor", "rank", SLURM_PROCID=str(rank), SLURM_NTASKS="2") for rank in (0, 1)
    ]
    said = [finish(rank) for rank in ranks]
    assert sorted("the last rank adds up" in text for text in said) == [False, True]
    assert sha256(tmp_path) == undisturbed[0]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("executor", ["inline", "process"])
@pytest.mark.parametrize("moment", ["at the start", "at work"])
def test_a_signal_ends_every_process_and_says_how_to_go_on(executor, number, code, moment, model, tmp_path):
    process = start(model, tmp_path, "--executor", executor)
    wait_for((tmp_path / "run.json").exists, process)
    if moment == "at work":
        wait_for(lambda: list((tmp_path / "shards").glob("s-*")), process)
    elif executor == "process":
        wait_for(lambda: deaf_to_ctrl_c(process), process)  # workers that are still importing
        assert all(deaf_to_ctrl_c(process))
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == code, said
    assert said.splitlines()[-1] == (
        "ffnprobe: interrupted: a report keeps its finished shards, the same command goes on"
    )
    assert "Traceback" not in said
    deadline = time.monotonic() + 5
    while left := left_behind(process):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.skipif(shutil.which("ss") is None, reason="ss is not installed")
# asked for, not imported: ray takes its token when it is imported, and a later test gives it one
@pytest.mark.skipif(find_spec("ray") is None, reason="the extra [ray] is not installed")
def test_ray_listens_on_loopback_alone(model, undisturbed, tmp_path):
    before = listening()
    process = start(model, tmp_path, "--executor", "ray", OMP_NUM_THREADS="2")
    wait_for(lambda: list((tmp_path / "shards").glob("s-*")), process)
    opened = listening() - before
    finish(process)
    assert opened and all(re.match(r"127\.|\[::1\]|\[::ffff:127\.", address) for address in opened), opened
    assert not any(address.endswith(":8265") for address in opened)  # the dashboard
    assert sha256(tmp_path) == undisturbed[0]


def listening() -> set[str]:
    """Addresses that accept connections."""
    lines = subprocess.run(["ss", "-ltnH"], text=True, capture_output=True, check=True).stdout.splitlines()
    return {line.split()[3] for line in lines}

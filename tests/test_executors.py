"""Who computes a shard, and where, does not show in its bytes."""

import os
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

import pytest
from recipes import SHARDS, Deadly, Refusing, go, sha256, work_of

from ffnprobe import manifest
from ffnprobe.errors import InputError, MachineError
from ffnprobe.executors import Inline, Processes, Rank, Ray, executor_of, process
from ffnprobe.run import run

RAY = [pytest.mark.slow, pytest.mark.skipif(find_spec("ray") is None, reason="the extra [ray] is not installed")]

KINDS = pytest.mark.parametrize(
    ("kind", "method"),
    [
        (Processes, "fork"),  # without the imports of a fresh process
        pytest.param(Processes, "spawn", marks=pytest.mark.slow),
        pytest.param(Ray, "spawn", marks=RAY),
    ],
)


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """Ray's workers find the recipes where these tests do."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))


@pytest.fixture(autouse=True)
def start(request, monkeypatch):
    """Workers of `Processes` are started as the test says."""
    if "method" in request.fixturenames:
        monkeypatch.setattr(process, "METHOD", request.getfixturevalue("method"))


@pytest.fixture(scope="module")
def work(llama):
    return work_of(llama)


@pytest.fixture(scope="module")
def inline(work, tmp_path_factory):
    folder = tmp_path_factory.mktemp("inline")
    go(folder, work)
    return sha256(folder)


def late(executor_type: type, marks: Path):
    """The executor, which makes the folder that `Deadly` waits for when it starts its workers."""

    class Late(executor_type):
        def __call__(self, *arguments):
            marks.mkdir()
            return super().__call__(*arguments)

    return Late


@KINDS
def test_other_processes_give_the_same_bytes_though_one_is_killed(kind, method, folder_of, inline, tmp_path):
    marks = tmp_path / "marks"
    recipe = Deadly(folder_of("llama"), marks, 1)
    with run(tmp_path / "run", recipe, executor=late(kind, marks)(2, 1)) as (_, outcome):
        assert outcome.bit_equal
    assert len(list(marks.iterdir())) == 1
    assert sha256(tmp_path / "run") == inline


@pytest.mark.slow
def test_a_shard_that_kills_every_worker_is_given_up(folder_of, tmp_path):
    marks = tmp_path / "marks"
    recipe = Deadly(folder_of("llama"), marks, 99)
    with (
        pytest.raises(MachineError, match="3 workers died over shard 2"),
        run(tmp_path / "run", recipe, executor=late(Processes, marks)(1, 1)),
    ):
        pass


@KINDS
def test_an_error_in_a_worker_is_the_runs(kind, method, folder_of, tmp_path):
    recipe = Refusing(folder_of("llama"), os.getpid())
    with (
        pytest.raises(InputError, match="not here"),
        run(tmp_path / "run", recipe, executor=kind(1, 1)),
    ):
        pass


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_the_last_rank_adds_up(order, work, inline, tmp_path):
    outcomes = [go(tmp_path, work, executor=Rank(rank, 3)) for rank in order]
    assert [outcome is None for outcome, _ in outcomes] == [True, True, False]
    assert "2 of 4 shards are still out" in outcomes[0][1][-1] or "3 of 4" in outcomes[0][1][-1]
    assert sha256(tmp_path) == inline
    names = {path.name for path in tmp_path.glob("MANIFEST*")}
    assert names == {"MANIFEST-0.jsonl", "MANIFEST-1.jsonl", "MANIFEST-2.jsonl"}


def test_ranks_at_the_same_time_give_the_same_bytes(work, inline, tmp_path):
    children = []
    for rank in range(3):
        children.append(os.fork())
        if not children[-1]:
            code = 9
            try:
                outcome, _ = go(tmp_path, work, executor=Rank(rank, 3))
                code = 0 if outcome is None else 1
            finally:
                os._exit(code)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert sorted(codes) == [0, 0, 1]  # one of them has added up
    assert sha256(tmp_path) == inline


def test_what_a_dead_rank_left_out_is_made_inline(work, inline, tmp_path):
    assert go(tmp_path, work, executor=Rank(1, 2))[0] is None
    outcome, said = go(tmp_path, work)
    assert outcome.bit_equal and "2 of 4 shards are there" in said[0]
    assert sha256(tmp_path) == inline
    assert len(manifest.read(tmp_path)) == SHARDS + 1


def test_a_damaged_shard_of_another_rank_is_made_by_the_last(work, inline, tmp_path):
    go(tmp_path, work, executor=Rank(1, 2))
    path = tmp_path / "shards" / "s-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    outcome, said = go(tmp_path, work, executor=Rank(0, 2))
    assert outcome is not None and any(path.name in line for line in said)
    assert sha256(tmp_path) == inline


def test_a_run_is_kept_out_while_ranks_are_at_work(work, tmp_path):
    with (
        run(tmp_path, lambda say: work, executor=Rank(0, 2)),
        pytest.raises(InputError, match="in use by process"),
    ):
        go(tmp_path, work)


def test_a_rank_leaves_the_adding_up_to_one_that_is_still_there(work, inline, tmp_path):
    with run(tmp_path, lambda say: work, executor=Rank(1, 2)) as (_, outcome):
        assert outcome is None
        assert go(tmp_path, work, executor=Rank(0, 2))[0] is None
    assert go(tmp_path, work, executor=Rank(1, 2))[0] is not None
    assert sha256(tmp_path) == inline


def test_a_late_rank_waits_for_the_one_that_adds_up(work, tmp_path):
    said: list[str] = []

    def late() -> None:
        with run(tmp_path, lambda say: work, executor=Rank(1, 2), say=said.append):
            said.append("in")

    rank = threading.Thread(target=late)
    with run(tmp_path, lambda say: work):
        rank.start()
        rank.join(0.5)
        assert rank.is_alive() and "waiting" in said[0] and "in" not in said
    rank.join()
    assert said[-1] == "in"


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "1", "WORLD_SIZE": "3", "LOCAL_RANK": "1"},
        {"SLURM_PROCID": "1", "SLURM_NTASKS": "3", "SLURM_LOCALID": "0"},
        {"RANK": "1", "WORLD_SIZE": "3", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"},  # torchrun within a job
    ],
)
def test_a_launcher_numbers_the_ranks(environment):
    rank = Rank.from_environment(environment)
    assert (rank.rank, rank.world, rank.writer) == (1, 3, "-1")


@pytest.mark.parametrize(
    "environment", [{}, {"RANK": "1"}, {"RANK": "3", "WORLD_SIZE": "3"}, {"RANK": "-1", "WORLD_SIZE": "3"}]
)
def test_a_rank_without_a_launcher_is_refused(environment):
    with pytest.raises(InputError, match="start with torchrun or srun"):
        Rank.from_environment(environment)


def test_executors_have_names():
    assert isinstance(executor_of("inline"), Inline)
    assert executor_of("process", 2).workers == 2
    with pytest.raises(InputError, match="choose from inline, process, rank, ray"):
        executor_of("spark")

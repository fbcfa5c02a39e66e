"""What a plan says is what a report then takes."""

import os
import shutil
from dataclasses import replace

import pytest

from ffnprobe.errors import InputError, MachineError
from ffnprobe.executors import Inline, Processes
from ffnprobe.report import plan
from ffnprobe.report.build import build_report
from ffnprobe.report.plan import plan_report
from ffnprobe.report.settings import Settings


@pytest.fixture(scope="module")
def settings(folder_of):
    few = ("hidden_rank", "memories", "weight_rank")
    return Settings(str(folder_of("llama")), tokens=1024, batch=1, shard=256, analyzers=few)


@pytest.fixture(scope="module")
def planned(settings, tmp_path_factory, sketching):
    folder = tmp_path_factory.mktemp("plan")
    with sketching():
        made = plan_report(settings, folder / "runs" / "name", Inline(1))
    assert not list(folder.iterdir())  # nothing stays
    return made


def size(folder) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.usefixtures("sketched")
def test_the_bytes_are_those_of_the_report(planned, settings, tmp_path):
    build_report(settings, tmp_path, Inline(1))
    shards = [path.stat().st_size for path in (tmp_path / "shards").iterdir()]
    assert planned.shards == len(shards) == 4
    header = 40_000  # names and shapes, which count in a tiny model only
    assert 0 < max(shards) - planned.statistics < header
    assert abs(size(tmp_path) - planned.disk) < 0.1 * size(tmp_path) + (len(shards) + 2) * header

    before = {path: os.stat(path).st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    again = plan_report(settings, tmp_path, Inline(1))
    assert again.disk == pytest.approx(planned.disk, rel=0.01)
    assert again.disk_there > shutil.disk_usage(tmp_path).free  # what is there needs no more room
    assert {path: os.stat(path).st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.usefixtures("sketched")
def test_what_an_analysis_takes_at_any_rate_is_not_multiplied_by_the_layers(settings, tmp_path, monkeypatch):
    def timed(settings, work, start, layers, clock):
        clock.lap()
        return [], {name: 1000.0 + 100.0 * len(layers) for name in settings.analyzers}

    monkeypatch.setattr(plan, "_timed", timed)
    monkeypatch.setattr(plan, "inner", lambda layers: layers[:2])
    several = replace(settings, analyzers=("hidden_rank", "knockout"))
    found = plan_report(several, tmp_path, Inline(1)).seconds["analyses"]
    assert found == pytest.approx(1300 + 1200, abs=50)  # of three layers, two were timed


def test_every_stage_takes_time_and_the_lines_say_so(planned):
    assert list(planned.seconds) == ["load", "pass", "files", "analyses", "drawing"]
    assert all(seconds > 0 for seconds in planned.seconds.values())
    assert planned.memory > planned.weights + planned.statistics
    model, statistics, memory, disk, time = planned.lines()
    assert "float32" in model and "3 of 3 layers, 1,024 tokens" in model
    assert "exact" in statistics and "at the most" in memory and "4 shards" in disk and "analyses" in time


@pytest.mark.usefixtures("sketched")
def test_workers_share_the_time_and_add_up_in_memory(planned, settings, tmp_path):
    two = plan_report(settings, tmp_path, Processes(2, 1))
    assert two.memory > 2 * planned.memory and "of 2 workers together" in two.lines()[2]
    assert two.shards == planned.shards


def test_too_small_a_machine_is_said(planned):
    with pytest.raises(MachineError, match=r"memory is too small: [\d,]+ bytes needed, 1,000 bytes there"):
        replace(planned, memory_there=1000).check()
    with pytest.raises(MachineError, match=r"disk is too small: [\d,]+ bytes needed, 1,000 bytes there"):
        replace(planned, disk_there=1000).check()
    planned.check()


def test_statistics_beyond_memory_are_refused_before_they_are_made(settings, tmp_path, monkeypatch):
    monkeypatch.setattr("ffnprobe.report.plan.available", lambda: -(10**12))
    with pytest.raises(MachineError, match="memory is too small"):
        plan_report(settings, tmp_path, Inline(1))
    assert not list(tmp_path.iterdir())


def test_two_sources_of_text_are_one_too_many():
    with pytest.raises(InputError, match="both --corpus and --dataset"):
        Settings("any", corpus="x.txt", dataset="y")


def test_a_folder_that_takes_no_files_is_said_before_the_model_is_loaded(settings):
    said: list[str] = []
    with pytest.raises(InputError, match="cannot write into /proc"):
        plan_report(settings, "/proc/run", Inline(1), said.append)
    assert not said

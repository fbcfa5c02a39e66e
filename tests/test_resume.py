"""The command line: it goes on where it stopped, and says how."""

import errno
import hashlib
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

from ffnprobe.cli import main
from ffnprobe.shards import MERGED, Maker

pytestmark = pytest.mark.usefixtures("sketched")


@pytest.fixture
def ffnprobe(monkeypatch, capsys):
    """Run a command; its exit code and what it wrote."""

    def command(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["ffnprobe", *map(str, words)])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        out = capsys.readouterr()
        return code, out.out + out.err

    return command


def files(folder: Path) -> dict[str, str]:
    """What must not depend on the way: the sums, the tables and the figures."""
    names = [
        MERGED,
        *(f"{kind}/{p.name}" for kind in ("tables", "figures") for p in (folder / kind).iterdir()),
    ]
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


@pytest.fixture(scope="module")
def model(folder_of):
    return folder_of("llama")


def report(model: Path, out: Path, *more: str) -> tuple:
    return (
        "report",
        model,
        "--tokens",
        1024,
        "--shard",
        256,
        "--batch",
        1,
        "--only",
        "hidden_rank,memories",
        "--out",
        out,
        *more,
    )


def test_a_report_goes_on_after_signals_and_is_drawn_from_its_folder_alone(ffnprobe, model, tmp_path, monkeypatch):
    out, made, sent = tmp_path / "run", Maker.__call__, []

    def interrupted(number: int, at: int):
        def make(self, shard):
            if shard == at and number not in sent:
                sent.append(number)
                os.kill(os.getpid(), number)
            return made(self, shard)

        return make

    command = report(model, out)
    for number, at, code, there in ((signal.SIGINT, 1, 130, 1), (signal.SIGTERM, 2, 143, 2)):
        monkeypatch.setattr(Maker, "__call__", interrupted(number, at))
        got, said = ffnprobe(*command)
        assert got == code and "the same command goes on" in said and "Traceback" not in said
        assert len(list((out / "shards").iterdir())) == there
    got, said = ffnprobe(*command)
    assert got == 0 and "shards are there: going on" in said
    assert ffnprobe(*report(model, tmp_path / "straight"))[0] == 0
    assert files(out) == files(tmp_path / "straight")

    page = (out / "report.html").read_bytes()
    before = files(out)
    for part in ("figures", "shards", MERGED, "pilot.safetensors", "report.html"):
        shutil.rmtree(out / part) if (out / part).is_dir() else (out / part).unlink()
    shutil.move(out, tmp_path / "moved")
    code, said = ffnprobe("report", tmp_path / "moved")
    assert code == 0 and "loading" not in said
    assert (tmp_path / "moved" / "report.html").read_bytes() == page
    (tmp_path / "moved" / MERGED).write_bytes((tmp_path / "straight" / MERGED).read_bytes())
    assert files(tmp_path / "moved") == before


def test_a_full_disk_is_exit_4_with_the_bytes(ffnprobe, model, tmp_path, monkeypatch):
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    code, said = ffnprobe(*report(model, tmp_path / "run"))
    assert code == 4 and "bytes needed" in said and "bytes free" in said and "Traceback" not in said


def test_an_unfinished_or_foreign_folder_is_not_drawn(ffnprobe, tmp_path):
    for text, said in (('{"settings": {}}', "is not finished"), ("{}", "is not a run"), ("", "is not a run")):
        (tmp_path / "run.json").write_text(text)
        code, line = ffnprobe("report", tmp_path)
        assert (code, said in line) == (2, True), line

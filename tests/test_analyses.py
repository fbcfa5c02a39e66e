"""Every script of the gallery runs on any model, and the gallery shows what every script draws."""

import runpy
import sys
from pathlib import Path

import pytest

from ffnprobe.errors import InputError

ANALYSES = Path(__file__).parents[1] / "analyses"
SCRIPTS = sorted(ANALYSES.glob("plot_*.py"))
OWN = {
    "plot_recall.py": ["recall-planted"],
    "plot_claims_family.py": ["claims_family-tiny"],
    "plot_expansion.py": ["expansion-tiny", "expansion_fits-tiny"],
    "plot_memory_edit.py": ["memory_edit-tiny-x4"],
    "plot_quantization_family.py": ["quantization_family-tiny"],
    "plot_contraction_family.py": ["contraction_family-tiny"],
}


@pytest.fixture
def run(monkeypatch):
    def call(script: Path, *arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [str(script), *arguments])
        runpy.run_path(str(script), run_name="__main__")

    return call


@pytest.mark.usefixtures("sketched")
@pytest.mark.parametrize("script", [s for s in SCRIPTS if s.name not in OWN], ids=lambda path: path.stem)
def test_the_script_draws_its_figure_and_saves_its_table(script, run, folder_of, tmp_path, capsys):
    run(script, str(folder_of("gpt2")), "--layers", "0-2", "--tokens", "512", "--out", str(tmp_path))
    stem = f"{script.stem.removeprefix('plot_')}-gpt2"
    assert {path.name for path in tmp_path.iterdir()} == {f"{stem}.{kind}" for kind in ("png", "svg", "parquet")}
    assert f"{stem}.png" in capsys.readouterr().out


def test_a_layer_that_is_not_there_is_said(run, folder_of, tmp_path):
    with pytest.raises(InputError, match="layer 9 is not there"):
        run(ANALYSES / "plot_weight_rank.py", str(folder_of("gpt2")), "--layers", "9", "--out", str(tmp_path))


@pytest.mark.slow
def test_the_family_is_drawn_from_two_models_and_a_corpus(run, tmp_path, capsys):
    models, corpus = ("tiny-x4", "tiny-x0.5"), str(ANALYSES.parent / "data/tiny/heldout.jsonl")
    run(ANALYSES / "plot_expansion.py", *models, "--corpus", corpus, "--tokens", "1024", "--out", str(tmp_path))
    stems = OWN["plot_expansion.py"]
    kinds = ("png", "svg", "parquet")
    assert {path.name for path in tmp_path.iterdir()} == {f"{stem}.{kind}" for stem in stems for kind in kinds}
    assert "8 times the width multiplies the soft rank" in capsys.readouterr().out


@pytest.mark.slow
def test_codes_of_a_family_are_drawn_from_two_models(run, tmp_path, capsys):
    models = ("tiny-x1", "tiny-x0.5")
    run(ANALYSES / "plot_quantization_family.py", *models, "--tokens", "512", "--out", str(tmp_path))
    (stem,) = OWN["plot_quantization_family.py"]
    assert {path.name for path in tmp_path.iterdir()} == {f"{stem}.{kind}" for kind in ("png", "svg", "parquet")}
    assert "lost to d_mlp codewords of x" in capsys.readouterr().out


@pytest.mark.slow
def test_the_claims_of_the_family_are_drawn_from_two_models(run, tmp_path, capsys):
    models, corpus = ("tiny-x1", "tiny-x0.5"), str(ANALYSES.parent / "data/tiny/heldout.jsonl")
    run(
        ANALYSES / "plot_claims_family.py", *models, "--corpus", corpus, "--tokens", "1024", "--out", str(tmp_path)
    )
    (stem,) = OWN["plot_claims_family.py"]
    assert {path.name for path in tmp_path.iterdir()} == {f"{stem}.{kind}" for kind in ("png", "svg", "parquet")}
    said = capsys.readouterr().out
    assert "expansion 0.5 to 1: R² of y" in said and "before training" in said and "claim 6, " in said


@pytest.mark.slow
def test_contraction_is_drawn_of_two_models_and_a_corpus(run, tmp_path, capsys):
    corpus = str(ANALYSES.parent / "data/tiny/heldout.jsonl")
    options = ("--corpus", corpus, "--tokens", "1024", "--layers", "1", "--out", str(tmp_path))
    run(ANALYSES / "plot_contraction_family.py", "tiny-x4", "tiny-x0.5", *options)
    (stem,) = OWN["plot_contraction_family.py"]
    assert {path.name for path in tmp_path.iterdir()} == {f"{stem}.{kind}" for kind in ("png", "svg", "parquet")}
    assert "r = 0.5: 100% of the variance of h kept" in capsys.readouterr().out


def test_edits_are_drawn_on_a_tiny_model(run, tmp_path, capsys):
    run(ANALYSES / "plot_memory_edit.py", "--layers", "1", "--tokens", "1024", "--out", str(tmp_path))
    (stem,) = OWN["plot_memory_edit.py"]
    assert {path.name for path in tmp_path.iterdir()} == {f"{stem}.{kind}" for kind in ("png", "svg", "parquet")}
    assert "Layer 1, random key" in capsys.readouterr().out


def test_the_gallery_shows_every_script():
    page = (ANALYSES / "README.md").read_text()
    for script in SCRIPTS:
        for stem in OWN.get(script.name, [f"{script.stem.removeprefix('plot_')}-smollm2-135m"]):
            assert script.name in page and f"figures/{stem}.png" in page
            assert (ANALYSES / f"figures/{stem}.png").exists()

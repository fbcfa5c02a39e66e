"""What comes with the package is there, whole, and better than counts."""

import json
from pathlib import Path

import pytest
import train_expansion_family as training

from ffnprobe import shipped
from ffnprobe.errors import InputError
from ffnprobe.family import MEMBERS, digest
from ffnprobe.hub import fetch, locate
from ffnprobe.models import check_model, describe, ffns, load_model, plain

MODELS = training.TINY.parent / "models"
SHIPPED = list(MEMBERS)
every_model = pytest.mark.parametrize("name", SHIPPED)


def facts(name: str) -> dict:
    return json.loads((MODELS / name / "training.json").read_text())


@every_model
def test_a_tiny_model_loads_passes_the_self_check_and_says_what_it_is(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = load_model(name)
    assert check_model(model).ok
    assert {ffn.d_mlp for ffn in ffns(model)} == {MEMBERS[name].d_mlp}
    described = describe(model)
    assert described["name"] == name and described["dtype"] == "float32"
    assert "trained by ffnprobe on 12.6 million tokens" in described["note"]


@every_model
def test_it_predicts_held_out_text_better_than_a_bigram(name):
    found = facts(name)
    assert found["held_out_float16"] == pytest.approx(found["held_out"], abs=0.002)
    assert found["held_out_float16"] < found["bigram"] - 0.3 < found["unigram"] - 1


@every_model
def test_training_started_from_the_weights_of_its_seed(name):
    assert facts(name)["step_0_sha256"] == digest(MEMBERS[name].at_step_0(facts(name)["seed"]).state_dict())


@pytest.mark.slow
def test_its_held_out_loss_is_the_recorded_one():
    loss = training.held_out(plain(load_model("tiny-x4")), training.packed("heldout"))
    assert loss == pytest.approx(facts("tiny-x4")["held_out_float16"], abs=1e-4)


def test_the_family_is_small():
    assert sum(path.stat().st_size for path in MODELS.rglob("*") if path.is_file()) < 40e6


def test_fetch_says_where_a_tiny_model_is():
    assert fetch("tiny-x4") == MODELS / "tiny-x4"


def test_a_folder_of_that_name_wins(folder_of, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tiny-x4").symlink_to(folder_of("gpt2"))
    assert locate("tiny-x4") == (Path("tiny-x4"), None)


def test_what_is_missing_is_said_with_the_names_that_there_are(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "__file__", str(tmp_path / "ffnprobe/shipped.py"))
    said = r"tiny-x4 is not at .*data/models/tiny-x4: reinstall .* choose from smollm2-135m, tiny-x0\.5, tiny-x1, "
    with pytest.raises(InputError, match=said):
        load_model("tiny-x4")


@pytest.mark.parametrize("parent", ["ffnprobe/data/models", "data/models"])
def test_an_installed_package_and_a_checkout_are_both_searched(parent, tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "__file__", str(tmp_path / "ffnprobe/shipped.py"))
    (tmp_path / parent / "tiny-x4").mkdir(parents=True)
    assert fetch("tiny-x4") == tmp_path / parent / "tiny-x4"

import math
import runpy
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import ffnprobe
from ffnprobe import recall
from ffnprobe.analyzers import planted as module
from ffnprobe.analyzers.planted import ARMS, Facts, bits, expected_accuracy, expected_load, store
from ffnprobe.analyzers.recall import MARK, Recall, Row
from ffnprobe.errors import InputError

SOLVED = [name for name, arm in ARMS.items() if arm.solved]
SCRIPT = Path(__file__).parents[2] / "analyses/plot_recall.py"


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def planted(arm: str, facts: int, d_mlp: int, d_model: int = 32, seeds: int = 3, steps: int = 300):
    stored = Facts.random(seeds, facts, d_model, seeded(1))
    return stored, store(ARMS[arm], stored, d_mlp, steps, 0.03, seeded(2))


def unexplained(stored: Facts, written: torch.Tensor) -> float:
    return float((written - stored.targets).square().sum() / stored.targets.square().sum())


@pytest.fixture(scope="module")
def small() -> Recall:
    return recall(d_model=8, facts=[48, 96, 192], expansions=[0.5, 1.0, 3.0, 9.0], seeds=2, steps=60)


@pytest.mark.parametrize("arm", SOLVED)
@pytest.mark.parametrize("d_mlp", [128, 256])
def test_random_keys_leave_one_minus_width_over_facts(arm, d_mlp):
    assert unexplained(*planted(arm, 512, d_mlp)) == pytest.approx(1 - d_mlp / 512, rel=0.03)


@pytest.mark.parametrize("arm", SOLVED)
@pytest.mark.parametrize("d_mlp", [60, 75])
def test_as_many_neurons_as_facts_store_exactly(arm, d_mlp):
    stored, written = planted(arm, 60, d_mlp)
    assert unexplained(stored, written) < 1e-6
    assert stored.recalled(written).tolist() == [1, 1, 1]


def test_recall_of_a_random_projection_is_the_closed_form():
    stored = Facts.random(4, 1024, 16, seeded())
    for rank in (64, 256):
        basis = torch.linalg.qr(torch.randn(4, 1024, rank, generator=seeded(1))).Q
        found = stored.recalled(basis @ (basis.mT @ stored.targets)).mean()
        assert float(found) == pytest.approx(expected_accuracy(rank / 1024, 16), abs=0.025)


def test_of_two_answers_the_closed_form_is_the_error_function():
    margin = math.sqrt(0.3 * 2 / 0.7)
    assert expected_accuracy(0.3, 2) == pytest.approx((1 + math.erf(margin / 2)) / 2, abs=1e-9)
    assert expected_accuracy(expected_load(0.9, 7), 7) == pytest.approx(0.9)


def test_bits_are_the_capacity_of_a_symmetric_channel():
    joint = {True: 0.6, False: 0.4 / 4}  # 5 answers: the right one, and each wrong one
    brute = sum(p * math.log2(p * 5) for p in (joint[True], *[joint[False]] * 4))
    assert bits(0.6, 5) == pytest.approx(brute)
    assert bits(0.1, 5) == 0  # below chance nothing is proven


def test_recalled_is_a_slow_loop_over_facts():
    stored = Facts.random(2, 37, 5, seeded())
    written = torch.randn(2, 37, 5, generator=seeded(3))
    for seed in range(2):
        right = sum(
            max(range(5), key=lambda v: float(written[seed, i, v])) == int(stored.answers[seed, i])
            for i in range(37)
        )
        assert float(stored.recalled(written)[seed]) == pytest.approx(right / 37)


def test_every_answer_is_equally_frequent_and_in_another_place_for_every_seed():
    stored = Facts.random(2, 64, 16, seeded())
    assert all(torch.bincount(answers).tolist() == [4] * 16 for answers in stored.answers)
    assert not torch.equal(*stored.answers)


def test_permuting_the_neurons_changes_nothing(monkeypatch):
    start, order = module._start, torch.randperm(24, generator=seeded())
    stored, written = planted("least squares, GELU", 100, 24)
    monkeypatch.setattr(module, "_start", lambda *a: {k: w[:, order] for k, w in start(*a).items()})
    torch.testing.assert_close(store(ARMS["least squares, GELU"], stored, 24, 1, 0.03, seeded(2)), written)


def test_a_seed_is_trained_as_if_alone():
    both, written = planted("trained, gated", 400, 6, seeds=2, steps=7)
    weights = {name: w.clone() for name, w in _start("trained, gated", 2, 6).items()}
    for seed in range(2):
        alone = Facts(both.subjects[seed : seed + 1], both.answers[seed : seed + 1])
        own = {name: w[seed : seed + 1].clone() for name, w in weights.items()}
        torch.testing.assert_close(
            module._descend(ARMS["trained, gated"], alone, own, 7, 0.03)[0], written[seed], rtol=1e-3, atol=1e-4
        )


def _start(arm: str, seeds: int, d_mlp: int, d_model: int = 32):
    return module._start(ARMS[arm], seeds, d_model, d_mlp, seeded(2))


@pytest.mark.parametrize("arm", ["trained values", "trained", "trained, gated", "linear"])
def test_few_facts_are_all_recalled_once_trained(arm):
    stored, written = planted(arm, 40, 32)
    assert stored.recalled(written).tolist() == [1, 1, 1]
    assert float(stored.shuffled(seeded(5)).recalled(written).mean()) < 0.15


def test_shuffled_facts_are_at_chance(small):
    shuffled = [row.accuracy_shuffled for row in small.rows]
    assert sum(shuffled) / len(shuffled) == pytest.approx(1 / 8, abs=0.02)


def test_the_same_seed_gives_the_same_table_and_another_another():
    same = [recall(d_model=4, facts=[16], expansions=[2.0], seeds=2, steps=9, seed=s).rows for s in (3, 3, 4)]
    assert same[0] == same[1] != same[2]


def test_the_table_survives_the_disk_and_is_read(small, tmp_path):
    loaded = Recall.load(small.save(tmp_path / "t.parquet"))
    assert list(loaded.rows) == small.rows
    assert loaded.findings() == small.findings()
    assert {row.parameters for row in small.rows if row.arm == "linear"} == {64}
    assert {row.parameters / row.d_mlp for row in small.rows if row.arm == "trained, gated"} == {24}


def table(accuracy) -> Recall:
    """Every arm recalls accuracy(width, facts)."""
    rows = [
        Row(arm, 8, w, w / 8, f, 0, accuracy(w, f), None, 0.1, 0.1, None, None, 1, 0.0)
        for arm in MARK
        for f in (16, 32, 64)
        for w in (4, 8, 16, 32, 64)
    ]
    return Recall(rows, {})


def test_memory_that_is_linear_in_width_has_exponent_one():
    linear = table(lambda width, facts: min(1.0, width / facts))
    assert linear.needed("trained", 32) == pytest.approx(32 * 2**-0.2)  # 0.5 at 16, 1 at 32: 0.9 is 4/5 of the way
    assert linear.exponent("trained").b == pytest.approx(1)
    assert linear.verdicts()[0].verdict == "supported"


def test_memory_that_width_does_not_change_is_not_supported():
    flat = table(lambda width, facts: 0.5 + (width * 7 % 5) / 100)
    assert flat.needed("trained", 32) is None and flat.exponent("trained") is None
    assert flat.verdicts()[0].verdict == "not supported"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"facts": [8, 0]}, r"facts: got \[8, 0\], give at least 1"),
        ({"facts": []}, "facts: got"),
        ({"d_model": 1}, r"d_model: got \[1\], give at least 2"),
        ({"expansions": [1.0, -2.0]}, r"neurons: got \[16, -32\], give at least 1"),
        ({"expansions": [0.01]}, "neurons"),
        ({"seeds": 0}, "seeds"),
        ({"steps": 0}, "steps"),
    ],
)
def test_a_size_that_no_layer_has_is_said(given, said):
    with pytest.raises(InputError, match=said):
        recall(**given)


def test_the_script_draws_its_figure_and_saves_its_table(monkeypatch, tmp_path, sketched, capsys):
    tiny = partial(recall, d_model=4, facts=[8, 16], expansions=[1.0, 2.0], seeds=2, steps=5)
    monkeypatch.setattr(ffnprobe, "recall", tiny)
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--out", str(tmp_path)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert {path.name for path in tmp_path.iterdir()} == {
        f"recall-planted.{kind}" for kind in ("png", "svg", "parquet")
    }
    assert "chance 25.0%" in capsys.readouterr().out

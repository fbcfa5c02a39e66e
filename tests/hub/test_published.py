"""The published numbers, on the models that they were measured on: `pytest -m hub tests/hub`.

A model is taken from a folder in $FFNPROBE_HUB (as OWNER--NAME), from the Hugging Face cache, or from the hub.
Where a model's weights are on the hub as pickles only, its tests are skipped and say so. Every measure and every
assertion also runs on tiny models, in test_machinery.py. Tolerances are ours.
"""

import asserted
import published
import pytest

from ffnprobe import load_corpus, pack, svd_directions
from ffnprobe.models import tokenizer_of

pytestmark = pytest.mark.hub

SMALL, MEDIUM = "stanford-crfm/alias-gpt2-small-x21", "stanford-crfm/arwen-gpt2-medium-x21"


@pytest.mark.parametrize(
    ("name", "layer", "neuron", "numbers"),
    [
        (SMALL, 11, 3030, (1.339984, -0.001558, 2.000657, -0.129749, 9e-6, -0.134, 3.268)),
        (SMALL, 11, 2859, (0.507985, 0.215399, 2.273104, 0.016099, 4.9e-5, -0.042, 2.615)),
        (MEDIUM, 23, 945, (0.835114, 0.718998, 1.608204, -0.278377, 9e-6, -0.109, 3.604)),
    ],
)
def test_a1_an_entropy_neuron_reads_as_published(name, layer, neuron, numbers):
    """Gurnee et al. 2024, released notebook; folded."""
    names = ("w_in", "b_in", "w_out", "cos", "variance", "skew", "kurtosis")
    asserted.reads_as(published.published(name), layer, neuron, dict(zip(names, numbers, strict=True)))


@pytest.mark.parametrize(
    ("layer", "neuron", "numbers"),
    [
        (2, 1243, {"cos": -0.885803}),
        (1, 1366, {"cos": 0.833145}),
        (10, 2822, {"kurtosis": 110.13, "skew": -7.22}),
        (9, 632, {"kurtosis": 93.05, "skew": 5.89}),
    ],
)
def test_a1_extreme_neurons_read_as_published(layer, neuron, numbers):
    """Gurnee et al. 2024, released table; folded."""
    asserted.reads_as(published.published(SMALL), layer, neuron, numbers)


def test_a2_as_many_neurons_are_peaked_as_published():
    """Gurnee et al. 2024, released notebook; folded."""
    assert 1201 <= published.peaked(published.published(MEDIUM)) <= 1300


def test_a3_published_entropy_neurons_move_the_logits_least():
    """Stolfo et al. 2024, released code; folded."""
    asserted.are_quiet(published.published("gpt2"), [584, 2378, 2870, 2123, 1611, 2910])


def test_a4_the_first_position_writes_the_published_coordinates():
    """arXiv 2604.14722, released code; raw."""
    assert published.outliers(published.published("gpt2")) >= {138, 378, 447}


def test_a5_the_published_direction_of_gpt2():
    """Millidge & Black 2022, released data: layer 0, the first direction of W_out; raw."""
    row = svd_directions(published.published("gpt2"), layers=[0], readings=15).matrix("values")[0]
    asserted.speaks(row, 'the , a . - and in " to of The an ( I one'.split(), 12)  # noqa: SIM905


@pytest.fixture(scope="module")
def texts() -> list[str]:
    if not published.TEXTS.exists():
        pytest.skip(
            f"the three texts of NerVE's notebook are not here: put them into {published.TEXTS}, one a line"
        )
    return published.TEXTS.read_text().splitlines()


def test_a6_the_spectra_of_the_nerve_notebook(texts):
    """NerVE, executed notebook; raw, centred, every position in: 234 positions for 3,072 neurons."""
    layers = asserted.spectra_of(published.published("gpt2"), texts, 78, 4.024, 4.428, 24.4, 50.8)
    asserted.near(layers[2], {"entropy_post": (2.404, 0.01), "pr_post": (2.5, 0.05)})


@pytest.mark.parametrize(
    ("step", "ratio"), [(1, 62.4), (1000, 64.5), (10_000, 70.5), (50_000, 55.6), (100_000, 47.8), (143_000, 42.2)]
)
def test_a7_the_ranks_of_pythia_over_training(texts, step, ratio):
    """NerVE, executed notebook; raw."""
    model = published.published(f"EleutherAI/pythia-410m@step{step}")
    asserted.near(asserted.means(model, texts, 78), {"pr_post": (ratio, 0.01 * ratio)})


def test_a8_ten_neurons_hold_a_small_share_in_most_layers():
    """Geva et al. 2022, by notes."""
    model = published.published("gpt2")
    shares = published.top_share(model, pack(load_corpus(), tokenizer_of(model), tokens=4096))
    asserted.most_within(shares, 0.05, 0.2)


@pytest.mark.parametrize("name", ["gpt2", "EleutherAI/pythia-160m"])
def test_a9_some_layers_are_affine_and_some_are_not(name):
    """arXiv 2606.19379, abstract; a band over the two models."""
    model = published.published(name)
    asserted.spreads(published.affine_r2(model, pack(load_corpus(), tokenizer_of(model))), 0.3, 0.99)

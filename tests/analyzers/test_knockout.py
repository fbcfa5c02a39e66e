"""A set of neurons is set to its means, and random sets are what they are called."""

import pytest
import torch

from ffnprobe import knockout, load_corpus, load_model, pack, tokenizer_of
from ffnprobe.analyzers.knockout import Knockout, _drawn, strongest_and_weakest
from ffnprobe.attribution import first_order
from ffnprobe.errors import InputError, ModelRefused
from ffnprobe.intervene import Change, losses
from ffnprobe.models import ffns, plain, taps
from ffnprobe.stream import capture

HALF = {"held_out": 128, "draws": 2}


@pytest.fixture(scope="module")
def trained():
    """Trained, so that its loss depends on its neurons; and real text."""
    model = load_model("tiny-x0.5")
    return model, pack(load_corpus(), tokenizer_of(model), tokens=1024, length=128)


def test_the_prediction_is_what_a_small_step_to_the_mean_does(trained):
    model, text = trained
    sets = {"two": {1: [0, 63]}, "many": {0: range(40), 2: [5, 60]}}
    small, large = (knockout(model, text, sets, held_out=256, draws=2, scale=scale).rows for scale in (0.01, 0.02))
    for one, other in zip(small, large, strict=True):
        predicted, slopes = one.predicted / 0.01, (one.delta / 0.01, other.delta / 0.02)
        assert other.predicted == pytest.approx(2 * one.predicted)
        # the loss bends: what two steps miss is twice what one misses
        assert 2 * slopes[0] - slopes[1] == pytest.approx(predicted, rel=0.05), one.name
    assert small[0].delta == pytest.approx(small[0].predicted, rel=0.02)


def test_first_order_is_the_slope_of_a_single_neuron(trained):
    model, text = trained
    text, step, layer, neuron = text.sequences(slice(2)), 1e-2, 1, 7
    means = {layer: torch.zeros(ffns(model)[layer].d_mlp)}
    predicted = first_order(model, text, means)[layer][neuron]

    def shrink(sign):
        def to(read):
            scale = torch.ones(read["post"].shape[1])
            scale[neuron] += sign * step
            return read["post"] * scale

        return to

    arms = {name: [Change(layer, "post", shrink(sign))] for name, sign in (("up", 1), ("down", -1))}
    found = losses(model, text, arms)
    # towards a mean of 0 is down
    slope = (found.delta("down")[0] - found.delta("up")[0]) / (2 * step)
    assert slope == pytest.approx(float(predicted), rel=0.02)


def test_a_set_is_set_to_its_mean_and_the_rest_is_not(model_of, tokens):
    model, text = model_of("gpt2"), tokens(model_of("gpt2"), sequences=4)
    (row,) = knockout(model, text, {"a": {1: [3, 4]}}, **HALF).rows
    hidden = [batch[1].sites["post"][batch[1].kept] for batch in capture(model, text, layers=[1])]
    mean = torch.cat(hidden)[:, [3, 4]].double().mean(0).float()
    test = text.sequences(slice(2, None))

    def cut(module, args):
        h = args[0].clone()
        h[~test.special] = h[~test.special].index_copy(1, torch.tensor([3, 4]), mean.expand(120, 2))
        return (h,)

    def loss() -> torch.Tensor:
        with torch.no_grad():
            logp = plain(model)(input_ids=test.ids).logits[:, :-1].log_softmax(-1)
        picked = logp.gather(2, test.ids[:, 1:, None])[..., 0]
        same = (test.document[:, 1:] == test.document[:, :-1]) & ~test.special[:, 1:]
        return -picked[same].mean()

    before = loss()
    handle = taps(model)[1].down.register_forward_pre_hook(cut)
    after = loss()
    handle.remove()
    assert row.loss == pytest.approx(float(before), rel=1e-5)
    assert row.delta == pytest.approx(float(after - before), abs=2e-6)
    assert (row.neurons, row.layers) == (2, [1])


def test_random_sets_are_of_others_and_of_one_size_or_one_norm():
    generator = torch.Generator().manual_seed(0)
    power = torch.rand(400, generator=generator).double() ** 4
    some = power.argsort()[-20:]
    sizes, norms = (_drawn(kind, some, power, generator) for kind in ("same_size", "same_norm"))
    for drawn in (sizes, norms):
        assert len(drawn.unique()) == len(drawn) and not torch.isin(drawn, some).any()
    assert len(sizes) == 20
    assert float(power[norms].sum()) == pytest.approx(float(power[some].sum()), rel=0.1)
    assert len(norms) > 2 * len(some)
    nearly_all = torch.arange(390)
    assert len(_drawn("same_size", nearly_all, power, generator)) == 10  # there are no more


def test_the_default_sets_are_the_strongest_and_the_weakest():
    power = {3: torch.arange(40).double()}
    strongest, weakest = strongest_and_weakest(power).values()
    assert strongest[3].tolist() == [38, 39] and sorted(weakest[3].tolist()) == list(range(20))


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_the_table_is_whole_and_round_trips(model_of, tokens, architecture, tmp_path):
    result = knockout(model_of(architecture), tokens(model_of(architecture), sequences=4), layers=[1, 2], **HALF)
    again = Knockout.load(result.save(tmp_path / "t.parquet"))
    assert again.findings() == result.findings() and len(again.rows) == 2
    for row in result.rows:
        assert row.layers == [1, 2] and row.same_norm_neurons > 0 and 0 < row.share < 1


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        ({"a": {}}, "set 'a' has no neuron"),
        ({"a": {9: [0]}}, "layer 9 is not there"),
        ({"a": {1: [2, 36]}}, r"layer 1 has neurons 0 to 35, got \[36\]"),
        ({"a": {1: [-1]}}, r"got \[-1\]"),
    ],
)
def test_a_set_that_is_not_there_is_said(gpt2, tokens, sets, said):
    with pytest.raises(InputError, match=said):
        knockout(gpt2, tokens(gpt2), sets, **HALF)


@pytest.mark.parametrize(
    ("wrong", "said"), [({"draws": 1}, "got 1 draws"), ({"held_out": 512}, "cannot hold 512")]
)
def test_too_little_is_said(gpt2, tokens, wrong, said):
    with pytest.raises(InputError, match=said):
        knockout(gpt2, tokens(gpt2), **(HALF | wrong))


def test_a_model_that_predicts_no_next_token_is_refused(model_of, tokens):
    with pytest.raises(ModelRefused, match="predicts no next token"):
        knockout(model_of("bert"), tokens(model_of("bert")))

"""A feed-forward layer is a sum of memories."""

from dataclasses import replace

import pytest
import torch

from ffnprobe.ffn import ACTIVATIONS, FFN, Folding
from ffnprobe.models import ffns


def random_ffn(activation: str = "gelu", gated: bool = False, d_model: int = 4, d_mlp: int = 7) -> FFN:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return FFN(
        layer=3,
        keys=draw(d_mlp, d_model),
        values=draw(d_mlp, d_model),
        activation=activation,
        gates=draw(d_mlp, d_model) if gated else None,
        key_bias=draw(d_mlp),
        gate_bias=draw(d_mlp) if gated else None,
        bias=draw(d_model),
    )


@pytest.fixture(params=["plain", "gated"])
def ffn(request: pytest.FixtureRequest) -> FFN:
    return random_ffn(gated=request.param == "gated")


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_one_neuron_by_hand():
    one = {"keys": torch.tensor([[1.0, 2.0]]), "values": torch.tensor([[3.0, -1.0]]), "activation": "relu"}
    plain = FFN(layer=0, **one, key_bias=torch.tensor([-1.0]), bias=torch.tensor([0.5, 0.0]))
    assert plain.write(plain.hidden(torch.tensor([1.0, 1.0]))).tolist() == [2 * 3 + 0.5, -2.0]
    gated = FFN(layer=0, **one, gates=torch.tensor([[0.0, 2.0]]))
    assert gated.hidden(torch.tensor([1.0, 1.0])).tolist() == [2 * 3]
    assert gated.hidden(torch.tensor([1.0, -1.0])).tolist() == [0]
    assert gated.pre(torch.tensor([1.0, 1.0])).tolist() == [2], "a gated layer's z is the gate's"


def test_sizes_come_from_the_matrices(ffn: FFN):
    assert (ffn.d_model, ffn.d_mlp, ffn.expansion) == (4, 7, 7 / 4)


def test_the_output_is_the_sum_of_its_memories(ffn: FFN, x: torch.Tensor):
    h = ffn.hidden(x)
    assert ffn.bias is not None
    slow = ffn.bias.expand_as(x).clone()
    for i in range(ffn.d_mlp):
        slow += h[..., i, None] * ffn.values[i]
    torch.testing.assert_close(ffn.write(h), slow)


def test_neurons_have_no_order(ffn: FFN, x: torch.Tensor):
    order = torch.randperm(ffn.d_mlp, generator=torch.Generator().manual_seed(2))
    rows = ("keys", "values", "gates", "key_bias", "gate_bias")
    permuted = replace(ffn, **{name: getattr(ffn, name)[order] for name in rows if getattr(ffn, name) is not None})
    torch.testing.assert_close(permuted.write(permuted.hidden(x)), ffn.write(ffn.hidden(x)))
    torch.testing.assert_close(permuted.hidden(x), ffn.hidden(x)[..., order])


def test_a_gated_neuron_is_free_in_sign_and_scale(x: torch.Tensor):
    ffn = random_ffn(gated=True)
    a = torch.linspace(-3, 2.5, 7, dtype=torch.float64)
    assert ffn.key_bias is not None
    keys, key_bias, values = ffn.keys * a[:, None], ffn.key_bias * a, ffn.values / a[:, None]
    other = replace(ffn, keys=keys, key_bias=key_bias, values=values)
    torch.testing.assert_close(other.write(other.hidden(x)), ffn.write(ffn.hidden(x)))


def test_no_two_activations_are_the_same_on_the_grid_that_detects_them():
    z = torch.linspace(-12, 12, 500)
    names = list(ACTIVATIONS)
    for i, first in enumerate(names):
        for second in names[:i]:
            assert (ACTIVATIONS[first](z) - ACTIVATIONS[second](z)).abs().max() > 4e-4, (first, second)


def test_canonical_is_the_same_function_whatever_the_scale_and_sign_of_its_neurons(llama):
    ffn = ffns(llama)[1]
    a = torch.linspace(-3, 3, ffn.d_mlp)  # both signs, none zero
    turned = replace(ffn, keys=ffn.keys * a[:, None], values=ffn.values / a[:, None])
    x = torch.randn(5, ffn.d_model, generator=torch.Generator().manual_seed(0))
    for layer in (ffn, turned):
        one = layer.canonical()
        torch.testing.assert_close(one.write(one.hidden(x)), ffn.write(ffn.hidden(x)), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(one.keys, ffn.canonical().keys, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one.values.norm(dim=1), torch.ones(ffn.d_mlp))


def test_weighing_makes_hidden_activations_those_of_canonical(ffn: FFN, x: torch.Tensor):
    torch.testing.assert_close(ffn.weighing(ffn.hidden(x)), ffn.canonical().hidden(x))


def test_canonical_leaves_a_plain_layer_alone(gpt2):
    ffn = ffns(gpt2)[0]
    assert ffn.canonical() is ffn


@pytest.mark.parametrize("centres", [True, False])
def test_folding_takes_the_norms_around_into_the_weights(ffn: FFN, x: torch.Tensor, centres: bool):
    draw = torch.randn(3, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    gain, bias, behind = draw[0], draw[1], draw[2]
    folded = ffn.folded(Folding(gain, bias, centres, behind))
    x = x - x.mean(-1, keepdim=True) if centres else x
    h = ffn.hidden(x * gain + bias)
    torch.testing.assert_close(folded.hidden(x), h)
    y = ffn.write(h) * behind
    torch.testing.assert_close(folded.write(h), y - y.mean(-1, keepdim=True) if centres else y)


def test_folding_leaves_the_layer_itself_alone(ffn: FFN):
    before = ffn.keys.clone(), ffn.values.clone()
    bare = Folding(torch.full((4,), 2.0), torch.zeros(4), centres=False)
    assert torch.equal(ffn.folded(bare).keys, 2 * before[0])
    assert torch.equal(ffn.keys, before[0]) and torch.equal(ffn.values, before[1])
    assert replace(ffn, key_bias=None).folded(bare).key_bias is None, "no norm bias, so none appears"

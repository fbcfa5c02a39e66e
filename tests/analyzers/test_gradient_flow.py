from dataclasses import replace

import pytest
import torch

from ffnprobe import gradient_flow
from ffnprobe import spectrum as sp
from ffnprobe.analyzers.gradient_flow import GradientFlow, jacobian_numbers
from ffnprobe.analyzers.gradient_passage import gradient_norms
from ffnprobe.analyzers.jacobian import (
    Exact,
    backward_product,
    forward_product,
    hutchinson,
    jacobian,
    slopes,
)
from ffnprobe.errors import InputError
from ffnprobe.ffn import ACTIVATIONS, FFN
from ffnprobe.intervene import next_token_losses, predictable
from ffnprobe.models import ffns, plain


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_layer(d: int, d_mlp: int, activation: str, gated: bool = False, biased: bool = True) -> FFN:
    """Weights whose pre-activations are standard normal on standard normal x."""
    names = ("keys", "values", *(["gates"] if gated else []))
    parts = {name: gaussian(d_mlp, d, seed=i) / d**0.5 for i, name in enumerate(names, start=1)}
    biases = ("key_bias", *(["gate_bias"] if gated else []))
    parts |= {name: gaussian(d_mlp, seed=i) for i, name in enumerate(biases, start=5)} if biased else {}
    return FFN(0, activation=activation, bias=gaussian(d, seed=9), **parts)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu_tanh", "silu", "relu2", "identity"])
def test_the_jacobian_is_that_of_finite_differences(activation, gated):
    ffn, x, step = random_layer(7, 20, activation, gated), gaussian(7, seed=33), 1e-5

    def f(x):
        return ffn.write(ffn.hidden(x))

    found = torch.stack([(f(x + step * e) - f(x - step * e)) / (2 * step) for e in torch.eye(7).double()], dim=1)
    assert torch.allclose(jacobian(ffn, x), found, atol=1e-4)
    w = gaussian(7, 3, seed=8)
    assert torch.allclose(forward_product(ffn, slopes(ffn, x), w), jacobian(ffn, x) @ w)
    assert torch.allclose(backward_product(ffn, slopes(ffn, x), w), jacobian(ffn, x).T @ w)


def test_beside_the_residual_path_a_linear_layer_is_exactly_i_plus_j():
    ffn = random_layer(6, 11, "identity")
    J = ffn.values.T @ ffn.keys
    spectrum = Exact(jacobian(ffn, gaussian(6)))
    assert torch.allclose(spectrum.singular, torch.linalg.svdvals(J))
    assert spectrum.condition == pytest.approx(float(torch.linalg.cond(torch.eye(6).double() + J)))
    assert spectrum.rank == pytest.approx(sp.participation_ratio(torch.linalg.svdvals(J) ** 2))
    # keys that write what they read: J = -I/2, and nothing else is left of I + J
    undo = FFN(0, torch.eye(4).double(), -torch.eye(4).double() / 2, "identity")
    undone = Exact(jacobian(undo, gaussian(4)))
    assert undone.condition == pytest.approx(1) and undone.rank == pytest.approx(4)
    # next to nothing is left in one direction: the square of its share would be lost
    turned = torch.linalg.qr(gaussian(3, 3)).Q
    nearly = Exact(turned @ torch.diag(torch.tensor([1e-10 - 1, 0, 0], dtype=torch.float64)) @ turned.T)
    assert nearly.condition == pytest.approx(1e10, rel=1e-4)


@pytest.mark.parametrize("gated", [False, True])
def test_random_vectors_agree_with_the_jacobian_itself(gated):
    ffn, x = random_layer(40, 90, "silu", gated), gaussian(3, 40, seed=33)
    for token in x:
        one = Exact(jacobian(ffn, token))
        closely = hutchinson(ffn, token, 1500, torch.Generator().manual_seed(0))
        assert closely == pytest.approx((one.rank, one.gain), rel=0.05)
    few = [hutchinson(ffn, token, 64, torch.Generator().manual_seed(seed))[0] for seed in range(40)]
    assert sum(few) / 40 == pytest.approx(one.rank, rel=0.03)
    one, other = jacobian_numbers(ffn, x, 0), jacobian_numbers(ffn, x, 0, most=39)
    assert other["rank"] == pytest.approx(one["rank"], rel=0.1) and other["condition"] is None
    assert other["rank_null"] == pytest.approx(one["rank_null"], rel=0.1) and other["singular_values"] == []
    assert (other["gain"], other["gain_null"]) == pytest.approx((one["gain"], one["gain_null"]), rel=0.1)


def test_the_factor_of_an_activation_is_the_published_one():
    def k(activation):
        return 1 / sp.random_jacobian_rank(1.0, ACTIVATIONS[activation]) - 2

    assert [k("identity"), k("relu"), k("gelu")] == pytest.approx([1, 2, 2.1], abs=0.03)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ["identity", "relu", "gelu", "silu"])
@pytest.mark.parametrize("r", [0.5, 4.0])
def test_gaussian_weights_have_the_rank_of_the_closed_form(r, activation, gated):
    d = 256
    ffn, x = random_layer(d, int(r * d), activation, gated, biased=False), gaussian(2, d, seed=33)
    x *= d**0.5 / x.norm(dim=1, keepdim=True)
    found = sum(_rank(jacobian(ffn, token)) for token in x) / 2 / d
    assert found == pytest.approx(sp.random_jacobian_rank(r, ACTIVATIONS[activation], gated), rel=0.05)


def _rank(J: torch.Tensor) -> float:
    M = J @ J.T
    return float(M.trace() ** 2 / M.square().sum())


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request, model_of):
    return model_of(request.param)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma2"])
def test_a_layer_put_in_its_own_place_passes_what_it_passed(architecture, model_of, tokens):
    model = model_of(architecture)
    text = tokens(model, sequences=2)
    for passed in gradient_norms(model, text, {ffn.layer: ffn for ffn in ffns(model)}).values():
        assert passed.random.tolist() == pytest.approx(passed.on.tolist(), rel=1e-4)
        assert passed.off.tolist() != pytest.approx(passed.on.tolist(), rel=1e-4)
        assert len(passed.on) == 2


def test_gradients_are_those_of_the_loss_over_ordinary_tokens(gpt2, tokens):
    text = tokens(gpt2, sequences=2)
    passed = gradient_norms(gpt2, text, {0: ffns(gpt2)[0], 2: ffns(gpt2)[2]})
    for i, ids in enumerate(text.ids):
        # positions are added to the embeddings, so this is the gradient at the first block's input
        embedded = plain(gpt2).get_input_embeddings()(ids[None]).detach().requires_grad_()
        each = next_token_losses(plain(gpt2)(inputs_embeds=embedded, use_cache=False).logits, ids[None])
        (found,) = torch.autograd.grad(each[predictable(text)[i : i + 1]].mean(), embedded)
        ordinary = found[0][~text.special[i]]
        assert float(passed[0].on[i]) == pytest.approx(float(ordinary.norm()), rel=1e-4)
        assert float(ordinary.norm()) != pytest.approx(float(found.norm()), rel=1e-3)
    # a middle block is left out here, so what is behind the first is no input that was asked for
    assert passed[0].behind.tolist() != passed[2].on.tolist()


def test_a_layer_that_writes_nothing_passes_the_same_on_and_off(planted, tokens):
    def silence(hf):
        for block in hf.transformer.h[1:]:
            block.mlp.c_proj.weight.zero_()

    model = planted("gpt2", silence)
    rows = gradient_flow(model, tokens(model, sequences=2), gradient_tokens=128, sampled=2).rows
    assert [row.passed == pytest.approx(row.passed_off, rel=1e-6) for row in rows] == [False, True, True]
    assert rows[1].more == pytest.approx(0, abs=1e-6) and rows[1].gain == 0
    assert rows[1].rank == 0 and rows[1].condition == pytest.approx(1)


def test_every_row_is_that_of_the_sampled_tokens(model, tokens, tmp_path):
    found = gradient_flow(model, tokens(model), layers=[1], sampled=4, gradient_tokens=0)
    (row,) = found.rows
    assert row.tokens == 4 and row.sequences == 0 and row.passed is None
    assert len(row.singular_values) == 17 and row.singular_values == sorted(row.singular_values)
    assert 0 < row.rank < 1 and row.condition >= 1
    assert GradientFlow.load(found.save(tmp_path / "t.parquet")).rows == tuple(found.rows)
    assert found.plot() and len(found.findings()) == 2


def test_the_verdict_follows_its_rule():
    numbers = {name: 1.0 for name in GradientFlow.row_type.__dataclass_fields__}
    numbers |= {"tokens": 2, "sequences": 4, "singular_values": [], "more": 0.3, "more_se": 0.1, "passed": 1.3}
    row = GradientFlow.row_type(**numbers | {"layer": 0})

    def verdict(**changed):
        rows = [replace(row, layer=layer, **changed) for layer in range(6)]
        return GradientFlow(rows, {}).verdicts()[0].verdict

    assert verdict() == "supported"
    assert verdict(passed_null=1.4) == "mixed"
    assert verdict(more=0.19) == verdict(more=-0.5) == "not supported"
    assert GradientFlow([row] * 4, {}).verdicts() == []
    assert GradientFlow([replace(row, sequences=0)] * 9, {}).verdicts() == []


def test_no_loss_and_wrong_numbers_are_said(model_of, tokens):
    bert = model_of("bert")
    (row,) = gradient_flow(bert, tokens(bert), layers=[0], sampled=2).rows
    assert row.sequences == 0 and row.more is None and row.rank > 0
    gpt2 = model_of("gpt2")
    with pytest.raises(InputError, match="sampled=0"):
        gradient_flow(gpt2, tokens(gpt2), sampled=0)
    with pytest.raises(InputError, match="layer 99"):
        gradient_flow(gpt2, tokens(gpt2), layers=[99])

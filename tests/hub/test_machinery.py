"""What the tests of the published numbers measure and assert, on tiny models and beside a slow count of each."""

from pathlib import Path

import asserted
import published
import pytest
import torch
from torch.nn import functional as F

from ffnprobe import svd_directions
from ffnprobe.models import plain, tokenizer_of

TEXTS = ["The cat sat on the mat.", "A golden spike was driven through the last tie.", "In 1869"]


def by_hand(model, layer: int, neuron: int) -> dict[str, float]:
    """A GPT-2's neuron, folded from the raw state: no function of ffnprobe."""
    state = {name: tensor.double() for name, tensor in plain(model).state_dict().items()}
    at = f"transformer.h.{layer}."
    gain, shift = state[at + "ln_2.weight"], state[at + "ln_2.bias"]
    raw, value = state[at + "mlp.c_fc.weight"][:, neuron], state[at + "mlp.c_proj.weight"][neuron]
    key, value = raw * gain - (raw * gain).mean(), value - value.mean()
    u = state["lm_head.weight"] * state["transformer.ln_f.weight"]
    u = u - u.mean(1, keepdim=True)
    cosine = F.cosine_similarity(u - u.mean(0), value[None])
    z = (cosine - cosine.mean()) / cosine.std(correction=0)
    return {
        "w_in": float(key.norm()),
        "b_in": float(state[at + "mlp.c_fc.bias"][neuron] + raw @ shift),
        "w_out": float(value.norm()),
        "cos": float(F.cosine_similarity(key, value, dim=0)),
        "variance": float(cosine.var(correction=0)),
        "skew": float(z.pow(3).mean()),
        "kurtosis": float(z.pow(4).mean()),
    }


def hooked(model, tokens, name: str) -> list[torch.Tensor]:
    """By layer, all that enters (in) or leaves (out) a module of every GPT-2 block, from plain hooks."""
    module, side = name.split("/")
    hf, seen = plain(model), []
    handles = [
        block.mlp.get_submodule(module).register_forward_hook(
            lambda m, args, out: seen.append((args[0] if side == "in" else out).flatten(0, 1).double())
        )
        for block in hf.transformer.h
    ]
    with torch.no_grad():
        hf(tokens.ids)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize(("layer", "neuron"), [(0, 3), (2, 17)])
def test_a1_a_neuron_reads_as_by_hand(gpt2, layer, neuron):
    numbers = by_hand(gpt2, layer, neuron)
    asserted.reads_as(gpt2, layer, neuron, numbers)
    for name in numbers:
        with pytest.raises(AssertionError):
            asserted.reads_as(gpt2, layer, neuron, {**numbers, name: 1.02 * numbers[name] + 0.01})


def test_a2_peaked_neurons_are_counted(gpt2):
    kurtosis = [by_hand(gpt2, layer, neuron)["kurtosis"] for layer in range(3) for neuron in range(36)]
    middle = sorted(kurtosis)[60] + 1e-4
    assert published.peaked(gpt2, middle) == sum(k > middle for k in kurtosis) == 47


def test_a3_a_value_without_logits_is_quiet_and_others_are_not(planted, gpt2):
    state = {name: tensor.double() for name, tensor in plain(gpt2).state_dict().items()}
    u = state["lm_head.weight"] * state["transformer.ln_f.weight"]
    u = u - u.mean(1, keepdim=True)
    cov = torch.cov(u.T) + 1e3 * torch.ones(12, 12)  # the all-ones direction is not meant
    least = torch.linalg.eigh(cov).eigenvectors[:, 0].float()

    def plant(hf):
        hf.transformer.h[2].mlp.c_proj.weight[30] = 5 * least + 1

    model = planted("gpt2", plant)
    asserted.are_quiet(model, [30])
    with pytest.raises(AssertionError):
        asserted.are_quiet(model, [30, 3])


def test_a4_outlying_coordinates_are_those_of_the_blocks_own_modules(gpt2):
    hf = plain(gpt2)
    with torch.no_grad():
        position = hf.transformer.wpe.weight[0]
        size = (position + hf.transformer.h[0].mlp(position)).abs()
    for sds in (0.5, 1.5):
        expected = {i for i in range(12) if size[i] > size.mean() + sds * size.std()}
        assert published.outliers(gpt2, sds) == expected and expected


def test_a5_a_direction_speaks_its_own_tokens_only(gpt2):
    row = svd_directions(gpt2, layers=[0], readings=15).matrix("values")[0]
    asserted.speaks(row, [token.strip() for token in row.shorter[:12]], 8)
    with pytest.raises(AssertionError):
        asserted.speaks(row, ["no such token"], 1)


def test_a6_a7_spectra_are_those_of_torchs_covariance_of_every_position(gpt2):
    tokens = published.padded(gpt2, TEXTS, 20)
    end = tokenizer_of(gpt2).eos_token_id
    assert tokens.ids.shape == (3, 20) and (tokens.ids[2, -5:] == end).all()
    numbers = []
    for site in ("c_fc/out", "c_proj/in"):
        values = [torch.linalg.eigvalsh(torch.cov(h.T)).clamp(min=0) for h in hooked(gpt2, tokens, site)]
        shares = [v / v.sum() for v in values]
        numbers.append([float(-torch.xlogy(p, p).sum()) for p in shares])
        numbers.append([float(1 / p.square().sum()) for p in shares])
    entropy_pre, pr_pre, entropy_post, pr_post = numbers
    expected = [sum(some) / 3 for some in (entropy_pre, entropy_post, pr_pre, pr_post)]
    layers = asserted.spectra_of(gpt2, TEXTS, 20, *expected)
    asserted.near(layers[2], {"entropy_post": (entropy_post[2], 1e-5), "pr_post": (pr_post[2], 1e-4)})
    asserted.near(asserted.means(gpt2, TEXTS, 20), {"pr_post": (expected[3], 1e-4)})
    with pytest.raises(AssertionError):
        asserted.spectra_of(gpt2, TEXTS, 20, *(1.02 * number for number in expected))


def test_a8_the_share_of_the_largest_contributions(gpt2, tokens):
    text = tokens(gpt2)
    state = plain(gpt2).state_dict()
    expected = []
    for layer, h in enumerate(hooked(gpt2, text, "c_proj/in")):
        size = h[~text.special.flatten()].abs() * state[f"transformer.h.{layer}.mlp.c_proj.weight"].norm(dim=1)
        expected.append(float((size.sort(1).values[:, -10:].sum(1) / size.sum(1)).mean()))
    shares = published.top_share(gpt2, text)
    assert shares == pytest.approx(expected, rel=1e-3)  # no token here is a sink
    asserted.most_within(shares, min(shares), max(shares))
    with pytest.raises(AssertionError):
        asserted.most_within(shares, 0, min(shares) / 2)


def test_a9_an_affine_layer_is_affine_and_a_random_one_is_not(planted, tokens):
    def plant(hf):
        hf.transformer.h[1].mlp.c_fc.weight *= 1e-3  # near 0, GELU is linear
        hf.transformer.h[1].mlp.c_fc.bias.zero_()

    model = planted("gpt2", plant)
    text = tokens(model)
    found = published.affine_r2(model, text)
    assert found[1] > 0.999 and max(found[0], found[2]) < 0.95
    even = text.document.flatten() % 2 == 0
    for layer, (x, y) in enumerate(
        zip(hooked(model, text, "c_fc/in"), hooked(model, text, "c_proj/out"), strict=True)
    ):
        x = torch.cat([x, torch.ones(len(x), 1).double()], dim=1)
        # what a LayerNorm gives lies in a plane, but for float32's rounding
        fit = x[even] @ torch.linalg.lstsq(x[~even], y[~even], rcond=1e-5, driver="gelsd").solution
        left = (y[even] - fit).square().sum() / (y[even] - y[even].mean(0)).square().sum()
        assert found[layer] == pytest.approx(float(1 - left), abs=1e-4)
    asserted.spreads(found, 0.95, 0.999)
    with pytest.raises(AssertionError):
        asserted.spreads(found, 0, 0.5)


def test_a_model_is_taken_from_a_folder_and_its_absence_is_said(folder_of, tmp_path, monkeypatch):
    (tmp_path / "owner--tiny").symlink_to(folder_of("gpt2"))
    monkeypatch.setenv(published.FOLDERS, str(tmp_path))
    assert published.published("owner/tiny").cfg.d_model == 12

    def offline(name: str, say) -> Path:
        raise published.MachineError(f"the hub cannot be reached and {name} is not cached here")

    monkeypatch.setattr("ffnprobe.models.locate", offline)
    with pytest.raises(
        pytest.skip.Exception, match="owner/other: the hub cannot be reached and owner/other is not"
    ):
        published.published("owner/other")

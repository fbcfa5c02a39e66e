import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ffnprobe import svd_directions
from ffnprobe.analyzers.memories import word
from ffnprobe.analyzers.svd_directions import (
    GAP,
    SVDDirections,
    gaps,
    overlap,
    random_overlap,
    read_directions,
    singular,
)
from ffnprobe.errors import InputError
from ffnprobe.models import ffns, tokenizer_of
from ffnprobe.unembedding import unembedding


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.integers(1, 9), st.integers(1, 9))
def test_singular_directions_are_those_of_the_svd(n, d):
    rows = gaussian(n, d, seed=10 * n + d)
    found, reference = singular(rows), torch.linalg.svd(rows, full_matrices=False)
    assert found.values == pytest.approx(reference.S, rel=1e-6)
    assert torch.allclose((found.directions * reference.Vh).sum(1).abs(), torch.ones(min(n, d)).double())


@given(st.lists(st.floats(0.5, 2), min_size=1, max_size=6))
def test_the_gap_is_to_the_nearer_neighbour(ratios):
    values = torch.tensor(sorted(ratios, reverse=True))
    for i, gap in enumerate(gaps(values).tolist()):
        others = [float(max(values[i] / v, v / values[i])) for j, v in enumerate(values) if j != i]
        assert gap == pytest.approx(min(others, default=math.inf))


def test_directions_of_rounding_have_no_gap():
    assert gaps(torch.tensor([1.0, 1e-8, 1e-9, 0.0])).tolist() == [pytest.approx(1e8), 1, 1, 1]


@pytest.mark.parametrize(("k", "d"), [(1, 5), (3, 7), (6, 12), (7, 7)])
def test_random_spaces_overlap_as_the_closed_form_says(k, d):
    draws = [torch.linalg.qr(gaussian(2, d, k, seed=seed)).Q.mT for seed in range(4000)]
    found = torch.tensor([overlap(*pair) for pair in draws])
    mean, sd = random_overlap(k, d)
    assert float(found.mean()) == pytest.approx(mean, abs=4 * sd / 4000**0.5 + 1e-6)
    assert float(found.std()) == pytest.approx(sd, rel=0.06, abs=1e-6)


@pytest.mark.parametrize("d", [4, 16])
def test_the_kurtosis_of_tokens_on_a_sphere_and_of_gaussian_ones(d):
    tokens = gaussian(100_000, d).float()
    sphere = tokens / tokens.norm(dim=1, keepdim=True)
    for vocabulary, closed in ((tokens, 3), (sphere, 3 * d / (d + 2))):
        found = [reading.kurtosis for reading in read_directions(gaussian(8, d, seed=1), vocabulary, 1)]
        assert found == pytest.approx([closed] * 8, rel=0.05)


def test_a_reading_is_its_slow_loop_whatever_is_held_at_once():
    vocabulary, directions = gaussian(300, 12).exp().float(), gaussian(7, 12, seed=1).float()
    whole, pieces = (list(read_directions(directions, vocabulary, 4, held=held)) for held in (2**26, 1))
    for direction, reading, piece in zip(directions, whole, pieces, strict=True):
        logits = vocabulary.double() @ direction.double()
        z = (logits - logits.mean()) / logits.std(correction=0)
        order = (z * z.pow(3).mean().sign()).argsort(descending=True)
        assert reading.kurtosis == pytest.approx(float(z.pow(4).mean()), rel=1e-4)
        assert reading.longer.tolist() == order[:4].tolist()
        assert reading.shorter.tolist() == order.flip(0)[:4].tolist()
        assert piece.kurtosis == pytest.approx(reading.kurtosis, rel=1e-5)
        assert torch.equal(piece.longer, reading.longer) and torch.equal(piece.shorter, reading.shorter)


@pytest.mark.parametrize("view", ["raw", "folded"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_every_row_is_that_of_the_canonical_matrix(architecture, view, model_of, tmp_path):
    model = model_of(architecture)
    found = svd_directions(model, layers=[1], directions=5, readings=3, view=view)
    ffn, vocabulary = ffns(model)[1].canonical(), unembedding(model, view).double()
    words = [word(tokenizer_of(model), i) for i in range(len(vocabulary))]
    parts = {"keys": ffn.keys, "values": ffn.values} | ({"gates": ffn.gates} if ffn.gated else {})
    leading = {name: torch.linalg.svd(part.double()).Vh[:5] for name, part in parts.items()}
    assert {row.matrix for row in found.rows} == parts.keys() and len(found.rows) == 5 * len(parts)
    for row in found.rows:
        strengths = torch.linalg.svdvals(parts[row.matrix].double())
        assert row.singular_value == pytest.approx(float(strengths[row.direction]), rel=1e-6)
        assert row.share == pytest.approx(float(strengths[row.direction] ** 2 / strengths.square().sum()))
        partner = leading["keys" if row.matrix == "values" else "values"]
        cosines = torch.linalg.svdvals(leading[row.matrix] @ partner.T)
        assert row.overlap == pytest.approx(float(cosines.square().mean()))
        assert (row.kurtosis is None) == (row.longer == []) == (row.gap <= GAP)
        if row.kurtosis is not None:
            logits = vocabulary @ leading[row.matrix][row.direction]
            ends = [[words[i] for i in logits.topk(3, largest=largest).indices] for largest in (True, False)]
            assert [row.longer, row.shorter] in (ends, ends[::-1])
    assert found.settings["vocabulary"] == view and f"vocabulary {view}" in found.plot()._supxlabel.get_text()
    assert SVDDirections.load(found.save(tmp_path / "t.parquet")).rows == tuple(found.rows)


def test_a_token_planted_in_the_values_is_read_first(planted, gpt2):
    token = int(unembedding(gpt2).norm(dim=1).argmax())  # no other token has a larger logit along it

    def plant(hf):
        direction = unembedding(gpt2)[token] / unembedding(gpt2)[token].norm()
        hf.transformer.h[1].mlp.c_proj.weight.add_(100 * torch.outer(torch.linspace(-1, 2, 36), direction))

    row = svd_directions(planted("gpt2", plant), layers=[1], view="folded").matrix("values")[0]
    planted_word = word(tokenizer_of(gpt2), token)
    assert planted_word in (row.longer[0], row.shorter[0])  # sign free
    assert row.share > 0.9 and row.gap > 5


def test_equal_singular_values_are_left_out(planted):
    def plant(hf):
        hf.transformer.h[0].mlp.c_proj.weight.copy_(torch.eye(36, 12))

    found = svd_directions(planted("gpt2", plant), layers=[0])
    assert all(row.kurtosis is None for row in found.matrix("values"))
    assert "Values: nan% of 0 singular" in found.findings()[1] and "12 more were left out" in found.findings()[1]
    assert found.plot()


def test_the_scale_and_sign_of_a_gated_neuron_change_nothing(planted, model_of):
    def rescale(hf):
        a = gaussian(48).exp().float() * torch.tensor([1.0, -1.0]).repeat(24)
        for layer in hf.model.layers:
            layer.mlp.up_proj.weight.mul_(a[:, None])
            layer.mlp.down_proj.weight.div_(a)

    pairs = zip(
        svd_directions(model_of("llama")).rows, svd_directions(planted("llama", rescale)).rows, strict=True
    )
    for row, same in pairs:
        one, other = ([r.singular_value, r.share, r.overlap, r.kurtosis or 0] for r in (row, same))
        assert one == pytest.approx(other, rel=1e-5)
        assert (row.longer, row.shorter) == (same.longer, same.shorter)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"directions": 0}, "directions=0"),
        ({"view": "mid"}, 'view "mid" is unknown'),
        ({"layers": [9]}, "layer 9"),
    ],
)
def test_what_is_not_there_is_said(gpt2, wrong, said):
    with pytest.raises(InputError, match=said):
        svd_directions(gpt2, **wrong)

from dataclasses import replace

import pytest
import torch
from test_regression import halves

from ffnprobe import interactions
from ffnprobe import spectrum as sp
from ffnprobe.analyzers.affine_probes import Beside
from ffnprobe.analyzers.bilinear import bilinear, interaction_matrix
from ffnprobe.analyzers.interaction_index import SCALES, index_numbers, index_of, interaction_parts
from ffnprobe.analyzers.interactions import Interactions, probes
from ffnprobe.errors import InputError
from ffnprobe.ffn import FFN
from ffnprobe.models import ffns
from ffnprobe.regression import cross_fitted
from ffnprobe.stream import capture, collect


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def product() -> FFN:
    """A bilinear layer that writes x1 x2 along its first direction."""
    return FFN(
        0,
        keys=torch.tensor([[0.0, 1.0, 0.0]]).double(),
        values=torch.tensor([[1.0, 0.0, 0.0]]).double(),
        activation="identity",
        gates=torch.tensor([[1.0, 0.0, 0.0]]).double(),
    )


def test_a_product_is_not_affine_and_all_interaction():
    x = gaussian(20_000, 3)
    y = product().write(product().hidden(x))
    products = torch.stack([x[:, i] * x[:, j] for i in range(3) for j in range(i, 3)], dim=1)
    linear, quadratic = cross_fitted(halves(x, y)), cross_fitted(halves(torch.cat([x, products], dim=1), y))
    assert linear.share == pytest.approx(0, abs=0.01) and quadratic.share == pytest.approx(1, abs=1e-8)


def test_the_index_of_a_bilinear_layer_is_its_mixed_term():
    ffn, (x, a, b) = product(), gaussian(3, 500, 3)
    parts = interaction_parts(ffn, x, a, b, 0.5)
    mixed = 0.25 * (a[:, 0] * b[:, 1] + b[:, 0] * a[:, 1])  # B(a, b) + B(b, a), both scaled
    assert torch.allclose(parts[0], mixed**2)
    alone = [(x + 0.5 * c)[:, 0] * (x + 0.5 * c)[:, 1] - x[:, 0] * x[:, 1] for c in (a, b)]
    assert torch.allclose(parts[1], alone[0] ** 2 + alone[1] ** 2)
    assert index_of(parts) == pytest.approx(float((parts[0].sum() / parts[1].sum()).sqrt()))


def test_an_affine_layer_has_no_interactions_and_a_silent_one_none_either():
    affine = FFN(0, gaussian(9, 4), gaussian(9, 4, seed=1), "identity", key_bias=gaussian(9, seed=2))
    x, a, b = gaussian(3, 50, 4, seed=3)
    assert index_of(interaction_parts(affine, x, a, b, 1.0)) < 1e-12
    silent = replace(affine, values=torch.zeros(9, 4).double())
    assert index_of(interaction_parts(silent, x, a, b, 1.0)) == 0


def test_changes_are_differences_of_other_tokens_and_nulls_have_their_norms():
    ffn, x = FFN(0, gaussian(30, 6), gaussian(30, 6, seed=1), "relu"), gaussian(64, 6, seed=2)
    found = index_numbers(ffn, x, seed=0)
    a = torch.stack([x[i - 1] - x[i - 2] for i in range(64)])
    b = torch.stack([x[i - 3] - x[i - 4] for i in range(64)])
    for i, scale in enumerate(SCALES):
        assert found["index"][i] == pytest.approx(index_of(interaction_parts(ffn, x, a, b, scale)))
        null = index_of(interaction_parts(ffn.randomised(0), x, a, b, scale))
        assert found["index_weights"][i] == pytest.approx(null)
    # Gaussian x has no directions of its own: random ones are like differences
    assert found["index_directions"] == pytest.approx(found["index"], rel=0.2)
    assert found["index_directions"] != found["index"] and found["index_spread"] < 0.1


def tensor_of(ffn: FFN) -> torch.Tensor:
    assert ffn.gates is not None
    both = torch.einsum("io,ia,ib->oab", ffn.values, ffn.gates, ffn.keys)
    return (both + both.transpose(1, 2)) / 2


def test_the_bilinear_spectra_are_those_of_the_tensor_itself():
    ffn = FFN(0, gaussian(15, 5), gaussian(15, 5, seed=1), "identity", gates=gaussian(15, 5, seed=2))
    B, found = tensor_of(ffn), bilinear(ffn)
    x = gaussian(1, 5, seed=3)
    assert torch.allclose(torch.einsum("oab,na,nb->no", B, x, x), ffn.write(ffn.hidden(x)))
    unfolded = {"output": B.flatten(1), "input": B.permute(1, 0, 2).flatten(1)}
    for name, matrix in unfolded.items():
        expected = sp.participation_ratio(torch.linalg.svdvals(matrix) ** 2)
        assert getattr(found, name) == pytest.approx(expected)
    w = torch.linalg.svd(unfolded["output"]).U[:, 0]
    top = torch.einsum("o,oab->ab", w, B)
    assert torch.allclose(interaction_matrix(ffn, w), top)
    assert found.top == pytest.approx(sp.participation_ratio(torch.linalg.eigvalsh(top) ** 2))
    assert bilinear(replace(ffn, gates=None)) is None


def test_one_product_is_one_output_two_inputs():
    found = bilinear(product())
    assert (found.output, found.input, found.top) == pytest.approx((1, 2, 2))


def test_scale_and_sign_of_a_neuron_leave_the_tensor_as_it_is():
    ffn = FFN(0, gaussian(15, 5), gaussian(15, 5, seed=1), "silu", gates=gaussian(15, 5, seed=2))
    scale = gaussian(15, 1, seed=4).exp() * torch.tensor([1.0, -1.0, 1.0]).repeat(5)[:, None]
    other = replace(ffn, keys=ffn.keys * scale, values=ffn.values / scale)
    assert bilinear(ffn) == pytest.approx(bilinear(other))


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request, model_of):
    return model_of(request.param)


def test_every_regression_is_that_of_all_rows(model, tokens):
    text, ffn = tokens(model, sequences=24), ffns(model)[1]
    statistics = collect(model, text, probes([ffn], components=3))
    (row,) = interactions(model, text, layers=[1], components=3, statistics=statistics).rows
    batches = [batch[1] for batch in capture(model, text, ("in", "out"), layers=[1])]
    x, y = (torch.cat([a.sites[site] for a in batches]).double() for site in ("in", "out"))
    kept, half = torch.cat([a.kept for a in batches]), text.document.flatten() % 2
    basis = statistics["interactions/1/products/0"].basis
    z = x @ basis
    z = z - z[kept].mean(0)  # where products are taken about changes only what is affine in z
    products = torch.stack([z[:, i] * z[:, j] for i in range(3) for j in range(i, 3)], dim=1)
    beside = Beside(ffn, ffn.d_mlp, 0)
    null, h = beside.random.hidden(x.float()).double(), ffn.canonical().hidden(x.float()).double()

    def share(target, *inputs):
        rows = torch.cat(inputs, dim=1)
        order = torch.cat([(kept & (half == i)).nonzero().squeeze(1) for i in (0, 1)])
        n = int((kept & (half == 0)).sum())
        assert n * 2 == len(order)  # so that halves() can take every second row
        mixed = torch.stack([order[:n], order[n:]], dim=1).flatten()
        return cross_fitted(halves(rows[mixed], target[mixed]))

    weights = h[kept].var(0, correction=0)
    for target, of, end in ((y, lambda j: j.share, ""), (null, lambda j: j.weighted(weights), "_null")):
        linear, quadratic, few, few_quadratic = (
            of(share(target, *inputs)) for inputs in ((x,), (x, products), (z,), (z, products))
        )
        assert getattr(row, f"share{end}") == pytest.approx(quadratic - linear, abs=2e-3)
        assert getattr(row, f"components_share{end}") == pytest.approx(few_quadratic - few, abs=2e-3)
        if not end:
            assert (row.r2_linear, row.components_linear) == pytest.approx((linear, few), abs=1e-4)


def test_the_analyzers_share_their_rows(gpt2):
    wanted = probes(ffns(gpt2))
    of = {probe.of for name, probe in wanted.items() if "/hidden/" in name or "/products/" in name}
    assert len(of) == 3  # one a layer: h is computed once for both


def test_the_verdict_follows_its_rule(tmp_path):
    numbers = dict.fromkeys(Interactions.row_type.__dataclass_fields__, 2.0)
    numbers |= {"tokens": 9, "share": 0.1, "share_spread": 0.01, "share_null": 0.05, "index": [0.1, 0.5, 1.0]}
    numbers |= {"index_spread": 0.05, "index_directions": [0.1, 0.3, 1.0], "index_weights": [0.1, 0.4, 1.0]}
    row = Interactions.row_type(**numbers | {"layer": 0})

    def found(**changed):
        settings = {"model": "m", "seed": 0, "components": 16}
        return Interactions([replace(row, layer=layer, **changed) for layer in range(6)], settings)

    assert found().verdicts()[0].verdict == "supported"
    assert found(share_null=0.095).verdicts()[0].verdict == "mixed"  # within the spread
    assert found(index_weights=[0.0, 0.46, 0.0]).verdicts()[0].verdict == "mixed"
    assert found(share=-0.1, share_null=-0.2, index=[1.0, 0.4, 1.0]).verdicts()[0].verdict == "not supported"
    assert Interactions([row] * 4, {}).verdicts() == []
    assert Interactions.load(found().save(tmp_path / "t.parquet")).rows == tuple(found().rows)
    assert len(found().plot().axes) == 4 and len(found().findings()) == 3
    plain = {name: None for name in numbers if name.startswith("bilinear")}
    assert len(found(**plain).plot().axes) == 3 and len(found(**plain).findings()) == 2


def test_what_is_not_there_is_said(gpt2, tokens):
    with pytest.raises(InputError, match="layer 99"):
        interactions(gpt2, tokens(gpt2), layers=[99])
    with pytest.raises(InputError, match="one document"):
        interactions(gpt2, tokens(gpt2, sequences=1, document=64))

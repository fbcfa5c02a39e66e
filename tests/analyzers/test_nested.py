import pytest
import torch

from ffnprobe import nested
from ffnprobe import spectrum as sp
from ffnprobe.analyzers.nested import CRITERIA, SHARES, Nested
from ffnprobe.errors import InputError
from ffnprobe.models import ffns
from ffnprobe.stream import capture


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request, model_of):
    return model_of(request.param)


def contributions(model, tokens, layer: int) -> torch.Tensor:
    """What each neuron is worth: h, of a gated layer times the norm of its value."""
    seen = [batch[layer] for batch in capture(model, tokens, ["post"], layers=[layer])]
    h = torch.cat([a.sites["post"][a.kept] for a in seen]).double()
    return h * ffns(model)[layer].gauge.double() if ffns(model)[layer].gated else h


def test_every_row_is_that_of_the_neurons_kept(model, tokens):
    text = tokens(model)
    found = nested(model, text, layers=[1])
    h, ffn = contributions(model, text, 1), ffns(model)[1]
    reach = h.abs().mean(0) * (1 if ffn.gated else ffn.values.double().norm(dim=1))
    orders = {"contribution": reach.argsort(descending=True), "variance": h.var(0).argsort(descending=True)}
    for criterion, order in orders.items():
        rows = [row for row in found.rows if row.criterion == criterion]
        assert [row.kept for row in rows] == sorted({max(2, round(share * ffn.d_mlp)) for share in SHARES})
        for row in rows:
            covariance = torch.cov(h[:, order[: row.kept]].T, correction=0)
            spectrum = sp.eigenvalues(covariance)
            assert row.soft_rank == pytest.approx(sp.soft_rank(spectrum), rel=1e-3)
            assert row.participation_ratio == pytest.approx(sp.participation_ratio(spectrum), rel=1e-3)
            assert row.independent_soft_rank == pytest.approx(sp.soft_rank(covariance.diagonal()), rel=1e-3)
            whole = torch.cov(h.T, correction=0).trace()
            assert row.variance_share == pytest.approx(float(covariance.trace() / whole), rel=1e-3)


def test_all_neurons_are_the_layer_whatever_the_order(model, tokens):
    found = nested(model, tokens(model), layers=[0])
    whole = [row for row in found.rows if row.kept == row.d_mlp]
    assert {row.criterion for row in whole} == set(CRITERIA)
    for row in whole:
        assert row.variance_share == pytest.approx(1)
        assert row.soft_rank == pytest.approx(whole[0].soft_rank)
        assert row.participation_ratio == pytest.approx(whole[0].participation_ratio)


def test_the_largest_variances_come_first(model, tokens):
    found = nested(model, tokens(model), layers=[0])
    share = {(row.criterion, row.kept): row.variance_share for row in found.rows}
    assert all(share["variance", kept] >= share[criterion, kept] - 1e-9 for criterion, kept in share)


def test_independent_equal_neurons_have_an_exponent_of_one():
    rows = [
        row
        for layer in range(3)
        for criterion in CRITERIA
        for row in [_row(layer, criterion, kept) for kept in (4, 8, 16, 32, 64, 128)]
    ]
    found = Nested(rows, {"model": "planted", "seed": 0})
    assert [law.exponent for law in found.fits("variance", "soft_rank")] == pytest.approx([1, 1, 1])
    assert "1.000 (OLS [1.000, 1.000], N = 6)" in found.findings()[0] and len(found.plot().axes) == 3


def _row(layer: int, criterion: str, kept: int):
    return Nested.row_type(layer, criterion, kept, 128, 9, kept / 128, float(kept), float(kept), float(kept))


def test_the_same_seed_keeps_the_same_neurons(model, tokens):
    text = tokens(model)
    one, same, other = (nested(model, text, layers=[0], seed=seed).rows for seed in (1, 1, 2))
    assert one == same != other


def test_a_layer_that_is_not_there_is_said(model, tokens):
    with pytest.raises(InputError, match="layer 99 is not there"):
        nested(model, tokens(model), layers=[99])

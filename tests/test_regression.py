"""Regression from moments: closed forms, and the least squares of all rows."""

import pytest
import torch

from ffnprobe.regression import Paired, cross_fitted, fit, mean_square_error


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def paired(x: torch.Tensor, t: torch.Tensor) -> Paired:
    whole = torch.cov(torch.cat([x, t], dim=1).T, correction=0)
    d = x.shape[1]
    return Paired(len(x), x.mean(0), whole[:d, :d], t.mean(0), whole[:d, d:], whole.diagonal()[d:])


def halves(x: torch.Tensor, t: torch.Tensor) -> list[Paired]:
    return [paired(x[i::2], t[i::2]) for i in (0, 1)]


def test_an_affine_map_is_found_and_leaves_nothing():
    x = gaussian(500, 6) @ gaussian(6, 6, seed=1) + 10
    t = x @ gaussian(6, 4, seed=2) + 7
    assert cross_fitted(halves(x, t)).share == pytest.approx(1, abs=1e-8)
    assert torch.allclose(fit(paired(x, t))(x), t, atol=1e-6)


def test_the_absolute_value_of_symmetric_inputs_is_not_affine_at_all():
    x = gaussian(200_000, 3)
    x = torch.cat([x, -x])
    assert cross_fitted(halves(x, x.abs())).share == pytest.approx(0, abs=1e-3)


def test_relu_of_an_isotropic_gaussian_is_affine_to_the_closed_share():
    x = gaussian(60_000, 8)
    judged = cross_fitted(halves(x, torch.relu(x @ gaussian(8, 40, seed=1))))
    assert judged.share == pytest.approx(0.734, rel=0.02)
    assert judged.spread < 0.01


def test_errors_are_those_of_least_squares_on_all_rows():
    x, t = gaussian(300, 5) + 3, gaussian(300, 2, seed=1).exp()
    t[:, 0] += x[:, 0]
    judged = cross_fitted(halves(x, t))
    for i in (0, 1):
        ours, theirs = slice(i, None, 2), slice(1 - i, None, 2)
        lines = [torch.cat([part, torch.ones(len(part), 1)], dim=1) for part in (x[theirs], x[ours])]
        found = torch.linalg.lstsq(lines[0], t[theirs]).solution
        error = (t[ours] - lines[1] @ found).square().mean(0)
        assert torch.allclose(judged.error[i], error, rtol=1e-5)
        assert torch.allclose(judged.variance[i], t[ours].var(0, correction=0))


def test_few_tokens_count_against_a_map_of_noise():
    x, noise = gaussian(200, 20), gaussian(200, 50, seed=1)
    # each half has 100 tokens: least squares of d noisy inputs errs by n / (n - d - 1) and more
    assert -0.45 < cross_fitted(halves(x, noise)).share < -0.1
    p = paired(x, noise)
    assert float(1 - mean_square_error(fit(p), p).sum() / p.variance.sum()) > 0.05  # on its own tokens


def test_a_direction_without_variance_is_left_out():
    x = gaussian(400, 4)
    x = torch.cat([x, x.sum(1, keepdim=True), torch.ones(400, 1)], dim=1)  # as a LayerNorm leaves one
    assert cross_fitted(halves(x, x[:, :1] * 3)).share == pytest.approx(1, abs=1e-8)


def test_units_of_the_inputs_change_nothing():
    x, t = gaussian(300, 5), gaussian(300, 2, seed=1)
    t += x[:, :2]
    units = torch.tensor([1e-6, 1.0, 1e6, 1e3, 1e-3])
    assert cross_fitted(halves(x * units, t)).share == pytest.approx(cross_fitted(halves(x, t)).share, abs=1e-7)


def test_linear_images_of_targets_and_inputs():
    x, t, A, B = gaussian(300, 5), gaussian(300, 3, seed=1) + 1, gaussian(5, 2, seed=2), gaussian(3, 4, seed=3)
    found = fit(paired(x, t)).into(B, torch.ones(4).double())
    direct = fit(paired(x, t @ B + 1))
    assert torch.allclose(found.weights, direct.weights) and torch.allclose(found.offset, direct.offset)
    moved, reference = paired(x, t).of(A), paired(x @ A, t)
    assert torch.allclose(moved.inputs, reference.inputs) and torch.allclose(moved.cross, reference.cross)


def test_each_target_can_be_weighed_by_another_variance():
    x = gaussian(2000, 3)
    t = torch.stack([x[:, 0], x[:, 1].square(), torch.zeros(2000).double()], dim=1)
    judged = cross_fitted(halves(x, t))
    assert judged.weighted(torch.tensor([1.0, 3.0, 5.0]).double()) == pytest.approx(0.25, abs=0.02)

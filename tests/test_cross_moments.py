"""Moments across sites, and products of components: each against its slow reference."""

import pytest
import torch

from ffnprobe.statistics import CrossMoments, QuadraticMoments


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("d", [1, 3, 4])
def test_cross_moments_are_torchs_covariance(d):
    x = gaussian(50, 5) @ gaussian(5, 5, seed=1) + 100
    cross = CrossMoments.about(x[:7], d)
    for part in x.split(13):
        cross.update(part, torch.arange(len(part)))
    found, whole = cross.compute(), torch.cov(x.T, correction=0)
    assert torch.allclose(found.covariance, whole[:d, d:])
    assert torch.allclose(found.variance, whole.diagonal()[d:])
    assert torch.allclose(torch.cat([found.input_mean, found.mean]), x.mean(0))


def test_one_token_has_a_mean_and_no_variance():
    cross = CrossMoments.about(gaussian(4, 3), 2)
    cross.update(torch.tensor([[1.0, 2.0, 3.0]]).double(), torch.tensor([5]))
    found = cross.compute()
    assert found.mean.tolist() == [pytest.approx(3)] and found.input_mean.tolist() == pytest.approx([1, 2])
    assert float(found.variance) == pytest.approx(0) and found.covariance.abs().max() < 1e-12


def test_what_is_not_finite_is_said():
    cross = CrossMoments.about(gaussian(4, 3), 2)
    cross.update(torch.full((2, 3), torch.inf), torch.arange(2))
    with pytest.raises(ValueError, match="not finite"):
        cross.compute()


def test_products_of_components_are_a_loop_over_pairs():
    x, b = gaussian(60, 4) * torch.tensor([1.0, 5.0, 2.0, 0.1]) + 3, gaussian(60, 2, seed=1)
    rows = torch.cat([x, b], dim=1)
    quadratic = QuadraticMoments.about(rows[:40], d=4, k=3)
    for part in rows.split(17):
        quadratic.update(part, torch.arange(len(part)))
    components = (x - x[:40].mean(0)) @ quadratic.basis
    pilot = torch.cov(components[:40].T, correction=0)
    assert torch.allclose(pilot, torch.eye(3).double(), atol=1e-9)
    spread = torch.linalg.eigvalsh(torch.cov(x[:40].T, correction=0)).flip(0)
    assert torch.allclose(quadratic.basis.norm(dim=0), spread[:3].rsqrt())  # the leading three
    products = [components[:, i] * components[:, j] for i in range(3) for j in range(i, 3)]
    reference = torch.cov(torch.stack([*products, *rows.T]), correction=0)
    found = quadratic.compute()
    assert torch.allclose(found.covariance, reference[:6])


def test_products_of_what_never_varies_are_finite():
    for pilot in (torch.ones(3, 4), torch.ones(0, 4), torch.ones(1, 4)):
        quadratic = QuadraticMoments.about(pilot, d=3, k=2)
        quadratic.update(torch.ones(5, 4), torch.arange(5))
        assert torch.isfinite(quadratic.compute().covariance).all()

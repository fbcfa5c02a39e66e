import pytest
import torch

from ffnprobe import neuron_clusters
from ffnprobe.clustering import spherical_kmeans

GROUPS = 6


def directions(seed: int, d: int = 16) -> torch.Tensor:
    """48 rows in 6 tight groups of 8."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.linalg.qr(torch.randn(d, GROUPS, generator=generator)).Q.T
    return centres.repeat(8, 1) + 0.02 * torch.randn(48, d, generator=generator)


def test_planted_groups_that_read_and_write_together_are_found(planted):
    def plant(hf):
        mlp = hf.model.layers[1].mlp
        mlp.gate_proj.weight.copy_(directions(1))
        mlp.up_proj.weight.copy_(directions(2))
        mlp.down_proj.weight.copy_(directions(3).T)
        # a gated FFN is the same after this
        mlp.up_proj.weight[::3] *= -2
        mlp.down_proj.weight[:, ::3] /= -2

    for row in neuron_clusters(planted("llama", plant), layers=[1], clusters=GROUPS).rows:
        assert row.stability == pytest.approx(1)
        assert row.stability_null < 0.5
        if row.view != "values":
            assert row.agreement_with_values == pytest.approx(1)
            assert row.agreement_permuted < 0.4
        assert row.fit > 0.98


def test_gaussian_weights_have_no_groups(planted):
    def plant(hf):
        for layer in hf.transformer.h:
            generator = torch.Generator().manual_seed(4)
            layer.mlp.c_fc.weight.copy_(torch.randn(layer.mlp.c_fc.weight.shape, generator=generator))
            layer.mlp.c_proj.weight.copy_(torch.randn(layer.mlp.c_proj.weight.shape, generator=generator))

    keys = neuron_clusters(planted("gpt2", plant), layers=[0], clusters=4, seeds=10).view("keys")[0]
    assert keys.stability == pytest.approx(keys.stability_null, abs=0.2)
    assert keys.agreement_with_values < max(0.1, keys.agreement_permuted)
    assert keys.agreement_permuted > 0  # the largest of twenty that scatter about 0


def test_lines_ignore_signs_and_scales_and_cosines_do_not():
    rows = directions(0)
    turned = (
        rows
        * torch.linspace(0.1, 10, 48)[:, None]
        * torch.where(torch.arange(48) // GROUPS % 2 == 0, 1.0, -1.0)[:, None]
    )
    assert torch.equal(
        spherical_kmeans(rows, GROUPS, signed=False)[0], spherical_kmeans(turned, GROUPS, signed=False)[0]
    )
    assert not torch.equal(spherical_kmeans(rows, GROUPS)[0], spherical_kmeans(turned, GROUPS)[0])


@pytest.mark.parametrize("signed", [True, False])
def test_no_cluster_stays_empty_and_the_fit_is_the_mean_cosine(signed):
    rows = torch.randn(60, 5, generator=torch.Generator().manual_seed(1))
    labels, fit = spherical_kmeans(rows, 20, signed=signed)
    assert labels.bincount(minlength=20).min() > 0
    assert 0 < fit <= 1


def test_each_row_sits_with_the_centre_it_is_nearest_to():
    rows = torch.randn(80, 4, generator=torch.Generator().manual_seed(2))
    unit = torch.nn.functional.normalize(rows, dim=1)
    labels, fit = spherical_kmeans(rows, 5, iterations=200)
    centres = torch.stack([torch.nn.functional.normalize(unit[labels == k].sum(0), dim=0) for k in range(5)])
    assert torch.equal((unit @ centres.T).argmax(dim=1), labels)
    assert fit == pytest.approx(float((unit * centres[labels]).sum(1).mean()), abs=1e-6)


def test_more_clusters_than_rows_are_refused():
    with pytest.raises(ValueError, match="choose 1 to 3"):
        spherical_kmeans(torch.eye(3), 4)

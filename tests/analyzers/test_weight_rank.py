import pytest
import torch

from ffnprobe import weight_rank
from ffnprobe.analyzers.weight_rank import WeightRank


def gaussian(hf):
    for layer in hf.model.layers:
        for weight in (layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight, layer.mlp.down_proj.weight):
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(7)))


def test_gaussian_weights_are_their_own_null(planted):
    def unequal(hf):  # a null of equal norms would differ
        gaussian(hf)
        for layer in hf.model.layers:
            layer.mlp.gate_proj.weight.mul_(torch.logspace(-1, 1, 48)[:, None])

    for row in weight_rank(planted("llama", unequal), draws=20).rows:
        assert row.soft_rank == pytest.approx(row.soft_rank_null, abs=6 * row.soft_rank_null_sd)
        assert row.spikes == 0


def test_planted_directions_stand_out(planted):
    def plant(hf):
        gaussian(hf)
        keys = hf.model.layers[1].mlp.up_proj.weight
        directions = torch.linalg.qr(torch.randn(16, 3, generator=torch.Generator().manual_seed(1))).Q
        strength = torch.linalg.qr(torch.randn(48, 3, generator=torch.Generator().manual_seed(2))).Q
        keys.add_(100 * strength @ directions.T)

    result = weight_rank(planted("llama", plant))
    assert [row.spikes for row in result.matrix("keys")] == [0, 3, 0]
    keys = result.matrix("keys")[1]
    assert keys.soft_rank < 0.6 * keys.soft_rank_null


def test_a_rank_one_matrix_has_one_direction(planted):
    def plant(hf):
        weight = hf.model.layers[0].mlp.gate_proj.weight
        weight.copy_(
            torch.outer(torch.arange(1.0, 49), torch.randn(16, generator=torch.Generator().manual_seed(1)))
        )

    row = weight_rank(planted("llama", plant), layers=[0]).matrix("gates")[0]
    assert row.soft_rank == pytest.approx(1, abs=1e-4)
    assert row.erank_rv == pytest.approx(1, abs=1e-4)
    assert row.soft_rank_null > 8


def test_a_plain_ffn_has_no_gates(gpt2, tmp_path):
    result = weight_rank(gpt2)
    assert {row.matrix for row in result.rows} == {"keys", "values"}
    assert {(row.neurons, row.dimensions) for row in result.rows} == {(36, 12)}
    assert list(WeightRank.load(result.save(tmp_path / "t.parquet")).rows) == result.rows

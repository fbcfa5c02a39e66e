"""(key, value) -> (a key, value / a) leaves a gated layer as it is: no analyzer may notice."""

import math

import pytest
import torch

from ffnprobe import (
    attention_share,
    contraction,
    hidden_rank,
    memories,
    neuron_clusters,
    neuron_roles,
    weight_rank,
)

FLOATS = 1e-3  # activations are float32


def rescale(hf):
    generator = torch.Generator().manual_seed(1)
    for layer in hf.model.layers:
        a = torch.exp(torch.randn(48, generator=generator)) * (
            torch.randint(2, (48,), generator=generator) * 2 - 1
        )
        layer.mlp.up_proj.weight *= a[:, None]
        layer.mlp.down_proj.weight /= a


def same(one, other) -> bool:
    if isinstance(one, float):
        return one == pytest.approx(other, rel=FLOATS, abs=FLOATS) or (math.isnan(one) and math.isnan(other))
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return all(same(one[key], other[key]) for key in one)
    return one == other


def contracted(model, tokens):
    return contraction(model, tokens, causal_layers=[1], held_out=128)


def attended(model, tokens):
    return attention_share(model, tokens, layers=[0, 1], held_out=128)


@pytest.mark.parametrize(
    "analyzer",
    [attended, contracted, hidden_rank, memories, neuron_roles, weight_rank, neuron_clusters],
    ids=lambda f: f.__name__,
)
def test_no_number_changes(analyzer, planted, model_of, tokens):
    one, other = model_of("llama"), planted("llama", rescale)
    arguments = [tokens(one)] if analyzer in (attended, contracted, hidden_rank, memories, neuron_roles) else []
    for a, b in zip(analyzer(one, *arguments).rows, analyzer(other, *arguments).rows, strict=True):
        for name, value in vars(a).items():
            assert same(value, getattr(b, name)), (name, value, getattr(b, name))

"""(key, value) -> (a key, value / a), or another order, leaves a gated layer as it is: no analyzer may notice."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import ffnprobe as fp
from ffnprobe.models import Model, ffns

CLOSE = 1e-5
ANALYZERS: list[Callable] = [
    fp.attention_share,
    fp.contraction,
    fp.experts,
    fp.gradient_flow,
    fp.hidden_rank,
    fp.interactions,
    fp.knockout,
    fp.memories,
    fp.memory_use,
    fp.neuron_clusters,
    fp.neuron_roles,
    fp.nonlinearity,
    fp.quantization,
    fp.weight_rank,
]
OPTIONS: dict[str, dict[str, Any]] = {
    "attention_share": {"held_out": 128},
    "contraction": {"held_out": 128},
    "experts": {"loss_tokens": 128},
    "knockout": {"held_out": 128, "draws": 2},
    "neuron_clusters": {"candidates": [6], "algorithms": ["balanced"], "permutations": 2, "seeds": 2},
}


SINGLE = {"experts", "quantization"}  # their samples are float32


def rescale(hf):
    generator = torch.Generator().manual_seed(1)
    for layer in hf.model.layers:
        a = torch.exp(torch.randn(48, generator=generator)) * (
            torch.randint(2, (48,), generator=generator) * 2 - 1
        )
        layer.mlp.up_proj.weight *= a[:, None]
        layer.mlp.down_proj.weight /= a


def reorder(hf):
    for layer in hf.model.layers:
        order = torch.randperm(48, generator=torch.Generator().manual_seed(2))
        for projection in (layer.mlp.up_proj, layer.mlp.gate_proj):
            projection.weight.copy_(projection.weight[order])
        layer.mlp.down_proj.weight.copy_(layer.mlp.down_proj.weight[:, order])


def same(one, other, close: float = CLOSE) -> bool:
    if isinstance(one, float):
        return one == pytest.approx(other, rel=close, abs=close) or (math.isnan(one) and math.isnan(other))
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b, close) for a, b in zip(one, other, strict=True))
    if isinstance(one, dict):
        return all(same(one[key], other[key], close) for key in one)
    return one == other


def measure(analyzer: Callable, model: Model, tokens: Callable) -> list:
    arguments = [tokens(model)] if "tokens" in inspect.signature(analyzer).parameters else []
    return analyzer(model, *arguments, **OPTIONS.get(analyzer.__name__, {})).rows


@pytest.fixture
def pair(planted):
    """The same function twice, as it is and after an edit: in double precision, where rounding hides nothing."""

    def make(edit: Callable, single: bool = False) -> tuple[Model, Model]:
        def precise(hf):
            return hf if single else hf.double()

        return planted("llama", precise), planted("llama", lambda hf: edit(precise(hf)))

    return make


@pytest.mark.parametrize("analyzer", ANALYZERS, ids=lambda f: f.__name__)
def test_no_number_changes(analyzer, pair, tokens):
    single = analyzer.__name__ in SINGLE
    one, other = (measure(analyzer, model, tokens) for model in pair(rescale, single))
    for a, b in zip(one, other, strict=True):
        for name, value in vars(a).items():
            assert same(value, getattr(b, name), 100 * CLOSE if single else CLOSE), name


@pytest.mark.parametrize("analyzer", [fp.memories, fp.neuron_roles], ids=lambda f: f.__name__)
def test_neurons_in_another_order_say_the_same(analyzer, pair, tokens):
    one, other = (measure(analyzer, model, tokens) for model in pair(reorder))
    order = torch.randperm(48, generator=torch.Generator().manual_seed(2)).tolist()
    places = {(row.layer, order[row.neuron]): row for row in other}
    assert len(places) == len(one)
    for a in one:
        for name, value in vars(a).items():
            assert name == "neuron" or same(value, getattr(places[a.layer, a.neuron], name)), name


def test_the_order_is_another_and_the_layer_the_same(pair):
    one, other = (ffns(model)[1] for model in pair(reorder))
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0)).double()
    assert not torch.allclose(one.hidden(x), other.hidden(x))
    assert torch.allclose(one.write(one.hidden(x)), other.write(other.hidden(x)))

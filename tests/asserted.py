"""What must a published number agree with, and how closely? Run on the hub's models and on tiny ones."""

from collections.abc import Mapping, Sequence
from statistics import fmean

import published
import pytest

from ffnprobe.models import Model

NEAR = {"w_in": 1e-3, "b_in": 1e-3, "w_out": 1e-3, "cos": 1e-3, "variance": 5e-7, "skew": 5e-3}


def reads_as(model: Model, layer: int, neuron: int, numbers: Mapping[str, float]) -> None:
    """Norms and cosines to 1e-3, kurtosis and a large skew to 1%, others to the digits that were printed."""
    found = published.reading(model, layer, neuron)
    assert {name: found[name] for name in numbers} == {
        name: pytest.approx(number, abs=NEAR.get(name, 0), rel=0.01 if name in ("kurtosis", "skew") else 1e-9)
        for name, number in numbers.items()
    }


def are_quiet(model: Model, neurons: Sequence[int]) -> None:
    """All in the lowest 1% of logit variance of the last layer, norm above its median."""
    assert [(below < 0.01, large) for below, large in published.quiet(model, neurons)] == [(True, True)] * len(
        neurons
    )


def speaks(row, tokens: Sequence[str], least: int) -> None:
    """So many of these tokens are read at one of a direction's ends; it has no sign."""
    assert max(len({*tokens} & {token.strip() for token in end}) for end in (row.longer, row.shorter)) >= least


def means(model: Model, texts: Sequence[str], length: int) -> dict[str, float]:
    """Over layers."""
    layers = published.spectra(model, published.padded(model, texts, length))
    return {name: fmean(layer[name] for layer in layers) for name in layers[0]}


def near(found: Mapping[str, float], numbers: Mapping[str, tuple[float, float]]) -> None:
    assert {name: found[name] for name in numbers} == {
        name: pytest.approx(number, abs=error) for name, (number, error) in numbers.items()
    }


def spectra_of(model: Model, texts: Sequence[str], length: int, *numbers: float) -> list[dict[str, float]]:
    """Means over layers: entropies to 0.01, participation ratios to 1%."""
    found = means(model, texts, length)
    near(
        found,
        {
            name: (number, 0.01 if name.startswith("entropy") else 0.01 * number)
            for name, number in zip(("entropy_pre", "entropy_post", "pr_pre", "pr_post"), numbers, strict=True)
        },
    )
    return published.spectra(model, published.padded(model, texts, length))


def most_within(shares: Sequence[float], low: float, high: float) -> None:
    assert sum(low <= share <= high for share in shares) > len(shares) / 2, shares


def spreads(values: Sequence[float], low: float, high: float) -> None:
    assert min(values) < low and max(values) > high, values

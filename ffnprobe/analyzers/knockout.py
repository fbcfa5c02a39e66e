"""What does the model lose without a set of neurons, beside random sets?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from torch import Tensor

from ..attribution import first_order
from ..corpus import Tokens
from ..errors import InputError
from ..ffn import FFN
from ..figure import BLACK, BLUE, GREY, ORANGE, caption, legend_below, new_figure, styled
from ..intervene import Change, Losses, check_causal, losses, mean_of
from ..models import Model, ffns
from ..result import Result, column
from ..statistics import Marginals
from ..stream import Probe, choose_layers, collect, settings_of

Neurons = Mapping[int, Sequence[int]]  # by layer


@dataclass(frozen=True)
class Row:
    name: str = column("", "set of neurons")
    layers: list[int] = column("", "layers that it has neurons in")
    neurons: int = column("neurons", "neurons in it")
    share: float = column("0..1", "its share of the squared contribution norms of these layers")
    delta: float = column("nats/token", "added to the loss when its neurons are set to their means")
    delta_se: float = column("nats/token", "its standard error over documents")
    predicted: float = column("nats/token", "the same if the loss were linear in h")
    same_size: float = column("nats/token", "added by as many other neurons of each layer, mean over draws")
    same_size_sd: float = column("nats/token", "standard deviation over draws")
    same_size_most: float = column("nats/token", "largest of the draws")
    same_norm: float = column("nats/token", "added by others with as much squared contribution norm in each layer")
    same_norm_sd: float = column("nats/token", "standard deviation over draws")
    same_norm_most: float = column("nats/token", "largest of the draws")
    same_norm_neurons: float = column("neurons", "neurons of such a draw, mean")
    same_norm_share: float = column("0..1", "their share; below the set's where the others do not have as much")
    draws: int = column("draws", "random sets of each kind")
    loss: float = column("nats/token", "of the whole model on the same tokens")
    tokens: int = column("tokens", "predicted")
    documents: int = column("documents", "that they are of")


@dataclass(frozen=True)
class Knockout(Result):
    name: ClassVar[str] = "knockout"
    question: ClassVar[str] = "What does the model lose without a set of neurons, beside random sets?"
    row_type: ClassVar[type] = Row

    def findings(self) -> list[str]:
        rows = sorted(self.rows, key=lambda row: row.delta - row.same_norm_most, reverse=True)
        return [
            f"Without {row.name} ({row.neurons:,} neurons, {row.share:.1%} of the squared contribution norm) the "
            f"loss of {row.loss:.3f} changes by {row.delta:+.3f} ± {row.delta_se:.3f} nats a token (linear "
            f"{row.predicted:+.3f}); without as many others {row.same_size:+.3f} ± {row.same_size_sd:.3f}, "
            f"without {row.same_norm_neurons:,.0f} others of {row.same_norm_share:.1%} {row.same_norm:+.3f} ± "
            f"{row.same_norm_sd:.3f}."
            for row in rows
        ]

    @styled
    def plot(self) -> Figure:
        row = self.rows[0]
        about = caption(self.settings, f"loss on {row.tokens:,} tokens of {row.documents}")
        figure, (axes, linear) = new_figure(2, about)
        at = range(len(self.rows))
        for kind, colour, shift in (("same_size", GREY, 0.2), ("same_norm", BLUE, -0.2)):
            middle = [getattr(row, kind) for row in self.rows]
            spread = [getattr(row, f"{kind}_sd") for row in self.rows]
            label = "random, as many" if kind == "same_size" else "random, as much contribution"
            axes.errorbar(middle, [i + shift for i in at], xerr=spread, fmt="s", color=colour, label=label)
        delta, error = [row.delta for row in self.rows], [row.delta_se for row in self.rows]
        axes.errorbar(delta, list(at), xerr=error, fmt="o", color=BLACK, label="the set")
        axes.set_yticks(list(at), [row.name for row in self.rows])
        axes.set(title="Set to their means", xlabel="added to the loss (nats/token)")
        ends = [min([0.0, *delta]), max(delta)]
        linear.plot(ends, ends, "--", color=GREY, label="equal")
        linear.plot([row.predicted for row in self.rows], delta, "o", color=ORANGE, label="a set")
        linear.set(
            title="Is the loss linear in h?", xlabel="predicted to first order (nats/token)", ylabel="measured"
        )
        for each in (axes, linear):
            legend_below(each)
        return figure


def probes(layers: Sequence[FFN]) -> dict[str, Probe]:
    """What `knockout` needs of one pass over the tokens."""
    return {f"knockout/{ffn.layer}": Probe(ffn.layer, "post", Marginals.about) for ffn in layers}


def knockout(
    model: Model,
    tokens: Tokens,
    sets: Mapping[str, Neurons] | None = None,
    *,
    layers: Sequence[int] | None = None,
    held_out: int = 2048,
    draws: int = 3,
    scale: float = 1.0,
    seed: int = 0,
    statistics: Mapping[str, Any] | None = None,
    **collecting: Any,
) -> Knockout:
    """Set neurons to their mean hidden activation (never their pre-activation) and see what the loss says.

    The means are those of ordinary tokens, and ordinary tokens alone are changed: attention sinks keep what they
    hold. A contribution norm is |v_i| times the standard deviation of h_i: what the mean takes away. Random sets
    are drawn of the neurons of the same layers that are not in the set.

    Args:
        sets: neurons by layer, by any name; by default the 5% with the largest and the half with the smallest
            contribution norm of every layer.
        layers: of the default sets; all by default.
        held_out: tokens from the end of the corpus on which the loss is measured; the means are of all.
        draws: random sets of each kind, at least 2.
        scale: of the way to the mean, in (0, 1].
        statistics: what one `collect` over `probes(...)` gave, when several analyzers share a pass.
        collecting: passed to `collect` (batch, sink_factor, nonfinite, progress).

    Raises:
        InputError: a layer or a neuron that is not there, an empty set, too few tokens.
        ModelRefused: the model does not predict the next token.
    """
    check_causal(model)
    if draws < 2 or not 0 < scale <= 1:
        raise InputError(f"got {draws} draws, scale {scale}: give at least 2 draws and a scale in (0, 1]")
    _, test = tokens.held_out(held_out)
    layer_of = {ffn.layer: ffn for ffn in ffns(model)}
    given = None if sets is None else {name: _checked(name, some, layer_of) for name, some in sets.items()}
    wanted = layers if given is None else sorted({layer for neurons in given.values() for layer in neurons})
    measured = [layer_of[tap.layer] for tap in choose_layers(model, wanted)]
    if statistics is None:
        statistics = collect(model, tokens, probes(measured), **collecting)
    marginals = {ffn.layer: statistics[f"knockout/{ffn.layer}"].compute() for ffn in measured}
    means = {layer: of.mean for layer, of in marginals.items()}
    power = {
        ffn.layer: marginals[ffn.layer].variance.cpu() * ffn.wide().values.norm(dim=1).cpu().double() ** 2
        for ffn in measured
    }
    chosen_sets = strongest_and_weakest(power) if given is None else given
    generator = torch.Generator().manual_seed(seed)
    arms: dict[str, dict[int, Tensor]] = {}
    for name, neurons in chosen_sets.items():
        arms[f"{name}/set"] = neurons
        for draw in range(draws):
            for kind in ("same_size", "same_norm"):
                arms[f"{name}/{kind}/{draw}"] = {
                    layer: _drawn(kind, some, power[layer], generator) for layer, some in neurons.items()
                }
    changes = {
        arm: [Change(layer, "post", _towards(means[layer], some, scale)) for layer, some in neurons.items()]
        for arm, neurons in arms.items()
    }
    looking = {name: value for name, value in collecting.items() if name in ("sink_factor", "nonfinite")}
    found = losses(model, test, changes, **looking)
    linear = first_order(model, test, means, **looking)
    rows = [_row(name, neurons, arms, found, linear, power, draws, scale) for name, neurons in chosen_sets.items()]
    settings = settings_of(model, tokens, seed, **collecting)
    return Knockout(rows, settings | {"held_out": held_out, "draws": draws, "scale": scale, "weights": "raw"})


def strongest_and_weakest(
    power: Mapping[int, Float[Tensor, " d_mlp"]], most: float = 0.05, least: float = 0.5
) -> dict[str, dict[int, Int[Tensor, " k"]]]:
    """Of every layer the share of neurons with the largest contribution norms, and that with the smallest."""
    order = {layer: of.argsort() for layer, of in power.items()}
    count = {layer: (max(1, round(most * len(of))), max(1, round(least * len(of)))) for layer, of in power.items()}
    return {
        f"the strongest {most:.0%}": {layer: of[-count[layer][0] :] for layer, of in order.items()},
        f"the weakest {least:.0%}": {layer: of[: count[layer][1]] for layer, of in order.items()},
    }


def _checked(name: str, neurons: Neurons, layer_of: Mapping[int, FFN]) -> dict[int, Int[Tensor, " k"]]:
    found = {layer: torch.tensor(sorted(set(some))) for layer, some in neurons.items() if len(some)}
    if not found:
        raise InputError(f"set {name!r} has no neuron: give some, as {{layer: [neurons]}}")
    for layer, some in found.items():
        if layer not in layer_of:
            raise InputError(f"set {name!r}: layer {layer} is not there; choose among {sorted(layer_of)}")
        width = layer_of[layer].d_mlp
        if int(some.min()) < 0 or int(some.max()) >= width:
            out = some[(some < 0) | (some >= width)].tolist()
            raise InputError(f"set {name!r}: layer {layer} has neurons 0 to {width - 1}, got {out}")
    return found


def _drawn(
    kind: str, some: Int[Tensor, " k"], power: Float[Tensor, " d_mlp"], generator: torch.Generator
) -> Int[Tensor, " n"]:
    """As many others as there are in the set, or others with as much power."""
    others = torch.ones(len(power), dtype=torch.bool)
    others[some] = False
    order = others.nonzero().squeeze(1)
    order = order[torch.randperm(len(order), generator=generator)]
    if kind == "same_size":
        return order[: len(some)]
    # the sum that comes nearest
    sums = torch.cat([power.new_zeros(1), power[order].cumsum(0)])
    return order[: int((sums - power[some].sum()).abs().argmin())]


def _towards(mean: Float[Tensor, " d_mlp"], some: Int[Tensor, " k"], scale: float):
    to = mean_of(mean, "post", some)
    return to if scale == 1 else lambda read: torch.lerp(read["post"], to(read), scale)


def _row(
    name: str,
    neurons: Mapping[int, Int[Tensor, " k"]],
    arms: Mapping[str, Mapping[int, Tensor]],
    found: Losses,
    linear: Mapping[int, Float[Tensor, " d_mlp"]],
    power: Mapping[int, Float[Tensor, " d_mlp"]],
    draws: int,
    scale: float,
) -> Row:
    whole = sum(float(power[layer].sum()) for layer in neurons)

    def share(some: Mapping[int, Tensor]) -> float:
        return sum(float(power[layer][which].sum()) for layer, which in some.items()) / whole

    def count(some: Mapping[int, Tensor]) -> int:
        return sum(len(which) for which in some.values())

    nulls: dict[str, float] = {}
    for kind in ("same_size", "same_norm"):
        deltas = [found.delta(f"{name}/{kind}/{draw}")[0] for draw in range(draws)]
        nulls |= {kind: fmean(deltas), f"{kind}_sd": stdev(deltas), f"{kind}_most": max(deltas)}
    matched = [arms[f"{name}/same_norm/{draw}"] for draw in range(draws)]
    delta, error = found.delta(f"{name}/set")
    return Row(
        name=name,
        layers=list(neurons),
        neurons=count(neurons),
        share=share(neurons),
        delta=delta,
        delta_se=error,
        predicted=scale * sum(float(linear[layer][some].sum()) for layer, some in neurons.items()),
        **nulls,
        same_norm_neurons=fmean(map(count, matched)),
        same_norm_share=fmean(map(share, matched)),
        draws=draws,
        loss=found.mean(),
        tokens=int(found.tokens.sum()),
        documents=len(found.tokens),
    )

"""From a model and tokens to a stream of activations, and from the stream to statistics.

`capture` hands out batches that nobody keeps; `collect` feeds them to statistics while the forward pass
runs, so that no more than one layer's activations exist at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .corpus import Tokens
from .errors import InputError
from .models import Model, Tap, context_length, describe, plain, taps
from .statistics import Statistic

SITES = ("in", "pre", "up", "post", "out")
KINDS = ("kept", "sink", "special")
SINK_FACTOR = 10.0
BATCH = 8  # sequences a forward pass
PILOT = 4  # sequences that fix the sink thresholds and the shifts

Progress = Callable[[int, int], None]  # tokens done, tokens in all


@dataclass(frozen=True)
class Activations:
    """One layer's activations for one batch of tokens.

    Sites: `in` [n, d_model] what the FFN reads (after the norm), `pre` [n, d_mlp] before the nonlinearity
    (the gate's, when gated), `up` [n, d_mlp] the up-projection of a gated FFN, `post` [n, d_mlp] the hidden
    activation, `out` [n, d_model] what the down-projection writes.
    """

    layer: int
    at: Int[Tensor, " n"]  # flat index of each token in the corpus
    kind: Int[Tensor, " n"]  # index into KINDS
    sites: Mapping[str, Float[Tensor, "n width"]]

    @property
    def kept(self) -> Bool[Tensor, " n"]:
        """Ordinary tokens: neither attention sinks nor special."""
        return self.kind == 0


@dataclass(frozen=True)
class Probe:
    """One statistic of one site of one layer: which tokens it sees, and what of them.

    `make` builds the statistic from a pilot sample of what it will see; `of` maps the site's rows to what
    is measured; `half` restricts it to every other document.
    """

    layer: int
    site: str
    make: Callable[[Float[Tensor, "n width"]], Statistic]
    of: Callable[[Float[Tensor, "n width"]], Float[Tensor, "n other"]] = lambda x: x
    kinds: tuple[str, ...] = ("kept",)
    half: int | None = None


@dataclass(frozen=True)
class Sinks:
    """Norms above which a token is an attention sink: `factor` times the layer's median over a pilot."""

    factor: float
    residual: dict[int, float]
    hidden: dict[int, float]

    def find(self, layer: int, read: Mapping[str, Tensor]) -> Bool[Tensor, " n"]:
        """Which of a layer's tokens are sinks."""
        residual, hidden = _norms(read)
        return (residual > self.residual[layer]) | (hidden > self.hidden[layer])


def _norms(read: Mapping[str, Tensor]) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Norms of the residual stream and of the hidden activation, each neuron weighed as it is written."""
    return read["residual"].norm(dim=1), (read["post"].square() @ read["weight"]).sqrt()


def capture(
    model: Model,
    tokens: Tokens,
    sites: Sequence[str] = ("post",),
    layers: Sequence[int] | None = None,
    *,
    batch: int = BATCH,
    sink_factor: float = SINK_FACTOR,
) -> Iterator[dict[int, Activations]]:
    """Yield the activations of one batch of sequences after the other, by layer.

    Args:
        sites: any of `in`, `pre`, `up` (gated FFNs only), `post`, `out`.
        layers: the layers to read; all by default. Layers beyond the last are not run.
        batch: sequences a forward pass.
        sink_factor: a token is an attention sink where its residual or hidden norm is above this multiple
            of the layer's median; `inf` keeps every token.

    Raises:
        InputError: a site or a layer that the model does not have.
    """
    chosen = choose_layers(model, layers)
    _check_sites(sites, chosen)
    sinks = find_sinks(model, tokens, chosen, sink_factor)
    for rows in torch.arange(len(tokens.ids)).split(batch):
        found: dict[int, Activations] = {}

        def keep(tap: Tap, read: dict[str, Tensor], rows=rows, found=found) -> None:
            found[tap.layer] = _activations(tap, read, sites, rows, tokens, sinks)

        _run(model, tokens.ids[rows], chosen, keep)
        yield found


def collect(
    model: Model,
    tokens: Tokens,
    probes: Mapping[str, Probe],
    *,
    batch: int = BATCH,
    sink_factor: float = SINK_FACTOR,
    progress: Progress | None = None,
) -> dict[str, Statistic]:
    """Run the model once over the tokens and feed every probe's statistic; memory does not grow with tokens.

    Args:
        probes: what to measure, by any name; the answer has the same names.

    Raises:
        InputError: a site or a layer that the model does not have, or no probe.
    """
    if not probes:
        raise InputError("nothing to collect: got no probe; give at least one")
    by_layer: dict[int, list[tuple[str, Probe]]] = {}
    for name, probe in probes.items():
        by_layer.setdefault(probe.layer, []).append((name, probe))
    chosen = choose_layers(model, sorted(by_layer))
    for tap in chosen:
        _check_sites([probe.site for _, probe in by_layer[tap.layer]], [tap])
    half = (torch.cat([torch.zeros(1), tokens.document.flatten().diff()]) != 0).cumsum(0) % 2

    statistics: dict[str, Statistic] = {}

    def set_up(tap: Tap, read: dict[str, Tensor], ordinary: Tensor) -> None:
        for name, probe in by_layer[tap.layer]:
            statistics[name] = probe.make(probe.of(read[probe.site][ordinary]))

    sinks = find_sinks(model, tokens, chosen, sink_factor, set_up)
    for rows in torch.arange(len(tokens.ids)).split(batch):

        def feed(tap: Tap, read: dict[str, Tensor], rows=rows) -> None:
            wanted = by_layer[tap.layer]
            seen = _activations(tap, read, {probe.site for _, probe in wanted}, rows, tokens, sinks)
            for name, probe in wanted:
                use = torch.isin(seen.kind, torch.tensor([KINDS.index(kind) for kind in probe.kinds]))
                if probe.half is not None:
                    use &= half[seen.at] == probe.half
                x = probe.of(seen.sites[probe.site][use])
                statistics[name].update(x, seen.at[use].to(x.device))

        _run(model, tokens.ids[rows], chosen, feed)
        if progress:
            progress(int(rows[-1] + 1) * tokens.ids.shape[1], tokens.ids.numel())
    return statistics


def find_sinks(
    model: Model,
    tokens: Tokens,
    chosen: Sequence[Tap],
    factor: float,
    then: Callable[[Tap, dict[str, Tensor], Tensor], None] | None = None,
) -> Sinks:
    """Fix each layer's sink thresholds from the medians of a pilot: a few sequences spread over the corpus.

    `then` is shown each layer's pilot activations and which of the tokens are no sinks.
    """
    sinks = Sinks(factor, {}, {})

    def measure(tap: Tap, read: dict[str, Tensor]) -> None:
        residual, hidden = _norms(read)
        sinks.residual[tap.layer] = factor * float(residual.median())
        sinks.hidden[tap.layer] = factor * float(hidden.median())
        if then:
            then(tap, read, ~sinks.find(tap.layer, read))

    _run(model, tokens.ids[pilot_rows(tokens)], chosen, measure)
    return sinks


def pilot_rows(tokens: Tokens) -> Int[Tensor, " n"]:
    """The sequences of the pilot, spread evenly."""
    return torch.linspace(0, len(tokens.ids) - 1, min(PILOT, len(tokens.ids))).long()


def choose_layers(model: Model, layers: Sequence[int] | None = None) -> list[Tap]:
    """The taps of the layers asked for, in the order of the forward pass.

    Raises:
        InputError: a layer that has no FFN or is not there.
    """
    available = {tap.layer: tap for tap in taps(model)}
    if layers is not None and not layers:
        raise InputError("no layer chosen: name at least one")
    for layer in layers or ():
        if layer not in available:
            there = f"{min(available)} to {max(available)}"
            raise InputError(f"layer {layer} is not there: the FFNs are in layers {there}; choose among them")
    return [tap for layer, tap in available.items() if layers is None or layer in layers]


def _check_sites(sites: Sequence[str], chosen: Sequence[Tap]) -> None:
    for site in sites:
        if site not in SITES:
            raise InputError(f'site "{site}" is unknown: choose from {", ".join(SITES)}')
        if site == "up" and any(tap.gate is None and not tap.fused for tap in chosen):
            raise InputError('site "up" is there in gated FFNs only: use "pre" for this model')


def _activations(tap, read, sites, rows, tokens: Tokens, sinks: Sinks) -> Activations:
    length = tokens.ids.shape[1]
    at = rearrange(rows * length, "s -> s 1") + torch.arange(length)
    at = rearrange(at, "s l -> (s l)")
    kind = 2 * tokens.special[rows].flatten().long()
    kind[sinks.find(tap.layer, read).cpu()] = 1
    return Activations(tap.layer, at, kind, {site: read[site] for site in sites})


class _Enough(Exception):
    """Raised inside the forward pass once the last layer asked for has been read."""


@contextmanager
def _hooks(chosen: Sequence[Tap], on_layer: Callable[[Tap, dict[str, Tensor]], None]) -> Iterator[None]:
    handles: list[torch.utils.hooks.RemovableHandle] = []
    try:
        for tap in chosen:
            handles += _hook_layer(tap, on_layer, last=tap is chosen[-1])
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook_layer(tap: Tap, on_layer, last: bool) -> list[torch.utils.hooks.RemovableHandle]:
    read: dict[str, Tensor] = {}
    gated = tap.gate is not None or tap.fused
    # the scale of a gated neuron is a gauge, of a plain one it is not
    down: Any = tap.down
    weight = down.weight.detach().square().sum(0) if gated else torch.ones(())

    def rows(x: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[-1])

    def at_block(module: nn.Module, args: tuple, kwargs: dict) -> None:
        read["residual"] = rows(args[0] if args else kwargs["hidden_states"])

    def at_up(module: nn.Module, args: tuple, output: Tensor) -> None:
        read["in"] = rows(args[0])
        if tap.fused:
            read["pre"], read["up"] = rows(output).chunk(2, dim=1)
        else:
            read["pre" if tap.gate is None else "up"] = rows(output)

    def at_gate(module: nn.Module, args: tuple, output: Tensor) -> None:
        read["pre"] = rows(output)

    def at_down(module: nn.Module, args: tuple, output: Tensor) -> None:
        read["post"], read["out"] = rows(args[0]), rows(output)
        read["weight"] = weight.to(read["post"]).expand(read["post"].shape[1])
        on_layer(tap, dict(read))
        read.clear()  # or the layer's activations would live until the next batch
        if last:
            raise _Enough

    handles = [
        tap.block.register_forward_pre_hook(at_block, with_kwargs=True),
        tap.up.register_forward_hook(at_up),
        tap.down.register_forward_hook(at_down),
    ]
    if tap.gate is not None and not tap.fused:
        handles.append(tap.gate.register_forward_hook(at_gate))
    return handles


def _run(model: Model, ids: Int[Tensor, "s l"], chosen: Sequence[Tap], on_layer) -> None:
    twin = plain(model)
    if (longest := context_length(model)) < ids.shape[1]:
        raise InputError(
            f"sequences of {ids.shape[1]} tokens: this model reads {longest}; pack with length={longest}"
        )
    with _hooks(chosen, on_layer), torch.no_grad(), suppress(_Enough):
        # the base model: nobody asked for logits
        twin.base_model(input_ids=ids.to(twin.device), use_cache=False)


def settings_of(
    model: Model, tokens: Tokens, seed: int, *, batch: int = BATCH, sink_factor: float = SINK_FACTOR, **_
) -> dict:
    """All that decides what `collect` sees, for a result's settings."""
    return {
        "model": describe(model)["name"],
        "tokens": tokens.ids.numel(),
        "documents": tokens.n_documents,
        "seed": seed,
        "batch": batch,
        "sink_factor": sink_factor,
        "packing": tokens.settings,
    }

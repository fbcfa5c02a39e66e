"""From a model and tokens to a stream of activations, and from the stream to statistics.

`capture` hands out batches that nobody keeps; `collect` feeds them to statistics while the forward pass
runs, so that no more than one layer's activations exist at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .backoff import backing_off
from .corpus import Tokens
from .errors import InputError
from .forward import choose_ffns as choose_ffns
from .forward import choose_layers as choose_layers
from .forward import forward
from .memory import apart
from .models import Model, Tap, describe
from .sinks import Sinks, find_sinks, flat_index, not_finite
from .statistics import Count, Statistic

log = logging.getLogger(__name__)

SITES = ("in", "pre", "up", "post", "out")
KINDS = ("kept", "sink", "special", "nonfinite")
NONFINITE = ("stop", "skip")
SINK_FACTOR = 10.0
BATCH = 8  # sequences a forward pass


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
        """Ordinary tokens: neither attention sinks nor special, and finite."""
        return self.kind == 0


@dataclass(frozen=True)
class Probe:
    """One statistic of one site of one layer, or of several sites: which tokens it sees, and what of them.

    `make` builds the statistic from a pilot sample of what it will see; `of` maps the rows of the sites, each an
    argument, to what is measured; `block` (i, n) restricts it to every n-th document, from the i-th on.
    """

    layer: int
    site: str | tuple[str, ...]
    make: Callable[[Float[Tensor, "n width"]], Statistic]
    of: Callable[..., Float[Tensor, "n other"]] = lambda x: x  # one object, one computation
    kinds: tuple[str, ...] = ("kept",)
    block: tuple[int, int] | None = None

    @property
    def sites(self) -> tuple[str, ...]:
        return (self.site,) if isinstance(self.site, str) else self.site


def capture(
    model: Model,
    tokens: Tokens,
    sites: Sequence[str] = ("post",),
    layers: Sequence[int] | None = None,
    *,
    batch: int = BATCH,
    sink_factor: float = SINK_FACTOR,
    nonfinite: str = "stop",
) -> Iterator[dict[int, Activations]]:
    """Yield the activations of one batch of sequences after the other, by layer.

    Args:
        sites: any of `in`, `pre`, `up` (gated FFNs only), `post`, `out`.
        layers: the layers to read; all by default. Layers beyond the last are not run.
        batch: sequences a forward pass.
        sink_factor: a token is an attention sink where its residual or hidden norm is above this multiple
            of the layer's median; `inf` keeps every token.
        nonfinite: `stop` at a NaN or Inf, or `skip`: mark its token with that kind.

    Raises:
        InputError: a site or a layer that the model does not have.
        ModelRefused: an activation is NaN or Inf.
    """
    chosen = choose_layers(model, layers)
    _check_sites(sites, chosen)
    sinks = find_sinks(model, tokens, chosen, sink_factor, nonfinite)
    for rows in torch.arange(len(tokens.ids)).split(batch):
        found: dict[int, Activations] = {}

        def keep(tap: Tap, read: dict[str, Tensor], rows=rows, found=found) -> None:
            found[tap.layer] = _activations(tap, read, sites, rows, tokens, sinks, nonfinite)

        forward(model, tokens.ids[rows], chosen, keep)
        yield found


@dataclass(frozen=True)
class Pilot:
    """What is fixed before the first token counts: sink thresholds, and where each statistic starts."""

    sinks: Sinks
    starts: Mapping[str, Statistic]


def collect(
    model: Model,
    tokens: Tokens,
    probes: Mapping[str, Probe],
    *,
    batch: int = BATCH,
    sink_factor: float = SINK_FACTOR,
    nonfinite: str = "stop",
    progress: Progress | None = None,
) -> dict[str, Statistic]:
    """Run the model once over the tokens and feed every probe's statistic; memory does not grow with tokens.

    Args:
        probes: what to measure, by any name; the answer has the same names.
        nonfinite: `stop` at a NaN or Inf, or `skip` its token at that layer; then the answer also holds
            a `Count` of them, named `nonfinite/LAYER`.

    Raises:
        InputError: a site or a layer that the model does not have, or no probe.
        ModelRefused: an activation is NaN or Inf.
        MachineError: a single sequence does not fit into memory.
    """
    probes = counting(probes, nonfinite)
    rows = torch.arange(len(tokens.ids))

    def feed(batch: int) -> dict[str, Statistic]:
        start = pilot(model, tokens, probes, sink_factor=sink_factor, nonfinite=nonfinite)
        return collect_rows(
            model, tokens, probes, start, rows, batch=batch, nonfinite=nonfinite, progress=progress
        )

    return backing_off(batch, feed, log.warning)[0]


def counting(probes: Mapping[str, Probe], nonfinite: str) -> dict[str, Probe]:
    """The probes, and where non-finite tokens are skipped a count of them for each layer."""
    if nonfinite not in NONFINITE:
        raise InputError(f"nonfinite {nonfinite!r} is unknown: choose from {', '.join(NONFINITE)}")
    layers = {probe.layer: probe.sites for probe in probes.values()} if nonfinite == "skip" else {}
    return {**probes} | {
        f"nonfinite/{layer}": Probe(layer, sites[0], Count.about, kinds=("nonfinite",))
        for layer, sites in layers.items()
    }


def pilot(
    model: Model,
    tokens: Tokens,
    probes: Mapping[str, Probe],
    *,
    sink_factor: float = SINK_FACTOR,
    nonfinite: str = "stop",
) -> Pilot:
    """Fix the sink thresholds and set every statistic up, from a few sequences spread over the corpus."""
    by_layer = _by_layer(probes)
    chosen = choose_layers(model, sorted(by_layer))
    for tap in chosen:
        _check_sites([site for _, probe in by_layer[tap.layer] for site in probe.sites], [tap])
    starts: dict[str, Statistic] = {}

    def set_up(tap: Tap, read: dict[str, Tensor], ordinary: Tensor) -> None:
        for name, probe in by_layer[tap.layer]:
            starts[name] = probe.make(probe.of(*(read[site][ordinary] for site in probe.sites)))

    with apart():
        sinks = find_sinks(model, tokens, chosen, sink_factor, nonfinite, set_up)
    return Pilot(sinks, starts)


def collect_rows(
    model: Model,
    tokens: Tokens,
    probes: Mapping[str, Probe],
    start: Pilot,
    rows: Int[Tensor, " sequences"],
    *,
    batch: int = BATCH,
    nonfinite: str = "stop",
    progress: Progress | None = None,
) -> dict[str, Statistic]:
    """Feed these sequences to the pilot's statistics and hand them back: a copy would be memory for nothing."""
    groups = _groups(probes)
    chosen = choose_layers(model, sorted(groups))
    document = (torch.cat([torch.zeros(1), tokens.document.flatten().diff()]) != 0).cumsum(0)
    statistics = dict(start.starts)
    for done, some in enumerate(rows.split(batch)):

        def feed(tap: Tap, read: dict[str, Tensor], some=some) -> None:
            wanted = groups[tap.layer]
            read_from = {site for sites, *_ in wanted for site in sites}
            seen = _activations(tap, read, read_from, some, tokens, start.sinks, nonfinite)
            for (sites, of, kinds, block), names in wanted.items():
                use = torch.isin(seen.kind, torch.tensor([KINDS.index(kind) for kind in kinds]))
                if block is not None:
                    use &= document[seen.at] % block[1] == block[0]
                rows, at = [seen.sites[site] for site in sites], seen.at
                if not use.all():
                    row = use.nonzero().squeeze(1)
                    rows, at = [x.index_select(0, row.to(x.device)) for x in rows], at[row]
                x = of(*rows)
                at = at.to(x.device)
                for name in names:
                    statistics[name].update(x, at)

        forward(model, tokens.ids[some], chosen, feed)
        if progress:
            progress((done * batch + len(some)) * tokens.ids.shape[1], len(rows) * tokens.ids.shape[1])
    return statistics


def _groups(probes: Mapping[str, Probe]) -> dict[int, dict[tuple, list[str]]]:
    """By layer, the names of the probes that see the same rows."""
    groups: dict[int, dict[tuple, list[str]]] = {}
    for layer, wanted in _by_layer(probes).items():
        groups[layer] = {}
        for name, probe in wanted:
            groups[layer].setdefault((probe.sites, probe.of, probe.kinds, probe.block), []).append(name)
    return groups


def _by_layer(probes: Mapping[str, Probe]) -> dict[int, list[tuple[str, Probe]]]:
    if not probes:
        raise InputError("nothing to collect: got no probe; give at least one")
    by_layer: dict[int, list[tuple[str, Probe]]] = {}
    for name, probe in probes.items():
        by_layer.setdefault(probe.layer, []).append((name, probe))
    return by_layer


def _check_sites(sites: Sequence[str], chosen: Sequence[Tap]) -> None:
    for site in sites:
        if site not in SITES:
            raise InputError(f'site "{site}" is unknown: choose from {", ".join(SITES)}')
        if site == "up" and any(tap.gate is None and not tap.fused for tap in chosen):
            raise InputError('site "up" is there in gated FFNs only: use "pre" for this model')


def _activations(tap, read, sites, rows, tokens: Tokens, sinks: Sinks, nonfinite: str) -> Activations:
    bad = not_finite(tap, read, {*sites, "residual", "post"}, rows, tokens, nonfinite)
    sink, bad = torch.stack([sinks.find(tap, read), bad]).cpu()
    kind = 2 * tokens.special[rows].flatten().long()
    kind[sink], kind[bad] = KINDS.index("sink"), KINDS.index("nonfinite")
    return Activations(tap.layer, flat_index(rows, tokens), kind, {site: read[site] for site in sites})


def settings_of(
    model: Model,
    tokens: Tokens,
    seed: int,
    *,
    batch: int = BATCH,
    sink_factor: float = SINK_FACTOR,
    nonfinite: str = "stop",
    **_,
) -> dict:
    """All that decides what `collect` sees, for a result's settings."""
    return {
        "model": describe(model)["name"],
        "tokens": tokens.ids.numel(),
        "documents": tokens.n_documents,
        "seed": seed,
        "batch": batch,
        "sink_factor": sink_factor,
        "nonfinite": nonfinite,
        "packing": tokens.settings,
    }

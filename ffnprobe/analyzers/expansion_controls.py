"""What does one model of a family give, and what do its controls: no training, random features, fewer neurons?"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from scipy.linalg import hadamard
from torch import Tensor

from .. import spectrum as sp
from ..corpus import Tokens
from ..family import MEMBERS, digest
from ..ffn import ACTIVATIONS, FFN
from ..hub import locate
from ..intervene import predictable, token_losses
from ..models import Model, ffns, load_model, plain, tokenizer_of
from ..placement import input_device
from ..statistics import Count, Moments
from ..stream import Probe, collect

log = logging.getLogger(__name__)

TRAINED, STEP_0, RANDOM, MATCHED, SUBSET = STATES = (
    "trained",
    "step 0",
    "random features",
    "random features, matched",
    "subset of the widest",
)
BLOCKS = 8  # of documents
DRAWS = 3  # subsets of each width
Line = dict[str, Any]  # a row's columns
ONLY_TRAINED: Line = {
    "loss": None,
    "soft_rank_extrapolated": None,
    "participation_ratio_unmasked": None,
    "soft_rank_unmasked": None,
    "closed_form": None,
    "soft_rank_halves": [],
    "participation_ratio_halves": [],
}


def controlled(
    model: Model, tokens: Tokens, longer: Tokens, spec: str | Path, seed: int, collecting: Mapping[str, Any]
) -> Iterator[Line]:
    """The trained model, and random features on its own inputs: three lines a layer."""
    layers = ffns(model)
    probes: dict[str, Probe] = {}
    for ffn in layers:
        probes |= _hidden(ffn, BLOCKS)
        features = ffn.canonical().randomised(seed).hidden
        probes[f"{ffn.layer}/in"] = Probe(ffn.layer, "in", Moments.about)
        probes[f"{ffn.layer}/null"] = Probe(ffn.layer, "in", Moments.about, of=features)
    found: Mapping[str, Any] = collect(model, tokens, probes, **collecting)
    loss = next_token_loss(model, longer)
    for ffn in layers:
        names = [*map(str, range(BLOCKS)), "dropped", "in", "null"]
        *blocks, dropped, x, null = (found[f"{ffn.layer}/{name}"] for name in names)
        facts = _facts(ffn, spec, found) | {"loss": loss}
        yield from layer_lines(ffn, facts, blocks, dropped=dropped, x=x, null=null)


def layer_lines(
    ffn: FFN, facts: Line, blocks: Sequence[Moments], *, dropped: Moments, x: Moments, null: Moments
) -> Iterator[Line]:
    """A trained layer, and random features on its own inputs: three lines.

    Args:
        facts: the columns that are not measured here.
        blocks: of h, by blocks of documents.
        dropped: of h of the tokens that were set apart.
        x: of the inputs.
        null: of the random features.
    """
    whole = _merged(blocks)
    covariance, random = whole.compute(), null.compute()
    measured = _ranks(sp.eigenvalues(covariance.centred), whole)
    everything = sp.eigenvalues(_merged([whole, dropped]).compute().centred)
    unmasked: Line = {
        "soft_rank_unmasked": sp.soft_rank(everything),
        "participation_ratio_unmasked": sp.participation_ratio(everything),
    }
    halves = _half_samples(blocks, measured)
    yield ONLY_TRAINED | facts | {"state": TRAINED} | measured | unmasked | halves
    facts = facts | {"loss": None}
    closed = None if ffn.gated else _closed_form(ffn, x)
    plainly = _ranks(sp.eigenvalues(random.centred), null)
    yield ONLY_TRAINED | facts | {"state": RANDOM, "closed_form": closed} | plainly
    yield ONLY_TRAINED | facts | {"state": MATCHED} | _ranks(random.scaled(covariance.variance))


def untrained(
    model: Model, tokens: Tokens, longer: Tokens, spec: str | Path, collecting: Mapping[str, Any]
) -> Iterator[Line]:
    """The model before training, if it is one of ours: a line a layer."""
    start = before_training(model, spec)
    if start is None:
        return
    probes: dict[str, Probe] = {}
    for ffn in ffns(start):
        probes |= _hidden(ffn, 1)
    found: Mapping[str, Any] = collect(start, tokens, probes, **collecting)
    loss = next_token_loss(start, longer)
    for ffn in ffns(start):
        moments = found[f"{ffn.layer}/0"]
        measured = _ranks(sp.eigenvalues(moments.compute().centred), moments)
        yield ONLY_TRAINED | _facts(ffn, spec, found) | {"state": STEP_0, "loss": loss} | measured


def before_training(model: Model, spec: str | Path) -> Model | None:
    """One of our models as it was before training; None for another, or where it cannot be made again."""
    training = _training(spec)
    if training is None:
        return None
    weights = MEMBERS[training["member"]].at_step_0(training["seed"])
    if digest(weights.state_dict()) != training["step_0_sha256"]:
        log.warning("%s: another torch or transformers gives other weights at step 0, which is left out", spec)
        return None
    return load_model(weights, tokenizer=tokenizer_of(model), device=input_device(plain(model)))


def subsets(
    model: Model, tokens: Tokens, spec: str | Path, widths: Sequence[int], seed: int, collecting: Mapping[str, Any]
) -> Iterator[Line]:
    """So many neurons of a model, drawn at random: a line a layer and width.

    The hard rank is that of all subsets (`spectrum.subset_participation_ratio`), the others are means of DRAWS.
    """
    random = torch.Generator().manual_seed(seed)
    probes: dict[str, Probe] = {}
    for ffn in ffns(model):
        probes |= _hidden(ffn, 1)
        for width in widths:
            for draw in range(DRAWS):
                rows = torch.randperm(ffn.d_mlp, generator=random)[:width]
                probes[f"{ffn.layer}/{width}/{draw}"] = Probe(
                    ffn.layer, "post", Moments.about, of=_some(ffn, rows)
                )
    found: Mapping[str, Any] = collect(model, tokens, probes, **collecting)
    for ffn in ffns(model):
        covariance = found[f"{ffn.layer}/0"].compute().centred
        for width in widths:
            drawn = [found[f"{ffn.layer}/{width}/{draw}"] for draw in range(DRAWS)]
            each = [_ranks(sp.eigenvalues(moments.compute().centred), moments) for moments in drawn]
            measured = {name: fmean(line[name] for line in each) for name in each[0]}
            measured["participation_ratio"] = sp.subset_participation_ratio(covariance, width)
            facts = _facts(ffn, spec, found) | {"d_mlp": width, "expansion": width / ffn.d_model}
            yield ONLY_TRAINED | facts | {"state": SUBSET} | measured


@torch.inference_mode()
def next_token_loss(model: Model, tokens: Tokens) -> float:
    """Mean cross-entropy of the tokens that follow another one of their document, nats."""
    each = torch.cat([token_losses(model, ids) for ids in tokens.ids.split(8)])
    return float(each[predictable(tokens)].double().mean())


def _training(spec: str | Path) -> dict[str, Any] | None:
    """How one of our models was trained; None for another one."""
    path = locate(spec)[0] / "training.json"
    return json.loads(path.read_text()) if path.is_file() else None


def _hidden(ffn: FFN, blocks: int) -> dict[str, Probe]:
    """h by blocks of documents, and what was set apart."""
    of = _some(ffn, torch.arange(ffn.d_mlp))
    probe = Probe(ffn.layer, "post", Moments.about, of=of)
    return {f"{ffn.layer}/{i}": replace(probe, block=(i, blocks)) for i in range(blocks)} | {
        f"{ffn.layer}/dropped": replace(probe, kinds=("sink", "special")),
        f"{ffn.layer}/sinks": Probe(ffn.layer, "in", Count.about, kinds=("sink",)),
    }


def _some(ffn: FFN, rows: Tensor) -> Callable[[Tensor], Tensor]:
    """The contributions of these neurons; of a plain layer, which has no gauge, their activations."""
    everyone, gauge = len(rows) == ffn.d_mlp, ffn.gauge[rows]

    def of(hidden: Tensor) -> Tensor:
        some = hidden if everyone else hidden.index_select(1, rows.to(hidden.device))
        return some * gauge if ffn.gated else some

    return of


def _facts(ffn: FFN, spec: str | Path, found: Mapping[str, Any]) -> Line:
    training = _training(spec)
    sinks = found[f"{ffn.layer}/sinks"].n
    return {
        "model": Path(spec).name,
        "arm": ffn.arm,
        "seed": training["seed"] if training else 0,
        "layer": ffn.layer,
        "d_mlp": ffn.d_mlp,
        "expansion": ffn.expansion,
        "tokens": sum(found[name].n for i in range(BLOCKS) if (name := f"{ffn.layer}/{i}") in found),
        "sinks": sinks,
        "special": found[f"{ffn.layer}/dropped"].n - sinks,
    }


def _ranks(spectrum: Tensor, moments: Moments | None = None) -> Line:
    return {
        "participation_ratio": sp.participation_ratio(spectrum),
        "participation_ratio_debiased": None if moments is None else moments.participation_ratio(),
        "soft_rank": sp.soft_rank(spectrum),
        "erank_rv": sp.erank_rv(spectrum),
        "stable_rank": sp.stable_rank(spectrum),
        "rank_at_90": float(sp.rank_at_energy(spectrum, 0.90)),
        "rank_at_99": float(sp.rank_at_energy(spectrum, 0.99)),
        "numerical_rank": float(sp.numerical_rank(spectrum)),
    }


def _half_samples(blocks: Sequence[Moments], whole: Line) -> Line:
    """ln of both ranks in 14 half-samples of the blocks, less their mean; and the soft rank at endless tokens.

    Seven splits of eight blocks in two, orthogonal to each other: the variance over the half-samples is then just
    that of the whole sample's mean over samples of documents (McCarthy 1966).
    """
    soft, hard = [], []
    for signs in hadamard(BLOCKS)[1:]:
        for sign in (1, -1):
            half = _merged([block for block, s in zip(blocks, signs, strict=True) if s == sign])
            spectrum = sp.eigenvalues(half.compute().centred)
            soft.append(sp.soft_rank(spectrum))
            hard.append(sp.participation_ratio(spectrum))
    logs = torch.tensor([soft, hard], dtype=torch.float64).log()
    lost = float(logs[0].mean() - torch.tensor(whole["soft_rank"]).log())
    off = (logs - logs.mean(dim=1, keepdim=True)).tolist()
    return {
        "soft_rank_halves": off[0],
        "participation_ratio_halves": off[1],
        "soft_rank_extrapolated": whole["soft_rank"] * float(torch.tensor(-lost).exp()),
    }


def _closed_form(ffn: FFN, x: Moments) -> float:
    return sp.random_feature_rank(x.participation_ratio(), ffn.d_mlp, ACTIVATIONS[ffn.activation])


def _merged(parts: Sequence[Moments]) -> Moments:
    whole = Moments(parts[0].state())
    for part in parts[1:]:
        whole.merge(part)
    return whole

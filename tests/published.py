"""How is each published number measured with what ffnprobe has in public? See tests/hub/."""

import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
import torch

from ffnprobe import capture, collect, ffns, load_model
from ffnprobe import spectrum as sp
from ffnprobe.analyzers.vocabulary_moments import Vocabulary
from ffnprobe.corpus import Tokens
from ffnprobe.errors import InputError, MachineError
from ffnprobe.models import Model, plain, tokenizer_of
from ffnprobe.statistics import Moments
from ffnprobe.stream import Probe
from ffnprobe.unembedding import unembedding

FOLDERS = "FFNPROBE_HUB"  # a folder that holds models as OWNER--NAME or NAME, saved by save_pretrained
TEXTS = Path(__file__).parent / "hub" / "nerve_texts.txt"


def published(name: str) -> Model:
    """The model, from a local folder, the cache or the hub; where none has it, skip the test and say why."""
    found = _load(name)
    if isinstance(found, str):
        pytest.skip(found)
    return found


@cache
def _load(name: str) -> Model | str:
    local = Path(os.environ.get(FOLDERS, ".")) / name.replace("/", "--")
    try:
        return load_model(local if FOLDERS in os.environ and local.is_dir() else name, device="cpu")
    except (InputError, MachineError) as error:  # what the hub lacks, and what keeps us from it
        return f"{name}: {error}"


def reading(model: Model, layer: int, neuron: int) -> dict[str, float]:
    """A neuron's folded weights and its value's cosines with the vocabulary (A1)."""
    ffn = next(ffn for ffn in ffns(model, "folded") if ffn.layer == layer)
    key, value = ffn.keys[neuron], ffn.values[neuron]
    spread = Vocabulary.of(unembedding(model)).spread(value[None])
    return {
        "w_in": float(key.norm()),
        "b_in": 0.0 if ffn.key_bias is None else float(ffn.key_bias[neuron]),
        "w_out": float(value.norm()),
        "cos": float(key @ value / key.norm() / value.norm()),
        "variance": float(spread.variance),
        "skew": float(spread.skew),
        "kurtosis": float(spread.kurtosis),
    }


def peaked(model: Model, kurtosis: float = 10) -> int:
    """Neurons whose value's cosines with the vocabulary have more than this kurtosis (A2)."""
    vocabulary = Vocabulary.of(unembedding(model))
    return sum(int((vocabulary.spread(ffn.values).kurtosis > kurtosis).sum()) for ffn in ffns(model, "folded"))


def quiet(model: Model, neurons: Sequence[int]) -> list[tuple[float, bool]]:
    """Of neurons of the last layer: the share of the layer with less logit variance, and: is their norm above the
    median (A3)."""
    last = ffns(model, "folded")[-1]
    variance, norm = Vocabulary.of(unembedding(model)).logit_variance(last.values), last.values.norm(dim=1)
    return [(float((variance < variance[i]).double().mean()), bool(norm[i] > norm.median())) for i in neurons]


def outliers(model: Model, sds: float = 3) -> set[int]:
    """Coordinates of wpe[0] + MLP_0(wpe[0]) above their mean by `sds` deviations; no norm (A4)."""
    ffn, position = ffns(model)[0], plain(model).get_parameter("transformer.wpe.weight")[0].detach()
    size = (position + ffn.write(ffn.hidden(position))).abs()
    return set((size > size.mean() + sds * size.std()).nonzero().flatten().tolist())


def padded(model: Model, texts: Sequence[str], length: int) -> Tokens:
    """Texts cut or filled up with the end-of-text token to one length; all positions count."""
    tokenizer, end = tokenizer_of(model), tokenizer_of(model).eos_token_id
    ids = torch.tensor(
        [(tokenizer(t, add_special_tokens=False).input_ids + [end] * length)[:length] for t in texts]
    )
    document = torch.arange(len(ids))[:, None].expand_as(ids).clone()
    return Tokens(ids, document, torch.zeros_like(ids, dtype=torch.bool), {})


def spectra(model: Model, tokens: Tokens) -> list[dict[str, float]]:
    """By layer, entropy (nats) and participation ratio of the centred spectrum before and after the nonlinearity,
    no position left out (A6, A7)."""
    names = [(ffn.layer, site) for ffn in ffns(model) for site in ("pre", "post")]
    probes = {f"{layer}/{site}": Probe(layer, site, Moments.about) for layer, site in names}
    found = collect(model, tokens, probes, sink_factor=float("inf"))
    lines = []
    for ffn in ffns(model):
        pre, post = (sp.eigenvalues(found[f"{ffn.layer}/{site}"].compute().centred) for site in ("pre", "post"))
        entropy = [float(torch.tensor(sp.soft_rank(values)).log()) for values in (pre, post)]
        ranks = sp.participation_ratio(pre), sp.participation_ratio(post)
        lines.append(
            dict(zip(("entropy_pre", "entropy_post", "pr_pre", "pr_post"), (*entropy, *ranks), strict=True))
        )
    return lines


def top_share(model: Model, tokens: Tokens, k: int = 10) -> list[float]:
    """By layer, the share of the k largest |h_i| |v_i| in their sum, mean over ordinary tokens (A8)."""
    norms = {ffn.layer: ffn.values.norm(dim=1) for ffn in ffns(model)}
    shares: dict[int, list[torch.Tensor]] = {layer: [] for layer in norms}
    for batch in capture(model, tokens, ["post"]):
        for layer, seen in batch.items():
            size = seen.sites["post"][seen.kept].abs() * norms[layer]
            shares[layer].append(size.topk(k, dim=1).values.sum(1) / size.sum(1))
    return [float(torch.cat(some).mean()) for some in shares.values()]


def affine_r2(model: Model, tokens: Tokens, ridge: float = 1e-8) -> list[float]:
    """By layer, R² on every second document of the affine map x -> y that is best on the others (A9); sinks in."""
    layers = ffns(model)
    sums: dict[int, torch.Tensor] = {}
    even = tokens.document.flatten() % 2 == 0
    for batch in capture(model, tokens, ["in", "out"], sink_factor=float("inf")):
        for layer, seen in batch.items():
            x = torch.cat([seen.sites["in"], torch.ones(len(seen.at), 1), seen.sites["out"]], dim=1).double()
            held = even[seen.at]
            sums[layer] = sums.get(layer, 0) + torch.stack([x[~held].T @ x[~held], x[held].T @ x[held]])
    found = []
    for ffn in layers:
        (fit, test), d = sums[ffn.layer], ffn.d_model + 1
        gram = fit[:d, :d] + ridge * fit[:d, :d].diagonal().mean() * torch.eye(d)
        there = torch.linalg.solve(gram, fit[:d, d:])
        left = test[d:, d:].trace() - 2 * (there * test[:d, d:]).sum() + (there * (test[:d, :d] @ there)).sum()
        total = test[d:, d:].trace() - test[d - 1, d:].square().sum() / test[d - 1, d - 1]
        found.append(float(1 - left / total))
    return found

"""How many directions does h of a T5's encoder use, beside random features on its own inputs?

ffnprobe loads no encoder-decoder, so plain hooks read the layers here. What they read goes into the statistics,
rules and figures of `ffnprobe.expansion`; there is no loss, because an encoder predicts nothing.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, T5EncoderModel

from ffnprobe import FFN, Moments
from ffnprobe.analyzers.expansion import Expansion, Row
from ffnprobe.analyzers.expansion_controls import BLOCKS, Line, layer_lines
from ffnprobe.corpus import Corpus
from ffnprobe.errors import InputError, ModelRefused
from ffnprobe.ffn import ACTIVATIONS
from ffnprobe.hub import locate, quiet
from ffnprobe.stream import SINK_FACTOR
from ffnprobe.taps import Tap, activations, recording

PER_DOCUMENT = 64  # tokens


@dataclass(frozen=True)
class Encoder:
    name: str
    network: T5EncoderModel
    tokenizer: PreTrainedTokenizerBase
    taps: list[Tap]
    ffns: list[FFN]


def load_encoder(spec: str | Path) -> Encoder:
    """The encoder of a T5 with plain layers, from safetensors; no code of the model's own is run.

    Raises:
        InputError: there is no such model, or it cannot be read.
        ModelRefused: it is no plain T5, or weights are missing.
    """
    folder, _ = locate(spec)
    name = Path(str(spec).partition("@")[0]).name
    local: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    reader: Any = T5EncoderModel
    try:
        with quiet():
            config = AutoConfig.from_pretrained(folder, **local)
            if config.model_type != "t5" or config.is_gated_act:
                what = "gated" if config.model_type == "t5" else f"a {config.model_type}"
                raise ModelRefused(f"{name} is {what}: give a T5 with plain layers, as T5-Efficient is")
            network, report = reader.from_pretrained(
                folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **local
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, **local)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"{name} could not be read ({reason}): save or download it again") from error
    if missing := sorted(report["missing_keys"]):
        # transformers would go on with random numbers in their place
        raise ModelRefused(f"{name} lacks {len(missing)} weights, the first is {missing[0]}: download it again")
    blocks: list[Any] = list(network.eval().encoder.block)
    dense: list[Any] = [block.layer[-1].DenseReluDense for block in blocks]
    taps = [
        Tap(layer, block, up=ff.wi, gate=None, down=ff.wo, fused=False)
        for layer, (block, ff) in enumerate(zip(blocks, dense, strict=True))
    ]
    found = activations(network, taps, torch.arange(18).reshape(2, 9))
    if unknown := [activation for activation in found if activation not in ACTIVATIONS]:
        raise ModelRefused(f"{name} has a nonlinearity that is {unknown[0]}")
    ffns = [
        FFN(layer, ff.wi.weight.detach(), ff.wo.weight.detach().T, activation)
        for layer, (ff, activation) in enumerate(zip(dense, found, strict=True))
    ]
    return Encoder(name, network, tokenizer, taps, ffns)


@dataclass(frozen=True)
class Documents:
    """The start of each document, a row each: an encoder reads both ways, so none may see another."""

    ids: Int[Tensor, "documents length"]
    real: Bool[Tensor, "documents length"]  # no padding
    ordinary: Bool[Tensor, "documents length"]  # neither padding nor special

    @property
    def blocks(self) -> list[Int[Tensor, " some"]]:
        return [torch.arange(i, len(self.ids), BLOCKS) for i in range(BLOCKS)]


def documents_of(corpus: Corpus, tokenizer: Any, n: int, seed: int) -> Documents:
    """`n` documents drawn at random, at most 64 tokens of each.

    Raises:
        InputError: they are fewer than the half-samples need.
    """
    drawn = torch.randperm(len(corpus.documents), generator=torch.Generator().manual_seed(seed))[:n].tolist()
    if len(drawn) < 2 * BLOCKS:
        raise InputError(f"got {len(drawn)} documents: half-samples need {2 * BLOCKS}; give more")
    found = tokenizer(
        [corpus.documents[i].text for i in drawn],
        max_length=PER_DOCUMENT,
        truncation=True,
        padding=True,
        split_special_tokens=True,
        return_tensors="pt",
    )
    special = torch.isin(found.input_ids, torch.tensor(tokenizer.all_special_ids))
    return Documents(found.input_ids, found.attention_mask.bool(), ~special)


def read(
    encoder: Encoder, layer: int, documents: Documents, rows: Int[Tensor, " some"]
) -> dict[str, Float[Tensor, "n width"]]:
    """The residual stream, x and h of a layer, a row a token, padding included."""
    tap = encoder.taps[layer]
    modules: dict[Hashable, nn.Module] = {"residual": tap.block, "in": tap.up, "post": tap.down}
    with recording(modules) as calls, torch.no_grad():
        encoder.network(input_ids=documents.ids[rows], attention_mask=documents.real[rows])
    return {str(site): entering for site, ((entering, _),) in calls.items()}


def find_sinks(
    encoder: Encoder, layer: int, documents: Documents, factor: float
) -> Bool[Tensor, "documents length"]:
    """The ordinary tokens whose residual or hidden norm is above `factor` times the layer's median."""
    norms = {site: torch.zeros(documents.ids.shape) for site in ("residual", "post")}
    for rows in documents.blocks:
        seen = read(encoder, layer, documents, rows)
        for site, norm in norms.items():
            norm[rows] = seen[site].norm(dim=1).reshape(len(rows), -1)
    above = [norm > factor * norm[documents.ordinary].median() for norm in norms.values()]
    return (above[0] | above[1]) & documents.ordinary


def encoder_lines(
    encoder: Encoder, layer: int, documents: Documents, seed: int = 0, factor: float = SINK_FACTOR
) -> Iterator[Line]:
    """Three lines of a layer: trained, random features on its inputs, and these at the trained variances."""
    ffn = encoder.ffns[layer]
    features = ffn.randomised(seed).hidden
    sinks = find_sinks(encoder, layer, documents, factor)
    kept = documents.ordinary & ~sinks
    pilot = read(encoder, layer, documents, documents.blocks[0])
    x, h = (pilot[site][kept[documents.blocks[0]].flatten()] for site in ("in", "post"))
    of_x, of_features, dropped = Moments.about(x), Moments.about(features(x)), Moments.about(h)
    blocks = [Moments.about(h) for _ in range(BLOCKS)]
    for block, rows in zip(blocks, documents.blocks, strict=True):
        seen, use = read(encoder, layer, documents, rows), kept[rows].flatten()
        _feed(block, seen["post"][use])
        _feed(dropped, seen["post"][documents.real[rows].flatten() & ~use])
        _feed(of_x, seen["in"][use])
        _feed(of_features, features(seen["in"][use]))
    facts = {
        "model": encoder.name,
        "arm": f"T5 encoder, {ffn.activation}",
        "seed": 0,
        "layer": layer,
        "d_mlp": ffn.d_mlp,
        "expansion": ffn.expansion,
        "tokens": int(kept.sum()),
        "sinks": int(sinks.sum()),
        "special": int((documents.real & ~documents.ordinary).sum()),
    }
    return layer_lines(ffn, facts, blocks, dropped=dropped, x=of_x, null=of_features)


def _feed(moments: Moments, x: Float[Tensor, "n width"]) -> None:
    moments.update(x, torch.arange(len(x)))


def encoder_expansion(
    specs: Sequence[str | Path],
    corpus: Corpus,
    *,
    documents: int = 256,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> Expansion:
    """Every rank of h of encoders that differ in d_ff alone; one layer's statistics are held at a time.

    Raises:
        InputError: they differ in more, a layer is not there, or documents are too few.
    """
    rows: list[Row] = []
    shapes: dict[tuple[int, int], str] = {}
    settings: dict[str, Any] = {}
    for spec in specs:
        encoder = load_encoder(spec)
        shapes.setdefault((len(encoder.ffns), encoder.ffns[0].d_model), encoder.name)
        if len(shapes) > 1:
            raise InputError(
                f"{' and '.join(shapes.values())} differ in depth or d_model: give d_ff alone to differ"
            )
        if beyond := set(layers or ()) - set(range(len(encoder.ffns))):
            raise InputError(f"layer {min(beyond)} is not there: {encoder.name} has {len(encoder.ffns)}")
        text = documents_of(corpus, encoder.tokenizer, documents, seed)
        settings = {
            "model": f"{next(iter(shapes.values()))} to {encoder.name}",
            "tokens": int(text.real.sum()),
            "documents": len(text.ids),
            "seed": seed,
            "sink_factor": SINK_FACTOR,
            "per_document": PER_DOCUMENT,
            "corpus": corpus.name,
            "corpus_sha256": corpus.sha256,
        }
        for layer in range(len(encoder.ffns)) if layers is None else layers:
            say(f"measuring {encoder.name}, layer {layer}")
            rows += [Row(**line) for line in encoder_lines(encoder, layer, text, seed)]
    return Expansion(rows, settings)

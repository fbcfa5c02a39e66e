"""Where are the feed-forward layers of a pretrained model, and are they what they are said to be?

The only importer of transformer_lens, whose 4.3.0 has faults that the self-check is there to catch.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from ffnprobe.check import ModelCheck as ModelCheck
from ffnprobe.check import check
from ffnprobe.errors import InputError, ModelRefused
from ffnprobe.ffn import FFN
from ffnprobe.hub import BUILT_IN as BUILT_IN
from ffnprobe.hub import Say, locate, log, provenance, quiet
from ffnprobe.hub import fetch as fetch
from ffnprobe.placement import (
    DeviceMap,
    dispatched,
    dtype_name,
    dtype_of,
    input_device,
    refuse_offloaded,
    refuse_split_layers,
)
from ffnprobe.taps import Tap as Tap
from ffnprobe.taps import activations, recording


@dataclass(frozen=True, eq=False)
class _Loaded:
    twin: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    note: str


Model = TransformerBridge

# beside the bridge, not on it: an attribute that is a module would be registered as its child
_LOADED: WeakKeyDictionary[TransformerBridge, _Loaded] = WeakKeyDictionary()


def load_model(
    spec: str | Path | PreTrainedModel,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = torch.float32,
    device_map: DeviceMap | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    say: Say = log.info,
    refuse: bool = True,
) -> TransformerBridge:
    """The bridge of a hub id, a local folder, a .gguf file, a built-in name or a loaded model, self-checked.

    Nothing of the model's own code is run and no weights are unpickled. A model that is passed in stays
    as it is: the bridge shares its tensors, not its modules (on another `device`, that of the tensors
    themselves moves). `say` hears of downloads. With `refuse` off a model that fails the self-check is
    returned for a look at `check_model`.

    Args:
        device: where the whole model goes; the GPU if there is one.
        dtype: of the weights that are read from disk: float32, bfloat16 or float16.
        device_map: how transformers spreads a model that is larger than one GPU ("auto", or a dict).

    Raises:
        InputError: there is no such model, or the options do not go together.
        ModelRefused: it cannot be measured truthfully, or does not fit on the GPUs.
    """
    dtype = dtype_of(dtype)
    if device is not None and device_map is not None:
        raise InputError("got both device and device_map: give one of them")
    if isinstance(spec, PreTrainedModel):
        if device_map is not None:
            raise InputError("got device_map for a model that is loaded already: give it to from_pretrained")
        hf, note, name = _share(spec), "", type(spec).__name__
        if tokenizer is None:
            raise InputError(f"a loaded {name} came without its tokenizer: pass tokenizer=")
    else:
        folder, gguf = locate(spec, say)
        name = str(spec) if str(spec) in BUILT_IN or not Path(spec).exists() else Path(spec).resolve().name
        hf, tokenizer = _read(folder, gguf, name, dtype, device_map, tokenizer)
        note = f"its weights carry the rounding of {gguf}" if gguf else provenance(folder).get("note", "")
    refuse_offloaded(hf, name)
    _refuse_weights(hf, name)
    _refuse_tokenizer(hf, tokenizer, name)
    hf.eval()
    default = hf.device if isinstance(spec, PreTrainedModel) else "cuda" if torch.cuda.is_available() else "cpu"
    if dispatched(hf) and device is not None:
        raise InputError(f"{name} is spread over devices already: leave out device")
    if device_map is None and not dispatched(hf):
        nn.Module.to(hf, torch.device(device or default))
    with quiet():
        twin = _share(hf)
        _attention(hf, "eager")  # the bridge's hooks read the attention pattern
        _attention(twin, "sdpa")
        bridge = _boot(hf, tokenizer, name)
    _LOADED[bridge] = _Loaded(twin, tokenizer, name, note)
    refuse_split_layers(taps(bridge), name)
    try:
        result = check_model(bridge)
    except RuntimeError as error:
        if dtype_name(twin) == "float32" or isinstance(error, torch.OutOfMemoryError):
            raise
        # OLMo 2's attention, for one, mixes precisions in transformer_lens 4.3.0
        raise ModelRefused(
            f"transformer_lens cannot run {name} in {dtype_name(twin)} ({_line(error)}): use float32"
        ) from error
    if not result.ok and twin.config._attn_implementation != "eager":
        _attention(twin, "eager")  # sdpa may leave out what a family does to its attention scores
        result = check_model(bridge)
    if refuse and not result.ok:
        raise ModelRefused(f"{name} failed the self-check: {result.problems[0]}: choose another model")
    return bridge


def _read(
    folder: Path,
    gguf: str | None,
    name: str,
    dtype: torch.dtype,
    device_map: DeviceMap | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    source: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    source |= {"gguf_file": gguf} if gguf else {}
    with quiet():
        try:
            config = AutoConfig.from_pretrained(folder, **source)
        except Exception as error:  # whatever a torn file makes the libraries raise
            raise InputError(f"{name} has no readable configuration ({_line(error)}): {_AGAIN}") from error
        if experts := _experts(config):  # before the weights are read, because a mixture is large
            raise ModelRefused(f"{name} is a mixture of experts ({experts}): {_DENSE}")
        if config.is_encoder_decoder:
            raise ModelRefused(f"{name} is an encoder-decoder ({config.model_type}), not one stack: {_DENSE}")
        masked = any(a.endswith("ForMaskedLM") for a in config.architectures or [])
        auto: Any = AutoModelForMaskedLM if masked else AutoModelForCausalLM
        try:
            hf, report = auto.from_pretrained(
                folder,
                dtype=dtype,
                device_map=device_map,
                use_safetensors=True,
                output_loading_info=True,
                **source,
            )
        except Exception as error:
            remedy = _AGAIN if device_map is None else f"correct device_map ({device_map!r}), or {_AGAIN}"
            raise InputError(f"{name} could not be read ({_line(error)}): {remedy}") from error
        if missing := sorted(report["missing_keys"]):
            # transformers would go on with random numbers in their place
            raise ModelRefused(f"{name} lacks {len(missing)} weights, the first is {missing[0]}: {_AGAIN}")
        try:
            tokenizer = tokenizer or AutoTokenizer.from_pretrained(folder, **source)
        except Exception as error:
            raise InputError(f"{name} has no readable tokenizer ({_line(error)}): pass tokenizer=") from error
    return hf, tokenizer


def _experts(config: PretrainedConfig) -> str | None:
    sizes = {k: v for k, v in config.to_dict().items() if k.endswith("experts") and isinstance(v, int)}
    return next((f"{k} = {v}" for k, v in sizes.items() if v > 1), None)


_AGAIN = "save or download it again"
_DENSE = "choose a model with dense feed-forward layers"


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _refuse_weights(hf: PreTrainedModel, name: str) -> None:
    for tensor, weight in hf.named_parameters():
        if not (finite := torch.isfinite(weight)).all():
            bad = f"{int((~finite).sum())} of {weight.numel()}"
            raise ModelRefused(f"{name}: {tensor} is NaN or infinite in {bad} entries: {_AGAIN}")


def _refuse_tokenizer(hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    if not tokenizer.encode("a cat", add_special_tokens=False):
        # transformers makes an empty one where the files are missing
        raise InputError(f"{name} has an empty tokenizer: give the tokenizer that belongs to this model")
    rows = _rows(hf)
    token, largest = max(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    if largest >= rows:
        raise InputError(
            f"{name}: the tokenizer's ids reach {largest} ({token!r}), the vocabulary has {rows} rows: "
            "give the tokenizer that belongs to this model"
        )


def _rows(hf: PreTrainedModel) -> int:
    embedding: Any = hf.get_input_embeddings()
    return embedding.weight.shape[0]


def _share(hf: PreTrainedModel) -> PreTrainedModel:
    """Another set of modules around the same tensors."""
    return copy.deepcopy(hf, {id(t): t for t in [*hf.parameters(), *hf.buffers()]})


def _attention(hf: PreTrainedModel, kind: str) -> None:
    try:
        hf.set_attn_implementation(kind)
    except ValueError:  # gemma2 caps its scores, which sdpa cannot; it stays eager
        log.debug("%s has no %s attention", type(hf).__name__, kind)


def _boot(hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> TransformerBridge:
    # transformer_lens adds tokens to the tokenizer it is given, and reloads it (from the hub, if need be)
    # unless it says that it adds a BOS
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.init_kwargs |= {"name_or_path": tokenizer.name_or_path, "add_bos_token": True}
    try:
        bridge = TransformerBridge.boot_transformers(
            f"./{name}", hf_model=hf, tokenizer=tokenizer, device=str(input_device(hf)), dtype=hf.dtype
        )  # "./": a bare name could be one of its aliases
    except (ValueError, AttributeError, RuntimeError, KeyError, TypeError) as error:
        raise ModelRefused(
            f"transformer_lens cannot wrap {name} ({type(hf).__name__}; {_line(error)[:120]}): {_DENSE}"
        ) from error
    if not hasattr(bridge, "blocks") or not any(hasattr(block, "mlp") for block in bridge.blocks):
        raise ModelRefused(f"{name} ({type(hf).__name__}) has no feed-forward layers: {_DENSE}")
    for layer, block in enumerate(bridge.blocks):
        mlp = getattr(block, "mlp", None)
        if mlp is not None and not (hasattr(mlp, "in") and hasattr(mlp, "out")):
            what = "a mixture of experts" if "MoE" in type(mlp).__name__ else f"a {type(mlp).__name__}"
            raise ModelRefused(f"{name}: the feed-forward of layer {layer} is {what}: {_DENSE}")
    return bridge


def plain(model: TransformerBridge) -> PreTrainedModel:
    """The Hugging Face model itself, unwrapped, with the bridge's tensors: what the hot loop runs."""
    return _loaded(model).twin


def tokenizer_of(model: TransformerBridge) -> PreTrainedTokenizerBase:
    """The tokenizer as it was loaded; `model.tokenizer` is transformer_lens's copy with tokens added."""
    return _loaded(model).tokenizer


def _loaded(model: TransformerBridge) -> _Loaded:
    if model not in _LOADED:
        raise InputError("this TransformerBridge did not come from load_model: pass its model to load_model")
    return _LOADED[model]


def describe(model: TransformerBridge) -> dict[str, str | int]:
    """What a report says about the model in its first line."""
    twin, note = plain(model), _loaded(model).note
    return {
        "name": _loaded(model).name,
        "architecture": type(twin).__name__,
        "d_model": model.cfg.d_model,
        "n_layers": len(model.blocks),
        "d_vocab": _rows(twin),
        "dtype": dtype_name(twin),
        "note": note,
    }


def taps(model: TransformerBridge) -> list[Tap]:
    """One tap a feed-forward layer, read off the bridge's map of the architecture."""
    found = []
    for layer, block in enumerate(model.blocks):
        if (mlp := getattr(block, "mlp", None)) is None:
            continue  # a layer of a hybrid model
        twin_block = plain(model).get_submodule(block.name)
        home = twin_block.get_submodule(mlp.name or "")
        fused = getattr(mlp, "fused_attr", None)
        gate = getattr(mlp, "gate", None)
        found.append(
            Tap(
                layer,
                block=twin_block,
                up=home.get_submodule(fused or getattr(mlp, "in").name),
                gate=home.get_submodule(gate.name) if gate is not None and not fused else None,
                down=home.get_submodule(mlp.out.name),
                fused=fused is not None,
            )
        )
    return found


def blocks(model: TransformerBridge) -> list[nn.Module]:
    """The blocks of the plain model, in their order."""
    return [plain(model).get_submodule(block.name) for block in model.blocks]


def attention_output(model: TransformerBridge, layer: int) -> nn.Module:
    """The projection by which a block's attention writes.

    Raises:
        InputError: the block has no attention.
    """
    block: Any = model.blocks[layer]
    attention = getattr(block, "attn", None)
    if attention is None or not hasattr(attention, "o"):
        raise InputError(f"layer {layer} has no attention: choose another layer")
    return plain(model).get_submodule(block.name).get_submodule(attention.name).get_submodule(attention.o.name)


def ffns(model: TransformerBridge) -> list[FFN]:
    """One FFN a feed-forward layer; in a hybrid model `FFN.layer` says which layer it is."""
    read = taps(model)
    found = []
    for tap, activation in zip(read, activations(plain(model), read, _few_tokens(model)), strict=True):
        keys, key_bias = _matrix(tap.up)
        gates, gate_bias = (None, None) if tap.gate is None else _matrix(tap.gate)
        if tap.fused:
            gates, keys = keys.chunk(2)
            gate_bias, key_bias = (None, None) if key_bias is None else key_bias.chunk(2)
        out, bias = _matrix(tap.down)
        found.append(FFN(tap.layer, keys, out.T, activation, gates, key_bias, gate_bias, bias))
    return found


def check_model(model: TransformerBridge) -> ModelCheck:
    """The self-check that every load runs; see check.py."""
    return check(model, plain(model), taps(model), ffns(model), _few_tokens(model))


def _matrix(projection: nn.Module) -> tuple[Float[Tensor, "out in"], Float[Tensor, " out"] | None]:
    """By type, never by shape: a guess from the shape is wrong for an expansion below 1."""
    weight: Any = projection.weight
    bias: Any = getattr(projection, "bias", None)
    matrix = weight.detach().T if isinstance(projection, Conv1D) else weight.detach()
    return matrix, None if bias is None else bias.detach()


def _few_tokens(model: TransformerBridge) -> Int[Tensor, "2 9"]:
    """Two sequences that hold the first and the last id."""
    rows = _rows(plain(model))
    ids = torch.randint(rows, (2, 9), generator=torch.Generator().manual_seed(0))
    ids[0, 3], ids[1, 5] = 0, rows - 1
    return ids.to(input_device(plain(model)))


def context_length(model: TransformerBridge) -> int:
    """Tokens that the model reads at once; a large number where nothing bounds it."""
    config = plain(model).config
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")
    return next((length for name in names if (length := getattr(config, name, None))), 2**31)


def output_gain(model: TransformerBridge, layer: int) -> Float[Tensor, " d_model"] | None:
    """What a norm behind the FFN multiplies its output by (Gemma 2, OLMo 2); None where there is no such norm."""
    block: Any = model.blocks[layer]
    if not hasattr(block, "ln2_post"):
        return None
    norm: Any = plain(model).get_submodule(block.name).get_submodule(block.ln2_post.name)
    return _gain(norm, norm.weight.detach()[None])[0]


def why_illegible(model: TransformerBridge) -> str | None:
    """Why values cannot be read in the vocabulary; None where they can."""
    try:
        unembedding(model)
    except ModelRefused as error:
        return str(error)
    return None


def unembedding(model: TransformerBridge, view: str = "folded") -> Float[Tensor, "d_vocab d_model"]:
    """The direction of each token in the vocabulary: `values @ unembedding.T` reads values as tokens.

    raw: the unembedding matrix as stored (a view; where embeddings are tied it is W_E too).
    folded: each column times the final norm's gain, found by probing the norm (Gemma's is 1 + weight);
    then, if that norm is a LayerNorm, each row centred over d_model, because a LayerNorm's output has
    mean 0; then each column centred over the vocabulary, because a constant on all logits changes no
    probability (left out where logits are capped: there it would). The biases of the norm and of the
    unembedding, and multipliers of all logits, are left out of both. The folded one is in float32 at least.

    Refused where the last block's output does not reach the unembedding through one norm: BERT has a
    dense layer and a GELU in between, OPT-350m a projection.
    """
    if view not in ("folded", "raw"):
        raise InputError(f'view "{view}" is unknown: choose from folded, raw')
    twin = plain(model)
    head: Any = twin.get_output_embeddings()
    if head is None:
        raise ModelRefused(f"{_loaded(model).name} has no unembedding: choose a language model")
    rows = head.weight.detach()
    if view == "raw":
        return rows
    norm = twin.get_submodule(model.ln_final.name) if hasattr(model, "ln_final") else None
    block = twin.get_submodule(model.blocks[-1].name)
    path = [module for module in (block, norm, head) if module is not None]
    with recording(dict(enumerate(path))) as calls, torch.inference_mode():
        twin(_few_tokens(model))
    if norm is None or not all(torch.equal(calls[i][0][1], calls[i + 1][0][0]) for i in (0, 1)):
        raise ModelRefused(
            f"{_loaded(model).name} has other than one norm between its last block and its unembedding, so "
            "values cannot be read in the vocabulary"
        )
    gain, centres = _gain(norm, rows)
    wide = torch.promote_types(rows.dtype, torch.float32)  # the order of tokens is that of close numbers
    folded = rows.to(wide) * gain.to(wide)
    if centres:
        folded = folded - folded.mean(dim=1, keepdim=True)
    if not model.cfg.output_logits_soft_cap > 0:
        folded = folded - folded.mean(dim=0, keepdim=True)
    return folded


@torch.inference_mode()
def _gain(norm: nn.Module, like: Float[Tensor, "_ d_model"]) -> tuple[Float[Tensor, " d_model"], bool]:
    """What the norm multiplies by, and whether it takes the mean off: measured, whatever it is called."""
    d_model = like.shape[1]
    half = d_model // 2
    x = torch.full((d_model,), float(-half)).to(like)  # mean 0 and no entry 0, in any dimension
    x[:half] = d_model - half
    x *= 1e3 / x.norm() * d_model**0.5  # far above the norm's epsilon

    def through(x: Tensor) -> Tensor:
        return norm(x).to(x)  # back from the norm's own device

    gain = (through(x) - through(-x)) / 2 / (x * 1e-3)
    return gain, torch.allclose(through(x + 1e3), through(x), atol=1e-3 * float(gain.abs().max()))

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
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from ffnprobe.check import ModelCheck as ModelCheck
from ffnprobe.check import check
from ffnprobe.checkpoint import DENSE, first_line, read, refuse_tokenizer, refuse_weights, rows_of
from ffnprobe.errors import InputError, ModelRefused
from ffnprobe.ffn import FFN, Folding
from ffnprobe.hub import BUILT_IN as BUILT_IN
from ffnprobe.hub import Say, locate, log, provenance, quiet
from ffnprobe.hub import fetch as fetch
from ffnprobe.norms import measure, norms_before
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
from ffnprobe.taps import activations


@dataclass(frozen=True, eq=False)
class _Loaded:
    twin: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    note: str


Model = TransformerBridge
VIEWS = ("folded", "raw")

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
        hf, tokenizer = read(folder, gguf, name, dtype, device_map, tokenizer)
        note = f"its weights carry the rounding of {gguf}" if gguf else provenance(folder).get("note", "")
    refuse_offloaded(hf, name)
    refuse_weights(hf, name)
    refuse_tokenizer(hf, tokenizer, name)
    hf.eval()
    default = hf.device if isinstance(spec, PreTrainedModel) else "cuda" if torch.cuda.is_available() else "cpu"
    if dispatched(hf) and device is not None:
        raise InputError(f"{name} is spread over devices already: leave out device")
    if device_map is None and not dispatched(hf):
        nn.Module.to(hf, torch.device(device or default))
    bridge = _boot(hf, tokenizer, name, note)
    result = _self_check(bridge)
    if refuse and not result.ok:
        raise ModelRefused(f"{name} failed the self-check: {result.problems[0]}: choose another model")
    return bridge


def _self_check(bridge: TransformerBridge) -> ModelCheck:
    twin, name = plain(bridge), _loaded(bridge).name
    try:
        result = check_model(bridge)
    except RuntimeError as error:
        if dtype_name(twin) == "float32" or isinstance(error, torch.OutOfMemoryError):
            raise
        # OLMo 2's attention, for one, mixes precisions in transformer_lens 4.3.0
        raise ModelRefused(
            f"transformer_lens cannot run {name} in {dtype_name(twin)} ({first_line(error)}): use float32"
        ) from error
    if not result.ok and twin.config._attn_implementation != "eager":
        _attention(twin, "eager")  # sdpa may leave out what a family does to its attention scores
        result = check_model(bridge)
    return result


def _share(hf: PreTrainedModel) -> PreTrainedModel:
    """Another set of modules around the same tensors."""
    return copy.deepcopy(hf, {id(t): t for t in [*hf.parameters(), *hf.buffers()]})


def _attention(hf: PreTrainedModel, kind: str) -> None:
    try:
        hf.set_attn_implementation(kind)
    except ValueError:  # gemma2 caps its scores, which sdpa cannot; it stays eager
        log.debug("%s has no %s attention", type(hf).__name__, kind)


def _boot(hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, note: str) -> TransformerBridge:
    with quiet():
        twin = _share(hf)
        _attention(hf, "eager")  # the bridge's hooks read the attention pattern
        _attention(twin, "sdpa")
        bridge = _wrap(hf, tokenizer, name)
    _LOADED[bridge] = _Loaded(twin, tokenizer, name, note)
    refuse_split_layers(taps(bridge), name)
    return bridge


def _wrap(hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> TransformerBridge:
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
            f"transformer_lens cannot wrap {name} ({type(hf).__name__}; {first_line(error)[:120]}): {DENSE}"
        ) from error
    if not hasattr(bridge, "blocks") or not any(hasattr(block, "mlp") for block in bridge.blocks):
        raise ModelRefused(f"{name} ({type(hf).__name__}) has no feed-forward layers: {DENSE}")
    for layer, block in enumerate(bridge.blocks):
        mlp = getattr(block, "mlp", None)
        if mlp is not None and not (hasattr(mlp, "in") and hasattr(mlp, "out")):
            what = "a mixture of experts" if "MoE" in type(mlp).__name__ else f"a {type(mlp).__name__}"
            raise ModelRefused(f"{name}: the feed-forward of layer {layer} is {what}: {DENSE}")
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
        "d_vocab": rows_of(twin),
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


def ffns(model: TransformerBridge, view: str = "raw") -> list[FFN]:
    """One FFN a feed-forward layer; in a hybrid model `FFN.layer` says which layer it is.

    raw: views of the model's weights. folded: new tensors, with the norms around the layer taken into them (see
    `foldings`); as many bytes again as the feed-forward weights in float32.

    Raises:
        InputError: no such view.
        ModelRefused: with `folded`, it cannot be told what a layer reads through.
    """
    if view not in VIEWS:
        raise InputError(f'view "{view}" is unknown: choose from {", ".join(VIEWS)}')
    read = taps(model)
    found = []
    for tap, activation in zip(read, activations(plain(model), read, few_tokens(model)), strict=True):
        keys, key_bias = _matrix(tap.up)
        gates, gate_bias = (None, None) if tap.gate is None else _matrix(tap.gate)
        if tap.fused:
            gates, keys = keys.chunk(2)
            gate_bias, key_bias = (None, None) if key_bias is None else key_bias.chunk(2)
        out, bias = _matrix(tap.down)
        found.append(FFN(tap.layer, keys, out.T, activation, gates, key_bias, gate_bias, bias))
    if view == "raw":
        return found
    how = foldings(model)
    return [ffn.folded(how[ffn.layer]) for ffn in found]


def foldings(model: TransformerBridge) -> dict[int, Folding]:
    """By layer, what `FFN.folded` takes in: the norm in front, measured, and the gain of one behind.

    Raises:
        ModelRefused: what a layer reads is not what a norm wrote, though the block has norms in front.
    """
    read, found = taps(model), {}
    norms = norms_before(plain(model), read, few_tokens(model))
    for tap, block in zip(read, (b for b in model.blocks if getattr(b, "mlp", None) is not None), strict=True):
        behind, norm, like = output_gain(model, tap.layer), norms[tap.layer], _matrix(tap.up)[0][:1]
        if norm is not None:
            gain, bias, centred = measure(norm, like)
            found[tap.layer] = Folding(gain, bias, centred, behind)
        elif hasattr(block, "ln2_post") and not hasattr(block, "ln1"):  # OLMo 2 reads the stream itself
            found[tap.layer] = Folding(torch.ones_like(like[0]), torch.zeros_like(like[0]), False, behind)
        else:
            raise ModelRefused(
                f"{_loaded(model).name}: what the feed-forward of layer {tap.layer} reads is not the output of "
                "one norm, so none can be folded into it: use raw weights"
            )
    return found


def check_model(model: TransformerBridge) -> ModelCheck:
    """The self-check that every load runs; see check.py."""
    return check(model, plain(model), taps(model), ffns(model), few_tokens(model))


def _matrix(projection: nn.Module) -> tuple[Float[Tensor, "out in"], Float[Tensor, " out"] | None]:
    """By type, never by shape: a guess from the shape is wrong for an expansion below 1."""
    weight: Any = projection.weight
    bias: Any = getattr(projection, "bias", None)
    matrix = weight.detach().T if isinstance(projection, Conv1D) else weight.detach()
    return matrix, None if bias is None else bias.detach()


def few_tokens(model: TransformerBridge) -> Int[Tensor, "2 9"]:
    """Two sequences that hold the first and the last id."""
    rows = rows_of(plain(model))
    ids = torch.randint(rows, (2, 9), generator=torch.Generator().manual_seed(0))
    ids[0, 3], ids[1, 5] = 0, rows - 1
    return ids.to(input_device(plain(model)))


def context_length(model: TransformerBridge) -> int:
    """Tokens that the model reads at once; a large number where nothing bounds it."""
    config = plain(model).config
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")
    return next((length for name in names if (length := getattr(config, name, None))), 2**31)


def contribution(model: TransformerBridge, layer: int) -> Callable[[Tensor], Tensor]:
    """What a block makes of its FFN's output before it adds it to the residual stream.

    A norm (Gemma 2, OLMo 2), a multiplication (Granite), nothing elsewhere.
    """
    block: Any = model.blocks[layer]
    if hasattr(block, "ln2_post"):
        return plain(model).get_submodule(block.name).get_submodule(block.ln2_post.name)
    multiplier = getattr(plain(model).config, "residual_multiplier", 1.0)
    return lambda written: multiplier * written


def output_gain(model: TransformerBridge, layer: int) -> Float[Tensor, " d_model"] | None:
    """What a norm behind the FFN multiplies its output by (Gemma 2, OLMo 2); None where there is no such norm."""
    block: Any = model.blocks[layer]
    if not hasattr(block, "ln2_post"):
        return None
    norm: Any = plain(model).get_submodule(block.name).get_submodule(block.ln2_post.name)
    return measure(norm, norm.weight.detach()[None]).gain

"""Do the feed-forward layers obey the equations that they are said to obey?

A silently wrong tensor is the common serious fault of this field, so every load runs this on a few
tokens. Errors are relative: the worst token's |got - expected| / |expected|.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from ffnprobe.ffn import ACTIVATIONS, FFN
from ffnprobe.taps import Tap, flat, recording

TOLERANCE = {  # in float32; a narrower dtype has that of its own rounding
    "pre": 1e-5,  # x @ keys.T + key_bias is what the up-projection gives, and the gate likewise
    "post": 1e-5,  # act(pre) [* up] is what enters the down-projection
    "write": 1e-5,  # post @ values + bias is what the down-projection gives
    "residual": 1e-5,  # the block's output is what came in plus what attention and FFN wrote
    # the bridge's hooks and logits show the same, through other attention kernels and up to the last
    # layer: 3e-6 on the 30 layers of SmolLM2-135M
    "bridge": 1e-4,
}


@dataclass(frozen=True)
class LayerCheck:
    """One layer: how far each identity is from holding, and what is wrong if anything is."""

    layer: int
    d_mlp: int
    activation: str
    form: str  # how the FFN reaches the residual stream
    pre: float
    post: float
    write: float
    residual: float
    bridge: float
    problem: str | None = None

    @property
    def ok(self) -> bool:
        return self.problem is None


@dataclass(frozen=True)
class ModelCheck:
    """All layers, and the logits of the bridge against those of the plain model."""

    layers: tuple[LayerCheck, ...]
    logits: float
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems

    def to_frame(self) -> pd.DataFrame:
        return pd.DataFrame([asdict(layer) for layer in self.layers])


@torch.inference_mode()
def check(
    bridge: Any,
    twin: PreTrainedModel,
    taps: list[Tap],
    ffns: list[FFN],
    ids: Int[Tensor, "sequences length"],
) -> ModelCheck:
    """Run both models once, and hold every layer to the equations."""
    modules = {(tap.layer, site): getattr(tap, site) for tap in taps for site in ("up", "gate", "down")}
    with recording({key: module for key, module in modules.items() if module is not None}) as calls:
        logits = twin(ids).logits
    hooks: dict[int, dict[str, list[Tensor]]] = {
        f.layer: {name: [] for name in _hooks(bridge, f.layer, f.gated)} for f in ffns
    }
    seen = bridge.run_with_hooks(
        ids, fwd_hooks=[(name, _keeping(kept)) for layer in hooks.values() for name, kept in layer.items()]
    )
    floor = 8 * torch.finfo(twin.dtype).eps
    layers = tuple(_layer(tap, ffn, calls, hooks[ffn.layer], floor) for tap, ffn in zip(taps, ffns, strict=True))
    error = relative_error(seen.flatten(0, -2), logits.flatten(0, -2))
    problems = [f"layer {row.layer}: {row.problem}" for row in layers if row.problem]
    if not error < max(floor, TOLERANCE["bridge"]):
        problems.append(f"the bridge's logits differ from Hugging Face's by {error:.1e}")
    return ModelCheck(layers, error, tuple(problems))


def _keeping(kept: list[Tensor]) -> Callable[..., None]:
    def keep(value: Tensor, hook: Any) -> None:
        kept.append(flat(value))

    return keep


def relative_error(got: Float[Tensor, "n d"], expected: Float[Tensor, "n d"]) -> float:
    """The worst token's |got - expected| / |expected|, in [0, inf]."""
    got, expected = got.to(expected.device).double(), expected.double()
    error, size = (got - expected).norm(dim=-1), expected.norm(dim=-1)
    return float(torch.where(error == 0, 0.0, error / size).max())  # a token with nothing to write is no error


STREAM = ("hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post")
FEED_FORWARD = ("mlp.in.hook_in", "mlp.hook_pre", "mlp.hook_pre_linear", "mlp.hook_post", "mlp.out.hook_out")


def _hooks(bridge: Any, layer: int, gated: bool) -> list[str]:
    """The names of the hooks that this layer has."""
    block = bridge.blocks[layer]
    names = [name for name in (*STREAM, "ln2.hook_out") if hasattr(block, name.split(".")[0])]
    names += [name for name in FEED_FORWARD if gated or name != "mlp.hook_pre_linear"]
    return [f"blocks.{layer}.{name}" for name in names]


def _layer(tap: Tap, ffn: FFN, calls: dict, hooks: dict[str, list[Tensor]], floor: float) -> LayerCheck:
    row: dict[str, Any] = {"layer": ffn.layer, "d_mlp": ffn.d_mlp, "activation": ffn.activation}
    errors: dict[str, Any] = dict.fromkeys(TOLERANCE, math.nan)

    def refused(problem: str, form: str = "?") -> LayerCheck:
        return LayerCheck(**row, form=form, **errors, problem=problem)

    counts = {name.split(".", 2)[2]: len(seen) for name, seen in hooks.items()}
    counts |= {site: len(calls[key]) for key in calls if key[0] == ffn.layer for site in [key[1]]}
    if wrong := [f"{name} fires {n} times" for name, n in counts.items() if n != 1]:
        return refused(f"{wrong[0]}, not once")
    if ffn.activation not in ACTIVATIONS:
        return refused(f"its activation is {ffn.activation}")
    home = ffn.values.device  # what enters a part is seen where it comes from
    site = {name.split(".", 2)[2]: seen[0].to(home) for name, seen in hooks.items()}
    (x, up), (h, y) = ([t.to(home) for t in calls[ffn.layer, part][0]] for part in ("up", "down"))
    z = up.chunk(2, dim=-1)[0] if tap.fused else up if tap.gate is None else calls[ffn.layer, "gate"][0][1]
    key = up.chunk(2, dim=-1)[1] if tap.fused else up
    widths = {h.shape[-1], site["mlp.hook_post"].shape[-1], site["mlp.hook_pre"].shape[-1]}
    if widths != {ffn.values.shape[0]}:
        return refused(f"its hooks are {sorted(widths)} wide, its W_out {ffn.values.shape[0]}")

    errors["pre"] = relative_error(ffn.pre(x), z)
    if ffn.gated:
        errors["pre"] = max(errors["pre"], relative_error(F.linear(x, ffn.keys, ffn.key_bias), key))
    activated = ACTIVATIONS[ffn.activation](z)
    errors["post"] = relative_error(activated * key if ffn.gated else activated, h)
    errors["write"] = relative_error(ffn.write(h), y)
    shown = {"mlp.in.hook_in": x, "mlp.hook_pre": z, "mlp.hook_post": h, "mlp.out.hook_out": y}
    shown |= {"mlp.hook_pre_linear": key} if ffn.gated else {}
    errors["bridge"] = max(relative_error(site[name], value) for name, value in shown.items())
    form, errors["residual"] = _residual(site, floor)
    failed = [name for name, error in errors.items() if not error < max(floor, TOLERANCE[name])]
    problem = f"{failed[0]} is off by {errors[failed[0]]:.1e}" if failed else None
    return LayerCheck(**row, form=form, **errors, problem=problem)


def _residual(site: dict[str, Tensor], floor: float) -> tuple[str, float]:
    """How the FFN's output reaches the residual stream, and how far the sum is from holding.

    pre-norm    post = pre + attention + y            GPT-2, Llama
    parallel    the same, but the FFN does not see what attention wrote: GPT-J, GPT-NeoX
    multiplier  post = pre + attention + m y          Granite
    post-norm   post = pre + attention + norm(y)      Gemma 2, OLMo 2
    norm-last   post = norm(x + y), x = norm(pre + attention)   BERT
    """
    y, written, post = site["mlp.out.hook_out"], site["hook_mlp_out"], site["hook_resid_post"]
    mid = site.get("hook_resid_mid")
    before = site["hook_resid_pre"] + site["hook_attn_out"]
    error = relative_error(before + written, post)
    if mid is not None and "ln2.hook_out" in site:
        x = site["mlp.in.hook_in"]
        last = max(relative_error(x + y, mid), relative_error(site["ln2.hook_out"], post))
        if last < error:
            return "norm-last", last
    if mid is None:
        return "parallel", error
    error = max(error, relative_error(before, mid))
    multiplier = float((written.double() * y).sum() / (y.double() * y).sum())
    if relative_error(multiplier * y, written) > max(floor, 1e-4):
        return "post-norm", error
    return ("pre-norm" if abs(multiplier - 1) < 1e-4 else "multiplier"), error

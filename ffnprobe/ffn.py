"""What is one feed-forward layer? Keys that read, values that write: row i of every matrix is neuron i."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu2": lambda z: F.relu(z).square(),
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "gelu_quick": lambda z: z * torch.sigmoid(1.702 * z),
    "silu": F.silu,
    "mish": F.mish,
    "elu": F.elu,
    "softplus": F.softplus,
    "hardswish": F.hardswish,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "identity": lambda z: z,
}


class Folding(NamedTuple):
    """What lies around a layer: the norm in front (gain, bias, and whether it centres), the gain of one behind."""

    gain: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"]
    centres: bool
    behind: Float[Tensor, " d_model"] | None = None


@dataclass(frozen=True, eq=False)
class FFN:
    """One layer's feed-forward network: y = hidden(x) @ values + bias.

    Plain: hidden(x) = activation(x @ keys.T + key_bias). Gated: hidden(x) = activation(x @ gates.T +
    gate_bias) * (x @ keys.T + key_bias), where the gate says when and the key says how much.

    The matrices are views of the model's storage: never modify them in place.

    >>> ffn = FFN(layer=0, keys=torch.eye(3, 2), values=torch.ones(3, 2), activation="relu")
    >>> ffn.expansion
    1.5
    >>> ffn.write(ffn.hidden(torch.tensor([[-1.0, 5.0]])))
    tensor([[5., 5.]])
    """

    layer: int
    keys: Float[Tensor, "d_mlp d_model"]
    values: Float[Tensor, "d_mlp d_model"]
    activation: str
    gates: Float[Tensor, "d_mlp d_model"] | None = None
    key_bias: Float[Tensor, " d_mlp"] | None = None
    gate_bias: Float[Tensor, " d_mlp"] | None = None
    bias: Float[Tensor, " d_model"] | None = None

    @property
    def d_model(self) -> int:
        return self.keys.shape[1]

    @property
    def d_mlp(self) -> int:
        return self.keys.shape[0]

    @property
    def expansion(self) -> float:
        """d_mlp / d_model, in (0, inf): 4 in GPT-2, 8/3 in many gated models, below 1 in some."""
        return self.d_mlp / self.d_model

    @property
    def gated(self) -> bool:
        return self.gates is not None

    @property
    def arm(self) -> str:
        """What layers have in common that differ in their width alone: the activation, and whether it is gated."""
        return self.activation + (", gated" if self.gated else "")

    def pre(self, x: Float[Tensor, "*n d_model"]) -> Float[Tensor, "*n d_mlp"]:
        """The pre-activation z: the gate's in a gated layer, else the key's."""
        if self.gates is None:
            return F.linear(x, self.keys, self.key_bias)
        return F.linear(x, self.gates, self.gate_bias)

    def hidden(self, x: Float[Tensor, "*n d_model"]) -> Float[Tensor, "*n d_mlp"]:
        """The hidden activation h: how strongly each memory is read out."""
        h = ACTIVATIONS[self.activation](self.pre(x))
        return h if self.gates is None else h * F.linear(x, self.keys, self.key_bias)

    def write(self, hidden: Float[Tensor, "*n d_mlp"]) -> Float[Tensor, "*n d_model"]:
        """The output y = sum_i h_i v_i + bias, before any norm or multiplier of the block."""
        return F.linear(hidden, self.values.T, self.bias)

    def to(self, dtype: torch.dtype) -> FFN:
        """The same layer in another precision: a copy, unless it has that one already."""
        if self.keys.dtype == dtype:
            return self
        names = ("keys", "values", "gates", "key_bias", "gate_bias", "bias")
        parts = {name: part.to(dtype) for name in names if (part := getattr(self, name)) is not None}
        return replace(self, **parts)

    def wide(self) -> FFN:
        """In float32 at least, which norms, products and ranks of weights are computed in."""
        return self.to(torch.promote_types(self.keys.dtype, torch.float32))

    @property
    def gauge(self) -> Float[Tensor, " d_mlp"]:
        """What `canonical` divides each value by: its norm, with the sign of its largest entry; 1 if plain."""
        values = self.wide().values
        if self.gates is None:
            return torch.ones_like(values[:, 0])
        largest = values.gather(1, values.abs().argmax(dim=1, keepdim=True)).squeeze(1)
        scale = values.norm(dim=1) * largest.sign()
        return torch.where(scale == 0, 1.0, scale)

    def canonical(self) -> FFN:
        """The same function with the freedom of a gated neuron's scale and sign taken out.

        (key, value) -> (a key, value / a) leaves a gated layer as it is, so no rank of its keys, values or
        hidden activations would mean anything; here values are unit vectors and keys carry their norms. A
        plain layer is returned as it is; either one in float32 at least.
        """
        wide, gauge = self.wide(), self.gauge
        if wide.gates is None:
            return wide
        key_bias = None if wide.key_bias is None else wide.key_bias * gauge
        return replace(
            wide, keys=wide.keys * gauge[:, None], key_bias=key_bias, values=wide.values / gauge[:, None]
        )

    @property
    def weighing(self) -> Callable[[Float[Tensor, "*n d_mlp"]], Float[Tensor, "*n d_mlp"]]:
        """Makes of the layer's hidden activations what `canonical` has in their place."""
        gauge = self.gauge
        return (lambda hidden: hidden) if self.gates is None else (lambda hidden: hidden * gauge)

    def folded(self, around: Folding) -> FFN:
        """The layer with the norms around it taken into its weights: new tensors, in float32 at least.

        Gain and bias of the norm in front go into keys, gates and their biases, so that hidden(x̂) is what the
        layer makes of gain * x̂ + bias. Where that norm is a LayerNorm, keys and gates are centred over d_model,
        which no x̂ of mean 0 notices, and so are values and output bias: every LayerNorm takes the mean off again.
        The gain of a norm behind the layer goes into the values; what it divides by differs from token to token.

        >>> ffn = FFN(layer=0, keys=torch.eye(2), values=torch.eye(2), activation="relu")
        >>> ffn.folded(Folding(torch.tensor([4.0, 1.0]), torch.tensor([0.5, 0.0]), centres=True)).keys
        tensor([[ 2.0000, -2.0000],
                [-0.5000,  0.5000]])
        """
        wide = self.wide()
        gain, bias = around.gain.to(wide.keys), around.bias.to(wide.keys)

        def centred(rows: Tensor) -> Tensor:
            return rows - rows.mean(dim=-1, keepdim=True) if around.centres else rows.clone()

        def through(rows: Tensor, offset: Tensor | None) -> Tensor | None:
            if offset is None:
                return rows @ bias if bias.any() else None
            return rows @ bias + offset

        def written(rows: Tensor) -> Tensor:
            return centred(rows if around.behind is None else rows * around.behind.to(rows))

        return replace(
            wide,
            keys=centred(wide.keys * gain),
            key_bias=through(wide.keys, wide.key_bias),
            gates=None if wide.gates is None else centred(wide.gates * gain),
            gate_bias=None if wide.gates is None else through(wide.gates, wide.gate_bias),
            values=written(wide.values),
            bias=None if wide.bias is None else written(wide.bias),
        )

    def randomised(self, seed: int = 0) -> FFN:
        """The null of this layer: Gaussian rows of the same norms in place of every matrix, biases kept."""
        generator = torch.Generator().manual_seed(1_000_003 * seed + self.layer)

        def random_rows(matrix: Tensor) -> Tensor:
            rows = torch.randn(matrix.shape, generator=generator).to(matrix)
            return rows * (matrix.norm(dim=1, keepdim=True) / rows.norm(dim=1, keepdim=True))

        gates = None if self.gates is None else random_rows(self.gates)
        return replace(self, keys=random_rows(self.keys), values=random_rows(self.values), gates=gates)

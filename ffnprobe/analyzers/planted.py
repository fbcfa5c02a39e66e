"""How does one feed-forward layer store random facts, and how many of them should it recall?"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from scipy.optimize import brentq
from torch import Tensor
from torch.func import vmap
from torch.nn import functional as F

from ..ffn import FFN

Weights = dict[str, Float[Tensor, "*seeds d_mlp d_model"]]


@dataclass(frozen=True)
class Arm:
    """One way to store facts: a layer and what of it is learnt; every other matrix stays random."""

    activation: str
    learnt: tuple[str, ...]
    solved: bool = False  # by least squares; else Adam on the cross-entropy

    def parameters(self, d_mlp: int, d_model: int) -> int:
        """The learnt ones."""
        return len(self.learnt) * d_mlp * d_model


ARMS = {
    "least squares, GELU": Arm("gelu", ("values",), solved=True),
    "least squares, ReLU": Arm("relu", ("values",), solved=True),
    "trained values": Arm("gelu", ("values",)),
    "trained": Arm("gelu", ("keys", "values")),
    "trained, gated": Arm("silu", ("keys", "values", "gates")),
    "linear": Arm("identity", ("values",)),  # its keys are the axes: no FFN
}


@dataclass(frozen=True)
class Facts:
    """Random unit vectors, each with one of d_model answers, by seed.

    An answer is an axis of the stream, so that the logits are the layer's output itself. Random directions would
    cost an unembedding and mix answers with one another; any orthonormal ones are a rotation of the values.
    """

    subjects: Float[Tensor, "seeds facts d_model"]
    answers: Int[Tensor, "seeds facts"]

    @classmethod
    def random(cls, seeds: int, facts: int, d_model: int, generator: torch.Generator) -> Facts:
        subjects = F.normalize(torch.randn(seeds, facts, d_model, generator=generator), dim=-1)
        # each answer equally often, or guessing the commonest would beat chance
        balanced = torch.arange(facts).remainder(d_model).expand(seeds, facts)
        return cls(subjects, balanced).shuffled(generator)

    @property
    def targets(self) -> Float[Tensor, "seeds facts d_model"]:
        """One-hot less its mean, which is no fact and which random features explain at once."""
        d_model = self.subjects.shape[-1]
        return F.one_hot(self.answers, d_model).to(self.subjects) - 1 / d_model

    def recalled(self, written: Float[Tensor, "seeds facts d_model"]) -> Float[Tensor, " seeds"]:
        """The share of facts whose answer is the largest logit, in [0, 1]; 1 / d_model by chance."""
        return (written.argmax(dim=-1) == self.answers).double().mean(dim=-1)

    def shuffled(self, generator: torch.Generator) -> Facts:
        """The same answers, paired with other subjects."""
        order = torch.rand(self.answers.shape, generator=generator).argsort(dim=-1)
        return Facts(self.subjects, self.answers.gather(1, order))


def store(
    arm: Arm, facts: Facts, d_mlp: int, steps: int, rate: float, generator: torch.Generator
) -> Float[Tensor, "seeds facts d_model"]:
    """What the layer writes at every subject, once it has stored the facts: a layer a seed."""
    seeds, _, d_model = facts.subjects.shape
    weights = _start(arm, seeds, d_model, d_mlp, generator)
    if arm.solved:
        # float64: with nearly as many neurons as facts the hidden activations are ill-conditioned
        hidden = vmap(lambda w, x: _layer(arm, w).hidden(x))(
            {name: weight.double() for name, weight in weights.items()}, facts.subjects.double()
        )
        targets = facts.targets.double()
        return hidden @ torch.linalg.lstsq(hidden, targets, driver="gelsd").solution
    return _descend(arm, facts, weights, steps, rate)


def _start(arm: Arm, seeds: int, d_model: int, d_mlp: int, generator: torch.Generator) -> Weights:
    """Gaussian rows: pre-activations have variance 1 at a unit subject, the output has that of the hidden ones."""
    weights = {
        name: torch.randn(seeds, d_mlp, d_model, generator=generator)
        for name in sorted({"keys", "values", *arm.learnt})
    }
    weights["values"] /= d_mlp**0.5
    if arm.activation == "identity":
        weights["keys"] = torch.eye(d_mlp, d_model).repeat(seeds, 1, 1)
    return weights


def _layer(arm: Arm, weights: Weights) -> FFN:
    return FFN(layer=0, activation=arm.activation, **weights)


def _descend(arm: Arm, facts: Facts, weights: Weights, steps: int, rate: float) -> Tensor:
    """Adam on all facts at once, the rate falling as a cosine; done once every fact of every seed is recalled."""
    learnt = [weights[name].requires_grad_() for name in arm.learnt]
    write: Callable[[Weights, Tensor], Tensor] = vmap(lambda w, x: _layer(arm, w).write(_layer(arm, w).hidden(x)))
    optimiser = torch.optim.Adam(learnt, lr=rate, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        written = write(weights, facts.subjects)
        if bool((facts.recalled(written) == 1).all()):
            break
        optimiser.zero_grad()
        # a sum over seeds: no seed's gradient depends on another
        (F.cross_entropy(written.mT, facts.answers, reduction="none").mean(dim=1).sum()).backward()
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        return write(weights, facts.subjects)


def expected_residual(d_mlp: int, facts: int) -> float:
    """The share of the targets that d_mlp random neurons leave unexplained: 1 - D/F, and 0 from D = F on.

    >>> expected_residual(64, 256), expected_residual(64, 64)
    (0.75, 0.0)
    """
    return max(0.0, 1 - d_mlp / facts)


def expected_accuracy(load: float, answers: int) -> float:
    """Recall by argmax of values solved on random keys, load = D/F neurons a fact, in [1/answers, 1].

    The layer writes P t, P a random projection of rank D in the space of the facts: a fact's own answer comes
    with weight a = D/F, and the other facts put noise of variance a (1 - a) / V on each of the V answers.
    For many facts the own logit wins with probability E[Phi(t + m)^(V - 1)], t standard normal,
    m = sqrt(a V / (1 - a)). Recall with GELU or ReLU lies up to 0.05 below (d_model 16).

    >>> round(expected_accuracy(0.0, 32) * 32, 6), expected_accuracy(1.0, 32)
    (1.0, 1.0)
    """
    if load >= 1:
        return 1.0
    t = torch.linspace(-12, 12, 4801, dtype=torch.float64)
    weight = torch.exp(-(t**2) / 2)
    wins = torch.special.ndtr(t + (load * answers / (1 - load)) ** 0.5) ** (answers - 1)
    return float((weight * wins).sum() / weight.sum())


def expected_load(accuracy: float, answers: int) -> float:
    """Neurons a fact at which `expected_accuracy` is this."""
    return float(brentq(lambda load: expected_accuracy(load, answers) - accuracy, 0, 1))


def bits(accuracy: float, answers: int) -> float:
    """What a recalled fact tells of its answer at the least: log2 V - h(p) - (1 - p) log2(V - 1), by Fano.

    >>> bits(1 / 16, 16), bits(1.0, 16)
    (0.0, 4.0)
    """
    p = max(accuracy, 1 / answers)
    return sum(q * math.log2(q / null) for q, null in ((p, 1 / answers), (1 - p, 1 - 1 / answers)) if q)

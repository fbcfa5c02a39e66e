"""Which neurons work for a token, if a layer is cut into experts of which each token gets a few?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..clustering import balanced
from ..ffn import FFN


@dataclass(frozen=True, eq=False)
class Partition:
    """A layer's neurons in experts; what an expert that is not chosen writes is its mean."""

    labels: Int[Tensor, " d_mlp"]  # the expert of each neuron
    values: Float[Tensor, "d_mlp d_model"]
    mean: Float[Tensor, " d_mlp"]  # of h

    @property
    def experts(self) -> int:
        return int(self.labels.max()) + 1

    def chosen(
        self, h: Float[Tensor, "n d_mlp"], pre: Float[Tensor, "n d_mlp"], choice: str, count: int
    ) -> Bool[Tensor, "n d_mlp"]:
        """The neurons of the `count` experts that the oracle or the router chooses for each token."""
        score = self.lost(h) if choice == "oracle" else self.match(pre)
        best = score.topk(count, dim=1).indices
        return torch.zeros_like(score, dtype=torch.bool).scatter_(1, best, True)[:, self.labels.to(score.device)]

    def lost(self, h: Float[Tensor, "n d_mlp"]) -> Float[Tensor, "n experts"]:
        """|sum over the expert's neurons of (h_i - mean_i) v_i|², what y would lose: the oracle's score."""
        off = h.float() - self.mean.to(h.device).float()
        if self.experts == len(self.labels):
            squares = self.values.float().square().sum(dim=1)[self.labels.argsort()]
            return off[:, self.labels.argsort()].square() * squares
        found = []
        for expert in range(self.experts):
            neurons = (self.labels == expert).nonzero().squeeze(1)
            some, values = off[:, neurons.to(off.device)], self.values[neurons].float()
            found.append(((some @ (values @ values.mT)) * some).sum(dim=1))
        return torch.stack(found, dim=1)

    def match(self, pre: Float[Tensor, "n d_mlp"]) -> Float[Tensor, "n experts"]:
        """x times the expert's mean key (and its mean bias), which is the mean of its pre-activations."""
        sums = pre.new_zeros(len(pre), self.experts, dtype=torch.float32)
        sums.index_add_(1, self.labels.to(pre.device), pre.float())
        return sums / torch.bincount(self.labels).to(sums)


def partitions(
    ffn: FFN, mean: Float[Tensor, " d_mlp"], experts: int, draws: int, seed: int
) -> dict[tuple[str, int], Partition]:
    """Clusters of what reads (gates if gated, else keys), random parts of the same sizes, and single neurons."""
    wide = ffn.wide()
    reading = wide.keys if wide.gates is None else wide.gates
    clusters = balanced(reading.detach().cpu(), experts, [seed])[0].labels
    generator = torch.Generator().manual_seed(1_000_003 * seed + ffn.layer)
    labels = {("clusters", 0): clusters, ("neurons", 0): torch.arange(ffn.d_mlp)}
    for draw in range(draws):
        labels["random", draw] = clusters[torch.randperm(ffn.d_mlp, generator=generator)]
    return {name: Partition(of, wide.values.detach(), mean) for name, of in labels.items()}

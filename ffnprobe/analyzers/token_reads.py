"""What does a token read of a layer's memories, and whose top token does the stream have behind the layer?"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..ffn import FFN
from ..models import Model, contribution, output_gain
from ..vocabulary import raised_most, read_values


def in_use(a: Float[Tensor, "n d_mlp"], k: int) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Participation ratio of each row, in [1, d_mlp], and the share of its k largest entries, in [0, 1].

    >>> in_use(torch.tensor([[0.0, 2.0, 0.0], [1.0, 1.0, 1.0]]), 1)
    (tensor([1., 3.]), tensor([1.0000, 0.3333]))
    """
    total = a.sum(1).clamp(min=torch.finfo(a.dtype).tiny)
    ratio = total**2 / a.square().sum(1).clamp(min=torch.finfo(a.dtype).tiny)
    return ratio, a.topk(min(k, a.shape[1]), dim=1).values.sum(1) / total


class Reads:
    """What is noted of each token that one layer is shown, by name; row i of `at` says which token that was."""

    def __init__(self, model: Model, ffn: FFN, words: Float[Tensor, "v d_model"], k: int, seed: int) -> None:
        self.ffn, self.words, self.k = ffn.wide(), words, k
        self.adds, gain = contribution(model, ffn.layer), output_gain(model, ffn.layer)
        values = self.ffn.values if gain is None else self.ffn.values * gain
        self.norms, self.seed = values.norm(dim=1), seed
        self.generator = torch.Generator().manual_seed(1_000_003 * seed + ffn.layer)
        raised, lowered = read_values(values, words, 1)
        self.tops = torch.cat([raised, lowered], dim=1)  # of a memory written as it is, and with a negative sign
        self._at: list[Tensor] = []
        self._noted: dict[str, list[Tensor]] = {}

    @property
    def noted(self) -> dict[str, Float[Tensor, " n"]]:
        """All that was noted, a number a token in the order in which they were shown."""
        return {name: torch.cat(parts) for name, parts in self._noted.items()}

    @property
    def at(self) -> Int[Tensor, " n"]:
        """Where in the corpus each token is."""
        return torch.cat(self._at)

    def see(self, read: Mapping[str, Tensor], some: Int[Tensor, " n"], index: Int[Tensor, " m"]) -> None:
        """Note what some of these tokens read; `index` says where in the corpus each of them all is."""
        self._at.append(index[some])
        self.some = some.to(read["out"].device)
        rows = {site: read[site][self.some].to(self.norms) for site in ("in", "pre", "post", "out")}
        a, null = rows["post"].abs() * self.norms, self.ffn.randomised(self.seed)
        ratio, share = in_use(a, self.k)
        ratio_null, share_null = in_use(null.hidden(rows["in"]).abs() * self.norms, self.k)
        self.added = self.adds(rows["out"]).to(self.norms)
        self.top = top = raised_most(self.added, self.words, 1).squeeze(1)
        tops = torch.where(rows["post"].cpu() < 0, self.tops[:, 1], self.tops[:, 0])
        other = top[torch.randperm(len(top), generator=self.generator)]
        strongest = tops.gather(1, a.argmax(1, keepdim=True).cpu()).squeeze(1)
        self._note(
            participation_ratio=ratio,
            participation_ratio_null=ratio_null,
            top_share=share,
            top_share_null=share_null,
            positive=(rows["pre"] > 0).float().mean(1),
            positive_null=(null.pre(rows["in"]) > 0).float().mean(1),
            zero_agreement=(tops != top[:, None]).all(1),
            zero_agreement_null=(tops != other[:, None]).all(1),
            strongest=strongest == top,
            strongest_null=strongest == other,
        )

    def compose(self, after: Float[Tensor, "m d_model"]) -> None:
        """Note whose top token the stream has behind the FFN, at the tokens that `see` saw last."""
        after = after[self.some].to(self.norms)
        before = after - self.added
        order = torch.randperm(len(after), generator=self.generator)
        elsewhere = before + self.added[order.to(after.device)]
        old, new, other = (raised_most(x, self.words, 1).squeeze(1) for x in (before, after, elsewhere))
        self._note(**_cases(old, self.top, new))
        nulls = _cases(old, self.top[order], other)
        self._note(**{f"{case}_null": share for case, share in nulls.items()})

    def _note(self, **columns: Tensor) -> None:
        for name, values in columns.items():
            self._noted.setdefault(name, []).append(values.double().cpu())


def _cases(
    before: Int[Tensor, " n"], added: Int[Tensor, " n"], after: Int[Tensor, " n"]
) -> dict[str, Bool[Tensor, " n"]]:
    kept, taken = after == before, after == added
    return {"residual": kept & ~taken, "ffn": taken & ~kept, "both": kept & taken, "neither": ~kept & ~taken}

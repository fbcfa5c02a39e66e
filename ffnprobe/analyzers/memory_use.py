"""How many memories does a token read, and does one of them decide what the layer writes?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from matplotlib.figure import Figure
from torch import Tensor

from ..corpus import Tokens
from ..errors import InputError
from ..figure import BLACK, BLUE, GREEN, GREY, ORANGE, caption, legend_below, new_figure, styled
from ..forward import showing
from ..intervene import block_outputs
from ..models import Model, ffns, plain
from ..placement import input_device
from ..result import FEWEST_LAYERS, Result, Verdict, beyond, column
from ..sinks import find_sinks, flat_index, not_finite
from ..stream import BATCH, SINK_FACTOR, choose_layers, settings_of
from ..taps import Tap, flat
from ..unembedding import unembedding
from .token_reads import Reads

ALL = "all"
CASES = {"residual": BLUE, "ffn": ORANGE, "both": GREEN, "neither": BLACK}


@dataclass(frozen=True)
class Row:
    layer: int = column("", "layer")
    positions: str = column("", "positions in the document, from 0; all of them in the first row of a layer")
    tokens: int = column("tokens", "ordinary tokens sampled: neither sinks nor special")
    memories: int = column("neurons", "d_mlp: the most that could be in use")
    participation_ratio: float = column("neurons", "(sum a)^2 / sum a^2 of a = |h_i| |v_i|, mean over tokens")
    participation_ratio_se: float = column("neurons", "its standard error over documents")
    participation_ratio_null: float = column("neurons", "the same of random weights on the same input")
    top_share: float = column("0..1", "share of the k largest of a in its sum, mean over tokens")
    top_share_null: float = column("0..1", "the same of random weights")
    positive: float = column("0..1", "share of positive pre-activations (the gate's, when gated)")
    positive_null: float = column("0..1", "the same of random weights")
    zero_agreement: float = column("0..1", "tokens at which the layer's top token is no memory's top token")
    zero_agreement_null: float = column("0..1", "the same with the layer's top token of another token")
    strongest: float = column("0..1", "tokens at which it is the top token of the memory with the largest a")
    strongest_null: float = column("0..1", "the same with the layer's top token of another token")
    residual: float = column("0..1", "the stream behind the FFN keeps the top token that it had before, not y's")
    ffn: float = column("0..1", "it takes the top token of what the FFN adds, and had another one")
    both: float = column("0..1", "all three have one top token")
    neither: float = column("0..1", "it has a third one: the sum is a composition")
    residual_null: float = column("0..1", "residual, with what the FFN adds at another token")
    ffn_null: float = column("0..1", "ffn, with what it adds at another token")
    both_null: float = column("0..1", "both, with what it adds at another token")
    neither_null: float = column("0..1", "neither, with what it adds at another token")


@dataclass(frozen=True)
class MemoryUse(Result):
    name: ClassVar[str] = "memory_use"
    question: ClassVar[str] = (
        "How many memories does a token read, and does one of them decide what the layer writes?"
    )
    row_type: ClassVar[type] = Row

    def group(self, positions: str = ALL) -> list[Row]:
        """The rows of one group of positions, in the order of the layers."""
        return [row for row in self.rows if row.positions == positions]

    def findings(self) -> list[str]:
        rows = self.group()
        middle = sorted(rows, key=lambda row: row.participation_ratio)[len(rows) // 2]
        of = lambda name: median(getattr(row, name) for row in rows)  # noqa: E731
        last = rows[-1]
        return [
            f"A token reads {middle.participation_ratio:.0f} ± {middle.participation_ratio_se:.0f} of "
            f"{middle.memories:,} memories at layer {middle.layer} (the median one; participation ratio; random "
            f"weights {middle.participation_ratio_null:.0f}); the {self.settings['k']} largest contributions are "
            f"{middle.top_share:.0%} of the sum (random weights {middle.top_share_null:.0%}).",
            f"At {of('zero_agreement'):.0%} of the tokens (median layer) the layer's top token is the top token "
            f"of none of its memories (another token's: {of('zero_agreement_null'):.0%}); at "
            f"{of('strongest'):.1%} it is that of the strongest memory (another token's: "
            f"{of('strongest_null'):.1%}).",
            f"Behind layer {last.layer} the top token is that of the stream before the FFN at "
            f"{last.residual:.0%} of the tokens, of what the FFN adds at {last.ffn:.1%}, of both at "
            f"{last.both:.1%}, of neither at {last.neither:.0%} (with what it adds elsewhere: "
            f"{last.residual_null:.0%}, {last.ffn_null:.1%}, {last.both_null:.1%}, {last.neither_null:.0%}).",
        ]

    def verdicts(self) -> list[Verdict]:
        rows = self.group()
        n = len(rows)
        if n < FEWEST_LAYERS:
            return []
        decides = sum(row.strongest > 0.5 for row in rows)
        above = sum(row.strongest > row.strongest_null for row in rows)
        supported = "supported" if beyond(decides, n) else "mixed"
        return [
            Verdict(
                claim=4,
                rule="supported if, in most layers (sign test, 5%), the strongest memory has the layer's top "
                "token at more than half of the tokens; mixed if, in most layers, more often than with another "
                "token's",
                measured=f"at more than half of the tokens in {decides} of {n} layers, above another token's in "
                f"{above} of {n}; zero-agreement {median(row.zero_agreement for row in rows):.0%} (median layer)",
                verdict=supported if beyond(above, n) else "not supported",  # type: ignore[arg-type]
                against="A layer's output is a composition: in a 16-layer model its top token was that of no "
                "single memory at two thirds of the tokens or more (Geva et al. 2021). Sparse activation also "
                "arises with random labels (Li et al. 2023).",
            )
        ]

    @styled
    def plot(self) -> Figure:
        about = caption(
            self.settings, f"{self.rows[0].tokens:,} sampled", f"vocabulary {self.settings['vocabulary']}"
        )
        figure, (use, agree, cases) = new_figure(3, about)
        groups = list(dict.fromkeys(row.positions for row in self.rows))
        for positions, colour in zip(groups, (BLACK, BLUE, GREEN, ORANGE, *[GREY] * len(groups)), strict=False):
            rows = self.group(positions)
            label = "all positions" if positions == ALL else f"positions {positions}"
            at = [row.layer for row in rows]
            use.plot(at, [row.participation_ratio for row in rows], "o-", color=colour, label=label)
        rows = self.group()
        at = [row.layer for row in rows]
        null = [row.participation_ratio_null for row in rows]
        use.plot(at, null, "--", color=GREY, label="random weights")
        use.set(title="Memories in use", ylabel="participation ratio of |h| |v| (neurons)", ylim=(0, None))
        agree.plot(at, [row.zero_agreement for row in rows], "o-", color=BLACK, label="no memory's")
        agree.plot(at, [row.strongest for row in rows], "s-", color=ORANGE, label="the strongest memory's")
        agree.plot(at, [row.zero_agreement_null for row in rows], "--", color=BLACK, alpha=0.45)
        agree.plot(at, [row.strongest_null for row in rows], "--", color=ORANGE, alpha=0.6)
        agree.set(title="The layer's top token is", ylabel="share of tokens", ylim=(-0.02, 1.02))
        for case, colour in CASES.items():
            cases.plot(at, [getattr(row, case) for row in rows], "o-", color=colour, label=case)
            cases.plot(at, [getattr(row, f"{case}_null") for row in rows], "--", color=colour, alpha=0.45)
        cases.set(title="Behind the FFN the top token is of", ylabel="share of tokens", ylim=(-0.02, 1.02))
        for axes in (agree, cases):
            axes.plot([], [], "--", color=GREY, label="another token's")
        for axes in (use, agree, cases):
            axes.set_xlabel("layer")
            legend_below(axes)
        return figure


def memory_use(
    model: Model,
    tokens: Tokens,
    *,
    layers: Sequence[int] | None = None,
    sample: int = 1024,
    k: int = 10,
    groups: Sequence[int] = (8, 32),
    seed: int = 0,
    batch: int = BATCH,
    sink_factor: float = SINK_FACTOR,
    nonfinite: str = "stop",
) -> MemoryUse:
    """What a token reads of a layer's memories, and whose token wins (Geva et al. 2021, section 5).

    A memory's token is the one that it raises most in the direction in which it writes at that token. Everything
    is read as values are: through the folded unembedding, without biases. The sample is drawn from sequences
    spread over the corpus, four times as many tokens.

    Args:
        layers: the layers to measure; all by default.
        sample: ordinary tokens, or as many as there are.
        k: memories of the top share.
        groups: positions in the document at which a new group begins.
        batch, sink_factor, nonfinite: as for `collect`.

    Raises:
        InputError: a layer that is not there, or no two ordinary tokens.
        ModelRefused: the vocabulary cannot be read.
    """
    chosen = choose_layers(model, layers)
    words, layer_of = unembedding(model), {ffn.layer: ffn for ffn in ffns(model)}
    measured = {tap.layer: Reads(model, layer_of[tap.layer], words, k, seed) for tap in chosen}
    sinks = find_sinks(model, tokens, chosen, sink_factor, nonfinite)
    picked, rows = _pick(tokens, sample, seed)
    network: Any = plain(model).base_model
    for some in rows.split(batch):
        index = flat_index(some, tokens)

        def look(tap: Tap, read: dict[str, Tensor], some=some, index=index) -> None:
            bad = not_finite(tap, read, {"residual", "in", "pre", "post", "out"}, some, tokens, nonfinite)
            use = picked[some].flatten() & ~(bad | sinks.find(tap, read)).cpu()
            measured[tap.layer].see(read, use.nonzero().squeeze(1), index)

        with showing(chosen, look), block_outputs(model) as outputs, torch.no_grad():
            network(input_ids=tokens.ids[some].to(input_device(network)), use_cache=False)
        for tap in chosen:
            measured[tap.layer].compose(flat(outputs[tap.layer]))
    table = [row for reads in measured.values() for row in _rows(reads, tokens, groups)]
    settings = settings_of(model, tokens, seed, batch=batch, sink_factor=sink_factor, nonfinite=nonfinite)
    settings |= {"sample": sample, "k": k, "groups": list(groups), "vocabulary": "folded", "weights": "raw"}
    return MemoryUse(table, settings)


def _rows(reads: Reads, tokens: Tokens, groups: Sequence[int]) -> list[Row]:
    noted, at = reads.noted, reads.at
    position, document = tokens.position.flatten()[at], tokens.document.flatten()[at]
    edges = [0, *groups]
    within: dict[str, Bool[Tensor, " n"]] = {ALL: torch.ones_like(at, dtype=torch.bool)}
    for first, stop in zip(edges, [*groups, None], strict=True):
        name = f"{first}+" if stop is None else f"{first}-{stop - 1}"
        within[name] = (position >= first) & (position < (stop or tokens.n))
    return [
        Row(
            layer=reads.ffn.layer,
            positions=name,
            tokens=int(some.sum()),
            memories=reads.ffn.d_mlp,
            participation_ratio_se=_error(noted["participation_ratio"][some], document[some]),
            **{column: float(values[some].mean()) for column, values in noted.items()},
        )
        for name, some in within.items()
        if some.any()
    ]


def _pick(tokens: Tokens, sample: int, seed: int) -> tuple[Bool[Tensor, "s l"], Int[Tensor, " rows"]]:
    """Ordinary tokens drawn from sequences that are spread over the corpus, and those sequences."""
    sequences, length = tokens.ids.shape
    rows = torch.linspace(0, sequences - 1, min(sequences, -(-4 * sample // length))).long()
    there = torch.zeros_like(tokens.special)
    there[rows] = ~tokens.special[rows]
    at = there.flatten().nonzero().squeeze(1)
    if len(at) < 2:
        raise InputError(f"got {len(at)} ordinary tokens: give more text")
    drawn = at[torch.randperm(len(at), generator=torch.Generator().manual_seed(seed))[:sample]]
    picked = torch.zeros(tokens.n, dtype=torch.bool)
    picked[drawn] = True
    return picked.view_as(there), rows


def _error(values: Float[Tensor, " n"], document: Int[Tensor, " n"]) -> float:
    """Standard error of the mean over tokens, documents being what was drawn; NaN of a single one."""
    _, which = document.unique(return_inverse=True)
    n = int(which.max()) + 1
    off = torch.zeros(n, dtype=values.dtype).index_add_(0, which, values - values.mean()) / len(values)
    return float(off.square().sum().sqrt() * (n / (n - 1)) ** 0.5) if n > 1 else float("nan")

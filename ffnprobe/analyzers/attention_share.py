"""How much of the work do attention and FFN do, and does the one need or replace the other?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, ClassVar

import torch
from matplotlib.figure import Figure

from ..corpus import Tokens
from ..errors import InputError
from ..figure import BLACK, BLUE, GREY, ORANGE, caption, legend_below, new_figure, styled
from ..intervene import BATCH, Change, Losses, check_causal, losses, mean_of
from ..models import Model
from ..result import FEWEST_LAYERS, Result, Verdict, beyond, column
from ..stream import SINK_FACTOR, choose_layers, settings_of
from .sublayers import Additions, look

COLOUR = {"attention": BLUE, "ffn": ORANGE}
SITE = {"attention": "attention", "ffn": "out"}


@dataclass(frozen=True)
class Row:
    layer: int = column("", "layer")
    tokens: int = column("tokens", "ordinary tokens measured: neither sinks nor special")
    attention_norm: float = column("ratio", "|a| / |stream before|, a what attention adds; mean over tokens")
    attention_norm_se: float = column("ratio", "its standard error over documents")
    ffn_norm: float = column("ratio", "|y| / |stream before|, y what the FFN adds; mean over tokens")
    ffn_norm_se: float = column("ratio", "its standard error over documents")
    ffn_share: float = column("0..1", "|y| / (|a| + |y|), mean over tokens; 1/2 if both add as much")
    ffn_share_se: float = column("0..1", "its standard error over documents")
    predicted: int = column("tokens", "of these, with a next token of the same document")
    attention_logit: float = column("logits", "a along the next token, see `attention_share`; mean over tokens")
    attention_logit_se: float = column("logits", "its standard error over documents")
    attention_null: float = column("logits", "the same along the next token of another place")
    ffn_logit: float = column("logits", "y along the next token; mean over tokens")
    ffn_logit_se: float = column("logits", "its standard error over documents")
    ffn_null: float = column("logits", "the same along the next token of another place")
    attention_delta: float = column("nats/token", "added to the loss when attention writes its mean")
    attention_delta_se: float = column("nats/token", "its standard error over documents")
    ffn_delta: float = column("nats/token", "added to the loss when the FFN writes its mean")
    ffn_delta_se: float = column("nats/token", "its standard error over documents")
    both_delta: float = column("nats/token", "added to the loss when both write their means")
    both_delta_se: float = column("nats/token", "its standard error over documents")
    interaction: float = column("nats/token", "both - (attention + FFN); above 0 redundant, below 0 synergetic")
    interaction_se: float = column("nats/token", "its standard error over documents")
    loss: float = column("nats/token", "of the whole model on the tokens held out")
    loss_tokens: int = column("tokens", "predicted there")
    documents: int = column("documents", "that they are of")

    def needs(self, sublayer: str) -> bool:
        """Whether the loss needs what it writes beside its mean, beyond two standard errors."""
        return getattr(self, f"{sublayer}_delta") > 2 * getattr(self, f"{sublayer}_delta_se")

    @property
    def redundant(self) -> bool:
        """Whether one stands in for the other, beyond two standard errors."""
        return self.interaction > 2 * self.interaction_se

    @property
    def synergetic(self) -> bool:
        """Whether one is worth more beside the other, beyond two standard errors."""
        return self.interaction < -2 * self.interaction_se


@dataclass(frozen=True)
class AttentionShare(Result):
    name: ClassVar[str] = "attention_share"
    question: ClassVar[str] = (
        "How much of the work do attention and FFN do, and does the one need or replace the other?"
    )
    row_type: ClassVar[type] = Row

    def findings(self) -> list[str]:
        rows, n = self.rows, len(self.rows)
        of = lambda name: median(getattr(row, name) for row in rows)  # noqa: E731
        strongest = max(rows, key=lambda row: row.ffn_delta)
        first = sum(row.ffn_delta > row.attention_delta for row in rows)
        redundant, synergetic = (sum(getattr(row, kind) for row in rows) for kind in ("redundant", "synergetic"))
        needed = {name: sum(row.needs(name) for row in rows) for name in SITE}
        middle = sorted(rows, key=lambda row: row.interaction)[n // 2]
        return [
            f"Writing its mean, the FFN adds {of('ffn_delta'):.3f} nats a token to the loss of "
            f"{rows[0].loss:.3f} (median layer; at most {strongest.ffn_delta:.2f} ± {strongest.ffn_delta_se:.2f}, "
            f"layer {strongest.layer}), attention {of('attention_delta'):.3f}; the FFN more than attention in "
            f"{first} of {n} layers. Beyond two standard errors the loss needs the FFN in "
            f"{needed['ffn']}, attention in {needed['attention']}.",
            f"Without both it is {of('both_delta'):.3f}. The interaction, both - (FFN + attention), is "
            f"{middle.interaction:+.3f} ± {middle.interaction_se:.3f} at layer {middle.layer} (the median one): "
            f"redundant (above 0: one stands in for the other) beyond two standard errors in {redundant} of {n} "
            f"layers, synergetic (below 0: one is worth more beside the other) in {synergetic}.",
            f"Relative to the stream the FFN adds a vector of norm {of('ffn_norm'):.2f}, attention one of "
            f"{of('attention_norm'):.2f} (median layer); the FFN's is {of('ffn_share'):.0%} of the two.",
            f"Directly, FFNs raise the next token above the mean one by {sum(r.ffn_logit for r in rows):+.2f} "
            f"logits (of another place: {sum(r.ffn_null for r in rows):+.2f}), attention by "
            f"{sum(r.attention_logit for r in rows):+.2f} ({sum(r.attention_null for r in rows):+.2f}), summed "
            f"over {n} layers.",
        ]

    def verdicts(self) -> list[Verdict]:
        n = len(self.rows)
        if n < FEWEST_LAYERS:
            return []
        needed = sum(row.needs("ffn") and row.needs("attention") for row in self.rows)
        apart = sum(not row.redundant for row in self.rows)
        supported = "supported" if beyond(apart, n) else "mixed"
        return [
            Verdict(
                claim=6,
                rule="that the FFN complements attention is supported if, in most layers (sign test, 5%), the "
                "loss needs both the FFN and attention by more than two standard errors, and if, in most layers, "
                "neither stands in for the other (interaction not above 0 by more than two standard errors); "
                "mixed if only the first holds",
                measured=f"both needed in {needed} of {n} layers, not redundant in {apart} of {n}; interaction "
                f"{median(row.interaction for row in self.rows):+.3f} nats a token (median layer)",
                verdict=supported if beyond(needed, n) else "not supported",  # type: ignore[arg-type]
                against="What one sublayer loses later ones often make up for (McGrath et al. 2023, the hydra "
                "effect), so that ablation understates both; and many attention layers of large models can be "
                "left out at little cost (He et al. 2024). Nothing here bears on gradients.",
            )
        ]

    @styled
    def plot(self) -> Figure:
        about = caption(self.settings, f"losses on {self.settings['held_out']:,} tokens")
        figure, (norms, logits, loss, together) = new_figure(4, about)
        at = [row.layer for row in self.rows]

        def values(name: str) -> list[float]:
            return [getattr(row, name) for row in self.rows]

        for name, colour in COLOUR.items():
            style = {"color": colour, "label": "FFN" if name == "ffn" else name, "fmt": "o-"}
            norms.errorbar(at, values(f"{name}_norm"), yerr=values(f"{name}_norm_se"), **style)
            logits.errorbar(at, values(f"{name}_logit"), yerr=values(f"{name}_logit_se"), **style)
            logits.plot(at, values(f"{name}_null"), "--", color=colour, alpha=0.5)
            loss.errorbar(at, values(f"{name}_delta"), yerr=values(f"{name}_delta_se"), **style)
        logits.plot([], [], "--", color=GREY, label="next token of another place")
        loss.errorbar(at, values("both_delta"), yerr=values("both_delta_se"), fmt="s-", color=BLACK, label="both")
        together.errorbar(
            at, values("interaction"), yerr=values("interaction_se"), fmt="o", color=BLACK, label="both - sum"
        )
        together.axhline(0, color=GREY, linestyle="--", label="each for itself")
        for axes, scale in ((norms, "log"), (loss, "symlog")):
            axes.set_yscale(scale, **({"linthresh": 0.01} if scale == "symlog" else {}))
        together.set_yscale("symlog", linthresh=0.01)
        norms.set(title="Added to the stream", ylabel="norm / norm of the stream before")
        logits.set(title="Added to the next token, directly", ylabel="logit above the mean token's")
        loss.set(title="Writing the mean instead", ylabel="added to the loss (nats/token)")
        together.set(title="Redundant above 0, synergetic below", ylabel="interaction (nats/token)")
        for axes in (norms, logits, loss, together):
            axes.set_xlabel("layer")
            legend_below(axes)
        return figure


def attention_share(
    model: Model,
    tokens: Tokens,
    *,
    layers: Sequence[int] | None = None,
    held_out: int = 1024,
    sample: int = 4096,
    seed: int = 0,
    batch: int = BATCH,
    sink_factor: float = SINK_FACTOR,
    nonfinite: str = "stop",
) -> AttentionShare:
    """What attention and FFN of each layer add to stream and next token, and what the loss is without them.

    Added is what the block adds, behind a norm or a multiplier. A logit is w·a / s: w the next token's row of the
    folded unembedding minus the mean of all rows, s what the final norm divides that token's stream by (held
    fixed), before a multiplier or a cap of all logits. In the loss, ordinary tokens get the mean of what is
    written there, before such a norm. interaction = both - (FFN + attention): above 0 the two are redundant,
    because losing both costs more than the sum; below 0 synergetic, because one is worth more beside the other.
    Where one alone costs almost all that a loss can, as the FFN of layer 0 often does, there is little left for
    both to add: then it is below 0 for that reason.

    Norms, logits and means are of sequences spread over all but the tokens that are held out for the loss.

    Args:
        layers: the layers to measure; all by default.
        held_out: tokens from the end of the corpus on which the loss is measured, three passes a layer.
        sample: tokens, at most, from which norms, logits and means are.
        seed: of the next tokens that are exchanged.
        batch, sink_factor, nonfinite: as for `collect`.

    Raises:
        InputError: a layer that is not there, or too few tokens.
        ModelRefused: the model does not predict the next token, has no residual stream that both add to, or its
            vocabulary cannot be read.
    """
    check_causal(model)
    rest, test = tokens.held_out(held_out)
    chosen = choose_layers(model, layers)
    looking: dict[str, Any] = {"sink_factor": sink_factor, "nonfinite": nonfinite}
    count = min(len(rest.ids), max(1, sample // rest.ids.shape[1]))
    some = rest.sequences(torch.linspace(0, len(rest.ids) - 1, count).long())
    added = look(model, some, chosen, seed=seed, batch=batch, **looking)
    for layer, of in added.items():
        if not of.n or not of.noted("predicts").any():
            raise InputError(f"no ordinary token of layer {layer} is followed by one to predict: give more text")
    changes = {
        (layer, name): Change(layer, SITE[name], mean_of(of.mean(name), SITE[name]))
        for layer, of in added.items()
        for name in SITE
    }
    arms = {f"{layer}/{name}": [change] for (layer, name), change in changes.items()}
    arms |= {f"{layer}/both": [changes[layer, name] for name in SITE] for layer in added}
    found = losses(model, test, arms, batch=batch, **looking)
    rows = [_row(layer, of, found) for layer, of in added.items()]
    settings = settings_of(model, tokens, seed, batch=batch, **looking)
    settings |= {"held_out": held_out, "sample": sample, "vocabulary": "folded", "weights": "raw"}
    return AttentionShare(rows, settings)


def interaction(found: Losses, both: str, parts: Sequence[str]) -> tuple[float, float]:
    """What arms add together beyond the sum of what each adds, and its standard error over documents."""
    beyond_sum = found.changed[both] - sum(found.changed[part] - found.unchanged for part in parts)
    return Losses(found.tokens, found.unchanged, {"interaction": beyond_sum}).delta("interaction")


def _row(layer: int, of: Additions, found: Losses) -> Row:
    columns: dict[str, Any] = {}
    for name in ("attention_norm", "ffn_norm", "ffn_share", "attention_logit", "ffn_logit"):
        columns[name], columns[f"{name}_se"] = of.over_documents(name)
    for arm in (*SITE, "both"):
        columns[f"{arm}_delta"], columns[f"{arm}_delta_se"] = found.delta(f"{layer}/{arm}")
    together, error = interaction(found, f"{layer}/both", [f"{layer}/{name}" for name in SITE])
    return Row(
        layer=layer,
        tokens=of.n,
        predicted=int(of.noted("predicts").sum()),
        **columns,
        attention_null=of.over_documents("attention_null")[0],
        ffn_null=of.over_documents("ffn_null")[0],
        interaction=together,
        interaction_se=error,
        loss=found.mean(),
        loss_tokens=int(found.tokens.sum()),
        documents=len(found.tokens),
    )

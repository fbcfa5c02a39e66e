"""Can one pair of key and value be written into a layer, and nothing else change?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import median
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Int
from matplotlib.figure import Figure
from torch import Tensor

from ..corpus import Tokens
from ..errors import InputError
from ..figure import BLACK, GREY, ORANGE, caption, legend_below, new_figure, styled
from ..intervene import check_causal
from ..models import Model, context_length, ffns, tokenizer_of
from ..result import Result, column
from ..statistics import Moments
from ..stream import Probe, choose_layers, collect, settings_of
from .writing import Logits, associate, document_losses, logits_of, next_token, wanted

ARMS = {"edit": ("o-", BLACK), "identity C": ("s--", ORANGE), "random key": ("^:", GREY)}

_ALL = ("kept", "sink", "special")  # the edit has to spare them all


@dataclass(frozen=True)
class Edit:
    """A wish: after `prompt`, or after a paraphrase that was not edited, the model should say `target`.

    `position` is the token of the prompt whose hidden activation is the key.
    """

    prompt: str
    target: str
    paraphrases: Sequence[str] = ()
    position: int = -1


@dataclass(frozen=True)
class Row:
    layer: int = column("", "layer")
    arm: str = column("", "edit; or its null: at a random key of the same norm, or with C the identity")
    prompt: str = column("", "prompt of the edit")
    target: str = column("", "token wanted next")
    asked: str = column("", "text that the model was asked to go on with")
    paraphrase: bool = column("", "it is a paraphrase, not the prompt itself")
    probability_before: float = column("0..1", "of the target")
    probability: float = column("0..1", "of the target, after the edit")
    rank_before: int = column("tokens", "of the target, 1 the most likely")
    rank: int = column("tokens", "of the target, after the edit")
    change: float = column("0..", "norm of the change over the norm of the values")
    loss_change: float = column("nats/token", "of the loss on unrelated documents, mean of their means")
    loss_change_se: float = column("nats/token", "its standard error over documents")
    documents: int = column("documents", "unrelated documents")


@dataclass(frozen=True)
class MemoryEdit(Result):
    name: ClassVar[str] = "memory_edit"
    question: ClassVar[str] = "Can one pair of key and value be written into a layer, and nothing else change?"
    row_type: ClassVar[type] = Row

    def typical(self, arm: str, measure: str, paraphrase: bool = False) -> tuple[list[int], list[float]]:
        """Layers, and the median over edits of a measure."""
        rows = [row for row in self.rows if (row.arm, row.paraphrase) == (arm, paraphrase)]
        by_layer = [(layer, list(some)) for layer, some in groupby(rows, key=lambda row: row.layer)]
        return [layer for layer, _ in by_layer], [
            median(getattr(r, measure) for r in some) for _, some in by_layer
        ]

    def findings(self) -> list[str]:
        sentences = []
        paraphrased = any(row.paraphrase for row in self.rows)
        layers, reached = self.typical("edit", "probability", paraphrased)
        best = layers[max(range(len(layers)), key=reached.__getitem__)]
        for arm in ARMS:

            def at(measure: str, paraphrase: bool = False, arm: str = arm) -> float:
                return dict(zip(*self.typical(arm, measure, paraphrase), strict=True))[best]

            on = f"{at('probability_before'):.2g} to {at('probability'):.2g} on the prompt"
            if paraphrased:
                on += f", {at('probability_before', True):.2g} to {at('probability', True):.2g} on paraphrases"
            sentences.append(
                f"Layer {best}, {arm}: the probability of the wanted token goes from {on} (median of edits); the "
                f"loss on unrelated text changes by {at('loss_change'):+.4f} ± {at('loss_change_se'):.4f} nats a "
                "token."
            )
        return sentences

    @styled
    def plot(self) -> Figure:
        about = caption(
            self.settings, f"{self.settings['edits']} edits, medians", f"ridge {self.settings['ridge']:g}"
        )
        figure, (prompt, paraphrase, loss) = new_figure(3, about)
        for axes, asked in ((prompt, False), (paraphrase, True)):
            for arm, (mark, colour) in ARMS.items():
                axes.plot(*self.typical(arm, "probability", asked), mark, color=colour, label=arm)
            before = self.typical("edit", "probability_before", asked)
            axes.plot(*before, "--", color=GREY, linewidth=0.8, label="before")
            axes.set(title="On paraphrases" if asked else "On the prompt", ylabel="probability of the target")
            axes.set_ylim(0, 1.02)
        for arm, (mark, colour) in ARMS.items():
            layers, change = self.typical(arm, "loss_change")
            _, error = self.typical(arm, "loss_change_se")
            loss.errorbar(layers, change, error, fmt=mark, color=colour, label=arm, capsize=2)
        loss.set(title="On unrelated text", ylabel="change of loss (nats/token)")
        for axes in (prompt, paraphrase, loss):
            axes.set_xlabel("layer")
            legend_below(axes)
        return figure


def memory_edit(
    model: Model,
    tokens: Tokens,
    edits: Sequence[Edit],
    *,
    layers: Sequence[int] | None = None,
    ridge: float = 1e-3,
    goal: float = 0.9,
    steps: int = 100,
    seed: int = 0,
    **collecting: Any,
) -> MemoryEdit:
    """Write one key and value into a layer's values, as into a linear memory (ROME, Meng et al. 2022), and ask.

    k* is the hidden activation where the prompt ends, C the second moment of h about zero over the first half of
    the tokens (sinks and special ones too), and v* what the layer has to write there: the first on a path of
    gradient steps at which the wanted token has the probability `goal`. If a layer is a memory, the edit shows in
    paraphrases, a random key moves nothing, and text of the other half, which has other keys, is read as before.
    That an edit works does not say that the fact was stored there (Hase et al. 2023). The caller's model stays as
    it is. On a gated layer h is weighed by the norm of its value: no arbitrary scale enters C or the nulls.

    Args:
        tokens: unrelated text; prompts are read behind its separator.
        edits: targets of one token each.
        ridge: added to the diagonal of C, in mean eigenvalues.
        collecting: passed to `collect` (batch, sink_factor, progress).

    Raises:
        InputError: a layer or a position that is not there, an empty prompt, a target of other than one token.
        ModelRefused: the model does not predict the next token.
    """
    check_causal(model)
    if not edits or ridge <= 0:
        raise InputError(f"got {len(edits)} edits, ridge {ridge}: give at least one edit and a ridge above 0")
    chosen = choose_layers(model, layers)
    wishes = [_wish(edit, model, tokens) for edit in edits]
    half = len(tokens.ids) // 2
    seen, unrelated = tokens.sequences(slice(half)), tokens.sequences(slice(half, None))
    apart = ~torch.isin(unrelated.document, seen.document)
    if not seen.n or len(unrelated.document[apart].unique()) < 2:
        raise InputError(f"{tokens.n_documents} documents in {len(tokens.ids)} sequences: give more text")
    probes = {str(tap.layer): Probe(tap.layer, "post", Moments.about, kinds=_ALL) for tap in chosen}
    moments = collect(model, seen, probes, **collecting)
    before = document_losses(logits_of(model), unrelated, apart)
    of_layer = {ffn.layer: ffn for ffn in ffns(model)}
    rows = []
    for tap in chosen:
        ffn = of_layer[tap.layer].to(torch.float64)
        gauge = ffn.gauge.cpu()
        C = gauge[:, None] * moments[str(tap.layer)].compute().uncentred.cpu() * gauge
        C += ridge * C.diagonal().mean() * torch.eye(len(C))
        values = ffn.canonical().values.cpu()
        random = torch.Generator().manual_seed(1_000_003 * seed + tap.layer)
        for wish in wishes:
            hidden, change = wanted(model, tap, wish.asked[0].ids, wish.position, wish.target, goal, steps)
            key = hidden * gauge
            other = torch.randn(len(key), generator=random, dtype=key.dtype)
            arms = {"edit": (key, C), "identity C": (key, torch.eye(len(C)).to(C))}
            for arm, (k, moment) in (arms | {"random key": (other * key.norm() / other.norm(), C)}).items():
                edited = associate(values, k, k @ values + change, moment)
                after = logits_of(model, tap, edited * gauge[:, None])
                worse = document_losses(after, unrelated, apart) - before
                rows += [
                    Row(
                        layer=tap.layer,
                        arm=arm,
                        prompt=wish.asked[0].text,
                        target=wish.text,
                        asked=question.text,
                        paraphrase=question is not wish.asked[0],
                        **_answers(logits_of(model), after, question.ids, wish.target),
                        change=float((edited - values).norm() / values.norm()),
                        loss_change=float(worse.mean()),
                        loss_change_se=float(worse.std() / len(worse) ** 0.5),
                        documents=len(worse),
                    )
                    for question in wish.asked
                ]
    settings = settings_of(model, tokens, seed, **collecting)
    settings |= {"edits": len(edits), "ridge": ridge, "goal": goal, "steps": steps, "weights": "raw"}
    return MemoryEdit(rows, settings)


class _Question(NamedTuple):
    text: str
    ids: Int[Tensor, "1 l"]


@dataclass(frozen=True)
class _Wish:
    """An edit in token ids; the prompt comes first in `asked`, and `position` counts from the separator."""

    asked: list[_Question]
    text: str
    target: int
    position: int


def _wish(edit: Edit, model: Model, tokens: Tokens) -> _Wish:
    tokenizer, longest = tokenizer_of(model), context_length(model)
    separator = tokens.settings.get("separator")
    lead = [] if separator is None else [separator]

    def ids_of(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

    asked = []
    for text in (edit.prompt, *edit.paraphrases):
        ids = ids_of(text)
        if not 0 < len(ids) <= longest - len(lead):
            raise InputError(f"prompt {text!r} has {len(ids)} tokens: give 1 to {longest - len(lead)}")
        asked.append(_Question(text, torch.tensor([lead + ids])))
    n = asked[0].ids.numel() - len(lead)
    if not -n <= edit.position < n:
        raise InputError(f"position {edit.position} is not in prompt {edit.prompt!r}: it has {n} tokens, from 0")
    target = ids_of(edit.target)
    if len(target) != 1:
        raise InputError(f"target {edit.target!r} is {len(target)} tokens of this model: give one token")
    return _Wish(asked, edit.target, target[0], len(lead) + edit.position % n)


def _answers(before: Logits, after: Logits, ids: Int[Tensor, "1 l"], target: int) -> dict[str, Any]:
    answers = {}
    for suffix, logits in (("_before", before), ("", after)):
        found = next_token(logits(ids))
        answers["probability" + suffix] = float(found[target].exp())
        answers["rank" + suffix] = 1 + int((found > found[target]).sum())
    return answers

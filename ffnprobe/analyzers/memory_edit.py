"""Can one pair of key and value be written into a layer, and nothing else change?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import median
from typing import Any, ClassVar, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ..corpus import Tokens
from ..errors import InputError, ModelRefused
from ..figure import BLACK, GREY, ORANGE, caption, legend_below, new_figure, styled
from ..forward import forward
from ..models import Model, Tap, context_length, describe, ffns, plain, tokenizer_of
from ..placement import input_device
from ..result import Result, column
from ..statistics import Moments
from ..stream import Probe, choose_layers, collect, settings_of

ARMS = {"edit": ("o-", BLACK), "identity C": ("s--", ORANGE), "random key": ("^:", GREY)}
STEP = 0.1  # of a gradient step, in norms of what the layer leaves in the residual stream

_ALL = ("kept", "sink", "special")  # the edit has to spare them all
Logits = Callable[[Int[Tensor, "s l"]], Float[Tensor, "s l d_vocab"]]


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
    if model.cfg.attention_dir != "causal":
        raise ModelRefused(f"{describe(model)['name']} predicts no next token: choose a causal language model")
    if not edits or ridge <= 0:
        raise InputError(f"got {len(edits)} edits, ridge {ridge}: give at least one edit and a ridge above 0")
    chosen = choose_layers(model, layers)
    wishes = [_wish(edit, model, tokens) for edit in edits]
    half = len(tokens.ids) // 2
    seen, unrelated = _sequences(tokens, slice(half)), _sequences(tokens, slice(half, None))
    if not (seen.n and (apart := ~torch.isin(unrelated.document, seen.document)).any()):
        raise InputError(f"{tokens.n_documents} documents in {len(tokens.ids)} sequences: give more text")
    probes = {str(tap.layer): Probe(tap.layer, "post", Moments.about, kinds=_ALL) for tap in chosen}
    moments = collect(model, seen, probes, **collecting)
    before = document_losses(_logits(model), unrelated, apart)
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
            hidden, change = wanted(model, tap, wish, goal, steps)
            key = hidden * gauge
            other = torch.randn(len(key), generator=random, dtype=key.dtype)
            arms = {"edit": (key, C), "identity C": (key, torch.eye(len(C)).to(C))}
            for arm, (k, moment) in (arms | {"random key": (other * key.norm() / other.norm(), C)}).items():
                edited = associate(values, k, k @ values + change, moment)
                after = _logits(model, tap, edited * gauge[:, None])
                worse = document_losses(after, unrelated, apart) - before
                rows += [
                    Row(
                        layer=tap.layer,
                        arm=arm,
                        prompt=wish.asked[0].text,
                        target=wish.text,
                        asked=question.text,
                        paraphrase=question is not wish.asked[0],
                        **_answers(_logits(model), after, question.ids, wish.target),
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


def associate(
    values: Float[Tensor, "d_mlp d_model"],
    key: Float[Tensor, " d_mlp"],
    value: Float[Tensor, " d_model"],
    second_moment: Float[Tensor, "d_mlp d_mlp"],
) -> Float[Tensor, "d_mlp d_model"]:
    """The values that answer `key` with `value` and change least what other keys are answered with.

    V + C^-1 k (v - V'k)' / (k' C^-1 k), the least E |h' dV|² under k' (V + dV) = v (Meng et al. 2022).

    >>> associate(torch.eye(2), torch.tensor([1.0, 0.0]), torch.tensor([0.0, 3.0]), torch.eye(2))
    tensor([[0., 3.],
            [0., 1.]])
    """
    direction = torch.linalg.solve(second_moment, key)
    return values + torch.outer(direction / (direction @ key), value - key @ values)


@torch.no_grad()
def document_losses(
    logits: Logits, tokens: Tokens, counted: Bool[Tensor, "s l"], batch: int = 2
) -> Float[Tensor, " documents"]:
    """The mean loss of each document in nats a token, over tokens that are counted and not special."""
    same = tokens.document[:, 1:] == tokens.document[:, :-1]
    use = same & counted[:, 1:] & ~tokens.special[:, 1:]
    loss = torch.cat(
        [
            F.cross_entropy(rearrange(logits(ids)[:, :-1].float(), "s l v -> s v l"), ids[:, 1:], reduction="none")
            for ids in tokens.ids.split(batch)
        ]
    )
    _, document = tokens.document[:, 1:][use].unique(return_inverse=True)
    n = document.bincount()
    return torch.zeros(len(n), dtype=torch.float64).index_add_(0, document, loss[use].double()) / n


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


def wanted(
    model: Model, tap: Tap, wish: _Wish, goal: float, steps: int
) -> tuple[Float[Tensor, " d_mlp"], Float[Tensor, " d_model"]]:
    """The hidden activation at the wish's position, and what to add to the layer's output there.

    Steps down the gradient of -log p(target), a tenth of the residual stream behind the layer each, end at `goal`.
    """
    twin, (_, ids) = plain(model), wish.asked[0]
    found: dict[str, Tensor] = {}
    forward(model, ids, [tap], lambda _, read: found.update(read))
    out = found["out"][wish.position].float()
    step = STEP * (found["residual"][wish.position] + out).norm()
    change = torch.zeros_like(out)
    here = (torch.arange(ids.numel()) == wish.position)[:, None].to(change)

    def add(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output + (here * change).to(output).view_as(output)

    handle = tap.down.register_forward_hook(add)
    try:
        for _ in range(steps):
            change.requires_grad_()
            loss = -_next(twin(input_ids=ids.to(input_device(twin)), use_cache=False).logits)[wish.target]
            if loss <= -math.log(goal):
                break
            (gradient,) = torch.autograd.grad(loss, change)
            # where the gradient is 0, as beside the last position of the last layer, nothing can be done
            change = change.detach() - step * gradient / gradient.norm().clamp(min=1e-30)
    finally:
        handle.remove()
    return found["post"][wish.position].cpu().double(), change.detach().cpu().double()


def _logits(model: Model, tap: Tap | None = None, values: Float[Tensor, "d_mlp d_model"] | None = None) -> Logits:
    """What the model says, with these values in place of a layer's own; the model itself is not touched."""
    twin, weights = plain(model), {}
    if tap is not None and values is not None:
        own: Any = tap.down.weight
        name = next(name for name, weight in twin.named_parameters() if weight is own)
        weights[name] = (values if isinstance(tap.down, Conv1D) else values.T).to(own)

    def read(ids: Int[Tensor, "s l"]) -> Float[Tensor, "s l d_vocab"]:
        with torch.no_grad():
            arguments = {"input_ids": ids.to(input_device(twin)), "use_cache": False}
            return functional_call(twin, weights, (), arguments).logits.cpu()

    return read


def _next(logits: Float[Tensor, "1 l d_vocab"]) -> Float[Tensor, " d_vocab"]:
    """Log-probabilities of what follows the last token."""
    return logits[0, -1].float().log_softmax(0)


def _answers(before: Logits, after: Logits, ids: Int[Tensor, "1 l"], target: int) -> dict[str, Any]:
    answers = {}
    for suffix, logits in (("_before", before), ("", after)):
        found = _next(logits(ids))
        answers["probability" + suffix] = float(found[target].exp())
        answers["rank" + suffix] = 1 + int((found > found[target]).sum())
    return answers


def _sequences(tokens: Tokens, which: slice) -> Tokens:
    return Tokens(tokens.ids[which], tokens.document[which], tokens.special[which], tokens.settings)

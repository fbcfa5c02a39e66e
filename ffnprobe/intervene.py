"""What does the model lose when what a layer holds or writes is changed?

Every change is made on a plain pass of the model by hooks; the weights stay as they are. Blocks before the first
one that an arm changes are not run again: their output is that of the unchanged pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from .corpus import Tokens
from .errors import InputError, ModelRefused
from .forward import choose_layers, reading, showing
from .models import Model, Tap, attention_output, blocks, describe, plain
from .placement import input_device
from .sinks import find_sinks, not_finite
from .stream import SINK_FACTOR, Progress

SITES = ("post", "out", "attention")
BATCH = 2  # sequences a pass: the logits of more are large

Read = Mapping[str, Float[Tensor, "n width"]]


@dataclass(frozen=True)
class Change:
    """What takes the place of a site of one layer, at the tokens that are changed.

    Sites: `post` the hidden activation, `out` what the FFN writes (before any norm behind it), `attention` what
    the attention beside it writes. `to` gets the rows of those tokens at all sites so far: `in`, `pre`, `up` and
    `post` for a change at `post`, and `out` for one at `out`; at `attention` that site alone.
    """

    layer: int
    site: str
    to: Callable[[Read], Float[Tensor, "n width"]]


@dataclass(frozen=True)
class Losses:
    """The mean loss of every document in nats a token, unchanged and under each arm."""

    tokens: Int[Tensor, " documents"]  # predicted ones
    unchanged: Float[Tensor, " documents"]
    changed: Mapping[str, Float[Tensor, " documents"]]

    def mean(self) -> float:
        """Of all tokens, unchanged."""
        return float(self.unchanged @ self.tokens.double() / self.tokens.sum())

    def delta(self, arm: str) -> tuple[float, float]:
        """What an arm adds to the mean loss of a token, and the standard error of that over documents."""
        difference = self.changed[arm] - self.unchanged
        share = self.tokens.double() / self.tokens.sum()
        mean = difference @ share
        n = len(share)
        error = ((difference - mean) * share).square().sum().sqrt() * (n / (n - 1)) ** 0.5
        return float(mean), float(error)


def losses(
    model: Model,
    tokens: Tokens,
    arms: Mapping[str, Sequence[Change]],
    *,
    counted: Bool[Tensor, "s l"] | None = None,
    sinks: bool = False,
    batch: int = BATCH,
    sink_factor: float = SINK_FACTOR,
    nonfinite: str = "stop",
    progress: Progress | None = None,
) -> Losses:
    """The loss with each arm's changes made, beside the loss without, on the same tokens.

    Changed are ordinary tokens: what the sinks and the special tokens hold stays, unless `sinks`. A prediction
    counts where the token predicted is not special, is of the same document and is `counted`.

    Args:
        arms: by any name, the changes that are made together.
        counted: tokens whose prediction counts; all by default.
        sinks: change every token.
        batch: sequences a pass.

    Raises:
        InputError: a layer or a site that is not there, or fewer than two documents to predict.
        ModelRefused: the model does not predict the next token, or an activation is NaN or Inf.
    """
    check_causal(model)
    for change in (change for changes in arms.values() for change in changes):
        if change.site not in SITES:
            raise InputError(f'site "{change.site}" cannot be changed: choose from {", ".join(SITES)}')
    layers = sorted({change.layer for changes in arms.values() for change in changes})
    chosen = choose_layers(model, layers) if layers else []
    apart = find_sinks(model, tokens, chosen, sink_factor, nonfinite) if layers and not sinks else None
    use = predictable(tokens) if counted is None else predictable(tokens) & counted[:, 1:]
    before: list[Tensor] = []
    found: dict[str, list[Tensor]] = {name: [] for name in arms}
    for rows in torch.arange(len(tokens.ids)).split(batch):
        kept: dict[int, Tensor] = {}

        def mark(tap: Tap, read: dict[str, Tensor], rows=rows, kept=kept) -> None:
            bad = not_finite(tap, read, read.keys(), rows, tokens, nonfinite).cpu()
            kept[tap.layer] = ~bad
            if apart is not None:
                kept[tap.layer] &= ~tokens.special[rows].flatten() & ~apart.find(tap, read).cpu()

        ids = tokens.ids[rows]
        with torch.no_grad(), showing(chosen, mark), block_outputs(model) as outputs:
            before.append(token_losses(model, ids))
        for name, changes in arms.items():
            with torch.no_grad(), _changed(model, changes, kept), _resumed(model, changes, outputs):
                found[name].append(token_losses(model, ids))
        if progress:
            progress(int(rows[-1] + 1) * ids.shape[1], tokens.n)
    n, unchanged = document_means(torch.cat(before), use, tokens)
    return Losses(
        n, unchanged, {name: document_means(torch.cat(of), use, tokens)[1] for name, of in found.items()}
    )


def check_causal(model: Model) -> None:
    """Refuse a model that has no next-token loss.

    Raises:
        ModelRefused: it does not predict the next token.
    """
    if model.cfg.attention_dir != "causal":
        raise ModelRefused(f"{describe(model)['name']} predicts no next token: choose a causal language model")


def mean_of(mean: Float[Tensor, " width"], site: str, which: Int[Tensor, " k"] | None = None) -> Callable:
    """A change to the mean, of these coordinates or of all.

    >>> mean_of(torch.tensor([5.0, 6.0]), "post", torch.tensor([1]))({"post": torch.zeros(1, 2)})
    tensor([[0., 6.]])
    """

    def to(read: Read) -> Tensor:
        x = read[site]
        if which is None:
            return mean.to(x).expand_as(x)
        return x.index_copy(1, which.to(x.device), mean[which].to(x).expand(len(x), -1))

    return to


def predictable(tokens: Tokens) -> Bool[Tensor, "s n"]:
    """Where the next token is of the same document and not special."""
    same = tokens.document[:, 1:] == tokens.document[:, :-1]
    return same & ~tokens.special[:, 1:]


def document_means(
    loss: Float[Tensor, "s n"], use: Bool[Tensor, "s n"], tokens: Tokens
) -> tuple[Int[Tensor, " documents"], Float[Tensor, " documents"]]:
    """Predicted tokens and mean loss of every document that has any.

    Raises:
        InputError: fewer than two have.
    """
    _, document = tokens.document[:, 1:][use].unique(return_inverse=True)
    n = document.bincount()
    if len(n) < 2:
        raise InputError(f"got {len(n)} documents with a token to predict: give text of several documents")
    return n, torch.zeros(len(n), dtype=torch.float64).index_add_(0, document, loss[use].double()) / n


def next_token_losses(logits: Float[Tensor, "s l d_vocab"], ids: Int[Tensor, "s l"]) -> Float[Tensor, "s n"]:
    """-log p of every token after the first."""
    # rows as they lie: with the vocabulary last, this takes a fifth of the time
    after = ids.roll(-1, dims=1).flatten().to(logits.device)
    return F.cross_entropy(logits.flatten(0, 1).float(), after, reduction="none").view(ids.shape)[:, :-1]


def token_losses(model: Model, ids: Int[Tensor, "s l"]) -> Float[Tensor, "s n"]:
    """-log p of every token after the first, as the model runs it now."""
    twin = plain(model)
    return next_token_losses(twin(input_ids=ids.to(input_device(twin)), use_cache=False).logits, ids).cpu()


@contextmanager
def _changed(model: Model, changes: Sequence[Change], kept: Mapping[int, Tensor]) -> Iterator[None]:
    with ExitStack() as stack:
        for change in changes:
            (tap,) = choose_layers(model, [change.layer])
            at = kept[change.layer].nonzero().squeeze(1)
            read = stack.enter_context(reading(tap)) if change.site != "attention" else {}
            hook = _replacing(change, read, at)
            if change.site == "post":
                handle = tap.down.register_forward_pre_hook(lambda _, args, hook=hook: (hook(args[0]), *args[1:]))
            else:
                module = tap.down if change.site == "out" else attention_output(model, change.layer)
                handle = module.register_forward_hook(lambda _, args, output, hook=hook: hook(output))
            stack.callback(handle.remove)
        yield


def _replacing(change: Change, read: dict[str, Tensor], at: Int[Tensor, " k"]) -> Callable[[Tensor], Tensor]:
    def replace(x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        here = at.to(x.device)
        sites = {site: of.to(x.device)[here] for site, of in (read | {change.site: rows}).items()}
        return rows.index_copy(0, here, change.to(sites).to(rows)).view_as(x)

    return replace


@contextmanager
def block_outputs(model: Model) -> Iterator[list[Any]]:
    """What each block gives, in their order."""
    outputs: list[Any] = []
    handles = [
        block.register_forward_hook(lambda _, args, output: outputs.append(output)) for block in blocks(model)
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _resumed(model: Model, changes: Sequence[Change], outputs: Sequence[Any]) -> Iterator[None]:
    """While the model runs, blocks before the first that is changed give what they gave before."""
    first = min((change.layer for change in changes), default=0)
    skipped: list[nn.Module] = blocks(model)[:first]
    before = [module.__dict__.get("forward") for module in skipped]  # accelerate's, where it has placed the block
    try:
        for module, output in zip(skipped, outputs, strict=False):
            module.forward = lambda *_, output=output, **__: output
        yield
    finally:
        for module, forward in zip(skipped, before, strict=True):
            del module.forward
            if forward is not None:
                module.forward = forward

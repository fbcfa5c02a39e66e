"""What do attention and FFN of every layer add to the residual stream, and to the logit of the next token?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..check import relative_error
from ..corpus import Tokens
from ..errors import ModelRefused
from ..forward import reading
from ..intervene import predictable
from ..models import Model, attention_output, contribution, describe, plain
from ..norms import measure
from ..placement import input_device
from ..sinks import find_sinks, not_finite
from ..taps import Tap, flat, recording
from ..unembedding import unembedding

EXACT = 1e-3  # of the stream, by which a block may miss the sum of its parts; a narrow dtype by its own rounding

Parts = dict[str, Float[Tensor, "n d_model"]]  # by sublayer
OnBlock = Callable[[Tap, dict[str, Tensor], Parts, Tensor], None]


class Additions:
    """What one layer's sublayers add: a few numbers a token, and the means of what is written."""

    def __init__(self, model: Model, layer: int) -> None:
        self.adds = adding(model, layer)
        self.n = 0
        self._total: dict[str, Tensor] = {}
        self._noted: dict[str, list[Tensor]] = {}

    def see(self, before: Float[Tensor, "n d_model"], written: Parts) -> Parts:
        """Note how much is written, and hand back what is added."""
        added = {name: adds(written[name]).to(before).float() for name, adds in self.adds.items()}
        size = {name: part.norm(dim=1) for name, part in added.items()}
        for name in added:
            self.note(f"{name}_norm", size[name] / before.float().norm(dim=1))
            total = written[name].sum(0, dtype=torch.float64).cpu()
            self._total[name] = self._total[name] + total if name in self._total else total
        self.note("ffn_share", size["ffn"] / (size["attention"] + size["ffn"]))
        self.n += len(before)
        return added

    def note(self, name: str, values: Tensor) -> None:
        self._noted.setdefault(name, []).append(values.cpu())

    def mean(self, sublayer: str) -> Float[Tensor, " d_model"]:
        """Of what it writes, before any norm or multiplier behind it."""
        return self._total[sublayer] / self.n

    def noted(self, name: str) -> Tensor:
        """A number a token, in the order in which they were shown."""
        return torch.cat(self._noted[name])

    def over_documents(self, name: str) -> tuple[float, float]:
        """Mean over tokens, and its standard error, documents being what was drawn; NaN of a single one."""
        values = self.noted(name).double()
        use = self.noted("predicts") if name.endswith(("logit", "null")) else torch.ones_like(values).bool()
        values, (_, which) = values[use], self.noted("document")[use].unique(return_inverse=True)
        n = len(which.unique())
        off = torch.zeros(n, dtype=values.dtype).index_add_(0, which, values - values.mean()) / len(values)
        error = off.square().sum().sqrt() * (n / (n - 1)) ** 0.5 if n > 1 else torch.nan
        return float(values.mean()), float(error)


def adding(model: Model, layer: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """By sublayer, what the block makes of what it writes before it adds that to the residual stream.

    A norm (Gemma 2, OLMo 2), a multiplication (Granite), nothing elsewhere.
    """
    block: Any = model.blocks[layer]
    adds: dict[str, Callable[[Tensor], Tensor]] = {"ffn": contribution(model, layer)}
    if hasattr(block, "ln1_post"):
        return adds | {"attention": plain(model).get_submodule(block.name).get_submodule(block.ln1_post.name)}
    multiplier = getattr(plain(model).config, "residual_multiplier", 1.0)
    return adds | {"attention": lambda written: multiplier * written}


@contextmanager
def showing_blocks(model: Model, chosen: Sequence[Tap], on_block: OnBlock) -> Iterator[None]:
    """While the model runs, show each block as it is done: what was read, what was written, the stream behind."""
    with ExitStack() as stack:
        for tap in chosen:
            read, written = stack.enter_context(reading(tap)), dict[str, Tensor]()
            modules = {"attention": attention_output(model, tap.layer), "ffn": tap.down}
            for name, module in modules.items():

                def keep(module: nn.Module, args: tuple, output: Tensor, name=name, written=written) -> None:
                    written[name] = flat(output)

                stack.callback(module.register_forward_hook(keep).remove)

            def at_end(module: nn.Module, args: tuple, output: Any, tap=tap, read=read, written=written) -> None:
                on_block(tap, dict(read), dict(written), flat(output))
                read.clear()  # or the layer's activations would live until the next batch
                written.clear()

            stack.callback(tap.block.register_forward_hook(at_end).remove)
        yield


class Targets:
    """Directions that raise the next token's logit, or that of the next token elsewhere, above the mean logit."""

    def __init__(self, model: Model, tokens: Tokens, seed: int) -> None:
        words = unembedding(model)
        self.words, self.middle = words, words.float().mean(0)
        self.predicts = torch.zeros_like(tokens.special)
        self.predicts[:, :-1] = predictable(tokens)
        following = tokens.ids.roll(-1, dims=1)
        some = following[self.predicts]
        elsewhere = following.clone()
        elsewhere[self.predicts] = some[torch.randperm(len(some), generator=torch.Generator().manual_seed(seed))]
        self.ids = {"logit": following, "null": elsewhere}

    def along(self, x: Float[Tensor, "n d_model"], ids: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Each row on its own token's direction."""
        rows = self.words[ids.to(self.words.device)].float() - self.middle
        return (x.to(rows) * rows).sum(1).cpu()


def scale_of(
    norm: nn.Module, x: Float[Tensor, "n d_model"], normed: Float[Tensor, "n d_model"]
) -> Float[Tensor, " n"]:
    """What a norm divides each row by: normed = gain * (x, centred by a LayerNorm) / scale + bias.

    >>> x = torch.tensor([[3.0, -3.0], [10.0, 20.0]])
    >>> norm = nn.LayerNorm(2, eps=0)
    >>> scale_of(norm, x, norm(x).detach())
    tensor([3., 5.])
    """
    gain, bias, centres = measure(norm, x[:1])
    x = x.double() - (x.double().mean(1, keepdim=True) if centres else 0)
    whole = x * gain.double()
    return (whole.square().sum(1) / ((normed.double() - bias.double()) * whole).sum(1)).float()


def look(
    model: Model,
    tokens: Tokens,
    chosen: Sequence[Tap],
    *,
    seed: int,
    batch: int,
    sink_factor: float,
    nonfinite: str,
) -> dict[int, Additions]:
    """Run the model once and note, at ordinary tokens, what both sublayers of each layer add.

    `NAME_norm` relative to the stream before the block; `ffn_share` |y| / (|a| + |y|); `NAME_logit` and
    `NAME_null` what it adds to the logit of the next token, or of that elsewhere, minus the mean logit. Memory
    grows with the tokens by a few numbers each.

    Raises:
        ModelRefused: a block is not the sum of what enters it and of what both add, an activation is NaN or
            Inf, or the vocabulary cannot be read.
    """
    targets, found = Targets(model, tokens, seed), {tap.layer: Additions(model, tap.layer) for tap in chosen}
    sinks = find_sinks(model, tokens, chosen, sink_factor, nonfinite)
    network: Any = plain(model).base_model
    final = plain(model).get_submodule(model.ln_final.name)
    for rows in torch.arange(len(tokens.ids)).split(batch):
        waiting: dict[int, tuple[Tensor, dict[str, Tensor]]] = {}

        def note(tap: Tap, read: dict, written: Parts, after: Tensor, rows=rows, waiting=waiting) -> None:
            home = written["ffn"].device
            read = {site: x.to(home) for site, x in read.items()}
            bad = not_finite(tap, read | written, {*read, *written}, rows, tokens, nonfinite)
            use = ~(bad | sinks.find(tap, read)).cpu() & ~tokens.special[rows].flatten()
            at, additions = use.nonzero().squeeze(1), found[tap.layer]
            before = read["residual"][at.to(home)]
            added = additions.see(before, {name: x.to(home)[at.to(home)] for name, x in written.items()})
            _refuse_remainder(model, tap, before, added, after.to(home)[at.to(home)])
            additions.note("document", tokens.document[rows].flatten()[at])
            additions.note("predicts", targets.predicts[rows].flatten()[at])
            waiting[tap.layer] = (
                at,
                {
                    f"{name}_{which}": targets.along(part, ids[rows].flatten()[at])
                    for name, part in added.items()
                    for which, ids in targets.ids.items()
                },
            )

        with showing_blocks(model, chosen, note), recording({"norm": final}) as calls, torch.no_grad():
            network(input_ids=tokens.ids[rows].to(input_device(network)), use_cache=False)
        scale = scale_of(final, *calls["norm"][0]).cpu()
        for layer, (at, raised) in waiting.items():
            for name, values in raised.items():
                found[layer].note(name, values / scale[at])
    return found


def _refuse_remainder(
    model: Model, tap: Tap, before: Float[Tensor, "n d"], added: Mapping[str, Tensor], after: Float[Tensor, "n d"]
) -> None:
    if not len(before):
        return
    off = relative_error(before.float() + added["attention"] + added["ffn"], after.float())
    if not off < max(EXACT, 8 * torch.finfo(before.dtype).eps):
        raise ModelRefused(
            f"{describe(model)['name']}: layer {tap.layer} is not the sum of what enters it and what attention "
            f"and FFN add (off by {off:.1e}): choose a model that adds both to a residual stream"
        )

"""What does one neuron do: where does it fire, what does it promote, and how far is that from chance?"""

from collections.abc import Mapping
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .show import show

Context = tuple[str, str, str, float]  # before, trigger token, after, activation


@dataclass(frozen=True)
class NeuronCard:
    """One neuron's triggers, its value in the vocabulary, and its numbers.

    A number called "NAME null" is the null of the number "NAME" and is shown beside it.
    """

    layer: int
    neuron: int
    contexts: tuple[Context, ...]
    promotes: tuple[str, ...]
    suppresses: tuple[str, ...]
    numbers: Mapping[str, float | int | None]

    @property
    def name(self) -> str:
        """`layer.neuron`, as the command line and the page's links write it."""
        return f"{self.layer}.{self.neuron}"

    def beside_null(self) -> list[tuple[str, str, str]]:
        """Each number as (name, value, null); the null is empty where the number has none."""
        nulls = {f"{name} null" for name in self.numbers} & self.numbers.keys()
        return [
            (show(name), show(value), show(self.numbers[null]) if (null := f"{name} null") in nulls else "")
            for name, value in self.numbers.items()
            if name not in nulls
        ]


def card_text(card: NeuronCard) -> RenderableType:
    """The card for a terminal. All of it is `Text`: a token such as `[red]` or an escape code stays one."""
    contexts = Table.grid(padding=(0, 2))
    contexts.add_column(justify="right", style="dim", no_wrap=True)
    contexts.add_column(overflow="fold")
    for before, token, after, activation in card.contexts:
        trigger = (f"«{show(token)}»", "bold reverse")  # guillemets: a pipe keeps no style
        contexts.add_row(show(activation), Text.assemble(show(before), trigger, show(after)))

    tokens = Table.grid(padding=(0, 2))
    tokens.add_column(style="dim", no_wrap=True)
    tokens.add_column(overflow="fold")
    for direction, words in (("promotes", card.promotes), ("suppresses", card.suppresses)):
        tokens.add_row(direction, Text("  ".join(show(word).replace(" ", "·") for word in words)))

    numbers = Table(box=None, pad_edge=False, header_style="dim")
    numbers.add_column("number")
    numbers.add_column("value", justify="right")
    numbers.add_column("null", justify="right")
    for line in card.beside_null():
        numbers.add_row(*map(Text, line))

    title = Text(f"neuron {card.name}", style="bold")
    fires = contexts if card.contexts else Text("no context: it never fired on an ordinary token", style="dim")
    return Group(title, Text(), fires, Text(), tokens, Text(), numbers)

"""What is kept of a stream: named tensors that add up."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

# rows at a time of what goes over a batch more than once. They are added to each other first and summed up at the
# end: a sum over the rows of each would have the cores fetch them from each other's caches
IN_CACHE = 128
_AT_ONCE = 2**18  # entries


class Statistic(ABC):
    """A mergeable summary of a stream of rows, one row a token, of fixed size however long the stream.

    However a stream is split and in whatever order the parts are merged, `compute` says the same. A
    subclass says what a batch adds (`_summary`) and what the state means (`compute`); it overrides `_add`
    where the state does not simply add up.
    """

    fixed: ClassVar[tuple[str, ...]] = ()  # tensors that are set at the start and equal in every partner

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self._state = {name: tensor.clone() for name, tensor in state.items()}

    def update(self, x: Float[Tensor, "n width"], at: Int[Tensor, " n"]) -> None:
        """Take in a batch: one row a token, and each token's flat index in the corpus."""
        if len(x):
            self._add(self._summary(x, at))

    def merge(self, other: Statistic) -> None:
        """Take in all that `other` has seen; `other` stays as it is and shares no memory with this one.

        Raises:
            ValueError: it is another kind of statistic, or was set up differently.
        """
        if type(other) is not type(self):
            raise ValueError(
                f"cannot merge {type(other).__name__} into {type(self).__name__}: merge like with like"
            )
        for name, mine in self._state.items():
            theirs = other._state[name]
            if mine.shape != theirs.shape or (name in self.fixed and not torch.equal(mine, theirs)):
                raise ValueError(
                    f"cannot merge: {name!r} differs between the two; set both up from one pilot sample"
                )
        self._add(other._state)

    def state(self) -> dict[str, Tensor]:
        """A copy of all there is, as named tensors; `type(self)(state)` makes the statistic again."""
        return {name: tensor.clone() for name, tensor in self._state.items()}

    def tensors(self) -> Mapping[str, Tensor]:
        """The state itself, for who writes it to disk: not a copy, not to be changed."""
        return MappingProxyType(self._state)

    def to(self, device: torch.device) -> Statistic:
        """The same on a device, but single numbers stay in main memory; itself if it is there."""

        def there(tensor: Tensor) -> bool:
            return tensor.device == device or (tensor.device.type == "cpu" and not tensor.ndim)

        if all(there(tensor) for tensor in self._state.values()):
            return self
        return type(self)({name: t if there(t) else t.to(device) for name, t in self._state.items()})

    @property
    def n(self) -> int:
        """Tokens seen."""
        return int(self._state["n"])

    @abstractmethod
    def _summary(self, x: Float[Tensor, "n width"], at: Int[Tensor, " n"]) -> dict[str, Tensor]:
        """The state that this batch alone would give (without the fixed tensors)."""

    def _add(self, part: Mapping[str, Tensor]) -> None:
        for name, tensor in part.items():
            if name not in self.fixed:
                add(self._state[name], tensor)

    @abstractmethod
    def compute(self) -> Any:
        """What the state means; pure, and raises ValueError where too few tokens were seen."""

    def _need(self, least: int, what: str) -> None:
        if self.n < least:
            raise ValueError(f"{what} needs at least {least} tokens, got {self.n}: give it more text")


def add(to: Tensor, part: Tensor) -> None:
    """Add in place. By parts: torch first converts all that it adds to the other precision, in fresh memory."""
    for mine, theirs in zip(to.view(-1).split(_AT_ONCE), part.reshape(-1).split(_AT_ONCE), strict=True):
        mine += theirs


def no_tokens() -> Tensor:
    """The count at the start."""
    return torch.zeros((), dtype=torch.int64)

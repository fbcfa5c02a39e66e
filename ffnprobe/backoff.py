"""What if memory runs out? The same work again, with half the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from .errors import MachineError

T = TypeVar("T")


def backing_off(batch: int, work: Callable[[int], T], say: Callable[[str], object]) -> tuple[T, int]:
    """`work(batch)`, with half the batch as often as memory runs out; and the batch that fitted.

    Raises:
        MachineError: a single sequence does not fit.
    """
    while True:
        try:
            return work(batch), batch
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            if batch == 1:
                raise MachineError(
                    "out of memory with a single sequence a batch: measure fewer layers with --layers"
                ) from error
        # outside the handler: the traceback would hold the tensors that did not fit
        batch = (batch + 1) // 2
        say(f"out of memory: going on with {batch} sequences a batch; sums differ in their last bits")


def _out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return "can't allocate memory" in str(error)  # the CPU allocator has no class of its own

"""Other devices, played by the processor: what mixes two of them fails, as it does on GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

FIRST, SECOND = torch.device("privateuseone:0"), torch.device("privateuseone:1")
_aten = torch.ops.aten
_INDEXING = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default}  # by what lies anywhere
_IN_PLACE = (torch.matmul, Tensor.matmul, Tensor.__matmul__)  # of a vector: they change a shape in place


class Elsewhere(Tensor):
    """A tensor that says it lies elsewhere."""

    def __new__(cls, inner: Tensor, device: torch.device) -> Elsewhere:
        with torch.inference_mode(False):
            return Tensor._make_wrapper_subclass(
                cls,
                inner.shape,
                strides=inner.stride(),
                storage_offset=inner.storage_offset(),
                dtype=inner.dtype,
                device=device,
            )

    def __init__(self, inner: Tensor, device: torch.device) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.inner.tolist()


@contextmanager
def elsewhere() -> Iterator[torch.device]:
    """Within it, tensors may be made on the other devices; it gives the first."""
    _begin()
    with _Device(), _Vectors():
        yield FIRST


@cache
def _begin() -> torch.library.Library:
    """Tell torch of the devices, once in a process; what is returned must be kept."""
    _setup_privateuseone_for_python_backend("elsewhere")
    kernels = torch.library.Library("aten", "IMPL", "PrivateUse1")  # for torch.tensor, which no mode sees
    kernels.impl("empty_strided", _empty_strided)
    kernels.impl("empty.memory_format", _empty)
    kernels.impl("_copy_from", _copy)
    return kernels


class _Device(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Vectors(TorchFunctionMode):
    """Torch's products of vectors drop a dimension in place, which a tensor of another's memory cannot follow."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _IN_PLACE and args[0].ndim == 1 < args[1].ndim:
            return (args[0][None] @ args[1])[..., 0, :]
        if func in _IN_PLACE and args[1].ndim == 1 < args[0].ndim:
            return (args[0] @ args[1][:, None])[..., 0]
        if func is torch.nn.functional.linear and args[0].ndim == 1:
            return func(args[0][None], *args[1:], **kwargs)[0]
        if func in (torch.quantile, Tensor.quantile) and isinstance(args[0], Elsewhere):
            return Elsewhere(func(args[0].inner, *args[1:], **kwargs), args[0].device)
        return func(*args, **kwargs)


def _run(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    there = [x for x in tensors if isinstance(x, Elsewhere)]
    places = {x.device for x in there}
    scalar = torch.Tag.pointwise in func.tags  # takes a single number from main memory
    here = [x for x in tensors if not isinstance(x, Elsewhere) and (x.ndim or not scalar)]
    if func in _INDEXING and isinstance(args[0], Elsewhere):
        here = []
    target = kwargs.get("device") or next((x for x in args if isinstance(x, torch.device)), None)
    if len(places) + bool(there and here) > 1 and func is not _aten.copy_.default and target is None:
        at = [(tuple(x.shape), str(x.device)) for x in tensors]
        raise RuntimeError(f"{func} got tensors on two devices: {at}")
    args, kwargs = tree_map(_inside, (args, kwargs))
    kwargs.pop("pin_memory", None)
    found = func(*args, **kwargs)
    if func is _aten.copy_.default:
        return tensors[0]
    if target is not None:
        places = {_numbered(target)} if torch.device(target).type == FIRST.type else set()
        if any(found is x.inner for x in there if x.device not in places):
            found = found.clone()  # where it came from is other memory
    if not places:
        return found
    assert all(x.shape == x.inner.shape for x in there), f"{func} changes a shape in place, which is not played"
    (device,), changed = places, {id(x.inner): x for x in there if x.device in places}

    def outside(inner: Tensor) -> Elsewhere:
        if isinstance(inner, Elsewhere):  # one of the kernels below made it
            return inner
        return changed[id(inner)] if id(inner) in changed else Elsewhere(inner, device)

    return tree_map(lambda x: outside(x) if isinstance(x, Tensor) else x, found)


def _inside(x: Any) -> Any:
    if isinstance(x, torch.device):
        return torch.device("cpu")
    return x.inner if isinstance(x, Elsewhere) else x


def _numbered(device: str | torch.device) -> torch.device:
    return torch.device(FIRST.type, torch.device(device).index or 0)


def _copy(source: Tensor, to: Elsewhere, non_blocking: bool = False) -> Elsewhere:
    to.inner.copy_(source.inner if isinstance(source, Elsewhere) else source)
    return to


def _empty_strided(size, stride, dtype=None, device=FIRST, **_) -> Elsewhere:
    return Elsewhere(torch.empty_strided(size, stride, dtype=dtype), _numbered(device))


def _empty(size, dtype=None, device=FIRST, **_) -> Elsewhere:
    return Elsewhere(torch.empty(size, dtype=dtype), _numbered(device))

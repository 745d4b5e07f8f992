"""The bytes of all tensors that are alive, and their peak, counted operator by operator.

What torch's MemTracker counts in all, without its books per module and kind, which cost several times the operators
themselves. Tensors without memory (FakeTensorMode) are counted as what they stand for.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts, while it is entered, the storages on one kind of device, each from the operator that makes it to its end.

    existing: what is there already. `peak` is the largest sum behind any operator.
    """

    def __init__(self, device_type: str, existing: Iterable[Tensor]) -> None:
        super().__init__()
        self.device_type = device_type
        self.current = self.peak = 0
        self._sizes: dict[int, int] = {}  # bytes of each storage, by its address
        self._ends: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        for tensor in existing:
            self._count(tensor)
        self.peak = self.current

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing is compiled in here, and torch's guard against it takes longer than the count.
        return False

    def __enter__(self) -> LiveBytes:
        # FSDP frees and restores its parameters' memory in place, by a method that is no operator.
        self._resize = resize = torch.UntypedStorage.resize_

        def counted_resize(storage: torch.UntypedStorage, size: int) -> Any:
            resized = resize(storage, size)
            if storage._cdata in self._sizes:
                self._add(storage)
            return resized

        torch.UntypedStorage.resize_ = counted_resize  # type: ignore[method-assign, assignment]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # it becomes operators on this process's part, which come here again
        result = func(*args, **(kwargs or {}))
        for tensor in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        self.peak = max(self.peak, self.current)
        return result

    def _count(self, tensor: Tensor) -> None:
        for plain in _parts(tensor):
            if plain.device.type == self.device_type:
                self._add(plain.untyped_storage())

    def _add(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        before = self._sizes.get(address)
        if before is None:
            self._ends[address] = weakref.ref(storage, lambda _: self._end(address))
        if before != size:
            self._sizes[address] = size
            self.current += size - (before or 0)

    def _end(self, address: int) -> None:
        del self._ends[address]
        self.current -= self._sizes.pop(address)


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the tensors that a tensor of a subclass wraps, itself where it wraps none."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        if isinstance(part := getattr(tensor, name), Tensor):
            yield from _parts(part)

"""A guard that no tensor is read back to the host, which would wait for all that runs on the device."""

from __future__ import annotations

from typing import Any

from tests.support.operators import EveryOperator


class NoHostReads(EveryOperator):
    """Raises when a tensor's value is read back to the host."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "equal")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.FORBIDDEN:
            raise AssertionError(f"{name} reads a tensor back to the host")
        return func(*args, **(kwargs or {}))

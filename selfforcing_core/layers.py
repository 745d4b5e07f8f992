"""torch's layers without the bookkeeping of torch's own call: what `CausalWan` is made of unless given other ones.

A call of a torch module looks for many kinds of hooks and finds its parameters by a failed attribute access: more work
than a small layer's arithmetic. Here the layer itself is looked at: one that is hooked, compiled, of a subclass or with
another `forward` goes through torch's own call, and so does every layer while hooks on all modules are there, by which
profilers and FLOP counters follow a network.
"""

from __future__ import annotations

from typing import Any

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Conv3d
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

__all__ = ["Conv3d", "LayerNorm", "Linear", "RMSNorm"]


# torch fills these dictionaries and never puts others in their place
_GLOBAL_HOOKS = (
    _global_forward_hooks,
    _global_forward_pre_hooks,
    _global_backward_hooks,
    _global_backward_pre_hooks,
)


def _is_changed(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether a call of the layer is more than its arithmetic."""
    return bool(
        type(layer) is not kind
        or layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or layer._compiled_call_impl is not None
        or "forward" in layer.__dict__  # as offloading libraries set it
        or any(_GLOBAL_HOOKS)
    )


class Linear(nn.Linear):
    """torch's Linear, called at once where nothing is changed about it."""

    def __call__(self, input: Tensor) -> Tensor:
        if _is_changed(self, Linear):
            return super().__call__(input)
        # `self.weight` fails as an attribute first, and is looked up by torch's __getattr__ only then
        parameters: dict[str, Any] = self._parameters
        return F.linear(input, parameters["weight"], parameters["bias"])


class LayerNorm(nn.LayerNorm):
    """torch's LayerNorm, called at once where nothing is changed about it."""

    def __call__(self, input: Tensor) -> Tensor:
        if _is_changed(self, LayerNorm):
            return super().__call__(input)
        parameters = self._parameters
        return F.layer_norm(input, self.normalized_shape, parameters["weight"], parameters["bias"], self.eps)


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm, called at once where nothing is changed about it."""

    def __call__(self, input: Tensor) -> Tensor:
        if _is_changed(self, RMSNorm):
            return super().__call__(input)
        return F.rms_norm(input, self.normalized_shape, self._parameters["weight"], self.eps)

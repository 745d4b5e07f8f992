"""torch's layers without the bookkeeping of torch's own call: what `CausalWan` is made of unless a host brings its own.

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


def _is_changed(layer: nn.Module, kind: type[nn.Module]) -> bool:
    return bool(
        type(layer) is not kind or layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks
        or layer._backward_pre_hooks or layer._compiled_call_impl is not None or "forward" in layer.__dict__
        or _global_forward_hooks or _global_forward_pre_hooks or _global_backward_hooks or _global_backward_pre_hooks
    )  # fmt: skip


class Linear(nn.Linear):
    def __call__(self, input: Tensor) -> Tensor:
        if _is_changed(self, Linear):
            return super().__call__(input)
        parameters: dict[str, Any] = self._parameters
        return F.linear(input, parameters["weight"], parameters["bias"])


class LayerNorm(nn.LayerNorm):
    def __call__(self, input: Tensor) -> Tensor:
        if _is_changed(self, LayerNorm):
            return super().__call__(input)
        parameters = self._parameters
        return F.layer_norm(input, self.normalized_shape, parameters["weight"], parameters["bias"], self.eps)


class RMSNorm(nn.RMSNorm):
    def __call__(self, input: Tensor) -> Tensor:
        if _is_changed(self, RMSNorm):
            return super().__call__(input)
        return F.rms_norm(input, self.normalized_shape, self._parameters["weight"], self.eps)

"""Weights of the large matrices in 8 bits: half the memory of bfloat16, cast back for every product.

Only storage shrinks; products are computed in the type of the activations, so this runs on any device.
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max  # 448; what is larger would become NaN


class Float8Linear(nn.Module):
    """A linear layer whose weight is float8_e4m3fn times one scale per output row.

    One scale for all rows would be set by the largest weight of any, and small rows would vanish beside it.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        # A row of zeros has no scale of its own; the smallest normal number keeps the division finite.
        scale = (weight.abs().amax(1, keepdim=True) / LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
        self.register_buffer("weight", (weight / scale).to(FLOAT8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        # widened for each product: a product in 8 bits would need GPUs that have one, and rounded activations
        weight = self.weight.to(x.dtype) * self.scale.to(x.dtype)
        return F.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))


def store_in_float8(model: nn.Module) -> nn.Module:
    """Replace every linear layer of the model's blocks in place, one after another, and return the model.

    model: a CausalWan with floating-point weights. Input layers, norms, modulation and head keep their type: they are
    few, and what they lose is in every token.
    """
    for block in model.get_submodule("blocks").children():
        for name, layer in list(block.named_modules()):
            if isinstance(layer, nn.Linear):  # each original is freed here, so that no moment has two of all
                parent, _, child = name.rpartition(".")
                setattr(block.get_submodule(parent), child, Float8Linear(layer))
    return model

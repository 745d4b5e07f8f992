"""Keys and values in 8 bits, with one scale for each token and head.

Letters: B batch, L query tokens (those that are new), S cached tokens, N heads, K head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # largest number of each type that is stored with scales
SCALE_DTYPE = torch.bfloat16  # numbers are divided by the scale as stored, so its own rounding is no error


def quantise(x_BLNK: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round to a type of LARGEST; return the numbers and their scales, [B, L, N, 1]: one for each token and head."""
    wide = x_BLNK.float()
    # One scale for all heads would be set by the head with the largest keys, and the others would lose their digits.
    # The smallest normal number, for a token of zeros, keeps the division finite.
    scale = (wide.abs().amax(-1, keepdim=True) / LARGEST[dtype]).clamp_min(torch.finfo(SCALE_DTYPE).tiny)
    scale = scale.to(SCALE_DTYPE)
    # the rounded scale may be the smaller one, and then the largest number comes out above what the type holds
    scaled = (wide / scale).clamp_(-LARGEST[dtype], LARGEST[dtype])
    return (scaled if dtype.is_floating_point else scaled.round_()).to(dtype), scale


def dequantise(stored_BSNK: Tensor, scale_BSN1: Tensor | None, like: Tensor) -> Tensor:
    """Return stored numbers times their scale, if there is one, in the type and on the device of `like`."""
    if scale_BSN1 is None:
        return stored_BSNK.to(like)
    # moved before it is widened: over a bus, one byte a number is a quarter of float32
    return stored_BSNK.to(like.device).to(like.dtype).mul_(scale_BSN1.to(like))

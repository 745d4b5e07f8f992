"""Three-axis rotary position embedding of Wan 2.1: time, height and width each turn their share of the channel pairs.

Pairs are adjacent channels (2j, 2j+1). Letters: L tokens in (frame, row, column) order, N heads, K head width.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

BASE = 10000.0
Axes = tuple[tuple[float, float], tuple[float, float], tuple[float, float]]
PLAIN: Axes = ((1.0, 0.0), (1.0, 0.0), (1.0, 0.0))  # scale and shift of the positions of time, height and width


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
    """Channel pairs that turn with time, height and width: 128 -> (22, 21, 21)."""
    pairs = head_dim // 2
    return pairs - 2 * (pairs // 3), pairs // 3, pairs // 3


@functools.lru_cache(maxsize=64)
def _turns(position_start: int, num_positions: int, pairs: int, axis: tuple[float, float] = (1.0, 0.0)) -> Tensor:
    """exp(i angle) [num_positions, pairs], complex128."""
    scale, shift = axis
    positions = torch.arange(position_start, position_start + num_positions, dtype=torch.float64) * scale + shift
    frequencies = BASE ** (-torch.arange(pairs, dtype=torch.float64) / max(pairs, 1))
    angles = torch.outer(positions, frequencies)
    return torch.polar(torch.ones_like(angles), angles)


def rotary_table(
    head_dim: int, start_frame: int, num_frames: int, height: int, width: int, device: torch.device | None = None,
    *, axes: Axes = PLAIN,
) -> Tensor:  # fmt: skip
    """exp(i angle) [L, 1, K/2], complex64, for frames [start_frame, start_frame + num_frames) of height x width tokens.

    axes: scale and shift of the positions of time, height and width, where a host wants other ones than 0, 1, 2, ...
    Computed on the CPU in double precision; frame numbers have no upper limit. The last few tables are kept, so that
    the passes of a chunk share one and only the first of them waits for a copy to the device.
    """
    return _table(head_dim, start_frame, (num_frames, height, width), device or torch.device("cpu"), axes)


@functools.lru_cache(maxsize=4)
def _table(head_dim: int, start_frame: int, grid: tuple[int, int, int], device: torch.device, axes: Axes) -> Tensor:
    time, rows, columns = axis_pairs(head_dim)
    num_frames, height, width = grid
    with torch.inference_mode(False):  # a later pass may need gradients
        table = torch.cat(
            [
                _turns(start_frame, num_frames, time, axes[0])[:, None, None].expand(*grid, time),
                _turns(0, height, rows, axes[1])[None, :, None].expand(*grid, rows),
                _turns(0, width, columns, axes[2])[None, None].expand(*grid, columns),
            ],
            dim=-1,
        )
        return table.flatten(0, 2).unsqueeze(1).to(torch.complex64).to(device)


def apply_rotary(x_BLNK: Tensor, table_L1K: Tensor) -> Tensor:
    """Turn each channel pair of x by its position's angle; computed in float32 at least, returned in x's dtype."""
    wide = x_BLNK.to(torch.promote_types(x_BLNK.dtype, torch.float32))
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        turned = torch.view_as_real(torch.view_as_complex(wide.unflatten(-1, (-1, 2))) * table_L1K).flatten(-2)
    else:  # the same in half the calls, but gradient does not pass through it
        turned = (wide.view(torch.promote_types(wide.dtype, torch.complex64)) * table_L1K).view(wide.dtype)
    return turned.to(x_BLNK.dtype)

"""Three-axis rotary position embedding of Wan 2.1: time, height and width each turn their share of the channel pairs.

A pair of channels is a complex number, and a position turns it by an angle (RoFormer, arXiv 2104.09864); a product of
query and key then depends on the difference of their positions alone. Pairs are adjacent channels (2j, 2j+1), where
much other code pairs the halves of a head.

Letters: B batch, L query tokens (in the order frame row column), N heads, K head width.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

BASE = 10000.0  # RoFormer, section 3.2.2; each axis has frequencies of its own, from 1 down to about 1 / BASE
Axes = tuple[tuple[float, float], tuple[float, float], tuple[float, float]]
# Scale and shift of the positions of time, height and width: 0, 1, 2, ... as they are.
PLAIN: Axes = ((1.0, 0.0), (1.0, 0.0), (1.0, 0.0))


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
    """Return how many channel pairs turn with time, height and width: 128 -> (22, 21, 21)."""
    pairs = head_dim // 2
    # thirds, rounded down; what is left over goes to time (Wan 2.1, wan/modules/model.py)
    return pairs - 2 * (pairs // 3), pairs // 3, pairs // 3


@functools.lru_cache(maxsize=64)
def _turns(position_start: int, num_positions: int, pairs: int, axis: tuple[float, float] = (1.0, 0.0)) -> Tensor:
    """Return exp(i angle), complex128, for each of the positions and each of the pairs."""
    scale, shift = axis
    # in float32 an angle of some thousand radians, as those of a long video are, has only three digits behind the point
    positions = torch.arange(position_start, position_start + num_positions, dtype=torch.float64) * scale + shift
    frequencies = BASE ** (-torch.arange(pairs, dtype=torch.float64) / max(pairs, 1))
    angles = torch.outer(positions, frequencies)
    return torch.polar(torch.ones_like(angles), angles)


def rotary_table(
    head_dim: int,
    start_frame: int,
    num_frames: int,
    height: int,
    width: int,
    device: torch.device | None = None,
    *,
    axes: Axes = PLAIN,
) -> Tensor:
    """Return exp(i angle) of every token and channel pair of some frames, [L, 1, K/2], complex64.

    The frames are [start_frame, start_frame + num_frames), of height x width tokens each.
    axes: scale and shift of the positions of time, height and width, where ComfyUI wants other ones than 0, 1, 2, ...
    Computed on the CPU in double precision; frame numbers have no upper limit. The last few tables are kept, so that
    the passes of a chunk share one and only the first of them waits for a copy to the device.
    """
    return _table(head_dim, start_frame, (num_frames, height, width), device or torch.device("cpu"), axes)


@functools.lru_cache(maxsize=4)
def _table(head_dim: int, start_frame: int, grid: tuple[int, int, int], device: torch.device, axes: Axes) -> Tensor:
    time, rows, columns = axis_pairs(head_dim)
    num_frames, height, width = grid
    # the table outlives this pass, and a tensor of inference mode could not be used in a pass with gradient
    with torch.inference_mode(False):
        table = torch.cat(
            [
                _turns(start_frame, num_frames, time, axes[0])[:, None, None].expand(*grid, time),
                _turns(0, height, rows, axes[1])[None, :, None].expand(*grid, rows),
                _turns(0, width, columns, axes[2])[None, None].expand(*grid, columns),
            ],
            dim=-1,
        )
        return table.flatten(0, 2).unsqueeze(1).to(torch.complex64).to(device)


@functools.lru_cache(maxsize=64)
def time_turn(head_dim: int, num_frames: float, device: torch.device, axes: Axes = PLAIN) -> Tensor:
    """Return what moves a key by `num_frames` in time alone, [1, 1, K/2], complex64, to be applied as a table is.

    A key that was turned by its position and is turned once more stands at the sum of both.
    """
    time, rows, columns = axis_pairs(head_dim)
    with torch.inference_mode(False):  # as for a table
        angles = num_frames * axes[0][0] * BASE ** (-torch.arange(time, dtype=torch.float64) / max(time, 1))
        turn = torch.polar(torch.ones_like(angles), angles)
        turn = torch.cat([turn, torch.ones(rows + columns, dtype=turn.dtype)])
        return turn[None, None].to(torch.complex64).to(device)


def apply_rotary(x_BLNK: Tensor, table_L1K: Tensor) -> Tensor:
    """Turn each channel pair of x by its position's angle; computed in float32 at least, returned in x's dtype."""
    wide = x_BLNK.to(torch.promote_types(x_BLNK.dtype, torch.float32))
    # autograd does not follow a view as another type, and the compiler makes one kernel of either
    if torch.compiler.is_compiling() or wide.requires_grad:
        turned = torch.view_as_real(torch.view_as_complex(wide.unflatten(-1, (-1, 2))) * table_L1K).flatten(-2)
    else:  # the same numbers in half the calls
        turned = (wide.view(torch.promote_types(wide.dtype, torch.complex64)) * table_L1K).view(wide.dtype)
    return turned.to(x_BLNK.dtype)

"""The one door to attention, and the masks of the uncached path.

Letters: B batch, L query tokens, S key tokens, N heads, K head width, F frames.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

KERNELS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
ATTENTIONS = ("auto", *KERNELS)


def attend(q_BLNK: Tensor, k_BSNK: Tensor, v_BSNK: Tensor, mask_LS: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(K)) v, [B, L, N, K]. `mask_LS` is True where a query may look."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLNK, k_BSNK, v_BSNK))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_LS).transpose(1, 2)


@contextmanager
def attention_kernel(name: str) -> Iterator[None]:
    """Choose torch's kernel behind `attend` while the block runs; "auto" leaves the choice to torch.

    Raises ValueError for an unknown name, or from the first call that the chosen kernel cannot serve.
    """
    if name not in ATTENTIONS:
        raise ValueError(f"attention {name!r} is unknown; use {', '.join(ATTENTIONS)}")
    if name == "auto":
        yield
        return
    try:
        with sdpa_kernel(KERNELS[name]):
            yield
    except RuntimeError as error:
        if "No available kernel" not in str(error) and "No viable backend" not in str(error):
            raise
        raise ValueError(f"attention {name!r} does not run on this device in this type; use auto") from error


def block_causal_frames(lengths: tuple[int, ...], *, window: int = -1, sink: int = 0) -> Tensor:
    """Which frame sees which, bool [F, F]: bidirectional inside a chunk, all earlier chunks visible.

    lengths: frames per chunk. With a window, the last `window` frames counted from the chunk's end stay visible,
    of which the first `sink` frames of the video take their share.
    """
    num_frames = sum(lengths)
    ends = torch.repeat_interleave(torch.tensor(lengths).cumsum(0), torch.tensor(lengths))[:, None]
    keys = torch.arange(num_frames)[None]
    visible = keys < ends
    if window != -1:
        recent = (ends <= window) | (keys >= ends - (window - sink))
        visible &= recent | (keys < sink)
    return visible


def teacher_forcing_frames(lengths: tuple[int, ...], *, window: int = -1) -> Tensor:
    """bool [2F, 2F] over [clean frames, noisy frames]: noisy chunks see earlier clean chunks and themselves."""
    clean = block_causal_frames(lengths, window=window)
    own = torch.block_diag(*(torch.ones(n, n) for n in lengths)).bool()
    return torch.cat([torch.cat([clean, torch.zeros_like(clean)], 1), torch.cat([clean & ~own, own], 1)])


def expand_frames(mask_FF: Tensor, tokens_per_frame: int) -> Tensor:
    """Frame mask to token mask [F*P, F*P]."""
    return mask_FF.repeat_interleave(tokens_per_frame, 0).repeat_interleave(tokens_per_frame, 1)
